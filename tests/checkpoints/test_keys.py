"""The keys of a YAML have the right types and sizes."""

from pathlib import Path
from typing import Any

import pytest

from separation.checkpoints.keys import refuse_unknown, section, take
from separation.errors import CheckpointError

PATH = Path("x.yaml")


def test_a_key_is_taken_with_its_default() -> None:
    document = {"dim": 3, "name": "a", "empty": None}
    assert take(document, "dim", int, PATH) == 3
    assert take(document, "other", str, PATH, default="b") == "b"
    assert section(document, "empty", PATH) == section(document, "missing", PATH) == {}


@pytest.mark.parametrize(
    "value, kind, message",
    [
        (0, int, "key must be a positive integer, not 0"),
        (True, int, "key must be a positive integer, not True"),
        (2**21, int, "key must be at most 1,048,576, not 2097152"),
        ([1], dict, r"key must be a section, not \[1\]"),
        ({1: 2}, dict, "the keys of key must be strings, not 1"),
    ],
)
def test_a_wrong_value_is_named(value: Any, kind: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^x\.yaml: {message}$"):
        take({"key": value}, "key", kind, PATH)


def test_a_missing_key_and_unknown_keys_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"^x\.yaml: dim is missing: add it as a positive integer$"):
        take({}, "dim", int, PATH)
    refuse_unknown(set(), PATH)
    with pytest.raises(CheckpointError, match=r"^x\.yaml: unknown key 'a', 'b': correct or remove it$"):
        refuse_unknown({"b", "a"}, PATH)
