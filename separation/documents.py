"""The only reader of YAML and JSON, with limits far above what honest files need.

A few hundred bytes can stand for gigabytes (aliases of aliases), nest deeper than Python recurses, or spell a number
that takes hours to read. Size, nodes, depth and digits are therefore checked before any value is built.
"""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import Resolver
from yaml.scanner import Scanner

MOST_BYTES = 2**18  # a model's YAML has a few thousand
MOST_NODES = 10_000  # in a YAML file; an alias counts as many nodes as it stands for
MOST_DEPTH = 32
MOST_DIGITS = 64  # characters of a number
MOST_HEADER_BYTES = 2**23  # a safetensors file's JSON header: some 50,000 tensors

# Control characters but tab and line feed, and lone surrogates.
CONTROL = re.compile("[\0-\b\v-\x1f\x7f-\x9f\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"


class DocumentError(Exception):
    """A document that cannot be read. The message is a predicate: the caller puts the file's name in front of it."""


class _Composer(Composer):
    """PyYAML's composer, with limits."""

    peek_event: Callable[[], Any]  # of the parser

    def __init__(self) -> None:
        super().__init__()
        self._nodes = self._depth = 0
        self._sizes: dict[int, int] = {}  # the number of nodes in each composed node, by id; all nodes stay alive

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _error(f"the alias *{event.anchor} refers to a value that contains it", event)
            self._count(self._sizes[id(node)], event)
            return node
        before = self._nodes
        self._count(1, event)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise _error(f"it is nested more than {MOST_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._nodes - before
        return node

    def _count(self, nodes: int, event: Any) -> None:
        self._nodes += nodes
        if self._nodes > MOST_NODES:
            raise _error(f"it has more than {MOST_NODES:,} values", event)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _error(f"the key {quoted(key.value)} appears twice: remove one", key)
                seen.add((key.tag, key.value))
        return node


class _Constructor(SafeConstructor, Resolver):
    """PyYAML's safe constructor. It knows plain values and `!!python/tuple`; it leaves dates as strings."""

    def __init__(self) -> None:
        SafeConstructor.__init__(self)
        Resolver.__init__(self)


class _PlainLoader(Reader, Scanner, Parser, _Composer, _Constructor):
    """Reads YAML in Python."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        _Composer.__init__(self)
        _Constructor.__init__(self)


def _error(problem: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _construct_string(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    if found := CONTROL.search(text):
        raise _error(f"a string contains the control character {found[0]!r}", node)
    return text


def _number(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def checked(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        if len(text) > MOST_DIGITS:
            raise _error(f"a number has {len(text):,} digits", node)
        try:
            return construct(loader, node)
        except (ArithmeticError, LookupError, ValueError) as e:
            raise _error(f"{quoted(text)} is not of the type that its tag states", node) from e

    return checked


_safe = yaml.SafeLoader.yaml_constructors
_Constructor.yaml_constructors = {
    _TAG + "null": _safe[_TAG + "null"],
    _TAG + "bool": _number(_safe[_TAG + "bool"]),
    _TAG + "int": _number(_safe[_TAG + "int"]),
    _TAG + "float": _number(_safe[_TAG + "float"]),
    _TAG + "str": _construct_string,
    _TAG + "seq": _safe[_TAG + "seq"],
    _TAG + "map": _safe[_TAG + "map"],
    _TAG + "python/tuple": _construct_tuple,
    None: yaml.SafeLoader.construct_undefined,
}
_Constructor.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TAG + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# PyYAML reads 1e-3, which has no decimal point, as a string. The digits are limited so that 955717e8,
# the name of a Demucs file, stays one.
_Constructor.add_implicit_resolver(
    _TAG + "float", re.compile(r"[-+]?\d{1,4}(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _loaders() -> list[Any]:
    """The loaders to try: one with the scanner and the parser of libyaml, if PyYAML has them, then the plain one.

    libyaml is about ten times as fast. The plain loader has the last word, so errors do not depend on libyaml.
    """
    if not yaml.__with_libyaml__:
        return [_PlainLoader]
    from yaml._yaml import CParser

    class FastLoader(_Composer, CParser, _Constructor):
        def __init__(self, text: str) -> None:
            CParser.__init__(self, text)
            _Composer.__init__(self)
            _Constructor.__init__(self)

    return [FastLoader, _PlainLoader]


_LOADERS = _loaders()


def _load(text: str) -> Any:
    *fast, plain = _LOADERS
    for loader in fast:
        with contextlib.suppress(yaml.YAMLError, ValueError, OverflowError):
            return yaml.load(text, Loader=loader)
    return yaml.load(text, Loader=plain)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file: null, booleans, numbers, strings, and lists, tuples and dictionaries of these.

    Raises FileNotFoundError, and DocumentError for a file that is not safe and valid YAML or exceeds a limit.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe might never end
            raise DocumentError("cannot be read as YAML: it is not a regular file")
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise DocumentError(f"cannot be read as YAML: it has more than {MOST_BYTES:,} bytes")
        return _load(content.decode("utf-8"))
    except FileNotFoundError:
        raise
    except yaml.MarkedYAMLError as e:
        line = f"line {e.problem_mark.line + 1} " if e.problem_mark else ""
        context = f"{e.context}, " if str(e.problem).startswith("but ") else ""
        raise DocumentError(f"{line}is not safe and valid YAML: {context}{e.problem}") from e
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
        raise DocumentError(f"cannot be read as YAML: {first_line(e)}") from e
    except (ValueError, OverflowError) as e:  # PyYAML does not catch these errors of Python's constructors
        raise DocumentError("cannot be read as YAML: a number or a character in it is out of range") from e


def read_json(
    text: str | bytes, *, most_bytes: int = MOST_BYTES, hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """The value of a JSON text, with `hook(object)` in place of each object.

    Raises DocumentError for a text that is not valid, repeats a key, or exceeds the limits on size and depth.
    """
    if len(text) > most_bytes:
        raise DocumentError(f"is not valid JSON: it has more than {most_bytes:,} bytes")
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: hook(_unique(pairs)) if hook else _unique(pairs))
        _check_depth(value, 0)
    except (ValueError, RecursionError) as e:
        raise DocumentError(f"is not valid JSON: {first_line(e)}") from e
    return value


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and its size in bytes. The library compares it with the file's size.

    Raises DocumentError for a header that is too large or not valid JSON, OSError for a file that cannot be read.
    """
    with path.open("rb") as stream:
        n_bytes = int.from_bytes(stream.read(8), "little")
        if n_bytes > MOST_HEADER_BYTES:  # the library would accept 100 MB
            raise DocumentError(f"announces a header of {n_bytes:,} bytes, more than {MOST_HEADER_BYTES:,}")
        header = read_json(stream.read(n_bytes), most_bytes=MOST_HEADER_BYTES)
    if not isinstance(header, dict):
        raise DocumentError("has a header that is not a JSON object")
    return header, n_bytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {quoted(name)} appears twice")
        result[name] = value
    return result


def _check_depth(value: Any, depth: int) -> None:
    if depth > MOST_DEPTH:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, depth + 1)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def quoted(value: object, *, most: int = 80) -> str:
    """A value for an error message: its `repr`, shortened to `most` characters."""
    return _shortened(repr(value), most)


def escaped(text: str, *, most: int = 80) -> str:
    """A text for an error message without quotes: control characters escaped, shortened to `most` characters."""
    return _shortened(repr(text)[1:-1], most)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
