"""Infers hyper-parameters from the shapes of a checkpoint's weights."""

import re
from collections.abc import Iterable, Mapping


class Shapes:
    """The shapes of weights by name. Lookups of missing names return None, counts return 0."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def size(self, name: str, axis: int) -> int | None:
        """The size of a tensor along an axis."""
        shape = self._shapes.get(name, ())
        return shape[axis] if axis < len(shape) else None

    def sizes(self, names: Iterable[str], axis: int) -> tuple[int, ...] | None:
        """The sizes of several tensors along an axis, or None if one is missing."""
        found = [self.size(name, axis) for name in names]
        return None if None in found else tuple(size for size in found if size is not None)

    def count(self, pattern: str) -> int:
        """How many different values the pattern's group has among the names it matches, such as numbers of layers."""
        numbers = {match[1] for name in self._shapes if (match := re.fullmatch(pattern, name))}
        return len(numbers)

    def has(self, pattern: str) -> bool:
        """Whether the pattern matches a name."""
        return any(re.fullmatch(pattern, name) for name in self._shapes)


def quotient(size: int | None, divisor: int | None) -> int | None:
    """`size / divisor` if that is a whole number, else None."""
    return size // divisor if size is not None and divisor and not size % divisor else None
