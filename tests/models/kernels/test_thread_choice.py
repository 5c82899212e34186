"""Half the threads are used where they are clearly faster."""

from collections.abc import Callable

import pytest

from separation.models.kernels.thread_choice import ThreadChoice


class Clock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def worker(clock: Clock, seconds: dict[int, float], used: list[int]) -> Callable[[int], None]:
    """Work that takes so many seconds on so many threads, and notes on how many it was called."""

    def work(threads: int) -> None:
        used.append(threads)
        clock.seconds += seconds[threads]

    return work


@pytest.mark.parametrize("half, chosen", [(0.8, 4), (0.95, 8), (2.0, 8)])
def test_half_the_threads_are_used_if_they_are_clearly_faster(half: float, chosen: int) -> None:
    clock, used = Clock(), []
    choice = ThreadChoice(clock)
    for _ in range(6):
        choice.run("layer", 8, worker(clock, {8: 1.0, 4: half}, used))
    assert used == [8, 8, 4, 8, chosen, chosen]


def test_a_slow_call_on_all_threads_does_not_count() -> None:
    """Another process may have disturbed it."""
    clock, used = Clock(), []
    choice = ThreadChoice(clock)
    for all_seconds in (9.0, 3.0, 0.0, 1.0, 1.0):
        choice.run("layer", 2, worker(clock, {2: all_seconds, 1: 1.0}, used))
    assert used == [2, 2, 1, 2, 2]


def test_each_kind_of_work_and_number_of_threads_is_measured_by_itself() -> None:
    clock, used = Clock(), []
    choice = ThreadChoice(clock)
    for _ in range(5):
        for kind, half in (("time", 0.5), ("bands", 2.0)):
            choice.run(kind, 2, worker(clock, {2: 1.0, 1: half}, used))
        choice.run("time", 1, worker(clock, {1: 1.0}, used))
    assert used[-3:] == [1, 2, 1]
    assert used.count(1) == 5 + 1 + 1 + 1  # one thread each time, a trial of each kind, and the choice
