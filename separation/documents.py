"""The one reader of the YAML and JSON that describe models and recipes, within limits that no honest file comes near.

A few hundred bytes can stand for gigabytes (aliases of aliases), nest deeper than Python recurses, or spell a number
that takes hours to read. Limits on size, nodes, depth and digits are checked before anything is built.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 2**18  # of text, of which the YAML of a model has a few thousand
MOST_NODES = 10_000  # of a YAML, where an alias counts as all that it stands for
MOST_DEPTH = 32
MOST_DIGITS = 64  # characters of a number
MOST_HEADER_BYTES = 2**23  # of JSON in front of a safetensors file: some 50,000 tensors

CONTROL = re.compile("[\0-\b\v-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tab and line feed; halves of surrogate pairs
_TAG = "tag:yaml.org,2002:"


class DocumentError(Exception):
    """A text that cannot be read. Its message is the end of a sentence that begins with the file."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader within limits, of plain values and `!!python/tuple` alone; a date is a text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0
        self._sizes: dict[int, int] = {}  # nodes within each composed node, by its id: all of them live until the end

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _error(f"the alias *{event.anchor} stands within what it stands for", event)
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
                    raise _error(f"{shown(key.value)} stands twice: remove one", key)
                seen.add((key.tag, key.value))
        return node


def _error(problem: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


def _construct_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    if found := CONTROL.search(text):
        raise _error(f"a text has the character {found[0]!r} in it", node)
    return text


def _number(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def checked(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        if len(text) > MOST_DIGITS:
            raise _error(f"a number has {len(text):,} digits", node)
        try:
            return construct(loader, node)
        except (ArithmeticError, LookupError, ValueError) as e:
            raise _error(f"{shown(text)} is not of the kind that its tag says", node) from e

    return checked


_safe = yaml.SafeLoader.yaml_constructors
_Loader.yaml_constructors = {
    _TAG + "null": _safe[_TAG + "null"],
    _TAG + "bool": _number(_safe[_TAG + "bool"]),
    _TAG + "int": _number(_safe[_TAG + "int"]),
    _TAG + "float": _number(_safe[_TAG + "float"]),
    _TAG + "str": _construct_text,
    _TAG + "seq": _safe[_TAG + "seq"],
    _TAG + "map": _safe[_TAG + "map"],
    _TAG + "python/tuple": _construct_tuple,
    None: yaml.SafeLoader.construct_undefined,
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TAG + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# PyYAML takes 1e-3, without a point, for a text; 955717e8 is one, the name of a file of Demucs.
_Loader.add_implicit_resolver(_TAG + "float", re.compile(r"[-+]?\d{1,4}(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: null, true or false, numbers, texts, lists, tuples and sections of these.

    Raises FileNotFoundError where there is none, DocumentError for one that is not safe and valid or exceeds a limit.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise DocumentError("cannot be read as YAML: it is no file")
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise DocumentError(f"cannot be read as YAML: it has more than {MOST_BYTES:,} bytes")
        return yaml.load(content.decode("utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise
    except yaml.MarkedYAMLError as e:  # for a refused tag, the problem names it
        line = f"line {e.problem_mark.line + 1} " if e.problem_mark else ""
        context = f"{e.context}, " if str(e.problem).startswith("but ") else ""
        raise DocumentError(f"{line}is not safe and valid YAML: {context}{e.problem}") from e
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
        raise DocumentError(f"cannot be read as YAML: {first_line(e)}") from e
    except (ValueError, OverflowError) as e:  # PyYAML leaves some to Python
        raise DocumentError("cannot be read as YAML: a number or a character in it is out of range") from e


def read_json(
    text: str | bytes, *, most_bytes: int = MOST_BYTES, hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """What a text in JSON holds, each object as `hook` returns it.

    Raises DocumentError for one that is not valid, names something twice, or exceeds the limits on size and depth.
    """
    if len(text) > most_bytes:
        raise DocumentError(f"is not JSON as it should be: it has more than {most_bytes:,} bytes")
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: hook(_once(pairs)) if hook else _once(pairs))
        _check_depth(value, 0)
    except (ValueError, RecursionError) as e:
        raise DocumentError(f"is not JSON as it should be: {first_line(e)}") from e
    return value


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and how many bytes it has; the library checks it against the file's size.

    Raises DocumentError for one that is too large or no JSON, OSError for a file that cannot be read.
    """
    with path.open("rb") as stream:
        n_bytes = int.from_bytes(stream.read(8), "little")
        if n_bytes > MOST_HEADER_BYTES:  # the library would take 100 MB
            raise DocumentError(f"announces a header of {n_bytes:,} bytes, more than {MOST_HEADER_BYTES:,}")
        header = read_json(stream.read(n_bytes), most_bytes=MOST_HEADER_BYTES)
    if not isinstance(header, dict):
        raise DocumentError("has a header that is no object of JSON")
    return header, n_bytes


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for name, value in pairs:
        if name in section:
            raise ValueError(f"{shown(name)} stands twice")
        section[name] = value
    return section


def _check_depth(value: Any, depth: int) -> None:
    if depth > MOST_DEPTH:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, depth + 1)


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def shown(value: object, *, most: int = 80) -> str:
    """A value as an error message shows it: cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def bare(text: str, *, most: int = 80) -> str:
    """A text as an error message shows it without quotes: cut where it is long, with nothing that a terminal obeys."""
    text = repr(text)[1:-1]
    return text if len(text) <= most else text[: most - 1] + "…"
