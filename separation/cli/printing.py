"""What is printed: lines for people, JSON, and progress bars."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from separation.progress import Progress
from separation.system import signals
from separation.system.text import shown

_SONG_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
_SONGS_BAR = "{n_fmt} of {total_fmt} songs|{bar}| {elapsed}<{remaining}"


class LogHandler(logging.StreamHandler[TextIO]):
    """Prints each log record as a line on stderr, above the progress bars, or as a JSON object."""

    def __init__(self, *, as_json: bool = False) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        if self._as_json:
            return _event("warning" if record.levelno >= logging.WARNING else "note", message=record.getMessage())
        return shown(record.getMessage())

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def print_line(line: object, file: TextIO | None = None) -> None:
    """Print a line for people, escaped for a terminal, on stdout by default."""
    print(shown(str(line)), file=file, flush=True)


def print_lines(text: object) -> None:
    """Print a text of several lines."""
    for line in str(text).split("\n"):
        print_line(line)


def print_error(error: object, *, as_json: bool = False) -> None:
    """Print an error on stderr."""
    if as_json:
        print_json(_event("error", message=str(error)), file=sys.stderr)
        return
    print_line(f"error: {error}", file=sys.stderr)


def print_json(text: str, file: TextIO | None = None) -> None:
    """Print JSON exactly. It is ASCII, in which DEL is the only character that a terminal would interpret."""
    print(text.replace("\x7f", "\\u007f"), file=file, flush=True)


def _event(kind: str, **facts: object) -> str:
    """An event for programs, as JSON in ASCII."""
    return json.dumps({"event": kind, **facts}).replace("\x7f", "\\u007f")


@contextmanager
def json_progress(song: str) -> Iterator[Progress]:
    """Progress as JSON objects on stderr: one when the stage or the whole percentage changes."""
    last: tuple[int, str] | None = None

    def report(share: float, stage: str) -> None:
        nonlocal last
        signals.check()
        if last != (now := (int(share * 100), stage)):
            last = now
            print_json(_event("progress", song=song, stage=stage, share=round(share, 4)), file=sys.stderr)

    yield Progress(report)


@contextmanager
def song_bar(name: str, *, leave: bool = True, hidden: bool = False) -> Iterator[Progress]:
    """A progress bar on stderr, if that is a terminal, unless `hidden`. `leave` keeps it on the screen at the end."""
    disable = True if hidden else None
    with tqdm(total=100, desc=shown(name), disable=disable, leave=leave, bar_format=_SONG_BAR) as bar:

        def report(share: float, stage: str) -> None:
            signals.check()
            bar.set_description_str(shown(f"{name}: {stage}"), refresh=False)
            bar.update(share * 100 - bar.n)

        yield Progress(report)


def songs_bar(n_songs: int, *, hidden: bool) -> "tqdm[Any]":
    """A bar on stderr that counts songs, if that is a terminal, unless `hidden`."""
    return tqdm(total=n_songs, disable=True if hidden else None, leave=False, bar_format=_SONGS_BAR)
