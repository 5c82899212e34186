"""What the shapes of weights tell of the hyper-parameters that their network was made with."""

import re
from collections.abc import Iterable, Mapping


class Shapes:
    """The shapes of weights by name. What is asked for and is not there is None or zero."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def size(self, name: str, axis: int) -> int | None:
        """The size of a tensor along an axis."""
        shape = self._shapes.get(name, ())
        return shape[axis] if axis < len(shape) else None

    def sizes(self, names: Iterable[str], axis: int) -> tuple[int, ...] | None:
        """The sizes of several along an axis; None if one is missing."""
        found = [self.size(name, axis) for name in names]
        return None if None in found else tuple(size for size in found if size is not None)

    def count(self, pattern: str) -> int:
        """How many parts there are, of which the pattern's group is the number."""
        numbers = {match[1] for name in self._shapes if (match := re.fullmatch(pattern, name))}
        return len(numbers)

    def has(self, pattern: str) -> bool:
        """Whether there is a name of this pattern."""
        return any(re.fullmatch(pattern, name) for name in self._shapes)


def quotient(size: int | None, divisor: int | None) -> int | None:
    """The whole quotient; None where there is none."""
    return size // divisor if size is not None and divisor and not size % divisor else None
