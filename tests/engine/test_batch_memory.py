"""batch_memory: batch sizes follow from a GPU's memory, and batches that do not fit are split."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from separation.engine.batch_memory import FittingModel, chunk_memory_bytes, fitting_batch_size, halving
from separation.errors import EstimateError

CPU = torch.device("cpu")


def two_stems(batch: Tensor) -> Tensor:
    return torch.stack([batch.sin() + batch.amax(-1, keepdim=True), batch.flip(-1)], dim=1)


class SmallGpu:
    """A model on a GPU whose memory holds batches of `room` chunks."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sizes: list[int] = []  # of the batches that were tried

    def __call__(self, batch: Tensor) -> Tensor:
        self.sizes.append(len(batch))
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return two_stems(batch)


@pytest.mark.parametrize(
    "total_gib, fraction, chunk_gib, expected",
    [
        (140, 1.0, 0.7, 8),
        (24, 1.0, 1.7, 4),
        (16, 1.0, 0.7, 4),
        (80, 0.075, 0.63, 2),
        (6, 1.0, 2.4, 1),
        (140, 1.0, 0, 8),
    ],
)
def test_a_batch_is_a_power_of_two_and_takes_at_most_a_third_of_the_gpus_memory(
    total_gib: float, fraction: float, chunk_gib: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=int(total_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda gpu: fraction)
    assert fitting_batch_size(int(chunk_gib * 2**30), torch.device("cuda")) == expected


def test_the_memory_of_a_chunk_is_what_computing_one_more_takes(gpu_statistics: None) -> None:
    seen: list[Tensor] = []

    def model(batch: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()  # otherwise what gradients need would be measured too
        seen.append(batch)
        return two_stems(batch)

    # The statistics are a GPU's, the computation is the CPU's.
    assert chunk_memory_bytes(model, 2, 1000, CPU) == 700
    assert [chunk.shape for chunk in seen] == [(1, 2, 1000)] * 2  # the first creates everything that stays
    with pytest.raises(EstimateError, match="does not hold one chunk of 1000 samples"):
        chunk_memory_bytes(SmallGpu(0), 2, 1000, CPU)


def test_a_batch_that_does_not_fit_is_split_and_so_are_all_later_batches(caplog: pytest.LogCaptureFixture) -> None:
    gpu, batch = SmallGpu(3), torch.randn(8, 2, 100)
    model = FittingModel(gpu, 8)
    for sizes in ([8, 4, 2, 2, 2, 2], [2, 2, 2, 2]):
        gpu.sizes.clear()
        assert torch.equal(model(batch), two_stems(batch))
        assert gpu.sizes == sizes
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "the GPU's memory does not hold a batch of 8 chunks: continuing with batches of 4",
        "the GPU's memory does not hold a batch of 4 chunks: continuing with batches of 2",
    ]


def test_a_small_batch_does_not_change_the_size_of_later_ones() -> None:
    gpu = SmallGpu(8)
    model = FittingModel(gpu, 8)
    for size in (2, 8):
        model(torch.randn(size, 2, 100))
    assert gpu.sizes == [2, 8]


def test_one_chunk_that_does_not_fit_is_an_error_that_says_what_to_do() -> None:
    words = (
        "^the memory of cpu does not hold one chunk of 100 samples: choose a smaller chunk size, "
        "precision bf16 or fp16, or device cpu$"
    )
    with pytest.raises(EstimateError, match=words) as raised:
        FittingModel(SmallGpu(0), 4)(torch.randn(4, 2, 100))
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_are_not_retried() -> None:
    tried: list[int] = []

    def compute(size: int) -> None:
        tried.append(size)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        halving(compute, 8, 100, CPU)
    assert tried == [8]
