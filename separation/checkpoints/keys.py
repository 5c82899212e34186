"""Reads the keys of a checkpoint's YAML, and checks their types and sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from separation.documents import escaped, quoted
from separation.errors import CheckpointError

# The largest integer that is accepted for a key: well above what published checkpoints have.
LARGEST = {"sample_rate": 384_000, "samplerate": 384_000, "chunk_size": 2**24, "segment": 600, "bytes": 2**36}
LARGEST_OTHER = 2**20

_KINDS = {dict: "a section", list: "a list", str: "a string", int: "a positive integer"}

T = TypeVar("T", dict[str, Any], list[Any], str, int)


def take(parent: Mapping[str, Any], key: str, kind: type[T], path: Path, *, default: T | None = None) -> T:
    """The value of a key, checked: it has this type, integers are positive and not too large, sections have names."""
    value, label = parent.get(key, default), escaped(key)
    is_kind = isinstance(value, kind) and not isinstance(value, bool)  # True is an int too
    if not is_kind or (isinstance(value, int) and value <= 0):
        if key not in parent:
            raise CheckpointError(f"{path}: {label} is missing: add it as {_KINDS[kind]}")
        raise CheckpointError(f"{path}: {label} must be {_KINDS[kind]}, not {quoted(value)}")
    if isinstance(value, int) and value > (largest := LARGEST.get(key, LARGEST_OTHER)):
        raise CheckpointError(f"{path}: {label} must be at most {largest:,}, not {quoted(value)}")
    if isinstance(value, dict) and (wrong := [name for name in value if not isinstance(name, str)]):
        raise CheckpointError(f"{path}: the keys of {label} must be strings, not {quoted(wrong[0])}")
    return kind(value)


def section(document: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The section, empty if it is missing or null."""
    return {} if document.get(key) is None else take(document, key, dict, path)


def refuse_unknown(keys: set[Any], path: Path) -> None:
    """Raise CheckpointError if there are any of these keys."""
    if keys:
        raise CheckpointError(f"{path}: unknown key {', '.join(sorted(map(quoted, keys)))}: correct or remove it")
