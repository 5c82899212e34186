"""Locks between processes, on every operating system. The system releases the lock of a process that is killed."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock


def lock(path: Path, *, wait: bool = True) -> "BaseFileLock":
    """A lock on a file, for a `with` statement. One thread of one process holds it at a time.

    The file is created if it is missing, and may remain. Hold the lock to remove the file; the next process then
    creates a new one.

    Entering the lock raises TimeoutError if another holds it and `wait` is false, and OSError if the file cannot be
    opened.
    """
    from filelock import FileLock  # importing it takes longer than `--help` takes to run

    return FileLock(path, timeout=-1 if wait else 0, thread_local=False, poll_interval=0.01)
