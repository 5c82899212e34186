"""A song from stdin, and a stem to stdout."""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from separation.cli.options import refuse_beside
from separation.errors import InputError
from separation.system.os_errors import output_errors

PIPE = "-"
_COPIED_BYTES = 2**20  # at once


@dataclass(frozen=True)
class Pipes:
    """What is connected: the file with the song from stdin, and whether the stem goes to stdout."""

    stdin: Path | None
    to_stdout: bool


def changed(args: argparse.Namespace, **changes: object) -> argparse.Namespace:
    """The arguments with some of them changed."""
    return argparse.Namespace(**{**vars(args), **changes})


@contextmanager
def stdin_song() -> Iterator[Path]:
    """The song on stdin, in a temporary file that is named `stdin`."""
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(f"{PIPE!r} is the song on stdin, but nothing is piped in: add `< song.mp3`, or name a file")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "stdin"
        with output_errors(path), path.open("xb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, _COPIED_BYTES)
        yield path


def check_stdout(args: argparse.Namespace, stems: Sequence[str]) -> None:
    """Raise InputError if one stem cannot go to stdout with these arguments."""
    unused = ["--json", "--report", "--analyse", "--reaper", "--video", "--name", "--summary"]
    refuse_beside("-o -", [*unused, "--ray", "--workers", "--overwrite"], args)
    if len(args.songs) > 1:
        raise InputError(f"-o - writes one stem of one song, and {len(args.songs)} songs are given: give one")
    if len(stems) > 1:
        raise InputError(f"-o - writes one stem, and there are {', '.join(stems)}: choose one, as in --only {stems[0]}")
    if sys.stdout.isatty():
        raise InputError("-o - writes to stdout, which is a terminal: add `> stem.wav`, or pipe it into a program")


def write_to_stdout(path: Path) -> None:
    """Copy a file to stdout."""
    with path.open("rb") as file:
        shutil.copyfileobj(file, sys.stdout.buffer, _COPIED_BYTES)
    sys.stdout.buffer.flush()
