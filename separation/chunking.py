"""Applying a model to a song of any length: overlapping chunks in, cross-faded finished samples out.

A chunk's ends are faded by straight ramps over the overlap and the sum is divided by the sum of the fades, so that an
identity model returns its input and a gain error in one chunk is cross-faded, never stepped. Memory holds one batch of
chunks and the samples that the next chunk may still change, whatever the song's length. Knows no model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from separation.errors import EstimateError, InputError

Read = Callable[[int, int], Tensor]  # (start, stop) -> mixture[:, start:stop], [C, stop - start] float32 on the CPU
Progress = Callable[[int, int], None]  # (chunks done, chunks in all); an exception that it raises cancels


@dataclass(frozen=True)
class ChunkPlan:
    """How a song is cut: `chunk_samples` every `chunk_hop` samples.

    With `reflects_border` the song is extended at both ends by its own reflection over the overlap, so that its first
    and last samples too lie inside a chunk; without, chunks start at the song's first sample and a short last chunk is
    centred in real context (Demucs' way). Beyond the extension there is silence.
    """

    chunk_samples: int
    overlap_samples: int
    reflects_border: bool = True

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
    """The model sees `mixture[read_start : read_start + chunk_samples]` and keeps `[start, start + length)` of it."""

    start: int
    length: int
    read_start: int


def chunks(plan: ChunkPlan, total_samples: int) -> Iterator[Chunk]:
    """The chunks of a song in order."""
    for start in plan.starts(total_samples):
        length = plan.chunk_samples if plan.reflects_border else min(plan.chunk_samples, total_samples - start)
        yield Chunk(start, length, start - (plan.chunk_samples - length) // 2)


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


def separate(
    model: Callable[[Tensor], Tensor],
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

    Chunks of digital silence are not computed: their estimates are silence.

    Args:
        model: chunks `[B, C, chunk_samples]` on `device` to estimates `[B, S, C, chunk_samples]`.
        read: gives a slice of the mixture; called with 0 <= start <= stop <= total_samples.
        n_stems: S.
        batch_size: chunks computed at once; changes the result by no more than the rounding of matrix products in
            the model's precision.
        offset, scale: the model sees `(mixture - offset) / scale` and its estimates are put back the same way.
        progress: called before the first batch and after each; raise from it to cancel.

    Raises:
        EstimateError: the model gave NaN or Inf; the message says where.
    """
    weights = fades(plan.chunk_samples, plan.overlap_samples)
    parts = list(chunks(plan, total_samples))
    batch_size = min(batch_size, len(parts))
    finished = 0  # samples yielded so far; the sums below start there
    width = plan.chunk_samples + batch_size * plan.chunk_hop
    sums = torch.zeros(n_stems, read(0, 0).shape[0], width)
    weight_sums = torch.zeros(width)
    if progress:
        progress(0, len(parts))
    for first in range(0, len(parts), batch_size):
        batch = parts[first : first + batch_size]
        mixtures = [
            read_extended(read, part.read_start, part.read_start + plan.chunk_samples, total_samples, plan.border)
            for part in batch
        ]
        for part, estimates in zip(batch, _estimate(model, mixtures, device, offset, scale), strict=True):
            start, stop = max(part.start, 0), min(part.start + part.length, total_samples)
            weight = weights[start - part.start : stop - part.start]
            weight_sums[start - finished : stop - finished] += weight
            if estimates is None:
                continue
            kept = estimates[..., start - part.read_start : stop - part.read_start]
            if not torch.isfinite(kept).all():
                raise EstimateError(
                    f"the model gave NaN or Inf between samples {start} and {stop}: check its weights, and use "
                    "precision fp32 if it ran in another"
                )
            sums[..., start - finished : stop - finished] += weight * kept
        following = parts[first + batch_size].start if first + batch_size < len(parts) else total_samples
        ready = max(0, min(following, total_samples) - finished)
        if ready:
            yield sums[..., :ready] / weight_sums[:ready]
            finished += ready
            for buffer in (sums, weight_sums):
                buffer[..., : width - ready] = buffer[..., ready:].clone()
                buffer[..., width - ready :] = 0
        if progress:
            progress(min(first + batch_size, len(parts)), len(parts))


@torch.inference_mode()
def _estimate(
    model: Callable[[Tensor], Tensor],
    mixtures: list[Tensor],
    device: torch.device | str,
    offset: float,
    scale: float,
) -> list[Tensor | None]:
    """Estimates `[S, C, chunk_samples]` of each mixture `[C, chunk_samples]`; None for digital silence."""
    sounding = [index for index, mixture in enumerate(mixtures) if mixture.any()]
    results: list[Tensor | None] = [None] * len(mixtures)
    if sounding:
        batch = torch.stack([mixtures[index] for index in sounding])
        estimates = model(((batch - offset) / scale).to(device)).to("cpu", torch.float32) * scale + offset
        for index, estimate in zip(sounding, estimates, strict=True):
            results[index] = estimate
    return results
