"""The one thread that runs all work on a CUDA GPU.

PyTorch keeps cuDNN's plans and cuBLAS's handles per thread: a new thread for each song would have to create them again.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

import torch

from separation.device import make_cuda_deterministic
from separation.system.threads import Threads

P = ParamSpec("P")
T = TypeVar("T")


class ComputeThread:
    """A thread that runs the jobs of a device one after the other, for as long as the program lives."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._executor = Threads(1, f"compute on {device}", self._begin)

    def _begin(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def submit(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a job."""
        return self._executor.submit(job, *args, **kwargs)

    def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Queue a job and wait for its result."""
        return self.submit(job, *args, **kwargs).result()


_threads: dict[torch.device, ComputeThread] = {}
_threads_lock = threading.Lock()


def compute_thread(device: torch.device) -> ComputeThread:
    """The compute thread of a device; started by the first call."""
    if device.type == "cuda":
        make_cuda_deterministic()
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    with _threads_lock:
        if device not in _threads:
            _threads[device] = ComputeThread(device)
        return _threads[device]
