"""The waveforms of one song: the mixture, the models' estimates, and what a recipe makes of them."""

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

from separation.audio.waveform import BLOCK_SAMPLES, Growing, Waveform
from separation.engine.ensembles import combined
from separation.engine.recipes import Combination, Ensemble, Estimate, Recipe, Run, runs_in
from separation.system.threads import Threads


class Samples(Growing):
    """A waveform in memory: `[2, T]` float32 at 44100 Hz, appended block by block, or given as a whole."""

    def __init__(self, n_samples: int, whole: NDArray[np.float32] | None = None) -> None:
        super().__init__(n_samples, 0 if whole is None else n_samples)
        samples = np.empty((2, n_samples), dtype=np.float32) if whole is None else whole  # numpy asks for huge pages
        self.samples: Tensor = torch.from_numpy(samples)

    @classmethod
    def of(cls, samples: Tensor) -> "Samples":
        """These samples on the CPU, `[2, T]`, without a copy if they are contiguous."""
        return cls(samples.shape[1], np.ascontiguousarray(samples.numpy()))

    def append(self, block: Tensor) -> None:
        """Append `[2, n]` float32."""
        self.samples[:, self._there : self._there + block.shape[1]] = block
        self._grow(block.shape[1])

    def read(self, start: int, stop: int) -> Tensor:
        """Samples `[start, stop)`, `[2, stop - start]`; waits for samples that are still missing."""
        self._wait(stop)
        return self.samples[:, start:stop]

    @property
    def peak(self) -> float:
        """The largest magnitude; NaN if there is a NaN."""
        lowest, highest = torch.aminmax(self.samples)
        return max(-float(lowest), float(highest))

    @property
    def mean(self) -> float:
        """The mean of the mono mixture."""
        return float(self._mono().mean())

    @property
    def std(self) -> float:
        """The unbiased standard deviation of the mono mixture; 0 for fewer than two samples."""
        return float(self._mono().std(ddof=1)) if self.n_samples > 1 else 0.0

    def _mono(self) -> NDArray[np.float64]:
        # In numpy, because sums in torch depend on the number of threads.
        mono: NDArray[np.float64] = np.add(*self.samples.numpy(), dtype=np.float64)
        mono /= 2
        return mono


Wave = TypeVar("Wave", Samples, Waveform)


class _WeightedSum(Generic[Wave]):
    """A weighted sum of waveforms, computed whenever it is read."""

    def __init__(self, parts: "list[tuple[Wave | _Combined[Wave], float]]") -> None:
        self._parts: list[tuple[Wave | _Combined[Wave], float]] = parts
        self.n_samples: int = parts[0][0].n_samples

    def read(self, start: int, stop: int) -> Tensor:
        total = torch.zeros(2, stop - start)
        for wave, weight in self._parts:
            total.add_(wave.read(start, stop), alpha=weight)
        return total

    def blocks(self) -> Iterator[Tensor]:
        for start in range(0, self.n_samples, BLOCK_SAMPLES):
            yield self.read(start, min(start + BLOCK_SAMPLES, self.n_samples))


class _Combined(Generic[Wave]):
    """An ensemble, stored in a waveform as far as it has been read. Only the thread that fills waveforms reads it."""

    def __init__(self, wave: Wave, blocks: Iterator[Tensor]) -> None:
        self.wave: Wave = wave
        self.n_samples: int = wave.n_samples
        self._blocks, self._there = blocks, 0

    def read(self, start: int, stop: int) -> Tensor:
        self._extend(stop)
        return self.wave.read(start, stop)

    def growing(self) -> Iterator[None]:
        """Steps that compute the whole ensemble."""
        for stop in range(BLOCK_SAMPLES, self.n_samples + BLOCK_SAMPLES, BLOCK_SAMPLES):
            self._extend(min(stop, self.n_samples))
            yield

    def _extend(self, stop: int) -> None:
        while self._there < stop:
            block = next(self._blocks)
            self.wave.append(block)
            self._there += block.shape[1]


class SongWaveforms(Generic[Wave]):
    """The waveforms of one song: the mixture, the models' estimates, and sums and ensembles of them.

    Sums are requested with `sum_of` and `fill`. Inside the `with` block, a thread computes them as the estimates grow.
    If it fails, or an exception leaves the block, the waveforms are closed, so that their readers stop waiting.

    Args:
        new: returns an empty waveform of the song's length.
        find: returns a cached estimate, or None.

    Attributes:
        estimates: the waveform of each estimate; that of None is the mixture.
        runs: the model runs that are needed because their estimates are not cached, in order, each with its stems.
    """

    def __init__(
        self,
        recipe: Recipe,
        mixture: Wave,
        new: Callable[[], Wave],
        find: Callable[[Estimate], Wave | None] = lambda estimate: None,
    ) -> None:
        self.n_samples: int = mixture.n_samples
        self.estimates: dict[Estimate | None, Wave] = {None: mixture}
        self._new: Callable[[], Wave] = new
        self._sums: dict[Combination, Wave] = {}
        self._ensembles: dict[Ensemble, _Combined[Wave]] = {}
        self._to_fill: list[tuple[int, Wave, Iterator[None]]] = []  # with the number of the last run that is needed
        self._threads = Threads(max_workers=2)  # one for the sums, one for background jobs
        self._filling: Future[None] | None = None
        self._jobs: list[Future[None]] = []

        def is_cached(estimate: Estimate) -> bool:
            if (cached := find(estimate)) is not None:
                self.estimates[estimate] = cached
            return cached is not None

        self.runs: dict[Run, tuple[str, ...]] = recipe.runs_without(is_cached)
        self.estimates |= {Estimate(run, stem): new() for run, stems in self.runs.items() for stem in stems}
        for run in self.runs:
            self.sum_of(run.input)

    def sum_of(self, parts: Combination) -> Wave:
        """The waveform of a sum, which the thread fills. A single part with weight 1 is returned as it is."""
        readable = self.readable(parts)
        if isinstance(readable, _Combined):
            return readable.wave
        if not isinstance(readable, _WeightedSum):
            return readable
        if parts not in self._sums:
            self._sums[parts] = self._new()
            self.fill(self._sums[parts], parts, readable.blocks())
        return self._sums[parts]

    def readable(self, parts: Combination) -> "Wave | _WeightedSum[Wave] | _Combined[Wave]":
        """The sum as something for the thread to read from once: it is not stored, but computed by each read."""
        if [weight for _, weight in parts] == [1.0]:
            return self._part(parts[0][0])
        return _WeightedSum([(self._part(part), weight) for part, weight in parts])

    def fill(self, wave: Wave, parts: Combination, blocks: Iterator[Tensor]) -> None:
        """Have the thread append `blocks`, which are computed from `parts`, to a waveform."""
        self._to_fill.append((self._last_run(parts), wave, _appending(wave, blocks)))

    def _part(self, part: Estimate | Ensemble | None) -> "Wave | _Combined[Wave]":
        if not isinstance(part, Ensemble):
            return self.estimates[part]
        if part not in self._ensembles:
            blocks = combined(part.rule, [self.readable(each) for each in part.parts])
            ensemble = self._ensembles[part] = _Combined(self._new(), blocks)
            self._to_fill.append((self._last_run(((part, 1.0),)), ensemble.wave, ensemble.growing()))
        return self._ensembles[part]

    def _last_run(self, parts: Combination) -> int:
        """The number of the last run that is needed for a sum; -1 if none is."""
        numbers = {run: number for number, run in enumerate(self.runs)}
        return max((numbers.get(run, -1) for run in runs_in(parts)), default=-1)

    def wait_for(self, parts: Combination) -> Wave:
        """The waveform of a sum, once it is complete. Raises the error of a thread that failed."""
        wave = self.sum_of(parts)
        while not wave.is_complete(0.2):
            self.check()
        return wave

    def finish(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until all sums are complete; `waiting` is called every 0.2 s: raise from it to cancel."""
        while self._filling and wait([self._filling], timeout=0.2).not_done:
            waiting()
        self.check()

    def in_background(self, job: Callable[[], None]) -> None:
        """Run a job on another thread. The end of the `with` block waits for it."""
        self._jobs.append(self._threads.submit(job))

    def check(self) -> None:
        """Raise the error of a thread that failed, if there is one."""
        for job in (self._filling, *self._jobs):
            if job and job.done():
                job.result()

    def _fill(self) -> None:
        # Waveforms that need the same runs grow together.
        for _, group in groupby(sorted(self._to_fill, key=itemgetter(0)), key=itemgetter(0)):
            for _ in zip_longest(*(steps for _, _, steps in group)):
                pass

    def _close_if_failed(self, filling: "Future[None]") -> None:
        # As a callback of the future: by the time that readers stop waiting, `check` raises the cause.
        if filling.exception():
            for _, wave, _ in self._to_fill:
                wave.close()

    def __enter__(self) -> Self:
        if self._to_fill:
            self._filling = self._threads.submit(self._fill)
            self._filling.add_done_callback(self._close_if_failed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        wait(self._jobs)  # finished estimates are cached, whatever happens later
        if error is not None:
            for wave in (*self.estimates.values(), *(wave for _, wave, _ in self._to_fill)):
                wave.close()
        self._threads.shutdown()
        if error is None:
            self.check()


def _appending(wave: Wave, blocks: Iterator[Tensor]) -> Iterator[None]:
    for block in blocks:
        wave.append(block)
        yield
