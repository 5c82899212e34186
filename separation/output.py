"""The folder that a song's stems go to: they appear there together and complete, or not at all."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from separation.encode import encode
from separation.errors import InputError, OutputError
from separation.waveform import Waveform

_LOCK = "lock"  # in a temporary folder, locked as long as its process lives


class OutputFolder:
    """Makes the folder and, hidden inside it and so on the same file system, a temporary one to `work` in.

    On leaving, the temporary folder goes and, if nothing came of the run, every folder that was made for it. What
    processes left that were killed goes when the folder is used again. Raises OutputError where that cannot be written.
    """

    work: Path

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cleaning = ExitStack()

    def __enter__(self) -> Self:
        try:
            for parent in reversed((self.folder, *self.folder.parents)):
                if not parent.exists():
                    parent.mkdir(parents=True, exist_ok=True)  # another song may just have removed the one above
                    self._cleaning.callback(_remove_if_empty, parent)
            for left in self.folder.glob(".separating-*"):
                _remove_if_left(left)
            self.work = Path(tempfile.mkdtemp(prefix=".separating-", dir=self.folder))
            self._cleaning.callback(shutil.rmtree, self.work, ignore_errors=True)
            # Under its name only once it is locked: before, another process would take it for a dead one's.
            lock = self._cleaning.enter_context(open(self.work / "unlocked", "x"))
            with suppress(OSError):  # a file system without locks: then nobody dares to remove it
                fcntl.flock(lock, fcntl.LOCK_EX)
                os.rename(lock.name, self.work / _LOCK)
        except OSError as e:
            self._cleaning.close()
            raise OutputError(f"cannot write into folder {str(self.folder)!r}: {e.strerror}: choose another") from e
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleaning.close()

    def check_targets(self, names: list[str], song: Path) -> None:
        """Raise before any work is done if a stem would take the place of the song itself or of a folder."""
        for target in (self.folder / name for name in names):
            if target.is_dir():
                raise OutputError(f"cannot write {str(target)!r}: a folder of that name is there; choose another place")
            if target.exists() and song.exists() and target.samefile(song):
                raise InputError(f"a stem would take the place of the song {song.name!r}: choose another output folder")

    def publish(self, parts: Mapping[str, Path]) -> dict[str, Path]:
        """Move finished files out of `work` to their place, over older ones; where one cannot be, none is."""
        published = {}
        with ExitStack() as undo:
            for stem, part in parts.items():
                published[stem] = target = self.folder / part.name
                try:
                    if os.path.lexists(target):
                        older = self.work / f"older-{part.name}"
                        os.replace(target, older)
                        undo.callback(os.replace, older, target)
                    else:
                        undo.callback(target.unlink, missing_ok=True)
                    os.replace(part, target)
                except OSError as e:
                    raise OutputError(f"cannot write {str(target)!r}: {e.strerror}; choose another folder") from e
            undo.pop_all()
        return published


class Encoders:
    """Encodes each stem into its part, in the format of the part's name, each in a thread of its own.

    They begin at once, with stems that are still to come, and `finish` ends them. In this thread, an exception that is
    thrown into it from outside (Ctrl-C, the container's cancel) would be lost inside the encoder's library. An
    exception inside the `with` block closes the stems, so that encoders that still run end at their next block.

    Args:
        clips: the format holds nothing beyond full scale, so that a loud stem may make a gain necessary.
        options: depths and bitrate as for `encode`.
    """

    def __init__(
        self, stems: Mapping[str, Waveform], parts: Mapping[str, Path], *, clips: bool, **options: Any
    ) -> None:
        self._stems, self._parts, self._clips, self._options = stems, parts, clips, options
        self._threads = ThreadPoolExecutor(max_workers=len(stems))
        self._jobs: dict[str, Future[None]] = {}

    def __enter__(self) -> Self:
        self._start(self._gain_so_far)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            for wave in self._stems.values():
                wave.close()
        self._threads.shutdown(cancel_futures=True)

    def check(self) -> None:
        """Raise what an encoder has failed with, if one has."""
        for job in self._jobs.values():
            if job.done():
                job.result()

    def finish(self, gain: float, progress: Callable[[int, str], None]) -> None:
        """Wait for the parts, whose samples have all come; with a gain other than 1 they are encoded again, scaled.

        `progress` is called with the number of stems done and the name of the next, and again while that is waited for:
        raise from it to cancel.
        """
        if gain != 1.0:
            self._wait(lambda _, stem: progress(0, next(iter(self._stems))))  # they give up at their next block
            self._start(gain)
        self._wait(progress)

    def _wait(self, progress: Callable[[int, str], None]) -> None:
        for done, (stem, job) in enumerate(self._jobs.items()):
            progress(done, stem)
            while wait([job], timeout=0.2).not_done:
                progress(done, stem)
            job.result()

    def _start(self, gain: float | Callable[[], float]) -> None:
        self._jobs = {stem: self._threads.submit(self._encode, stem, gain) for stem in self._stems}

    def _encode(self, stem: str, gain: float | Callable[[], float]) -> None:
        part = self._parts[stem]
        with suppress(_LoudError):
            encode(self._stems[stem], part, format=part.suffix[1:], gain=gain, **self._options)

    def _gain_so_far(self) -> float:
        """1 until a stem is known to exceed full scale: from then on nothing that is encoded without a gain is used."""
        if self._clips and any(wave.peak > 1.0 for wave in self._stems.values()):
            raise _LoudError
        return 1.0


class _LoudError(Exception):
    """A stem exceeds full scale."""


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, or another song's that failed has removed it
        folder.rmdir()


def _remove_if_left(folder: Path) -> None:
    """Remove a temporary folder whose process lives no more."""
    with suppress(OSError):  # its process is just making or removing it, or holds the lock
        with open(folder / _LOCK, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
