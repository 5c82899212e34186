"""Timing by CUDA events for batches and by the host's clock for songs, and profiles of the device."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from separation.device import peak_memory_bytes

WARM_UPS, RUNS = 2, 7  # of a batch
NAME_CHARACTERS = 60  # of a kernel's name


@dataclass(frozen=True)
class Milliseconds:
    """Median times of a job: until the device has finished it, and until the host has launched it."""

    device: float
    host: float


@dataclass(frozen=True)
class Kernel:
    """All launches of a kernel."""

    name: str
    launches: int
    milliseconds: float


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batch_milliseconds(job: Callable[[], object], device: torch.device, runs: int = RUNS) -> Milliseconds:
    """Time a job that computes a batch, after warm-ups (none for a single run); waits for each run."""
    for _ in range(WARM_UPS if runs > 1 else 0):
        job()
    synchronise(device)
    on_device, on_host = [], []
    for _ in range(runs):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            started = time.perf_counter()
            begin.record()
            job()
            end.record()
            on_host.append(time.perf_counter() - started)
            end.synchronize()
            on_device.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            job()
            on_host.append(time.perf_counter() - started)
            on_device.append(on_host[-1] * 1e3)
    return Milliseconds(statistics.median(on_device), statistics.median(on_host) * 1e3)


def song_seconds(job: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    """The time of each run of a job that starts and ends on the host."""
    times = []
    for _ in range(runs):
        synchronise(device)
        started = time.perf_counter()
        job()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return times


def forget_peak(device: torch.device) -> None:
    """Reset `peak_mib`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def clean_memory(device: torch.device) -> None:
    """Release PyTorch's cached memory and reset the peak."""
    forget_peak(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory_mib(device: torch.device) -> int:
    """The memory of tensors on a CUDA GPU; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) >> 20 if device.type == "cuda" else 0


def peak_mib(device: torch.device) -> int:
    """The peak memory: of tensors on a CUDA GPU since `forget_peak`, elsewhere of the whole process."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes(device)
    return peak >> 20


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute in true float32, without TF32, for a reference."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@contextmanager
def card_of(total_bytes: int, device: torch.device) -> Iterator[None]:
    """Make the GPU look as if it had no more memory than this, to PyTorch's allocator and in the driver's report."""
    clean_memory(device)
    real_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(total_bytes / real_bytes, device)

    def mem_get_info(*_: object) -> tuple[int, int]:
        return max(0, total_bytes - torch.cuda.memory_reserved(device)), total_bytes

    try:
        with mock.patch.object(torch.cuda, "mem_get_info", mem_get_info):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        clean_memory(device)


def busy_share(job: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """The share of a job's time in which the GPU is busy, and the number of its kernels and copies.

    Overlapping spans count once. The profiler slows the host down, so the true share is at least as large.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        (wall,) = song_seconds(job, device, 1)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
    )
    busy = reached = 0.0  # microseconds
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6 / wall, len(spans)


def kernels(job: Callable[[], object], device: torch.device) -> list[Kernel]:
    """The kernels that a job runs, the slowest first."""
    job()
    synchronise(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        job()
        synchronise(device)
    found = [
        Kernel(event.key[:NAME_CHARACTERS], event.count, event.self_device_time_total / 1e3)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(found, key=lambda kernel: -kernel.milliseconds)
