"""The folder that a song's stems go to: they appear there together and complete, or not at all."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from separation.audio import Waveform, encode
from separation.errors import InputError, OutputError

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


def encode_all(
    stems: Mapping[str, Waveform],
    parts: Mapping[str, Path],
    *,
    gain: float,
    mp3_bitrate: int,
    wav_depth: str,
    progress: Callable[[int, str], None],
) -> None:
    """Encode each stem into its part, in the format of the part's name, side by side, each in a thread of its own.

    In this thread, an exception that is thrown into it from outside (Ctrl-C, the container's cancel) would be lost
    inside the encoder's library. `progress` is called with the number of stems done and the name of the next, and again
    while that is waited for: raise from it to cancel.
    """
    encoders = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        jobs = {
            stem: encoders.submit(
                encode,
                wave,
                parts[stem],
                format=parts[stem].suffix[1:],
                gain=gain,
                mp3_bitrate=mp3_bitrate,
                wav_depth=wav_depth,
            )
            for stem, wave in stems.items()
        }
        for done, (stem, job) in enumerate(jobs.items()):
            progress(done, stem)
            while wait([job], timeout=0.2).not_done:
                progress(done, stem)
            job.result()
    except BaseException:
        for wave in stems.values():
            wave.close()  # so that encoders that still run end at their next block
        raise
    finally:
        encoders.shutdown(cancel_futures=True)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty, or another song's that failed has removed it
        folder.rmdir()


def _remove_if_left(folder: Path) -> None:
    """Remove a temporary folder whose process lives no more."""
    with suppress(OSError):  # its process is just making or removing it, or holds the lock
        with open(folder / _LOCK, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
