"""Output files: they appear complete or not at all, and never replace or write through somebody else's files."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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


@contextmanager
def present(folder: Path) -> Iterator[None]:
    """Create a folder and those above it that are missing; at the end, remove those of them that are empty."""
    with ExitStack() as cleaning:
        for parent in reversed((folder, *folder.parents)):
            if not parent.exists():
                parent.mkdir(parents=True, exist_ok=True)  # another song may have removed its parent
                cleaning.callback(_remove_if_empty, parent)
        yield


class OutputFolder:
    """A folder to write files to. Files are written in `work`, a hidden folder inside it, and then published.

    `work` is on the same file system, so that publishing a file only renames it. Entering the context creates both
    folders and removes what killed processes left behind. Leaving it removes `work` and, if nothing was published,
    every folder that was created.

    Args:
        folder: where files are published.
        overwrite: also replace files that this program did not write.
        record: the name of the record that lists the published files; None for no record.

    Raises:
        OutputError: the folder cannot be written to.
    """

    work: Path

    def __init__(self, folder: Path, *, overwrite: bool = False, record: str | None = RECORD) -> None:
        self.folder = folder
        self.overwrite = overwrite
        self.record = record
        self._cleaning = ExitStack()

    def __enter__(self) -> Self:
        with output_errors(self.folder), ExitStack() as on_error:
            on_error.callback(self._cleaning.close)
            self._cleaning.enter_context(present(self.folder))
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
                if not (work / _LOCK).exists():  # it waited for another process, which removed the folder
                    held.release()
                    continue
            except FileNotFoundError:  # another process removed the folder before it was locked
                continue
            except OSError:  # the file system has no locks, so no process removes the folder of another
                pass
            self._cleaning.callback(shutil.rmtree, work, ignore_errors=True)
            self._cleaning.callback(held.release)
            return work

    def check_targets(self, names: Sequence[str], song: Path | None = None) -> None:
        """Check that files with these names may be published; see `record.check_targets` for the errors."""
        record = [] if self.record is None else [self.record]
        name = self.record or RECORD
        check_targets(self.folder, [*names, *record], overwrite=self.overwrite, song=song, record_name=name)

    def publish(self, parts: Mapping[str, Path], names: Mapping[str, str] | None = None) -> dict[str, Path]:
        """Move finished files from `work` into the folder, over older ones. If one cannot be moved, none is.

        `names` are the files' names in the folder, which may have folders in them; None means their own names.
        """
        names = names or {stem: part.name for stem, part in parts.items()}
        self.check_targets([*names.values()])  # files may have appeared during the run
        if self.record is not None:  # first, so that a killed process never leaves an unrecorded file
            named = {names[stem]: part for stem, part in parts.items()}
            record = Record.read(self.folder, self.record).with_files(self.folder, named)
            self.write(record)
        published = {}
        with uninterrupted(), ExitStack() as undo:
            for number, (stem, part) in enumerate(parts.items()):
                published[stem] = target = self.folder / names[stem]
                with output_errors(target):
                    for parent in reversed(target.relative_to(self.folder).parents[:-1]):
                        (self.folder / parent).mkdir(exist_ok=True)
                        undo.callback(_remove_if_empty, self.folder / parent)
                    if os.path.lexists(target):
                        older = self.work / f"older-{number}"
                        os.replace(target, older)
                        undo.callback(os.replace, older, target)
                    else:
                        undo.callback(target.unlink, missing_ok=True)
                    os.replace(part, target)
            undo.pop_all()
        if self.record is not None and not all(record.vouches_for(self.folder, name) for name in names.values()):
            # Some network drives change a file's time when it is renamed.
            self.write(record.with_files(self.folder, {names[stem]: path for stem, path in published.items()}))
        return published

    def write(self, record: Record) -> None:
        """Replace the folder's record."""
        part, target = self.work / (self.record or RECORD), self.folder / (self.record or RECORD)
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
        if os.name == "nt":  # which keeps the lock file while it is open; elsewhere the folder may be another's by now
            shutil.rmtree(folder, ignore_errors=True)
