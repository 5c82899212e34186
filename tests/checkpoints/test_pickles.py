"""Pickles are read as Python reads them, without calling anything that they name."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from separation.checkpoints.pickles import Ignored, Name, Reader, check_plain


def read(content: bytes, find: Callable[[str], Name] = Name) -> Any:
    return Reader(content, find, lambda saved_id: saved_id).load()


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [False, 0, 255, 256, 65_536, -1, 2**31, -(2**31), 2**100, -(2**100)],
        [0.1, -1e300, float("inf")],
        ["", "é🎵", "x" * 1000],
        [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        {"a": {"b": [1, {"c": None}]}, 1: 2, 1.5: "x", None: []},
        [[]] * 3,  # one list, referred to by its number in the memo
        list(range(2000)),  # several batches
    ],
)
def test_plain_values_are_read_as_python_reads_them(value: Any) -> None:
    assert read(pickle.dumps(value, protocol=2)) == value


def test_a_list_that_contains_itself_is_read() -> None:
    circle: list[Any] = []
    circle.append(circle)
    found = read(pickle.dumps(circle, protocol=2))
    assert found[0] is found


def test_several_pickles_are_read_one_after_the_other() -> None:
    reader = Reader(pickle.dumps([1], protocol=2) + pickle.dumps("two", protocol=2), Name, lambda saved_id: saved_id)
    assert (reader.load(), reader.load()) == ([1], "two")
    with pytest.raises(EOFError):
        reader.load()


def test_a_class_is_its_name_and_cannot_be_called() -> None:
    assert read(b"\x80\x02cos\nsystem\n.").name == "os.system"
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL os\.system is called"):
        read(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")


def test_a_call_calls_the_stand_in() -> None:
    content = b"\x80\x02cmath\nprod\nK\x02K\x03\x86R."
    assert read(content, lambda name: Name(name, lambda *numbers: (name, numbers))) == ("math.prod", (2, 3))


def test_items_and_state_of_an_ignored_object_are_dropped() -> None:
    content = b"\x80\x02cx\nY\n)R(K\x01K\x02e}b."  # a list's items, then a state
    assert isinstance(read(content, lambda name: Name(name, Ignored)), Ignored)


def test_the_state_of_a_class_cannot_be_set() -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL os\.path is changed"):
        read(b"\x80\x02cos\npath\n}b.")


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_are_refused(protocol: int) -> None:
    with pytest.raises(pickle.UnpicklingError, match="not a pickle of protocol 2"):
        read(pickle.dumps([1], protocol=protocol))


def test_only_plain_keys_are_hashed() -> None:
    with pytest.raises(pickle.UnpicklingError, match="it has a tuple as a key"):
        read(pickle.dumps({(1, 2): 3}, protocol=2))


def test_values_are_counted_each_time_that_they_are_referred_to() -> None:
    check_plain([[1] * 10] * 9, most=99)
    with pytest.raises(pickle.UnpicklingError, match="it has more than 98 values"):
        check_plain([[1] * 10] * 9, most=98)
