"""A song's stems encoded, each in a thread of its own."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from separation.audio.encode import encode
from separation.audio.options import OutputOptions
from separation.audio.waveform import Waveform
from separation.progress import Progress
from separation.system.threads import Threads


class Encoders:
    """Encodes each stem into its part, in the format of the part's name, each in a thread of its own.

    They begin at once, with stems that are still to come, and `finish` ends them. In this thread, an exception that is
    thrown into it from outside (Ctrl-C, the container's cancel) would be lost inside the encoder's library. An
    exception inside the `with` block closes the stems, so that encoders that still run end at their next block.

    Args:
        parts, tags: by stem.
        options: as for `encode`; if the format clips, a loud stem may make a gain necessary.
    """

    def __init__(
        self,
        stems: Mapping[str, Waveform],
        parts: Mapping[str, Path],
        tags: Mapping[str, Mapping[str, str]],
        options: OutputOptions,
    ) -> None:
        self._stems, self._parts, self._tags, self._options = stems, parts, tags, options
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
        """Raise what an encoder has failed with, if one has."""
        for job in self._jobs.values():
            if job.done():
                job.result()

    def finish(self, gain: float, progress: Progress) -> None:
        """Wait for the parts, whose samples have all come; with a gain other than 1 they are encoded again, scaled.

        `progress` is called before each stem and again and again while it is waited for: raise from it to cancel.
        """
        if gain != 1.0:
            self._wait(progress.part(0, 0))  # they give up at their next block
            self._start(gain)
        self._wait(progress)

    def _wait(self, progress: Progress) -> None:
        for done, (stem, job) in enumerate(self._jobs.items()):
            progress(done / len(self._jobs), f"writing {stem}")
            while wait([job], timeout=0.2).not_done:
                progress(done / len(self._jobs), f"writing {stem}")
            job.result()

    def _start(self, gain: float | Callable[[], float]) -> None:
        self._jobs = {stem: self._threads.submit(self._encode, stem, gain) for stem in self._stems}

    def _encode(self, stem: str, gain: float | Callable[[], float]) -> None:
        part = self._parts[stem]
        with suppress(_LoudError):
            encode(self._stems[stem], part, self._options, tags=self._tags[stem], gain=gain)

    def _gain_so_far(self) -> float:
        """1 until a stem is known to exceed full scale: from then on nothing that is encoded without a gain is used."""
        if self._options.clips and any(wave.peak > 1.0 for wave in self._stems.values()):
            raise _LoudError
        return 1.0


class _LoudError(Exception):
    """A stem exceeds full scale."""
