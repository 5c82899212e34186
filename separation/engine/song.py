"""The waveforms of one song: the mixture, the estimates, and the sums made of them."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from itertools import groupby, zip_longest
from operator import itemgetter
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from separation.audio.waveform import Growing, Waveform
from separation.engine.recipes import Combination, Estimate, Recipe
from separation.system.threads import Threads

BLOCK_SAMPLES = 65536  # that are added up at once


class Samples(Growing):
    """A waveform in memory: `[2, T]` float32 at 44100 Hz, appended block by block, or given as a whole."""

    def __init__(self, n_samples: int, whole: NDArray[np.float32] | None = None) -> None:
        super().__init__(n_samples, 0 if whole is None else n_samples)
        samples = np.empty((2, n_samples), dtype=np.float32) if whole is None else whole  # numpy asks for huge pages
        self.samples = torch.from_numpy(samples)

    @classmethod
    def of(cls, samples: Tensor) -> "Samples":
        """These samples on the CPU, without a copy if they are contiguous."""
        return cls(samples.shape[1], np.ascontiguousarray(samples.numpy()))

    def append(self, block: Tensor) -> None:
        self.samples[:, self._there : self._there + block.shape[1]] = block
        self._grow(block.shape[1])

    def read(self, start: int, stop: int) -> Tensor:
        self._wait(stop)
        return self.samples[:, start:stop]

    @property
    def peak(self) -> float:
        lowest, highest = torch.aminmax(self.samples)
        return max(-float(lowest), float(highest))

    @property
    def mean(self) -> float:
        return float(self._mono().mean())

    @property
    def std(self) -> float:
        return float(self._mono().std(ddof=1)) if self.n_samples > 1 else 0.0

    def _mono(self) -> NDArray[np.float64]:
        # In numpy, for sums in torch depend on the number of threads.
        mono: NDArray[np.float64] = np.add(*self.samples.numpy(), dtype=np.float64)
        mono /= 2
        return mono


Wave = TypeVar("Wave", Samples, Waveform)
Find = Callable[[Estimate], Wave | None]  # an estimate that is there from before, if it is
Keep = Callable[[Estimate, Wave], None]


class _Sum(Generic[Wave]):
    """Waveforms added up, each times its weight, as they are read."""

    def __init__(self, parts: list[tuple[Wave, float]]) -> None:
        self._parts: list[tuple[Wave, float]] = parts
        self.n_samples = parts[0][0].n_samples

    def read(self, start: int, stop: int) -> Tensor:
        total = torch.zeros(2, stop - start)
        for wave, weight in self._parts:
            total.add_(wave.read(start, stop), alpha=weight)
        return total

    def blocks(self) -> Iterator[Tensor]:
        for start in range(0, self.n_samples, BLOCK_SAMPLES):
            yield self.read(start, min(start + BLOCK_SAMPLES, self.n_samples))


class Song(Generic[Wave]):
    """The waveforms of a song: the mixture, what models estimate, and what is made of these.

    Inside the `with` block a thread makes what was asked for by `wave` and `fill`, and the inputs of runs, as the
    estimates come. An exception there closes all waveforms, so that who waits for more samples of one ends.

    Args:
        new: makes an empty waveform of the song's length.
        find: gives an estimate that is there from before, if it is.
    """

    def __init__(
        self, recipe: Recipe, mixture: Wave, new: Callable[[], Wave], find: "Find[Wave] | None" = None
    ) -> None:
        self.n_samples = mixture.n_samples
        self.estimates: dict[Estimate | None, Wave] = {None: mixture}
        self._new: Callable[[], Wave] = new
        self._sums: dict[Combination, Wave] = {}
        self._filled: list[tuple[int, Wave, Iterator[Tensor]]] = []  # by the number of the last run that is needed
        self._threads = Threads(max_workers=2)  # one makes sums, one does what is asked for
        self._filling: Future[None] | None = None
        self._jobs: list[Future[None]] = []

        def is_known(estimate: Estimate) -> bool:
            if find and (found := find(estimate)) is not None:
                self.estimates[estimate] = found
            return estimate in self.estimates

        self.runs = recipe.runs_without(is_known)
        self.estimates |= {Estimate(run, stem): new() for run, stems in self.runs.items() for stem in stems}
        for run in self.runs:
            self.wave(run.input)

    def wave(self, parts: Combination) -> Wave:
        """The sum, which the thread will make; or the one waveform that it is."""
        readable = self.readable(parts)
        if not isinstance(readable, _Sum):
            return readable
        if parts not in self._sums:
            self._sums[parts] = self._new()
            self.fill(self._sums[parts], parts, readable.blocks())
        return self._sums[parts]

    def readable(self, parts: Combination) -> "Wave | _Sum[Wave]":
        """The sum, added up anew whenever it is read; or the one waveform that it is."""
        if [weight for _, weight in parts] == [1.0]:
            return self.estimates[parts[0][0]]
        return _Sum([(self.estimates[estimate], weight) for estimate, weight in parts])

    def fill(self, wave: Wave, parts: Combination, blocks: Iterator[Tensor]) -> None:
        """Have the thread append blocks, which come of these estimates, to a waveform."""
        numbers = {run: number for number, run in enumerate(self.runs)}
        last = max((numbers.get(estimate.run, -1) for estimate, _ in parts if estimate), default=-1)
        self._filled.append((last, wave, blocks))

    def _fill(self) -> None:
        # Those that the same runs make grow together.
        for _, group in groupby(sorted(self._filled, key=itemgetter(0)), key=itemgetter(0)):
            for _ in zip_longest(*(_appending(wave, blocks) for _, wave, blocks in group)):
                pass

    def _filled_or_failed(self, filling: "Future[None]") -> None:
        """Once `check` knows the error, who waits for what will not come may end too."""
        if filling.exception():
            for _, wave, _ in self._filled:
                wave.close()

    def in_background(self, job: Callable[[], None]) -> None:
        self._jobs.append(self._threads.submit(job))

    def check(self) -> None:
        """Raise what a thread has failed with, if one has."""
        for job in (self._filling, *self._jobs):
            if job and job.done():
                job.result()

    def complete(self, parts: Combination) -> Wave:
        """The sum, once it is made."""
        wave = self.wave(parts)
        while not wave.is_complete(0.2):
            self.check()
        return wave

    def finish(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until all sums are made; `waiting` is called now and then: raise from it to cancel."""
        while self._filling and wait([self._filling], timeout=0.2).not_done:
            waiting()
        self.check()

    def __enter__(self) -> Self:
        if self._filled:
            self._filling = self._threads.submit(self._fill)
            self._filling.add_done_callback(self._filled_or_failed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        wait(self._jobs)  # what a run gave is kept, whatever comes after it
        if error is not None:
            for wave in (*self.estimates.values(), *(wave for _, wave, _ in self._filled)):
                wave.close()
        self._threads.shutdown()
        if error is None:
            self.check()


def _appending(wave: Wave, blocks: Iterator[Tensor]) -> Iterator[None]:
    for block in blocks:
        wave.append(block)
        yield
