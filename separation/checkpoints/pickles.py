"""Reads the pickles in weights files without running their code, in an amount of memory that the file's size limits.

PyTorch's restricted unpickler runs no code either, but it allocates whatever memory a pickle asks for, and it has had
holes (CVE-2025-32434). Here an opcode makes a plain value or does nothing. Classes and functions are names; calling one
calls a harmless stand-in. The opcodes are those of protocol 2 that PyTorch writes.
"""

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

MOST_BYTES = 2**25  # a tensor takes about 120
MOST_STEPS = 2_000_000  # a tensor takes about 30
MOST_NAMES = 1000  # distinct classes and functions
MOST_NAME_BYTES = 200

_VALUES: dict[bytes, Callable[[], Any]] = {
    pickle.NONE: lambda: None,
    pickle.NEWTRUE: lambda: True,
    pickle.NEWFALSE: lambda: False,
    pickle.EMPTY_TUPLE: tuple,
    pickle.EMPTY_LIST: list,
    pickle.EMPTY_DICT: dict,
}
_NUMBERS = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
_STRINGS = {pickle.BINUNICODE: "<I", pickle.SHORT_BINSTRING: "<B"}  # with the format of their length
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_GETS = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
_PUTS = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}


class Ignored:
    """Stands in for an object that no model needs. Whatever the pickle puts into it is dropped."""


@dataclass(frozen=True, eq=False)
class Name:
    """A class or a function that a pickle refers to: its name, and its stand-in; None: it must not be called."""

    name: str
    call: Callable[..., Any] | None = None


class Reader:
    """Reads the pickles in `content` one after the other.

    `find` gives the stand-in for a name, or raises UnpicklingError; `load_persistent` gives the value of a persistent
    id.
    """

    def __init__(
        self, content: bytes, find: Callable[[str], Name], load_persistent: Callable[[tuple[Any, ...]], Any]
    ) -> None:
        self.position: int = 0
        self._content = content
        self._find, self._load_persistent = find, load_persistent
        self._steps = 0
        self._names: dict[str, Name] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The value of the next pickle.

        Raises UnpicklingError for a pickle with a forbidden name or beyond a limit. A damaged pickle leads to other
        exceptions too.
        """
        self._stack, self._marked, self._memo = [], [], {}
        if self._take(2) != pickle.PROTO + b"\x02":
            raise UnpicklingError("it is not a pickle of protocol 2")
        while (code := self._take(1)) != pickle.STOP:
            self._step(1)
            self._run(code)
        return self._stack.pop()

    def _run(self, code: bytes) -> None:
        """Carry out an opcode."""
        stack = self._stack
        if code in _VALUES:
            stack.append(_VALUES[code]())
        elif code in _NUMBERS:
            stack.append(self._number(_NUMBERS[code]))
        elif code in _GETS:
            stack.append(self._memo[self._number(_GETS[code])])
        elif code in _PUTS:
            self._memo[self._number(_PUTS[code])] = stack[-1]
        elif code in _STRINGS:
            stack.append(self._take(self._number(_STRINGS[code])).decode("utf-8", "surrogatepass"))
        elif code == pickle.LONG1:
            stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))
        elif code in _TUPLES:
            stack[-_TUPLES[code] :] = [tuple(stack[-_TUPLES[code] :])]
        elif code == pickle.MARK:
            self._marked.append(stack)
            self._stack = []
        elif code in (pickle.TUPLE, pickle.APPENDS, pickle.SETITEMS):  # of the items since the mark
            self._stack = self._marked.pop()
            self._fill(code, stack)
        elif code == pickle.APPEND:
            self._fill(pickle.APPENDS, [stack.pop()])
        elif code == pickle.SETITEM:
            value, key = stack.pop(), stack.pop()
            self._fill(pickle.SETITEMS, [key, value])
        else:
            self._refer(code)

    def _fill(self, code: bytes, items: list[Any]) -> None:
        """Make a tuple of the items, or add them to the list or the dictionary on the stack."""
        if code == pickle.TUPLE:
            self._stack.append(tuple(items))
        elif isinstance(self._stack[-1], Ignored):
            return
        elif code == pickle.APPENDS:
            _require(list, self._stack[-1]).extend(items)
        else:
            put(_require(dict, self._stack[-1]), zip(items[::2], items[1::2], strict=True))

    def _refer(self, code: bytes) -> None:
        """Carry out an opcode that refers to something outside the pickle: a name, call, state or persistent id."""
        stack = self._stack
        if code == pickle.GLOBAL:
            stack.append(self._name())
        elif code in (pickle.REDUCE, pickle.NEWOBJ):
            arguments, called = _require(tuple, stack.pop()), _require(Name, stack.pop())
            if called.call is None:
                raise UnpicklingError(f"GLOBAL {called.name} is called")
            made = called.call(*arguments)
            if isinstance(made, dict):
                self._step(len(made))
            stack.append(made)
        elif code == pickle.BUILD:  # sets an object's state
            stack.pop()
            if isinstance(stack[-1], Name):
                raise UnpicklingError(f"GLOBAL {stack[-1].name} is changed")
        elif code == pickle.BINPERSID:
            stack.append(self._load_persistent(_require(tuple, stack.pop())))
        else:
            raise UnpicklingError(f"it has the unknown opcode {code[0]}")

    def _name(self) -> Name:
        parts = []
        for _ in range(2):
            end = self._content.index(b"\n", self.position, self.position + MOST_NAME_BYTES)
            parts.append(self._take(end - self.position).decode("ascii"))
            self.position += 1
        name = ".".join(parts).replace("__builtin__.", "builtins.")  # protocol 2 has Python 2's name
        if not name.isprintable():
            raise UnpicklingError("it has an unprintable name")
        if name not in self._names:
            if len(self._names) == MOST_NAMES:
                raise UnpicklingError(f"it has more than {MOST_NAMES:,} names")
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
            raise UnpicklingError(f"it has more than {MOST_STEPS:,} steps")


_KEYS = (str, int, float, Name, Ignored, type(None))


def put(section: dict[Any, Any], items: Any) -> None:
    """Add items to a dictionary. Only plain keys are allowed: hashing others may never end."""
    for key, value in items:
        if not isinstance(key, _KEYS):
            raise UnpicklingError(f"it has a {type(key).__name__} as a key")
        section[key] = value


def _require(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise UnpicklingError(f"it has a {type(value).__name__} in place of a {kind.__name__}")
    return value


def check_plain(value: Any, most: int = 10_000) -> None:
    """Raise UnpicklingError if walking the value would visit more than `most` values, or never end.

    A value counts each time that it is referred to.
    """
    left, waiting = most, [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list | tuple):
            left -= len(each)
            if left < 0:
                raise UnpicklingError(f"it has more than {most:,} values")
            waiting.extend(each.values() if isinstance(each, dict) else each)
