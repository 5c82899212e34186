"""Batches that fit into a GPU's memory."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from separation.device import is_out_of_memory, memory_limit_bytes, needed_memory_bytes
from separation.errors import EstimateError

MAX_BATCH_SIZE = 8  # chunks; a large model fills a GPU with far fewer
# The share of a GPU's memory that a batch may take. The models take another third, and the last third is for batches
# that are computed without a CUDA graph.
MEMORY_SHARE = 1 / 3

logger: logging.Logger = logging.getLogger("separation")

T = TypeVar("T")

Model = Callable[[Tensor], Tensor]  # chunks [B, C, T] to estimates [B, S, C, T]


@torch.inference_mode()
def chunk_memory_bytes(model: Model, channels: int, chunk_samples: int, device: torch.device) -> int:
    """Measures how much memory of a CUDA GPU each chunk of a batch needs, by computing one chunk twice.

    Call it on the compute thread. Raises EstimateError if one chunk does not fit.
    """
    chunk = torch.zeros(1, channels, chunk_samples, device=device)
    fitting = FittingModel(model, 1)
    fitting(chunk)  # creates windows and workspaces, which stay
    return needed_memory_bytes(lambda: fitting(chunk), device)


def fitting_batch_size(chunk_bytes: int, device: torch.device) -> int:
    """How many chunks of `chunk_bytes` to compute at once on a CUDA GPU: a power of two, at most MAX_BATCH_SIZE.

    It depends on the GPU's total memory, not on what is free, because the batch size affects rounding: the same song
    must give the same samples whatever else runs on the GPU.
    """
    room = int(memory_limit_bytes(device) * MEMORY_SHARE / max(1, chunk_bytes))
    return 1 << max(1, min(MAX_BATCH_SIZE, room)).bit_length() - 1


def halving(compute: Callable[[int], T], size: int, chunk_samples: int, device: torch.device) -> tuple[T, int]:
    """Calls `compute` with a batch size, halved until the GPU's memory holds it; returns the result and that size.

    Each halving logs a warning. Raises EstimateError if one chunk does not fit.
    """
    while True:
        try:
            return compute(size), size
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            if size == 1:
                raise EstimateError(
                    f"the memory of {device} does not hold one chunk of {chunk_samples} samples: choose a smaller "
                    "chunk size, precision bf16 or fp16, or device cpu"
                ) from e
        # Outside the handler, because the error keeps the failed attempt's tensors alive until the handler is left.
        torch.cuda.empty_cache()
        logger.warning(
            "the GPU's memory does not hold a batch of %d chunks: continuing with batches of %d", size, size // 2
        )
        size //= 2


class FittingModel:
    """A model that splits a batch where the GPU's memory does not hold it as a whole."""

    def __init__(self, model: Model, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size  # chunks at once; only falls

    def __call__(self, batch: Tensor) -> Tensor:
        """Chunks `[B, C, T]` to estimates `[B, S, C, T]`. Raises EstimateError if one chunk does not fit."""

        def compute(size: int) -> Tensor:
            pieces = [self._model(piece) for piece in batch.split(size)]
            return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

        size = min(self._batch_size, len(batch))
        estimates, fitting = halving(compute, size, batch.shape[-1], batch.device)
        if fitting < size:
            self._batch_size = fitting
        return estimates
