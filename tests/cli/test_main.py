"""The exit code is 2 for bad input, with one line on stderr."""

import errno
import logging
import sys
from pathlib import Path

import pytest

from separation.cli import commands
from separation.cli.main import main
from separation.progress import WAIT


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/tmp/x"), "error: No such file: '/tmp/x'\n"),
    ],
)
def test_an_unexpected_error_of_the_disk_is_one_line(
    error: OSError, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**options: object) -> None:
        raise error

    monkeypatch.setattr(commands, "chosen_cache", fail)
    assert main(["cache", "list"]) == 2
    assert capsys.readouterr().err == line


def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(commands, "chosen_cache", fail)
    assert main(["cache", "list"]) == 2
    assert capsys.readouterr().err.startswith("error: the program needs more memory than this computer has free")


def test_an_error_of_the_package_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPARATION_CACHE", "off")
    assert main(["cache", "list"]) == 2
    assert capsys.readouterr().err == "error: the cache is off: set SEPARATION_CACHE to `on` or to a folder\n"


@pytest.mark.parametrize(
    "terminal, options, level",
    [
        (True, [], WAIT),
        (True, ["--quiet"], logging.WARNING),
        (True, ["--progress", "json"], logging.WARNING),
        (True, ["--verbose", "--quiet"], logging.INFO),
        (False, [], logging.WARNING),
    ],
)
def test_only_a_terminal_shows_why_something_takes_time(
    terminal: bool, options: list[str], level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[int] = []
    monkeypatch.setattr(logging, "basicConfig", lambda *, handlers, level: levels.append(level))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["separate", "no song.mp3", "-o", "out", "--recipe", "demo", *options]) == 2
    assert levels == [level]
