"""Applying a model to a song of any length: overlapping chunks in, cross-faded finished samples out.

A chunk's ends are faded by straight ramps over the overlap and the sum is divided by the sum of the fades, so that an
identity model returns its input and a gain error in one chunk is cross-faded, never stepped. Memory holds one batch of
chunks and the samples that the next chunk may still change, whatever the song's length. Knows no model.

The sums are on the model's device; only finished samples leave it. On a CUDA GPU the caller does not wait for what it
does not need: while it works on one block the next batch is computed, the one after that queued, and a third read. All
copies go through page-locked memory, and the GPU has the next batch before anything waits for the one at hand.

There every batch of a song has the same shape: the last, and one of which some chunks are silent, are filled up with
zeros. So a chunk is rounded in the same way wherever it lies in the song, and whatever ran before. Of a song that has
fewer chunks than a batch, batches are as large as the next power of two, for zeros cost as much as music.
"""

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, groupby, zip_longest
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from separation.device import is_out_of_memory, memory_limit_bytes, needed_memory_bytes
from separation.engine.gpu import ComputeThread, Model, compute_thread
from separation.errors import EstimateError, InputError
from separation.progress import Progress
from separation.system.threads import Threads

MAX_BATCH_SIZE = 8  # chunks; of a large model far fewer fill a GPU
# Of a GPU's memory that a batch may take. The models take another, and a batch outside the graphs' memory the third.
MEMORY_SHARE = 1 / 3

logger = logging.getLogger("separation")

T = TypeVar("T")

# A Model takes chunks [B, C, chunk_samples] to estimates [B, S, C, chunk_samples].
Read = Callable[[int, int], Tensor]  # (start, stop) -> mixture[:, start:stop], [C, stop - start] float32 on the CPU


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


@dataclass(frozen=True)
class _Planned:
    """Chunks that follow each other and of which the model is given equally many samples."""

    parts: list[Chunk]
    size: int  # chunks in a batch of such, at most; on a GPU the batch is filled up to so many


def _batches(parts: list[Chunk], batch_size: int) -> list[_Planned]:
    planned = []
    for _, alike in groupby(parts, key=lambda part: part.read_length):
        group = list(alike)
        size = min(batch_size, 1 << (len(group) - 1).bit_length())
        planned += [_Planned(group[first : first + size], size) for first in range(0, len(group), size)]
    return planned


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
    """The memory of a CUDA GPU that the model needs for each chunk of a batch: it computes one, twice.

    For the compute thread. Raises EstimateError if that is more than there is.
    """
    chunk = torch.zeros(1, channels, chunk_samples, device=device)
    fitting = _Fitting(model, 1)
    fitting(chunk)  # makes windows and workspaces, which are made once
    return needed_memory_bytes(lambda: fitting(chunk), device)


def fitting_batch_size(chunk_bytes: int, device: torch.device) -> int:
    """How many chunks to compute at once on a CUDA GPU, if each needs so much: a power of two.

    It follows from the memory that the GPU has, not from what is free, for the batch has a part in the rounding.
    """
    room = int(memory_limit_bytes(device) * MEMORY_SHARE / max(1, chunk_bytes))
    return 1 << max(1, min(MAX_BATCH_SIZE, room)).bit_length() - 1


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
    spare: Callable[[], Model] | None = None,
    progress: Progress = Progress(),
) -> Iterator[Tensor]:
    """Run `model` over a song; yields finished estimates `[S, C, n]`, float32 on the CPU, in order, to the song's end.

    Chunks of digital silence are not computed: their estimates are silence. A batch that a GPU's memory does not hold
    is halved until it fits, as are all that follow, and a warning is logged. With a CUDA GPU the device's compute
    thread calls the model; songs in several threads then share the GPU.

    Args:
        model: chunks `[B, C, chunk_samples]` on `device` to estimates `[B, S, C, chunk_samples]`.
        read: gives a slice of the mixture; called with 0 <= start <= stop <= total_samples. With a CUDA GPU another
            thread calls it.
        n_stems: S.
        batch_size: chunks computed at once; changes the result by no more than the rounding of matrix products in
            the model's precision.
        offset, scale: the model sees `(mixture - offset) / scale` and its estimates are put back the same way.
        spare: gives a model to take the place of one that gave NaN or Inf, from the batch where it did to the song's
            end; called where that happens.
        progress: called before the first batch and after each; raise from it to cancel.

    Raises:
        EstimateError: the model gave NaN or Inf; the message says where. Or a GPU's memory does not hold one chunk.
    """
    device = torch.device(device)
    parts = list(chunks(plan, total_samples))
    planned = _batches(parts, batch_size)
    n_samples = plan.chunk_samples + max(len(batch.parts) for batch in planned) * plan.chunk_hop
    task = _Task(plan, total_samples, (n_stems, read(0, 0).shape[0], n_samples), device, offset, scale)
    make = partial(_Song, task, model, max(batch.size for batch in planned), spare)
    ahead = _is_asynchronous(device)
    reading = _read_batches(read, task, planned, padded=ahead)
    done = 0
    with (
        closing(_prefetched(reading) if ahead else reading) as batches,
        closing(_ahead(make, batches, compute_thread(device)) if ahead else _in_turn(make, batches)) as finished,
    ):
        progress(0)
        for batch, block in zip(planned, finished, strict=True):
            if block.shape[-1]:
                yield block
            done += len(batch.parts)
            progress(done / len(parts))


def _is_asynchronous(device: torch.device) -> bool:
    """Whether the device computes while the CPU does something else."""
    return device.type == "cuda"


@dataclass(frozen=True)
class _Task:
    """What a song is to those who read and compute it."""

    plan: ChunkPlan
    total_samples: int
    shape: tuple[int, int, int]  # of the sums: [S, C, chunk_samples + batch_size * chunk_hop]
    device: torch.device
    offset: float
    scale: float


@dataclass(frozen=True)
class _Batch:
    """Chunks that follow each other, and the mixtures `[n, C, read_length]` of the n among them that sound."""

    parts: list[Chunk]
    sounding: list[Chunk]
    mixtures: Tensor | None  # on the CPU, in page-locked memory if they go to a GPU; None if n is 0
    size: int  # chunks that the model is given: those that sound, then zeros
    finishes: int  # no later chunk changes samples before this one


def _read_batches(read: Read, task: _Task, planned: list[_Planned], *, padded: bool) -> Generator[_Batch]:
    total_samples, border = task.total_samples, task.plan.border
    for batch, following in zip_longest(planned, planned[1:]):
        sounding, mixtures, stacked = [], [], None
        for part in batch.parts:
            mixture = read_extended(read, part.read_start, part.read_start + part.read_length, total_samples, border)
            if mixture.any():
                sounding.append(part)
                mixtures.append(mixture)
        if mixtures:
            stacked = torch.stack(mixtures)
            if task.device.type == "cuda":
                stacked = stacked.pin_memory()
        finishes = following.parts[0].start if following else total_samples
        yield _Batch(
            batch.parts, sounding, stacked, batch.size if padded else len(sounding), min(finishes, total_samples)
        )


def _prefetched(items: Generator[T]) -> Generator[T]:
    """The same items; while the caller works on one, a thread makes the next."""
    end: Any = object()
    with closing(items), Threads(max_workers=1) as thread:
        following = thread.submit(next, items, end)
        try:
            while (item := following.result()) is not end:
                following = thread.submit(next, items, end)
                yield item
        finally:
            del following  # it and the error that it may hold would keep each other, and the tensors of a GPU, alive


def _in_turn(make: Callable[[], "_Song"], batches: Iterable[_Batch]) -> Generator[Tensor]:
    """For each batch the samples `[S, C, n]` that it finishes, on the CPU; n may be 0."""
    song = make()
    for batch in batches:
        yield song.add(song.checked(song.start(batch)))()


def _ahead(make: Callable[[], "_Song"], batches: Iterable[_Batch], thread: ComputeThread) -> Generator[Tensor]:
    """The same by the device's thread, which has two batches more by the time that the caller is given a block."""
    song = thread.run(make)
    steps: deque[Future[Callable[[], Tensor] | None]] = deque()
    try:
        for batch in chain(batches, [None]):
            steps.append(thread.submit(song.step, batch))
            if len(steps) > 1 and (block := steps.popleft().result()):
                yield block()
        if block := steps.popleft().result():
            yield block()
    finally:
        song.is_over = True
        wait([step for step in steps if not step.cancel()])
        steps.clear()  # an error in one of them and this frame would keep each other alive


@dataclass(frozen=True)
class _Started:
    """A batch that the device is computing or has computed."""

    batch: _Batch
    estimates: Tensor  # of what sounds, [n, S, C, read_length] on the device
    finite: Callable[[], Tensor]  # waits, and says of each of them whether all that is kept is finite


class _Song:
    """A song under way: of what was estimated and is not finished, the sums of faded estimates and of the fades."""

    def __init__(self, task: _Task, model: Model, largest: int, spare: Callable[[], Model] | None) -> None:
        """`largest` is the number of chunks in the largest batch."""
        self._task, self._largest, self._spare = task, largest, spare
        self._model = _Fitting(model, largest)
        self._fades = _fades_on(task.device, task.plan.chunk_samples, task.plan.overlap_samples)
        self._sums = torch.zeros(task.shape, device=task.device)
        self._fade_sums = torch.zeros(task.shape[-1], device=task.device)
        self._finished = 0  # samples given out so far; the sums start there
        self._reached = 0  # samples that any chunk so far has a part in
        self._before: _Started | None = None
        self.is_over = False  # nothing more is wanted

    def step(self, batch: _Batch | None) -> Callable[[], Tensor] | None:
        """Start a batch, then finish the one before, so that the device has work while that is looked at.

        What it returns waits for the samples that the one before finishes; None where there is none.
        """
        if self.is_over:
            return None
        try:
            started = self.start(batch) if batch else None
            before, self._before = self._before, started
            if before is None:
                return None
            checked = self.checked(before)
            if batch and checked is not before:  # another model has taken over
                self._before = self.start(batch)
            return self.add(checked)
        except BaseException:
            self.is_over = True
            raise

    def start(self, batch: _Batch) -> _Started:
        """Start the model over a batch."""
        estimates = self._estimates(batch)
        finite = [
            torch.stack(torch.aminmax(self._kept(part, estimate))).isfinite().all()
            for part, estimate in zip(batch.sounding, estimates, strict=True)
        ]
        return _Started(batch, estimates, _to_cpu(torch.stack(finite) if finite else torch.ones(0, dtype=torch.bool)))

    @torch.inference_mode()
    def _estimates(self, batch: _Batch) -> Tensor:
        if batch.mixtures is None:
            return torch.empty(0)
        task = self._task
        mixtures = (batch.mixtures.to(task.device, non_blocking=True) - task.offset) / task.scale
        missing = batch.size - len(mixtures)
        estimates = self._model(F.pad(mixtures, (0, 0, 0, 0, 0, missing)) if missing else mixtures)
        return estimates[: len(mixtures)].float()

    def _span(self, part: Chunk) -> tuple[int, int]:
        return max(part.start, 0), min(part.start + part.length, self._task.total_samples)

    def _kept(self, part: Chunk, estimate: Tensor) -> Tensor:
        start, stop = self._span(part)
        return estimate[..., start - part.read_start : stop - part.read_start]

    def checked(self, started: _Started) -> _Started:
        """The batch, once it is computed; if it is not finite, as the spare model computes it, now and from here on."""
        finite = started.finite().tolist()
        if all(finite):
            return started
        if self._spare is None:
            start, stop = self._span(started.batch.sounding[finite.index(False)])
            raise EstimateError(
                f"the model gave NaN or Inf between samples {start} and {stop}: check its weights, and use "
                "precision fp32 if it ran in another"
            )
        self._model, self._spare = _Fitting(self._spare(), self._largest), None
        return self.checked(self.start(started.batch))

    def add(self, started: _Started) -> Callable[[], Tensor]:
        """Add a batch to the sums. What it returns waits for the samples that are finished by it, on the CPU."""
        batch, task, sums, finished = started.batch, self._task, self._sums, self._finished
        estimates = iter(started.estimates)
        sounding = iter(batch.sounding)
        following = next(sounding, None)
        for part in batch.parts:
            start, stop = self._span(part)
            here = slice(start - finished, stop - finished)
            fade = self._fades[start - part.start : stop - part.start]
            self._fade_sums[here] += fade
            self._reached = max(self._reached, stop)
            if part is following:
                # Without a tensor in between as large as the estimates: on a CPU its memory costs more than the sums.
                sums[..., here].addcmul_(self._kept(part, next(estimates)), fade, value=task.scale)
                if task.offset:
                    sums[..., here] += task.offset * fade
                following = next(sounding, None)
        ready = max(0, batch.finishes - finished)
        block = _to_cpu(sums[..., :ready] / self._fade_sums[:ready])
        pending = max(0, self._reached - finished - ready)  # samples that the next batch may still change
        for buffer in (sums, self._fade_sums):
            buffer[..., :pending] = buffer[..., ready : ready + pending].clone()
            buffer[..., pending : ready + pending] = 0
        self._finished += ready
        return block


@lru_cache(maxsize=8)
def _fades_on(device: torch.device, chunk_samples: int, overlap_samples: int) -> Tensor:
    return fades(chunk_samples, overlap_samples).to(device)


def _to_cpu(tensor: Tensor) -> Callable[[], Tensor]:
    """Start a copy to the CPU; what it returns waits for it."""
    if tensor.device.type != "cuda":
        copy = tensor.to("cpu")
        return lambda: copy
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # others need the CPU while one waits
    arrived.record()

    def waited() -> Tensor:
        arrived.synchronize()
        return copy

    return waited


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
            except RuntimeError as e:
                if not is_out_of_memory(e):
                    raise
                if size == 1:
                    raise does_not_fit(batch.shape[-1], batch.device) from e
            # Not in the handler: until that is left, the error keeps what the attempt had allocated.
            torch.cuda.empty_cache()
            self._largest = halved(size)


def does_not_fit(chunk_samples: int, device: torch.device) -> EstimateError:
    """The error that a GPU's memory does not hold one chunk."""
    return EstimateError(
        f"the memory of {device} does not hold one chunk of {chunk_samples} samples: choose a smaller chunk size, "
        "precision bf16 or fp16, or device cpu"
    )


def halved(size: int) -> int:
    """How many chunks to compute at once where a GPU's memory did not hold so many; warns of it."""
    logger.warning("the GPU's memory does not hold %d chunks at once: from here on %d", size, size // 2)
    return size // 2
