"""Computes two batches at a time on a CPU, each on half of the threads.

PyTorch splits each operation into equal parts, one a thread, and waits for the slowest. If another process is busy on
one core, the thread that shares it needs twice as long for its part, and all other threads wait. With two batches, only
the threads of one batch wait, and the other batch does not: it takes more than half of the batches.
"""

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch

from separation.system.memory import total_memory_bytes
from separation.system.threads import Threads

Item = TypeVar("Item")
Result = TypeVar("Result")

LEAST_MEMORY_BYTES = 8 * 2**30  # of the machine: a chunk takes up to 2 GiB
# Batches that are waiting, in work or done. While one thread computes a batch, the other can compute two and start a
# third.
MOST_BATCHES = 4


def pairs_help() -> bool:
    """Whether this machine has the threads and the memory for two batches at a time.

    Depends on nothing that changes, because the number of threads may change the rounding.
    """
    can_divide_threads = torch.backends.openmp.is_available()
    return can_divide_threads and torch.get_num_threads() > 1 and total_memory_bytes() >= LEAST_MEMORY_BYTES


def in_pairs(job: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
    """The results of `job` for each item, in order. Two threads run it, each with half of PyTorch's threads.

    Meanwhile PyTorch uses one thread in the caller's own: its idle threads might spin and take cores from the jobs.
    If the generator is closed or a job fails, running jobs are stopped once their current operation is done.
    """
    n_threads = torch.get_num_threads()
    stoppable = _Stoppable(job)
    results: deque[Future[Result]] = deque()
    with Threads(2, "compute") as threads:
        try:
            _divide_threads(threads, n_threads)
            for item in items:
                results.append(threads.submit(stoppable, item))
                if len(results) == MOST_BATCHES:
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
        finally:
            torch.set_num_threads(n_threads)
            for result in results:
                result.cancel()
            stoppable.stop()
            results.clear()  # an error in one of them and this frame would keep each other alive


def _divide_threads(threads: Threads, n_threads: int) -> None:
    """Set the number of PyTorch's threads in two threads, to half, and in this one, to 1."""
    both = threading.Barrier(2)

    def begin(share: int) -> None:
        torch.get_num_threads()  # on first use, PyTorch sets a thread's number to the one that was set last in any
        torch.set_num_threads(share)
        both.wait()

    share = -(-n_threads // 2)  # the same for both, so that it does not matter which of them computes a batch
    try:
        torch.set_num_threads(1)
        list(threads.map(begin, [share, share]))
    except BaseException:
        both.abort()  # the second thread has not started
        raise
    with Threads(1) as another:  # threads that start elsewhere take the number that was set last
        another.submit(torch.set_num_threads, n_threads).result()


class _Stopped(BaseException):
    """Ends a job."""


class _Stoppable(Generic[Item, Result]):
    """A job that another thread can stop, wherever it is running."""

    def __init__(self, job: Callable[[Item], Result]) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._running: set[int] = set()  # threads
        self._is_stopped = False

    def __call__(self, item: Item) -> Result:
        thread = threading.get_ident()
        try:
            with self._lock:
                if self._is_stopped:
                    raise _Stopped
                self._running.add(thread)
            return self._job(item)
        finally:
            with self._lock:  # after this, `stop` does not interrupt the thread any more
                self._running.discard(thread)

    def stop(self) -> None:
        """Raise an exception in each thread that runs the job, once its current operation is done."""
        with self._lock:
            self._is_stopped = True
            for thread in self._running:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Stopped))
