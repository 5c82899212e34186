"""How files get to their places: complete or not at all, and never over or through one that is somebody else's."""

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

_LOCK = "lock"  # in a temporary folder, locked as long as its process lives


def not_through_links(path: str, flags: int) -> int:
    """An opener, for `open`, that raises OSError where a symbolic link stands in the place of the file."""
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise OSError(e.errno, "a symbolic link of that name is there: remove it", path) from e
        raise


class OutputFolder:
    """Makes the folder and, hidden inside it and so on the same file system, a temporary one to `work` in.

    On leaving, the temporary folder goes and, if nothing came of the run, every folder that was made for it. What
    processes left that were killed goes when the folder is used again. Raises OutputError where that cannot be written.

    Args:
        overwrite: files may be replaced that this program did not write.
        recorded: what is published is entered into the folder's record.
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
                    parent.mkdir(parents=True, exist_ok=True)  # another song may just have removed the one above
                    self._cleaning.callback(_remove_if_empty, parent)
            for left in self.folder.glob(f"{WORK_PREFIX}*"):
                _remove_if_left(left)
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
            except FileNotFoundError:  # before it was locked, another process took it for a dead one's
                continue
            except OSError:  # a file system without locks: then nobody dares to remove it
                pass
            self._cleaning.callback(shutil.rmtree, work, ignore_errors=True)
            self._cleaning.callback(held.release)
            return work

    def check_targets(self, names: Sequence[str], song: Path | None = None) -> None:
        """Raise before any work is done if one of these names cannot be published, or would replace the song."""
        record = [RECORD] if self.recorded else []
        check_targets(self.folder, [*names, *record], overwrite=self.overwrite, song=song)

    def publish(self, parts: Mapping[str, Path]) -> dict[str, Path]:
        """Move finished files out of `work` to their place, over older ones; where one cannot be, none is."""
        self.check_targets([part.name for part in parts.values()])  # again, for the run took its time
        if self.recorded:  # first, so that no file of ours is ever there unrecorded, wherever we are killed
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
            # On some network drives a file that is renamed has another time.
            self.write(record.with_files(self.folder, published.values()))
        return published

    def write(self, record: Record) -> None:
        """Put a record in the place of the folder's."""
        part, target = self.work / RECORD, self.folder / RECORD
        with output_errors(target):
            part.write_text(record.text(), encoding="utf-8")
            os.replace(part, target)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, or another song's that failed has removed it
        folder.rmdir()


def _remove_if_left(folder: Path) -> None:
    """Remove a temporary folder whose process lives no more."""
    with suppress(OSError):  # its process is just making or removing it, or holds the lock
        with lock(folder / _LOCK, wait=False):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # what Windows keeps while it is open: the lock
