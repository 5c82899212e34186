"""The folder that a song's stems go to: they appear there together and complete, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from separation.audio import Waveform, encode
from separation.errors import InputError, OutputError


class OutputFolder:
    """Makes the folder and, hidden inside it and so on the same file system, a temporary one to `work` in.

    On leaving, the temporary folder goes and, if nothing came of the run, every folder that was made for it.
    Raises OutputError where that cannot be written.
    """

    work: Path

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cleaning = ExitStack()

    def __enter__(self) -> Self:
        try:
            for parent in reversed((self.folder, *self.folder.parents)):
                if not parent.exists():
                    parent.mkdir(exist_ok=True)
                    self._cleaning.callback(_remove_if_empty, parent)
            self.work = Path(tempfile.mkdtemp(prefix=".separating-", dir=self.folder))
        except OSError as e:
            self._cleaning.close()
            raise OutputError(f"cannot write into folder {str(self.folder)!r}: {e.strerror}: choose another") from e
        self._cleaning.callback(shutil.rmtree, self.work, ignore_errors=True)
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
    inside the encoder's library. `progress` is called with the number of stems done and the name of the next.
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
            job.result()
    except BaseException:
        for wave in stems.values():
            wave.close()  # so that encoders that still run end at their next block
        raise
    finally:
        encoders.shutdown(cancel_futures=True)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
