"""Output files: they appear complete or not at all, and never replace or write through somebody else's files."""

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from separation.system.locks import lock
from separation.system.os_errors import WORK_PREFIX, output_errors
from separation.system.record import RECORD, Record, check_targets
from separation.system.signals import uninterrupted

_LOCK = "lock"  # in a temporary folder; locked while the process that made it runs


def not_through_links(path: str, flags: int) -> int:
    """An opener for `open` that raises OSError if the path is a symbolic link."""
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise OSError(e.errno, "it is a symbolic link, and links are not followed", path) from e
        raise


class OutputFolder:
    """A folder to write files to. Files are written in `work`, a hidden folder inside it, and then published.

    `work` is on the same file system, so that publishing a file only renames it. Entering the context creates both
    folders and removes what killed processes left behind. Leaving it removes `work` and, if nothing was published,
    every folder that was created.

    Args:
        folder: where files are published.
        overwrite: also replace files that this program did not write.
        recorded: list published files in the folder's record.

    Raises:
        OutputError: the folder cannot be written to.
    """

    work: Path

    def __init__(self, folder: Path, *, overwrite: bool = False, recorded: bool = True) -> None:
        self.folder = folder
        self.overwrite = overwrite
        self.recorded = recorded
        self._cleaning = ExitStack()

    def __enter__(self) -> Self:
        with output_errors(self.folder), ExitStack() as on_error:
            on_error.callback(self._cleaning.close)
            for parent in reversed((self.folder, *self.folder.parents)):
                if not parent.exists():
                    parent.mkdir(parents=True, exist_ok=True)  # another song may have removed its parent
                    self._cleaning.callback(_remove_if_empty, parent)
            for left in self.folder.glob(f"{WORK_PREFIX}*"):
                _remove_if_abandoned(left)
            self.work = self._make_work()
            on_error.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleaning.close()

    def _make_work(self) -> Path:
        while True:
            work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=self.folder))
            held = lock(work / _LOCK)
            try:
                held.acquire()
            except FileNotFoundError:  # another process removed the folder before it was locked
                continue
            except OSError:  # the file system has no locks, so no process removes the folder of another
                pass
            self._cleaning.callback(shutil.rmtree, work, ignore_errors=True)
            self._cleaning.callback(held.release)
            return work

    def check_targets(self, names: Sequence[str], song: Path | None = None) -> None:
        """Check that files with these names may be published; see `record.check_targets` for the errors."""
        record = [RECORD] if self.recorded else []
        check_targets(self.folder, [*names, *record], overwrite=self.overwrite, song=song)

    def publish(self, parts: Mapping[str, Path]) -> dict[str, Path]:
        """Move finished files from `work` into the folder, over older ones. If one cannot be moved, none is."""
        self.check_targets([part.name for part in parts.values()])  # files may have appeared during the run
        if self.recorded:  # first, so that a killed process never leaves an unrecorded file
            record = Record.read(self.folder).with_files(self.folder, parts.values())
            self.write(record)
        published = {}
        with uninterrupted(), ExitStack() as undo:
            for stem, part in parts.items():
                published[stem] = target = self.folder / part.name
                with output_errors(target):
                    if os.path.lexists(target):
                        older = self.work / f"older-{part.name}"
                        os.replace(target, older)
                        undo.callback(os.replace, older, target)
                    else:
                        undo.callback(target.unlink, missing_ok=True)
                    os.replace(part, target)
            undo.pop_all()
        if self.recorded and not all(map(record.vouches_for, published.values())):
            # Some network drives change a file's time when it is renamed.
            self.write(record.with_files(self.folder, published.values()))
        return published

    def write(self, record: Record) -> None:
        """Replace the folder's record."""
        part, target = self.work / RECORD, self.folder / RECORD
        with output_errors(target):
            part.write_text(record.text(), encoding="utf-8")
            os.replace(part, target)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty, or removed already by another song that failed
        folder.rmdir()


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a temporary folder whose process has ended."""
    with suppress(OSError):  # its process holds the lock, or is creating or removing the folder
        with lock(folder / _LOCK, wait=False):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # Windows keeps the lock file while it is open
