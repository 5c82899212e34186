"""Encodes a song's stems in parallel, while they still grow."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from separation.audio.encode import encode
from separation.audio.metadata import Metadata
from separation.audio.options import OutputOptions
from separation.audio.waveform import Waveform
from separation.progress import Progress
from separation.system.threads import Threads


class Encoders:
    """Encodes each stem into a file, on a thread of its own.

    Encoding starts with the `with` block and waits for samples that are still missing; `finish` waits for the files. If
    an exception leaves the block, the stems are closed, so that the encoders stop at their next block.

    The caller's thread never encodes: an exception that is raised in it from outside, such as Ctrl-C or the container's
    cancellation, would be lost inside the encoder's library.

    Args:
        stems: by name.
        files: the paths to write, by stem.
        metadata: tags and cover, by stem.
        options: see `encode`.
    """

    def __init__(
        self,
        stems: Mapping[str, Waveform],
        files: Mapping[str, Path],
        metadata: Mapping[str, Metadata],
        options: OutputOptions,
    ) -> None:
        self._stems, self._files, self._metadata, self._options = stems, files, metadata, options
        self._threads = Threads(max_workers=len(stems))
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
        """Raise the error of an encoder that failed, if there is one."""
        for job in self._jobs.values():
            if job.done():
                job.result()

    def finish(self, gain: float, progress: Progress) -> None:
        """Wait for the files. Call it when the stems are complete.

        Args:
            gain: what the samples are multiplied by. If it is not 1, all stems are encoded again.
            progress: called before each stem and every 0.2 s; raise from it to cancel.
        """
        if gain != 1.0:
            self._wait(progress.part(0, 0))  # the encoders stop at their next block
            self._start(gain)
        self._wait(progress)

    def _wait(self, progress: Progress) -> None:
        for n_done, (stem, job) in enumerate(self._jobs.items()):
            progress(n_done / len(self._jobs), f"writing {stem}")
            while wait([job], timeout=0.2).not_done:
                progress(n_done / len(self._jobs), f"writing {stem}")
            job.result()

    def _start(self, gain: float | Callable[[], float]) -> None:
        self._jobs = {stem: self._threads.submit(self._encode, stem, gain) for stem in self._stems}

    def _encode(self, stem: str, gain: float | Callable[[], float]) -> None:
        with suppress(_LoudError):
            about = self._metadata[stem]
            encode(self._stems[stem], self._files[stem], self._options, tags=about.tags, cover=about.cover, gain=gain)

    def _gain_so_far(self) -> float:
        """1, unless a stem is known to clip. Then all stems will be encoded again with a gain, so encoding stops."""
        if self._options.clips and any(wave.peak > 1.0 for wave in self._stems.values()):
            raise _LoudError
        return 1.0


class _LoudError(Exception):
    """A stem exceeds full scale."""
