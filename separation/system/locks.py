"""Locks between processes, on every system: the system itself gives up what a killed process held."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock


def lock(path: Path, *, wait: bool = True) -> "BaseFileLock":
    """What one process, and one thread in it, holds at a time: enter it. The file is made if need be, and may stay.

    Whoever removes the file does so while holding it; the next one then makes another.

    Entering raises TimeoutError where another has it and `wait` is false, and OSError where the file cannot be had.
    """
    from filelock import FileLock  # takes longer to import than `--help` to run

    return FileLock(path, timeout=-1 if wait else 0, thread_local=False, poll_interval=0.01)
