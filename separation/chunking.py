"""Applying a model to a song of any length: overlapping chunks in, cross-faded finished samples out.

A chunk's ends are faded by straight ramps over the overlap and the sum is divided by the sum of the fades, so that an
identity model returns its input and a gain error in one chunk is cross-faded, never stepped. Memory holds one batch of
chunks and the samples that the next chunk may still change, whatever the song's length. Knows no model.

The sums are on the model's device; only finished samples leave it. On a CUDA GPU three batches are under way: one is
read, one computed, and the samples that the one before has finished are with the caller.
"""

import logging
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor

from separation.device import free_memory_bytes, needed_memory_bytes
from separation.errors import EstimateError, InputError

MAX_BATCH_SIZE = 8  # chunks; of a large model far fewer fill a GPU
MEMORY_SHARE = 1 / 3  # of a GPU's free memory that a batch may take: it is not ours alone, and not all in one piece

logger = logging.getLogger("separation")

T = TypeVar("T")

Model = Callable[[Tensor], Tensor]  # chunks [B, C, chunk_samples] to estimates [B, S, C, chunk_samples]
Read = Callable[[int, int], Tensor]  # (start, stop) -> mixture[:, start:stop], [C, stop - start] float32 on the CPU
Progress = Callable[[int, int], None]  # (chunks done, chunks in all); an exception that it raises cancels


@dataclass(frozen=True)
class ChunkPlan:
    """How a song is cut: `chunk_samples` every `chunk_hop` samples.

    With `reflects_border` the song is extended at both ends by its own reflection over the overlap, so that its first
    and last samples too lie inside a chunk; without, chunks start at the song's first sample and a short last chunk is
    centred in real context (Demucs' way). Beyond the extension there is silence. `input_samples` says how many samples
    the model is given for a chunk of which so many lie in the song: a whole chunk, unless it returns a number.
    """

    chunk_samples: int
    overlap_samples: int
    reflects_border: bool = True
    input_samples: Callable[[int], int | None] = lambda length: None

    def __post_init__(self) -> None:
        if self.chunk_samples < 1 or not 0 <= self.overlap_samples < self.chunk_samples:
            raise InputError(
                f"overlap ({self.overlap_samples} samples) must be smaller than the chunk ({self.chunk_samples} "
                "samples), and the chunk at least one sample"
            )

    @property
    def chunk_hop(self) -> int:
        """Samples between chunk starts."""
        return self.chunk_samples - self.overlap_samples

    @property
    def border(self) -> int:
        """Samples by which the song is extended at each end."""
        return self.overlap_samples if self.reflects_border else 0

    def starts(self, total_samples: int) -> range:
        """Where the chunks start, in samples of the song."""
        if not self.reflects_border:
            return range(0, total_samples, self.chunk_hop)
        hops = max(0, -(-(total_samples + 2 * self.border - self.chunk_samples) // self.chunk_hop))
        return range(-self.border, -self.border + hops * self.chunk_hop + 1, self.chunk_hop)


@lru_cache(maxsize=8)
def fades(chunk_samples: int, overlap_samples: int) -> Tensor:
    """The weight of each sample of a chunk, `[chunk_samples]`: ramps over the overlap, half a chunk at most."""
    fade = min(overlap_samples, chunk_samples // 2)
    weights = torch.ones(chunk_samples)
    if fade:
        ramp = torch.arange(1, fade + 1) / (fade + 1)
        weights[:fade] = ramp
        weights[-fade:] = ramp.flip(0)
    return weights


@dataclass(frozen=True)
class Chunk:
    """The model sees `mixture[read_start : read_start + read_length]` and keeps `[start, start + length)` of it."""

    start: int
    length: int
    read_start: int
    read_length: int


def chunks(plan: ChunkPlan, total_samples: int) -> Iterator[Chunk]:
    """The chunks of a song in order."""
    for start in plan.starts(total_samples):
        length = plan.chunk_samples if plan.reflects_border else min(plan.chunk_samples, total_samples - start)
        read_length = plan.input_samples(length) or plan.chunk_samples
        yield Chunk(start, length, start - (read_length - length) // 2, read_length)


def _batches(parts: list[Chunk], batch_size: int) -> list[list[Chunk]]:
    """Chunks that follow each other and of which the model is given equally many samples."""
    alike = (list(group) for _, group in groupby(parts, key=lambda part: part.read_length))
    return [group[first : first + batch_size] for group in alike for first in range(0, len(group), batch_size)]


def read_extended(read: Read, start: int, stop: int, total_samples: int, border: int) -> Tensor:
    """`mixture[:, start:stop]`, `[C, stop - start]`, where either end may lie outside the song.

    Up to `border` samples outside are the song's reflection (without its end sample), the rest is silence.
    """
    inside = read(max(start, 0), min(stop, total_samples))
    mirrored = min(border, total_samples - 1)
    parts = []
    if start < 0:
        count = min(-start, mirrored)
        reflection = read(1, count + 1).flip(-1) if count else inside[:, :0]
        parts += [inside.new_zeros(inside.shape[0], -start - count), reflection]
    parts.append(inside)
    if stop > total_samples:
        count = min(stop - total_samples, mirrored)
        reflection = read(total_samples - 1 - count, total_samples - 1).flip(-1) if count else inside[:, :0]
        parts += [reflection, inside.new_zeros(inside.shape[0], stop - total_samples - count)]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else inside


@torch.inference_mode()
def chunk_memory_bytes(model: Model, channels: int, chunk_samples: int, device: torch.device) -> int:
    """The memory of a CUDA GPU that the model needs for each chunk of a batch: it computes one.

    Raises EstimateError if that is more than there is.
    """
    chunk = torch.zeros(1, channels, chunk_samples, device=device)
    return needed_memory_bytes(lambda: _Fitting(model, 1)(chunk), device)


def fitting_batch_size(chunk_bytes: int, device: torch.device) -> int:
    """How many chunks to compute at once on a CUDA GPU with the memory that is free now, if each needs so much."""
    return max(1, min(MAX_BATCH_SIZE, int(free_memory_bytes(device) * MEMORY_SHARE / chunk_bytes)))


def separate(
    model: Model,
    read: Read,
    total_samples: int,
    plan: ChunkPlan,
    *,
    n_stems: int,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    offset: float = 0.0,
    scale: float = 1.0,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Run `model` over a song; yields finished estimates `[S, C, n]`, float32 on the CPU, in order, to the song's end.

    Chunks of digital silence are not computed: their estimates are silence. A batch that a GPU's memory does not hold
    is halved until it fits, as are all that follow, and a warning is logged.

    Args:
        model: chunks `[B, C, chunk_samples]` on `device` to estimates `[B, S, C, chunk_samples]`.
        read: gives a slice of the mixture; called with 0 <= start <= stop <= total_samples. With a CUDA GPU another
            thread calls it.
        n_stems: S.
        batch_size: chunks computed at once; changes the result by no more than the rounding of matrix products in
            the model's precision.
        offset, scale: the model sees `(mixture - offset) / scale` and its estimates are put back the same way.
        progress: called before the first batch and after each; raise from it to cancel.

    Raises:
        EstimateError: the model gave NaN or Inf; the message says where. Or a GPU's memory does not hold one chunk.
    """
    device = torch.device(device)
    parts = list(chunks(plan, total_samples))
    planned = _batches(parts, batch_size)
    batch_size = max(map(len, planned))
    sums = torch.zeros(n_stems, read(0, 0).shape[0], plan.chunk_samples + batch_size * plan.chunk_hop, device=device)
    fitting = _Fitting(model, batch_size)
    ahead = _ahead if _is_asynchronous(device) else _in_turn
    done = 0
    with (
        closing(ahead(_read_batches(read, total_samples, plan, planned, device))) as batches,
        closing(ahead(_overlap_add(fitting, batches, plan, total_samples, sums, offset, scale))) as finished,
    ):
        if progress:
            progress(0, len(parts))
        for batch, block in zip(planned, finished, strict=True):
            if block.shape[-1]:
                yield block
            done += len(batch)
            if progress:
                progress(done, len(parts))


def _is_asynchronous(device: torch.device) -> bool:
    """Whether the device computes while the CPU does something else."""
    return device.type == "cuda"


def _in_turn(items: Generator[T]) -> Generator[T]:
    return items


def _ahead(items: Generator[T]) -> Generator[T]:
    """The same items; while the caller works on one, a thread makes the next."""
    end: Any = object()
    with closing(items), ThreadPoolExecutor(max_workers=1) as thread:
        following = thread.submit(next, items, end)
        try:
            while (item := following.result()) is not end:
                following = thread.submit(next, items, end)
                yield item
        finally:
            del following  # it and the error that it may hold would keep each other, and the tensors of a GPU, alive


@dataclass(frozen=True)
class _Batch:
    """Chunks that follow each other, and the mixtures `[n, C, read_length]` of the n among them that sound."""

    parts: list[Chunk]
    sounding: list[bool]
    mixtures: Tensor | None  # on the CPU, in page-locked memory if they go to a GPU; None if n is 0
    finishes: int  # no later chunk changes samples before this one


def _read_batches(
    read: Read, total_samples: int, plan: ChunkPlan, planned: list[list[Chunk]], device: torch.device
) -> Generator[_Batch]:
    for batch, following in zip_longest(planned, planned[1:]):
        mixtures = [
            read_extended(read, part.read_start, part.read_start + part.read_length, total_samples, plan.border)
            for part in batch
        ]
        sounding = [bool(mixture.any()) for mixture in mixtures]
        stacked = None
        if any(sounding):
            stacked = torch.stack([mixture for mixture, sounds in zip(mixtures, sounding, strict=True) if sounds])
            if device.type == "cuda":
                stacked = stacked.pin_memory()
        finishes = following[0].start if following else total_samples
        yield _Batch(batch, sounding, stacked, min(finishes, total_samples))


def _overlap_add(
    model: Model,
    batches: Iterator[_Batch],
    plan: ChunkPlan,
    total_samples: int,
    sums: Tensor,
    offset: float,
    scale: float,
) -> Generator[Tensor]:
    """For each batch the samples `[S, C, n]` that it finishes, on the CPU; n may be 0.

    `sums` are zeros `[S, C, chunk_samples + batch_size * chunk_hop]` on the model's device.
    """
    device = sums.device
    weights = fades(plan.chunk_samples, plan.overlap_samples).to(device)
    weight_sums = torch.zeros(sums.shape[-1], device=device)
    finished = 0  # samples yielded so far; the sums start there
    reached = 0  # samples that any chunk so far has a part in
    for batch in batches:
        estimates = iter(() if batch.mixtures is None else _estimate(model, batch.mixtures, device, offset, scale))
        spans, finite = [], []
        for part, sounds in zip(batch.parts, batch.sounding, strict=True):
            start, stop = max(part.start, 0), min(part.start + part.length, total_samples)
            weight = weights[start - part.start : stop - part.start]
            weight_sums[start - finished : stop - finished] += weight
            reached = max(reached, stop)
            if sounds:
                kept = next(estimates)[..., start - part.read_start : stop - part.read_start]
                # Without a tensor in between as large as the estimates: on a CPU its memory costs more than the sums.
                sums[..., start - finished : stop - finished].addcmul_(kept, weight, value=scale)
                if offset:
                    sums[..., start - finished : stop - finished] += offset * weight
                spans.append((start, stop))
                finite.append(torch.stack(torch.aminmax(kept)).isfinite().all())
        # All of them together, for a GPU must be waited for.
        for span, is_finite in zip(spans, torch.stack(finite).tolist() if finite else (), strict=True):
            if not is_finite:
                raise EstimateError(
                    f"the model gave NaN or Inf between samples {span[0]} and {span[1]}: check its weights, and use "
                    "precision fp32 if it ran in another"
                )
        ready = max(0, batch.finishes - finished)
        yield (sums[..., :ready] / weight_sums[:ready]).to("cpu")
        pending = max(0, reached - finished - ready)  # samples that the next batch may still change
        for buffer in (sums, weight_sums):
            buffer[..., :pending] = buffer[..., ready : ready + pending].clone()
            buffer[..., pending : ready + pending] = 0
        finished += ready


@torch.inference_mode()
def _estimate(model: Model, mixtures: Tensor, device: torch.device, offset: float, scale: float) -> Tensor:
    """What the model makes of mixtures `[n, C, T]` on the CPU: `[n, S, C, T]` on the device."""
    return model((mixtures.to(device, non_blocking=True) - offset) / scale).float()


class _Fitting:
    """A model over batches of any size, in pieces that the device's memory holds: halved where it did not."""

    def __init__(self, model: Model, largest: int) -> None:
        self._model = model
        self._largest = largest  # chunks at once

    def __call__(self, batch: Tensor) -> Tensor:
        while True:
            size = min(self._largest, len(batch))
            try:
                pieces = [self._model(piece) for piece in batch.split(size)]
                return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            except torch.OutOfMemoryError as e:
                if size == 1:
                    raise EstimateError(
                        f"the memory of {batch.device} does not hold one chunk of {batch.shape[-1]} samples: choose a "
                        "smaller chunk size, precision bf16 or fp16, or device cpu"
                    ) from e
            # Not in the handler: until that is left, the error keeps what the attempt had allocated.
            torch.cuda.empty_cache()
            self._largest = size // 2
            logger.warning("the GPU's memory does not hold %d chunks at once: from here on %d", size, self._largest)
