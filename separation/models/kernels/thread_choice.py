"""How many threads a kernel should use: all of them, or half if that is faster.

Threads that share a core also share its caches and its units for products, so half of them can be faster.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

_CLEARLY = 0.9  # half the threads must need at most this share of the time


@dataclass
class _Trial:
    """The times of one kind of work."""

    all_seconds: list[float] = field(default_factory=list)
    half_seconds: float | None = None


class ThreadChoice:
    """Measures work that repeats. Its result must not depend on the number of threads.

    The first call warms up. The second and fourth use all threads and the third half of them; later calls use what was
    faster.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._trials: dict[Hashable, _Trial] = {}

    def run(self, kind: Hashable, threads: int, work: Callable[[int], object]) -> None:
        """Call `work` with a number of threads, at most `threads`. Work of the same `kind` takes the same time."""
        if threads < 2:
            work(threads)
            return
        trial = self._trials.setdefault((kind, threads), _Trial())
        if len(trial.all_seconds) == 3:
            work(self._best(trial, threads))
            return
        is_half = len(trial.all_seconds) == 2 and trial.half_seconds is None
        started = self._clock()
        work(threads // 2 if is_half else threads)
        seconds = self._clock() - started
        if is_half:
            trial.half_seconds = seconds
        else:
            trial.all_seconds.append(seconds)

    @staticmethod
    def _best(trial: _Trial, threads: int) -> int:
        assert trial.half_seconds is not None
        is_better = trial.half_seconds <= _CLEARLY * min(trial.all_seconds[1:])
        return threads // 2 if is_better else threads
