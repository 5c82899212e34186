"""Runs `separate` with the demo model, and reads what it prints and writes."""

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from helpers import common
from helpers.common import started
from separation.batch.job import stem_settings
from separation.cli.main import main
from separation.cli.options import engine_options, output_options, selection
from separation.cli.parser import build_parser

DEMO_RECIPE = ("--recipe", "demo", "--device", "cpu")
# With these, a song of up to two seconds is one chunk of four seconds; otherwise it is two chunks of eight.
SHORT_CHUNKS = ("--chunk-size", "4", "--overlap", "1")
DEMO = (*DEMO_RECIPE, *SHORT_CHUNKS)

# A run as an output folder's record holds it
RUN: dict[str, Any] = {
    "source": {"name": "\udce9.wav", "bytes": 4},
    "settings": {"format": "wav"},
    "stems": {"a": ("a.wav", 4)},
    "duration_seconds": 1.0,
    "elapsed_seconds": 2.0,
    "gain": 1.0,
    "warnings": ["loud"],
}


def separate(*arguments: str | Path) -> int:
    """Runs the command in this process, with the demo and short chunks by default; returns its exit code."""
    demo = DEMO_RECIPE[2:] if {"--model-name", "--model-path", "--model-dir"} & set(arguments) else DEMO_RECIPE
    chunks = () if {"--chunk-size", "--overlap"} & set(arguments) else SHORT_CHUNKS
    try:
        return main(["separate", *demo, *chunks, *map(str, arguments)])
    except SystemExit as e:  # argparse
        return int(str(e.code))


def separating(*arguments: str | Path) -> AbstractContextManager[Popen[str]]:
    """The command in a process of its own."""
    return started("separate", *DEMO, *arguments)


def settings_of(*arguments: str | Path) -> dict[str, Any]:
    """The settings in the record of a song that is separated with these options."""
    args = build_parser().parse_args(["separate", "x.wav", "-o", "y", *map(str, arguments)])
    return settings_of_parsed(args)


def settings_of_parsed(args: argparse.Namespace) -> dict[str, Any]:
    return stem_settings(selection(args), engine_options(args), output_options(args))


def write_songs(folder: Path, *names: str, seconds: float = 0.3) -> None:
    """Songs that all differ."""
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(common.song(seconds, gain=1 - index / 100))


def assert_refused(code: int, capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> None:
    """Exit code 2, one line on stderr with these words, and nothing written."""
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert captured.out == ""
    assert not out.exists()


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_text(path: Path) -> None:
    """A file of the user's."""
    path.write_text("mine")


def write_link(path: Path) -> None:
    """A symbolic link to a file of the user's."""
    (path.parent / "mine.txt").write_text("mine")
    path.symlink_to("mine.txt")


Make = Callable[[Path], None]
