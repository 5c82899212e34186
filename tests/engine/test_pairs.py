"""Two batches at a time: the order of results, the threads, and what happens at an error or a stop."""

import threading
from collections.abc import Iterator

import pytest
import torch

from separation.engine import pairs
from separation.engine.pairs import in_pairs, pairs_help

TIMEOUT = 60  # seconds


@pytest.fixture(params=[2, 3, 6])
def total(request: pytest.FixtureRequest) -> Iterator[int]:
    """PyTorch's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def threads_elsewhere() -> int:
    """PyTorch's number of threads in a new thread."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_two_threads_use_half_of_pytorchs_threads_each_the_caller_one_and_others_all(total: int) -> None:
    both = threading.Barrier(2, timeout=TIMEOUT)

    def job(item: int) -> tuple[int, int, int]:
        both.wait()
        torch.ones(300, 300).softmax(-1)  # with OpenMP
        return item, threading.get_ident(), torch.get_num_threads()

    found = []
    for result in in_pairs(job, range(8)):
        found.append(result)
        assert (torch.get_num_threads(), threads_elsewhere()) == (1, total)
    assert torch.get_num_threads() == threads_elsewhere() == total
    items, threads, shares = zip(*found, strict=True)
    assert items == tuple(range(8))
    assert len(set(threads)) == 2 and threading.get_ident() not in threads
    assert set(shares) == {-(-total // 2)}


def test_a_batch_that_takes_long_does_not_hold_up_the_other_thread() -> None:
    two_more, third = threading.Semaphore(0), threading.Event()

    def job(item: int) -> bool:
        if item == 0:
            return all(two_more.acquire(timeout=TIMEOUT) for _ in range(2)) and third.wait(TIMEOUT)
        third.set() if item == 3 else two_more.release()
        return True

    assert list(in_pairs(job, range(4))) == [True] * 4


def test_items_are_taken_only_a_few_ahead_of_the_results() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    for result in in_pairs(lambda item: item, items()):
        assert len(taken) <= result + pairs.MOST_BATCHES
    assert len(taken) == 20


class Endless:
    """A job that runs until it is stopped."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.running: set[int] = set()

    def __call__(self, item: int) -> int:
        self.running.add(item)
        self.begun.release()
        try:
            while True:
                torch.ones(100).sum()
        finally:
            self.running.discard(item)


def test_closing_stops_running_jobs_and_cancels_the_others() -> None:
    endless = Endless()
    results = in_pairs(lambda item: endless(item) if item else item, range(10))
    assert next(results) == 0
    assert endless.begun.acquire(timeout=TIMEOUT) and endless.begun.acquire(timeout=TIMEOUT)
    results.close()
    assert not endless.running and not endless.begun.acquire(blocking=False)


def test_an_error_in_one_job_stops_the_other() -> None:
    endless = Endless()

    def job(item: int) -> int:
        if item:
            return endless(item)
        assert endless.begun.acquire(timeout=TIMEOUT)
        return 1 // item

    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(in_pairs(job, range(10)))
    assert not endless.running and torch.get_num_threads() == threads


def test_a_thread_that_cannot_start_is_an_error_and_leaves_none_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def start_one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        list(in_pairs(lambda item: item, range(3)))
    assert not started[0].is_alive() and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "openmp, threads, memory_gib, expected",
    [(True, 2, 8, True), (True, 64, 100, True), (True, 1, 8, False), (True, 2, 7.9, False), (False, 2, 8, False)],
)
def test_pairs_need_several_threads_that_can_be_divided_and_memory(
    openmp: bool, threads: int, memory_gib: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: openmp)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(pairs, "total_memory_bytes", lambda: round(memory_gib * 2**30))
    assert pairs_help() is expected
