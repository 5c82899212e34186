"""What is printed: lines for people, JSON, and progress bars."""

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
    """Prints each log record as a line on stderr, above the progress bars."""

    def format(self, record: logging.LogRecord) -> str:
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


def print_error(error: object) -> None:
    """Print an error on stderr."""
    print_line(f"error: {error}", file=sys.stderr)


def print_json(text: str, file: TextIO | None = None) -> None:
    """Print JSON exactly. It is ASCII, in which DEL is the only character that a terminal would interpret."""
    print(text.replace("\x7f", "\\u007f"), file=file, flush=True)


@contextmanager
def song_bar(name: str, *, leave: bool = True) -> Iterator[Progress]:
    """A progress bar on stderr, if that is a terminal. `leave` keeps it on the screen at the end."""
    with tqdm(total=100, desc=shown(name), disable=None, leave=leave, bar_format=_SONG_BAR) as bar:

        def report(share: float, stage: str) -> None:
            signals.check()
            bar.set_description_str(shown(f"{name}: {stage}"), refresh=False)
            bar.update(share * 100 - bar.n)

        yield Progress(report)


def songs_bar(n_songs: int, *, hidden: bool) -> "tqdm[Any]":
    """A bar on stderr that counts songs, if that is a terminal, unless `hidden`."""
    return tqdm(total=n_songs, disable=True if hidden else None, leave=False, bar_format=_SONGS_BAR)
