"""How a song is cut into overlapping chunks and batches, and how a chunk is read where it reaches beyond the song."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from separation.audio.waveform import SAMPLE_RATE, Readable
from separation.errors import InputError


class Span(NamedTuple):
    """Samples `[start, stop)` of a song."""

    start: int
    stop: int

    def at(self, sample_rate: int) -> "Span":
        """The samples at this rate, in hertz, that cover the same time at 44100 Hz."""
        return Span(self.start * sample_rate // SAMPLE_RATE, -(-self.stop * sample_rate // SAMPLE_RATE))


@dataclass(frozen=True)
class ChunkPlan:
    """How a song is cut: chunks of `chunk_samples`; neighbours share `overlap_samples`.

    Args:
        chunk_samples: the length of a chunk.
        overlap_samples: how many samples neighbouring chunks share.
        reflects_border: extend the song at both ends by its own reflection over the overlap, so that its first and last
            samples also lie inside a chunk. Without it, as in Demucs, chunks start at the song's first sample and a
            short last chunk is centred in the samples around it. Beyond the song and its reflection there is silence.
        input_samples: maps the samples that a chunk keeps to the samples that the model needs for them; None means a
            whole chunk.
        spill_samples: how far a chunk's estimates reach beyond it on both sides. If not 0, estimates are added up
            instead of cross-faded, and chunks lie side by side, all of them whole, one of them before the song.

    Raises:
        InputError: the overlap is not smaller than the chunk.
    """

    chunk_samples: int
    overlap_samples: int
    reflects_border: bool = True
    input_samples: Callable[[int], int | None] = lambda length: None
    spill_samples: int = 0

    def __post_init__(self) -> None:
        if self.chunk_samples < 1 or not 0 <= self.overlap_samples < self.chunk_samples:
            raise InputError(
                f"an overlap of {self.overlap_samples} samples does not fit a chunk of {self.chunk_samples} samples: "
                "choose an overlap that is smaller than the chunk"
            )

    @property
    def chunk_hop(self) -> int:
        """Samples between chunk starts."""
        return self.chunk_samples - self.overlap_samples

    @property
    def border(self) -> int:
        """Samples by which the song is extended at each end."""
        return self.overlap_samples if self.reflects_border else 0

    @property
    def whole_chunk_input_samples(self) -> int:
        """Samples that the model is given for a whole chunk."""
        return self.input_samples(self.chunk_samples) or self.chunk_samples

    def starts(self, total_samples: int) -> range:
        """The sample of the song at which each chunk starts; negative in the border."""
        if self.spill_samples:  # the silence before and after the song may spill into it
            return range(-self.chunk_samples, total_samples + self.spill_samples, self.chunk_samples)
        if not self.reflects_border:
            return range(0, total_samples, self.chunk_hop)
        hops = max(0, -(-(total_samples + 2 * self.border - self.chunk_samples) // self.chunk_hop))
        return range(-self.border, -self.border + hops * self.chunk_hop + 1, self.chunk_hop)

    def chunks(self, total_samples: int) -> Iterator["Chunk"]:
        """The chunks of a song, in order."""
        for start in self.starts(total_samples):
            is_whole = self.reflects_border or self.spill_samples
            length = self.chunk_samples if is_whole else min(self.chunk_samples, total_samples - start)
            read_length = self.input_samples(length) or self.chunk_samples
            yield Chunk(
                start=start,
                kept_start=max(start - self.spill_samples, 0),
                kept_stop=min(start + length + self.spill_samples, total_samples),
                read_start=start - (read_length - length) // 2,
                read_length=read_length,
            )

    def batches(self, total_samples: int, batch_size: int) -> list["ChunkBatch"]:
        """The chunks of a song in batches of at most `batch_size`.

        Consecutive chunks of the same `read_length` share batches of the same size. If there are fewer of them than
        `batch_size`, that size is the next power of two, because padding costs as much as music.
        """
        batches = []
        for _, group in groupby(self.chunks(total_samples), key=lambda chunk: chunk.read_length):
            alike = list(group)
            size = min(batch_size, 1 << (len(alike) - 1).bit_length())
            batches += [ChunkBatch(alike[first : first + size], size) for first in range(0, len(alike), size)]
        return batches


@dataclass(frozen=True)
class Chunk:
    """One chunk, in samples of the song.

    The model sees `[read_start, read_start + read_length)`. Of its estimates, those for `[kept_start, kept_stop)` are
    kept: the part of the chunk, and of what it spills, that lies in the song.
    """

    start: int
    kept_start: int
    kept_stop: int
    read_start: int
    read_length: int

    def is_for(self, spans: Iterable[Span] | None) -> bool:
        """Whether the chunk keeps samples of one of these spans; None means the whole song."""
        return spans is None or any(self.kept_start < stop and start < self.kept_stop for start, stop in spans)


@dataclass(frozen=True)
class ChunkBatch:
    """Consecutive chunks of the same `read_length`, at most `size` of them."""

    chunks: list[Chunk]
    size: int


@lru_cache(maxsize=8)
def fades(chunk_samples: int, overlap_samples: int) -> Tensor:
    """The weight of each sample of a chunk, `[chunk_samples]`: linear ramps over the overlap, at most half a chunk."""
    fade = min(overlap_samples, chunk_samples // 2)
    weights = torch.ones(chunk_samples)
    if fade:
        ramp = torch.arange(1, fade + 1) / (fade + 1)
        weights[:fade] = ramp
        weights[-fade:] = ramp.flip(0)
    return weights


def read_extended(source: Readable, start: int, stop: int, border: int) -> Tensor:
    """Samples `[start, stop)` of a song, `[C, stop - start]`; both may lie outside the song.

    Up to `border` samples outside are the song's reflection, without its end sample. The rest is silence.
    """
    total_samples = source.n_samples
    inside = source.read(max(start, 0), min(stop, total_samples))
    reflected = min(border, total_samples - 1)
    parts = []
    if start < 0:
        count = min(-start, reflected)
        reflection = source.read(1, count + 1).flip(-1) if count else inside[:, :0]
        parts += [inside.new_zeros(inside.shape[0], -start - count), reflection]
    parts.append(inside)
    if stop > total_samples:
        count = min(stop - total_samples, reflected)
        last = total_samples - 1
        reflection = source.read(last - count, last).flip(-1) if count else inside[:, :0]
        parts += [reflection, inside.new_zeros(inside.shape[0], stop - total_samples - count)]
    return torch.cat(parts, dim=-1) if len(parts) > 1 else inside
