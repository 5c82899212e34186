"""Hostile YAML and JSON is refused in one sentence, before it takes memory or time."""

import json
import os
from pathlib import Path

import pytest
import yaml

from helpers.common import PROJECT
from helpers.small_model import DOCUMENT
from separation import documents
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.description import KEYS
from separation.documents import (
    MOST_BYTES,
    MOST_HEADER_BYTES,
    DocumentError,
    quoted,
    read_json,
    read_safetensors_header,
    read_yaml,
)
from separation.engine import recipes
from separation.errors import CheckpointError, RecipeError


def bomb(levels: int, first: str, line: str) -> str:
    """Lines that each refer nine times to the one before."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} {line.replace('@', ', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, levels + 1)]
    return "\n".join(lines)


HOSTILE = {
    "merge keys": (bomb(8, "{x: 1}", "{<<: [@]}"), "line 5 .* more than 10,000 values"),
    "nested aliases": (bomb(8, "[x]", "[@]") + "\nstems: *a8", "line 5 .* more than 10,000 values"),
    "aliases as keys": (bomb(8, "!!python/tuple [x]", "!!python/tuple [@]"), "more than 10,000 values"),
    "an alias of the value that contains it": ("a: &a [*a]", r"the alias \*a refers to a value that contains it"),
    "a section that merges itself": ("a: &a {<<: *a, b: 1}", r"the alias \*a refers to a value that contains it"),
    "an unknown alias": ("a: *b", "found undefined alias"),
    "many values": ("a: [" + "1, " * 10_000 + "1]", "more than 10,000 values"),
    "many brackets": ("a: " + "[" * 50_000, "nested more than 32 deep"),
    "many braces": ("a: " + "{b: " * 50_000, "nested more than 32 deep"),
    "many dashes": ("- " * 50_000, "nested more than 32 deep"),
    "many question marks": ("? " * 50_000, "nested more than 32 deep|not allowed"),
    "much text": ("a: " + "x" * MOST_BYTES, "more than 262,144 bytes"),
    "a long comment": ("a: 1 #" + "x" * MOST_BYTES, "more than 262,144 bytes"),
    "many digits": ("a: " + "9" * 5000, "line 1 .* a number has 5,000 digits"),
    "many hexadecimal digits": ("a: 0x" + "f" * 5000, "a number has 5,002 digits"),
    "a number of base 60": ("a: 1" + ":59" * 5000, "a number has 15,001 digits"),
    "a float of many digits": ("a: 1." + "9" * 5000 + "e5", "a number has 5,004 digits"),
    "a version of many digits": (
        "%YAML 1." + "9" * 5000 + "\n---\na: 1",
        "a number or a character in it is out of range",
    ),
    "a string tagged as a number": ("a: !!int many", "'many' is not of the type that its tag states"),
    "an empty string tagged as a number": ("a: !!int ''", "'' is not of the type"),
    "a string tagged as a float": ("a: !!float many", "'many' is not of the type"),
    "a string tagged as a boolean": ("a: !!bool perhaps", "'perhaps' is not of the type"),
    "a list tagged as a number": ("a: !!int [1]", "expected a scalar node"),
    "a date": ("a: !!timestamp 2024-01-01", "could not determine a constructor .*timestamp"),
    "bytes": ("a: !!binary aGVsbG8=", "could not determine a constructor .*binary"),
    "a set": ("a: !!set {b, c}", "could not determine a constructor .*set"),
    "an object": ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor .*python/object"),
    "a key that appears twice": ("a: 1\nb: 2\na: 3", "line 3 .* the key 'a' appears twice"),
    "a list as a key": ("? [a]\n: 1", "unhashable key"),
    "a tab": ("a:\n\tb: 1", "line 2 .* cannot start any token"),
    "a nul": ("a: \0", "cannot be read as YAML"),
    "an escaped nul": ('a: "\\0"', r"a string contains the control character '\\x00'"),
    "an escape for a terminal": ('a: "\\e[31m"', r"a string contains the control character '\\x1b'"),
    "a lone surrogate": ('a: "\\ud800"', r"a string contains the control character '\\ud800'"),
    "a character beyond Unicode": ('a: "\\U00110000"', "a number or a character in it is out of range"),
    "a character far beyond Unicode": ('a: "\\Uffffffff"', "a number or a character in it is out of range"),
    "a tag that is not UTF-8": ("a: !%ff b", "line 1 is not safe and valid YAML"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document in the stream, but found another document"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_yaml_is_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    text, message = HOSTILE[kind]
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(DocumentError, match=message) as caught:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("kind", ["merge keys", "nested aliases", "many brackets", "many digits", "a nul"])
def test_models_and_recipes_have_the_same_reader(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "all_4.yaml"
    path.write_text(HOSTILE[kind][0], encoding="utf-8")
    with pytest.raises(CheckpointError, match=HOSTILE[kind][1]):
        read_config(path)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    with pytest.raises(RecipeError, match=HOSTILE[kind][1]):
        recipes.load_recipe("mine", "all_4")


ODDITIES = """\
\ufeff# A byte order mark, as Notepad writes it
date: 2024-13-45
base: &base {a: 1, b: 1e-3}
merged: {<<: *base, b: 2}
several: [*base, *base]
tuple: !!python/tuple [1, [2]]
limits: [.inf, 1_000, 0x1f, null, yes]
"""


def test_harmless_oddities_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(ODDITIES, encoding="utf-8")
    base = {"a": 1, "b": 0.001}
    assert read_yaml(tmp_path / "x.yaml") == {
        "date": "2024-13-45",
        "base": base,
        "merged": {"a": 1, "b": 2},
        "several": [base, base],
        "tuple": (1, [2]),
        "limits": [float("inf"), 1000, 31, None, True],
    }


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").touch()
    os.truncate(tmp_path / "x.yaml", 10**12)  # a hole, which takes no space
    with pytest.raises(DocumentError, match="more than 262,144 bytes"):
        read_yaml(tmp_path / "x.yaml")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "device.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe", "device", "folder"):
        with pytest.raises(DocumentError, match="it is not a regular file"):
            read_yaml(tmp_path / f"{name}.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises((DocumentError, FileNotFoundError)):
        read_yaml(tmp_path / "loop.yaml")
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 50_000, "nested more than 32 deep|recursion"),
        ("[" * 100 + "]" * 100, "nested more than 32 deep"),
        ("9" * 5000, "digits"),
        ('{"a": 1, "a": 2}', "the key 'a' appears twice"),
        ('"' + "x" * MOST_BYTES, "more than 262,144 bytes"),
        ("{", "Expecting"),
        (b"\xff", "codec can't decode"),
    ],
)
def test_hostile_json_is_refused_in_one_sentence(text: str | bytes, message: str) -> None:
    with pytest.raises(DocumentError, match=message) as caught:
        read_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ((MOST_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "announces a header of 8,388,609 bytes"),
        (b"\xff" * 8 + b"{}", "announces a header"),
        ((2).to_bytes(8, "little") + b"[]", "not a JSON object"),
        ((17).to_bytes(8, "little") + b'{"a": {}, "a": 1}', "the key 'a' appears twice"),
        (b"", "is not valid JSON"),
    ],
)
def test_a_hostile_safetensors_header_is_refused_in_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DocumentError, match=message):
        read_safetensors_header(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors \([\d,]+ bytes\) is damaged, incomplete or not a"):
        read_config(tmp_path / "x.safetensors")


def test_a_long_value_is_shortened_in_a_message() -> None:
    assert quoted("x") == "'x'" and quoted(["x" * 1000]) == "['" + "x" * 77 + "…"


# What a model's YAML may say


URL = "https://example.com/x.ckpt"


def test_the_projects_own_files_are_far_below_the_limits() -> None:
    for path in (PROJECT / "configs").rglob("*.yaml"):
        assert path.stat().st_size < MOST_BYTES / 10
        assert len(json.dumps(read_yaml(path))) < MOST_BYTES / 10
    assert DOCUMENT.keys() <= KEYS


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML has no libyaml here")
def test_libyaml_reads_what_the_plain_loader_reads() -> None:
    """What libyaml refuses, the plain loader decides; so libyaml must accept nothing else and nothing more."""
    fast, plain = documents._LOADERS
    own = [path.read_text(encoding="utf-8") for path in sorted((PROJECT / "configs").rglob("*.yaml"))]
    for text in [*own, ODDITIES]:
        assert yaml.load(text, Loader=fast) == yaml.load(text, Loader=plain)
    for text, _ in HOSTILE.values():
        if len(text) <= MOST_BYTES:
            with pytest.raises((yaml.YAMLError, ValueError, OverflowError)):
                yaml.load(text, Loader=fast)
