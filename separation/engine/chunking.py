"""Applying a model to a song of any length: overlapping chunks in, cross-faded estimates out.

The ends of each chunk are faded by linear ramps over the overlap, and the sum of the faded chunks is divided by the sum
of the fades. An identity model therefore returns its input, and a gain error in one chunk is cross-faded, never
stepped. Estimates that spill over their chunk are parts of a sum: they are only added (see ChunkPlan). Memory holds a
few batches of chunks and the samples that the next chunk may still change, however long the song is. Nothing here
depends on which model it is.

The sums are kept on the model's device; only finished samples leave it. On a CPU, two batches may be computed at a time
(see engine/pairs.py). A CUDA GPU works ahead of the caller: while the caller uses one block, the next batch is
computed, the one after that is queued, and a third is read. All copies go through page-locked memory, and the next
batch is queued before anything waits for the current one.

On a CUDA GPU all batches of a song have the same shape: a batch with silent chunks and the last batch are padded with
zeros. A chunk is then rounded in the same way wherever it lies in the song and whatever ran before.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice, zip_longest
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from separation.audio.waveform import Readable
from separation.engine.batch_memory import FittingModel, Model
from separation.engine.chunk_plan import Chunk, ChunkBatch, ChunkPlan, Span, fades, read_extended
from separation.engine.compute_thread import ComputeThread, compute_thread
from separation.engine.pairs import in_pairs
from separation.engine.turns import Turns
from separation.errors import EstimateError
from separation.progress import Progress
from separation.system.threads import Threads

T = TypeVar("T")

CPU = torch.device("cpu")
TURN_SECONDS = 1.0  # after which a song that computes in pairs lets the next song have its turn


@dataclass(frozen=True)
class ReadyModel:
    """A model that is ready to run over batches of chunks.

    Attributes:
        model: chunks `[B, C, T]` on `device` to estimates `[B, S, C, T]`.
        n_stems: S.
        batch_size: chunks computed at once; changes the estimates by no more than the rounding of matrix products in
            the model's precision.
        device: what the model runs on. On a CUDA GPU, the device's compute thread calls the model.
        spare: returns a model that replaces this one for the rest of a song, from the first batch with NaN or Inf;
            called when that happens.
        in_pairs: two batches are computed at a time, each on half of the CPU's threads.
        turns: on a device other than a CUDA GPU, songs of several threads take turns.
    """

    model: Model
    n_stems: int
    batch_size: int = 1
    device: torch.device = CPU
    spare: Callable[[], Model] | None = None
    in_pairs: bool = False
    turns: Turns = field(default_factory=Turns)


@dataclass(frozen=True)
class Level:
    """The model sees `(mixture - offset) / scale`; its estimates are multiplied by `scale`, and `offset` is added."""

    offset: float = 0.0
    scale: float = 1.0


def separate(
    ready: ReadyModel,
    source: Readable,
    plan: ChunkPlan,
    level: Level = Level(),
    progress: Progress = Progress(),
    spans: Sequence[Span] | None = None,
) -> Generator[Tensor]:
    """Run a model over a song; yields finished estimates `[S, C, n]`, float32 on the CPU, in order.

    Chunks of digital silence are not computed: their estimates are silence. Neither are chunks outside `spans`; inside,
    the samples are those of a run over the whole song, because chunks and batches are the same. A batch that does not
    fit into a GPU's memory is halved until it does, and so are all later batches of the song; a warning is logged.
    Songs in several threads share a device: a CUDA GPU batch by batch, a CPU in turns of some batches.

    Args:
        ready: the model.
        source: the mixture, `[C, T]`. With a CUDA GPU, another thread reads it.
        plan: how the song is cut.
        level: how the mixture is shifted and scaled for the model.
        progress: called before the first batch, after each batch, and while another song has the device; raise from it
            to cancel.
        spans: where the estimates are needed; None means everywhere. Elsewhere they are incomplete, or silence.

    Raises:
        EstimateError: the model gave NaN or Inf (the message says where), or a GPU's memory does not hold one chunk.
    """
    batches = plan.batches(source.n_samples, ready.batch_size)
    n_needed = [sum(chunk.is_for(spans) for chunk in batch.chunks) for batch in batches]
    n_chunks = sum(n_needed)
    channels = source.read(0, 0).shape[0]
    start = partial(_SongRun, ready, plan, level, batches, channels)
    done = 0

    def report() -> None:
        progress(done / n_chunks if n_chunks else 1.0)

    with (
        closing(_read_batches(source, plan, batches, ready.device, spans)) as read,
        closing(
            _working_ahead(start, read, ready.device)
            if _works_ahead(ready.device)
            else _in_turn(start, read, len(batches) // 2 * 2 if ready.in_pairs else 0, ready.turns, report)
        ) as finished,
    ):
        report()
        for n, block in zip(n_needed, finished, strict=True):
            if block.shape[-1]:
                yield block
            done += n
            report()


def _works_ahead(device: torch.device) -> bool:
    """Whether the device computes while the CPU does something else."""
    return device.type == "cuda"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class _Batch:
    """A batch that has been read."""

    chunks: list[Chunk]
    sounding: list[Chunk]  # the chunks to compute: needed, and not silent
    mixtures: Tensor | None  # [len(sounding), C, read_length] on the CPU, page-locked for a GPU; None if there are none
    size: int  # chunks that the model is given: the sounding ones, then padding
    finished_until: int  # no later chunk changes samples before this one


def _read_batches(
    source: Readable, plan: ChunkPlan, batches: list[ChunkBatch], device: torch.device, spans: Sequence[Span] | None
) -> Generator[_Batch]:
    """The batches, read one after the other; for a device that works ahead, a thread reads the next one meanwhile."""
    works_ahead = _works_ahead(device)
    read = _read_in_turn(source, plan, batches, spans, pinned=device.type == "cuda", padded=works_ahead)
    return _prefetched(read) if works_ahead else read


def _read_in_turn(
    source: Readable,
    plan: ChunkPlan,
    batches: list[ChunkBatch],
    spans: Sequence[Span] | None,
    *,
    pinned: bool,
    padded: bool,
) -> Generator[_Batch]:
    for batch, following in zip_longest(batches, batches[1:]):
        sounding, mixtures = [], []
        for chunk in batch.chunks:
            if not chunk.is_for(spans):
                continue
            mixture = read_extended(source, chunk.read_start, chunk.read_start + chunk.read_length, plan.border)
            if mixture.any():
                sounding.append(chunk)
                mixtures.append(mixture)
        stacked = torch.stack(mixtures) if mixtures else None
        yield _Batch(
            chunks=batch.chunks,
            sounding=sounding,
            mixtures=stacked.pin_memory() if pinned and stacked is not None else stacked,
            size=batch.size if padded else len(sounding),
            finished_until=min(following.chunks[0].kept_start, source.n_samples) if following else source.n_samples,
        )


def _prefetched(items: Generator[T]) -> Generator[T]:
    """The same items; a thread makes the next one while the caller works on the current one."""
    end: Any = object()
    with closing(items), Threads(max_workers=1) as thread:
        following = thread.submit(next, items, end)
        try:
            while (item := following.result()) is not end:
                following = thread.submit(next, items, end)
                yield item
        finally:
            # A future, the error in it and this frame would keep each other alive, and with them the GPU's tensors.
            del following


# ---------------------------------------------------------------------------------------------------------------------
# Computing


def _in_turn(
    start: Callable[[], "_SongRun"], batches: Iterator[_Batch], n_paired: int, turns: Turns, waiting: Callable[[], None]
) -> Generator[Tensor]:
    """The samples that each batch finishes, `[S, C, n]` on the CPU; n may be 0.

    The first `n_paired` batches are computed two at a time. A last one on its own gets all threads. Other songs have
    their turns in between; meanwhile, `waiting` is called.
    """
    run = start()
    while n_paired:
        pairs = _pairs_of_one_turn(islice(batches, n_paired), turns)
        with turns.turn(waiting), closing(in_pairs(run.start, pairs)) as computed:
            for started in computed:
                n_paired -= 1
                yield run.add(run.checked(started))()
    for batch in batches:
        with turns.turn(waiting):
            yield run.add(run.checked(run.start(batch)))()


def _pairs_of_one_turn(batches: Iterator[_Batch], turns: Turns) -> Iterator[_Batch]:
    """An even number of batches: all, unless another song wants its turn after TURN_SECONDS."""
    end = time.monotonic() + TURN_SECONDS
    while pair := list(islice(batches, 2)):
        yield from pair
        if turns.is_wanted and time.monotonic() > end:
            return


def _working_ahead(
    start: Callable[[], "_SongRun"], batches: Iterable[_Batch], device: torch.device
) -> Generator[Tensor]:
    """As `_in_turn`, but the device's compute thread has two more batches when the caller gets a block."""
    thread: ComputeThread = compute_thread(device)
    run = thread.run(start)
    steps: deque[Future[Callable[[], Tensor] | None]] = deque()
    try:
        for batch in chain(batches, [None]):
            steps.append(thread.submit(run.step, batch))
            if len(steps) > 1 and (block := steps.popleft().result()):
                yield block()
        if block := steps.popleft().result():
            yield block()
    finally:
        run.is_over = True
        wait([step for step in steps if not step.cancel()])
        steps.clear()  # an error in one of them and this frame would keep each other alive


@dataclass(frozen=True)
class _Started:
    """A batch that the device computes or has computed."""

    batch: _Batch
    estimates: Tensor  # of the sounding chunks, [n, S, C, read_length] on the device
    finite: Callable[[], Tensor]  # waits; whether the kept part of each sounding chunk is finite, [n]


class _SongRun:
    """One run of a model over one song: computes batches, checks them and adds them up."""

    def __init__(
        self, ready: ReadyModel, plan: ChunkPlan, level: Level, batches: list[ChunkBatch], channels: int
    ) -> None:
        self._largest_batch = max(batch.size for batch in batches)
        self._model = FittingModel(ready.model, self._largest_batch)
        self._spare = ready.spare
        self._device = ready.device
        self._level = level
        chunks = max(len(batch.chunks) for batch in batches)
        shape = (ready.n_stems, channels, plan.chunk_samples + chunks * plan.chunk_hop + 2 * plan.spill_samples)
        self._sums = _OverlapAdd(plan, level, shape, ready.device)
        self._previous: _Started | None = None
        self.is_over = False  # set when the caller wants no more samples

    def step(self, batch: _Batch | None) -> Callable[[], Tensor] | None:
        """Start a batch, then finish the previous one, so that the device has work in the meantime.

        Returns a function that waits for the samples that the previous batch finishes; None if there is no previous
        batch.
        """
        if self.is_over:
            return None
        try:
            started = self.start(batch) if batch else None
            previous, self._previous = self._previous, started
            if previous is None:
                return None
            checked = self.checked(previous)
            if batch and checked is not previous:  # the spare model has taken over
                self._previous = self.start(batch)
            return self.add(checked)
        except BaseException:
            self.is_over = True
            raise

    def start(self, batch: _Batch) -> _Started:
        """Start the model over a batch."""
        estimates = self._estimates(batch)
        finite = [
            torch.stack(torch.aminmax(_kept(chunk, estimate))).isfinite().all()
            for chunk, estimate in zip(batch.sounding, estimates, strict=True)
        ]
        return _Started(batch, estimates, _to_cpu(torch.stack(finite) if finite else torch.ones(0, dtype=torch.bool)))

    @torch.inference_mode()
    def _estimates(self, batch: _Batch) -> Tensor:
        if batch.mixtures is None:
            return torch.empty(0)
        on_device = batch.mixtures.to(self._device, non_blocking=True)
        mixtures = (on_device - self._level.offset) / self._level.scale
        missing = batch.size - len(mixtures)
        estimates = self._model(F.pad(mixtures, (0, 0, 0, 0, 0, missing)) if missing else mixtures)
        return estimates[: len(mixtures)].float()

    def checked(self, started: _Started) -> _Started:
        """Wait for a batch. If it is not finite, the spare model computes it and everything after it."""
        finite = started.finite().tolist()
        if all(finite):
            return started
        if self._spare is None:
            chunk = started.batch.sounding[finite.index(False)]
            raise EstimateError(
                f"the model gave NaN or Inf between samples {chunk.kept_start} and {chunk.kept_stop}: check its "
                "weights, or choose precision fp32"
            )
        self._model, self._spare = FittingModel(self._spare(), self._largest_batch), None
        return self.checked(self.start(started.batch))

    def add(self, started: _Started) -> Callable[[], Tensor]:
        """Add a batch to the sums. Returns a function that waits for the samples that it finishes."""
        return self._sums.add(started.batch, started.estimates)


def _kept(chunk: Chunk, estimates: Tensor) -> Tensor:
    """The part of a chunk's estimates `[..., read_length]` that is kept."""
    return estimates[..., chunk.kept_start - chunk.read_start : chunk.kept_stop - chunk.read_start]


class _OverlapAdd:
    """The sums of faded estimates and of the fades, for the samples that later chunks may still change.

    Args:
        shape: of the sums, `[S, C, T]`: T holds a batch of chunks and the unfinished samples of the previous one.
    """

    def __init__(self, plan: ChunkPlan, level: Level, shape: tuple[int, int, int], device: torch.device) -> None:
        self._level = level
        self._spill = plan.spill_samples
        self._fades = _fades_on(device, plan.chunk_samples, plan.overlap_samples, plan.spill_samples)
        self._gains = torch.ones_like(self._fades) if plan.spill_samples else self._fades
        self._sums = torch.zeros(shape, device=device)
        self._fade_sums = torch.zeros(shape[-1], device=device)
        self._finished = 0  # samples that were returned; the sums start there
        self._reached = 0  # the end of the furthest chunk so far

    def add(self, batch: _Batch, estimates: Tensor) -> Callable[[], Tensor]:
        """Add the estimates of a batch, `[n, S, C, read_length]` for its n sounding chunks.

        Returns a function that waits for the samples that the batch finishes, `[S, C, n]` on the CPU.
        """
        estimate_of = dict(zip(batch.sounding, estimates, strict=True))
        for chunk in batch.chunks:
            here = slice(chunk.kept_start - self._finished, chunk.kept_stop - self._finished)
            first = chunk.start - self._spill
            part = slice(chunk.kept_start - first, chunk.kept_stop - first)
            fade, gain = self._fades[part], self._gains[part]
            self._fade_sums[here] += fade
            self._reached = max(self._reached, chunk.kept_stop)
            if chunk in estimate_of:
                # In place: on a CPU, allocating a tensor as large as the estimates costs more than the sums.
                self._sums[..., here].addcmul_(_kept(chunk, estimate_of[chunk]), gain, value=self._level.scale)
                if self._level.offset:
                    self._sums[..., here] += self._level.offset * fade
        return self._give_out(max(0, batch.finished_until - self._finished))

    def _give_out(self, n_samples: int) -> Callable[[], Tensor]:
        """Start a copy of the first samples to the CPU, and move the unfinished ones to the front."""
        block = _to_cpu(self._sums[..., :n_samples] / self._fade_sums[:n_samples])
        pending = max(0, self._reached - self._finished - n_samples)
        for buffer in (self._sums, self._fade_sums):
            buffer[..., :pending] = buffer[..., n_samples : n_samples + pending].clone()
            buffer[..., pending : n_samples + pending] = 0
        self._finished += n_samples
        return block


@lru_cache(maxsize=8)
def _fades_on(device: torch.device, chunk_samples: int, overlap_samples: int, spill_samples: int) -> Tensor:
    """The fades of a chunk, and zeros where its estimates spill over it."""
    return F.pad(fades(chunk_samples, overlap_samples), (spill_samples, spill_samples)).to(device)


def _to_cpu(tensor: Tensor) -> Callable[[], Tensor]:
    """Start a copy to the CPU. Returns a function that waits for it."""
    if tensor.device.type != "cuda":
        copy = tensor.to("cpu")
        return lambda: copy
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event(blocking=True)  # blocking: leaves the CPU to other threads
    arrived.record()

    def waited() -> Tensor:
        arrived.synchronize()
        return copy

    return waited
