"""Pickles as files of weights have them, read without running anything and without taking more than the file holds.

PyTorch's own restricted reader runs no code either, but it takes whatever memory a pickle asks for, and it has had
holes (CVE-2025-32434). Here an opcode makes a plain value or does nothing: a class or function that a pickle refers to
is its name alone, with what stands in for calling it. The opcodes are those that PyTorch writes, of protocol 2.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

MOST_BYTES = 2**25  # of a pickle: some 120 for each tensor
MOST_STEPS = 2_000_000  # some 30 for each tensor
MOST_NAMES = 1000  # different classes and functions
MOST_NAME_BYTES = 200

_VALUES: dict[int, Callable[[], Any]] = {
    ord("N"): lambda: None,
    0x88: lambda: True,
    0x89: lambda: False,
    ord(")"): tuple,
    ord("]"): list,
    ord("}"): dict,
}
_NUMBERS = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"}
_TEXTS = {ord("X"): "<I", ord("U"): "<B"}  # by how their lengths are written
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_GETS = {ord("h"): "<B", ord("j"): "<I"}
_PUTS = {ord("q"): "<B", ord("r"): "<I"}


class Ignored:
    """What stands in for an object that no model needs; whatever is put into it is gone."""


@dataclass(frozen=True, eq=False)
class Name:
    """A class or a function that a pickle refers to: its name, and what a call of it gives (None: it is refused)."""

    name: str
    call: Callable[..., Any] | None = None


class Reader:
    """Reads the pickles in some bytes, one after the other.

    `find` says what stands in for a name, or raises UnpicklingError; `load_persistent` what does for a persistent id.
    """

    def __init__(
        self, content: bytes, find: Callable[[str], Name], load_persistent: Callable[[tuple[Any, ...]], Any]
    ) -> None:
        self.position = 0
        self._content = content
        self._find, self._load_persistent = find, load_persistent
        self._steps = 0
        self._names: dict[str, Name] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The next pickle's value.

        Raises UnpicklingError for one that refers to what it must not, or is too large. Of a damaged one it raises
        other exceptions too.
        """
        self._stack, self._marked, self._memo = [], [], {}
        if self._take(1) != b"\x80" or self._take(1) != b"\x02":
            raise UnpicklingError("not a pickle of protocol 2")
        while (code := self._take(1)[0]) != ord("."):
            self._step(1)
            self._run(code)
        return self._stack.pop()

    def _run(self, code: int) -> None:
        stack = self._stack
        if code in _VALUES:
            stack.append(_VALUES[code]())
        elif code in _NUMBERS:
            stack.append(self._number(_NUMBERS[code]))
        elif code in _GETS:
            stack.append(self._memo[self._number(_GETS[code])])
        elif code in _PUTS:
            self._memo[self._number(_PUTS[code])] = stack[-1]
        elif code in _TEXTS:
            stack.append(self._take(self._number(_TEXTS[code])).decode("utf-8", "surrogatepass"))
        elif code == 0x8A:  # a long
            stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))
        elif code in _TUPLES:
            stack[-_TUPLES[code] :] = [tuple(stack[-_TUPLES[code] :])]
        elif code == ord("("):
            self._marked.append(stack)
            self._stack = []
        elif code in b"teu":  # what takes all since the mark
            self._stack = self._marked.pop()
            self._fill(code, stack)
        elif code in b"as":  # the same for one item
            n = 1 if code == ord("a") else 2
            items = stack[-n:]
            del stack[-n:]
            self._fill(ord("e") if n == 1 else ord("u"), items)
        else:
            self._refer(code)

    def _fill(self, code: int, items: list[Any]) -> None:
        """Make a tuple of the items, or put them into the list or the dictionary on the stack."""
        if code == ord("t"):
            self._stack.append(tuple(items))
        elif isinstance(self._stack[-1], Ignored):
            return
        elif code == ord("e"):
            _of(list, self._stack[-1]).extend(items)
        else:
            put(_of(dict, self._stack[-1]), zip(items[::2], items[1::2], strict=True))

    def _refer(self, code: int) -> None:
        """Do what concerns the world outside the pickle."""
        stack = self._stack
        if code == ord("c"):
            stack.append(self._name())
        elif code in b"R\x81":  # a call, or a new object
            arguments, called = _of(tuple, stack.pop()), _of(Name, stack.pop())
            if called.call is None:
                raise UnpicklingError(f"GLOBAL {called.name} is called")
            made = called.call(*arguments)
            if isinstance(made, dict):
                self._step(len(made))
            stack.append(made)
        elif code == ord("b"):  # an object's state
            stack.pop()
            if isinstance(stack[-1], Name):
                raise UnpicklingError(f"GLOBAL {stack[-1].name} is changed")
        elif code == ord("Q"):
            stack.append(self._load_persistent(_of(tuple, stack.pop())))
        else:
            raise UnpicklingError(f"opcode {code}")

    def _name(self) -> Name:
        parts = []
        for _ in range(2):
            end = self._content.index(b"\n", self.position, self.position + MOST_NAME_BYTES)
            parts.append(self._take(end - self.position).decode("ascii"))
            self.position += 1
        name = ".".join(parts).replace("__builtin__.", "builtins.")  # as Python 2 and so protocol 2 have it
        if not name.isprintable():
            raise UnpicklingError("a name that is none")
        if name not in self._names:
            if len(self._names) == MOST_NAMES:
                raise UnpicklingError("too many names")
            self._names[name] = self._find(name)
        return self._names[name]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, n_bytes: int) -> bytes:
        start = self.position
        self.position += n_bytes
        if self.position > len(self._content):
            raise EOFError
        return self._content[start : self.position]

    def _step(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise UnpicklingError(f"more than {MOST_STEPS:,} steps")


_KEYS = (str, int, float, Name, Ignored, type(None))


def put(section: dict[Any, Any], items: Any) -> None:
    """Fill a dictionary. Keys are few kinds of plain values: the hash of others may never end."""
    for key, value in items:
        if not isinstance(key, _KEYS):
            raise UnpicklingError(f"a {type(key).__name__} is a key")
        section[key] = value


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise UnpicklingError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


def check_plain(value: Any, most: int = 10_000) -> None:
    """Raise UnpicklingError unless this is a tree of at most so many values: others may never end when they are walked.

    What is referred to twice counts twice.
    """
    left, waiting = most, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list | tuple):
            left -= len(each)
            if left < 0:
                raise UnpicklingError(f"more than {most:,} values")
            waiting.extend(each.values() if isinstance(each, dict) else each)
