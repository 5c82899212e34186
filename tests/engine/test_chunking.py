"""chunking: any model, any length, exact reconstruction, cross-faded chunk borders, flat memory."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from separation.engine import chunking
from separation.engine.chunk_plan import ChunkPlan
from separation.engine.chunking import Level, ReadyModel, separate
from separation.engine.song_waveforms import Samples
from separation.errors import EstimateError
from separation.progress import Progress

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Source:
    """A song whose samples a function reads."""

    n_samples: int
    read: Callable[[int, int], Tensor]


def ones(n_samples: int) -> Source:
    return Source(n_samples, lambda start, stop: torch.ones(1, stop - start))


def identity(batch: Tensor) -> Tensor:
    return batch.unsqueeze(1)


IDENTITY = ReadyModel(identity, n_stems=1)
UNCHANGED = Level()


def run(
    mixture: Tensor,
    plan: ChunkPlan,
    ready: ReadyModel = IDENTITY,
    level: Level = UNCHANGED,
    progress: Progress = Progress(),
) -> Tensor:
    return torch.cat(list(separate(ready, Samples.of(mixture), plan, level, progress)), dim=-1)


def one_stem(model: Model, batch_size: int = 1, spare: Callable[[], Model] | None = None) -> ReadyModel:
    return ReadyModel(model, n_stems=1, batch_size=batch_size, spare=spare)


def two(model: Model, batch_size: int = 1) -> ReadyModel:
    """A model of two stems."""
    return ReadyModel(model, n_stems=2, batch_size=batch_size)


@pytest.mark.parametrize("reflects_border", [True, False])
@pytest.mark.parametrize("chunk, overlap", [(16, 8), (16, 4), (16, 12), (16, 15), (16, 0), (15, 7), (1, 0), (100, 50)])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 100, 257])
def test_an_identity_model_returns_its_input(length: int, chunk: int, overlap: int, reflects_border: bool) -> None:
    mixture = torch.randn(2, length)
    for batch_size in (1, 3):
        result = run(mixture, ChunkPlan(chunk, overlap, reflects_border), one_stem(identity, batch_size))
        assert result.shape == (1, 2, length)
        assert (result[0] - mixture).abs().max() <= 1e-6


@pytest.mark.parametrize("length", [1, 2, 7, 20, 21, 100, 257])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_estimates_that_spill_over_their_chunk_are_added(length: int, batch_size: int, order: str) -> None:
    plan = ChunkPlan(20, 0, False, lambda length: length + 14, spill_samples=5)
    rise = torch.arange(1, 11) / 11  # from 5 samples before the chunk; what one chunk lacks is in the next one
    share = torch.cat([torch.zeros(2), rise, torch.ones(10), 1 - rise, torch.zeros(2)])
    mixture = torch.randn(2, length)
    mixture[:, length // 3 : length // 2] = 0
    result = run(mixture, plan, one_stem(lambda batch: (batch * share)[:, None], batch_size), Level(0.0, 0.7))
    assert result.shape == (1, 2, length)
    assert (result[0] - mixture).abs().max() <= 1e-6


def two_stems(batch: Tensor) -> Tensor:
    """A model whose estimates differ by chunk and by the position of a sample."""
    return torch.stack([batch.sin() + batch.amax(-1, keepdim=True), batch.flip(-1)], dim=1)


def plain_reference(mixture: Tensor, plan: ChunkPlan, offset: float, scale: float) -> Tensor:
    """The reference for `separate` with `two_stems`: the whole song in memory, one chunk after the other."""
    channels, total = mixture.shape
    room = plan.chunk_samples + plan.overlap_samples  # around the song: as far as a chunk may reach
    song = np.zeros((channels, total + 2 * room), np.float32)
    song[:, room : room + total] = mixture
    for i in range(1, min(plan.border, total - 1) + 1):
        song[:, room - i] = mixture[:, i]
        song[:, room + total - 1 + i] = mixture[:, total - 1 - i]
    sums, weight_sums = np.zeros((2, channels, song.shape[1]), np.float32), np.zeros(song.shape[1], np.float32)
    fade = min(plan.overlap_samples, plan.chunk_samples // 2)
    weights = np.ones(plan.chunk_samples, np.float32)
    for i in range(fade):
        weights[i] = weights[-1 - i] = np.float32(i + 1) / np.float32(fade + 1)
    for start in plan.starts(total):
        stop = start + plan.chunk_samples
        shift = 0  # a short last chunk is centred in the samples around it
        if not plan.reflects_border and stop > total:
            shift, stop = (stop - total) // 2, total
        seen = song[:, room + start - shift :][:, : plan.chunk_samples]
        estimates = np.zeros((2, *seen.shape), np.float32)
        if seen.any():
            estimates = two_stems((torch.from_numpy(seen)[None] - offset) / scale)[0].numpy() * scale + offset
        here = slice(room + start, room + stop)
        sums[..., here] += weights[: stop - start] * estimates[..., shift : shift + stop - start]
        weight_sums[here] += weights[: stop - start]
    song = slice(room, room + total)
    return torch.from_numpy(sums[..., song] / weight_sums[song])


@pytest.fixture(params=["in turn", "ahead"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Reading, computing and the caller take turns, as on a CPU, or run in parallel threads, as on a GPU."""
    monkeypatch.setattr(chunking, "_works_ahead", lambda device: request.param == "ahead")
    return request.param


@pytest.mark.parametrize("reflects_border", [True, False])
@pytest.mark.parametrize("chunk, overlap", [(16, 8), (16, 12), (15, 7), (16, 0), (1, 0), (100, 50)])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 33, 257])
def test_every_sample_equals_the_plain_reference(
    length: int, chunk: int, overlap: int, reflects_border: bool, order: str
) -> None:
    mixture = torch.randn(2, length)
    mixture[:, length // 3 : length // 2] = 0
    plan = ChunkPlan(chunk, overlap, reflects_border)
    expected = plain_reference(mixture, plan, 0.1, 0.7)
    for batch_size in (1, 4):
        result = run(mixture, plan, two(two_stems, batch_size), Level(0.1, 0.7))
        assert result.shape == expected.shape
        assert (result - expected).abs().max() <= 2e-6  # a fused multiply-add rounds once, not twice


def test_every_chunk_size_and_overlap_of_the_contract_reconstructs_a_song() -> None:
    rate = 100  # samples a second: the plan only knows samples
    mixture = torch.randn(2, 61 * rate + 17)
    for chunk_seconds in range(4, 31):
        for overlap_seconds in range(1, min(chunk_seconds, 9)):
            plan = ChunkPlan(chunk_seconds * rate, overlap_seconds * rate)
            assert (run(mixture, plan)[0] - mixture).abs().max() <= 1e-6


def test_a_gain_error_in_one_chunk_is_cross_faded_and_never_stepped() -> None:
    calls = 0

    def second_chunk_louder(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return batch.unsqueeze(1) * (2.0 if calls == 2 else 1.0)

    mixture = torch.ones(1, 1000)
    result = run(mixture, ChunkPlan(200, 100), one_stem(second_chunk_louder))[0, 0]
    steps = result.diff().abs()
    assert result.max() == pytest.approx(2.0, abs=0.02)
    assert steps.max() <= 1.0 / 100 + 1e-4  # the whole gain error spread over the overlap


@pytest.mark.parametrize("batch_size", [2, 3, 5, 64])
def test_batch_size_does_not_change_a_sample(batch_size: int) -> None:
    mixture = torch.randn(2, 1234)

    def model(batch: Tensor) -> Tensor:
        return torch.stack([batch.sin(), batch * batch.mean(-1, keepdim=True)], dim=1)

    plan = ChunkPlan(128, 40)
    assert torch.equal(run(mixture, plan, two(model)), run(mixture, plan, two(model, batch_size)))


def test_chunks_of_silence_are_not_computed_and_give_silence() -> None:
    seen = []

    def model(batch: Tensor) -> Tensor:
        seen.append(batch.shape[0])
        return batch.unsqueeze(1) + 0.5

    mixture = torch.zeros(2, 1000)
    mixture[:, 800:] = 0.3
    plan = ChunkPlan(100, 50)
    result = run(mixture, plan, one_stem(model, batch_size=4))
    assert result[..., :700].abs().max() == 0
    assert sum(seen) < len(plan.starts(1000))
    assert run(torch.zeros(2, 1000), plan, one_stem(model)).abs().max() == 0


def test_offset_and_scale_are_undone() -> None:
    mixture = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.2
    seen: list[Tensor] = []

    def model(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch.unsqueeze(1)

    result = run(mixture, ChunkPlan(500, 0, False), one_stem(model), Level(0.2, 0.1))
    assert seen[0].std() == pytest.approx(1.0, rel=0.1)
    assert (result[0] - mixture).abs().max() <= 1e-6


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_nan_from_the_model_is_an_error_that_says_where(batch_size: int, order: str) -> None:
    def model(batch: Tensor) -> Tensor:
        return torch.where(batch > 40, torch.nan, batch).unsqueeze(1)

    with pytest.raises(EstimateError, match="NaN or Inf between samples 30 and 50:"):
        run(torch.arange(60.0)[None], ChunkPlan(20, 10), one_stem(model, batch_size))
    assert run(torch.arange(40.0)[None], ChunkPlan(20, 10), one_stem(model)).shape == (1, 1, 40)


def test_memory_does_not_grow_with_the_song() -> None:
    largest, furthest = 0, 0

    def read(start: int, stop: int) -> Tensor:
        nonlocal largest, furthest
        largest, furthest = max(largest, stop - start), max(furthest, stop)
        return torch.ones(1, stop - start)

    plan = ChunkPlan(100, 50)
    samples = 0
    for block in separate(one_stem(identity, batch_size=2), Source(100_000, read), plan):
        assert block.shape[:2] == (1, 1)
        assert block.shape[-1] <= plan.chunk_samples + 2 * plan.chunk_hop
        samples += block.shape[-1]
        assert furthest <= samples + plan.chunk_samples  # nothing is read long before it is needed
    assert samples == 100_000
    assert largest <= plan.chunk_samples


def test_progress_rises_to_1_and_raising_from_it_cancels() -> None:
    shares: list[float] = []
    progress = Progress(lambda share, stage: shares.append(share))
    run(torch.ones(1, 1000), ChunkPlan(100, 50), one_stem(identity, batch_size=4), progress=progress)
    assert shares[0] == 0.0 and shares[-1] == 1.0 and len(shares) > 3
    assert shares == sorted(shares)

    class StopError(Exception):
        pass

    def cancel(share: float, stage: str) -> None:
        if share:
            raise StopError

    with pytest.raises(StopError):
        run(torch.ones(1, 1000), ChunkPlan(100, 50), progress=Progress(cancel))


# Working ahead, as on a GPU


class OtherThreads:
    """True while threads that this test started still run. The compute thread does not count: it stays."""

    def __init__(self) -> None:
        self._before = set(threading.enumerate())

    def __bool__(self) -> bool:
        started = set(threading.enumerate()) - self._before
        return any(not thread.name.startswith("compute on") for thread in started)


def test_while_the_caller_has_a_block_two_more_batches_are_computed_and_a_third_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunking, "_works_ahead", lambda device: True)
    computed, read_so_far = threading.Semaphore(0), threading.Semaphore(0)

    def model(batch: Tensor) -> Tensor:
        computed.release()
        return batch.unsqueeze(1)

    def read(start: int, stop: int) -> Tensor:
        if stop > start:
            read_so_far.release()
        return torch.ones(1, stop - start)

    blocks = separate(one_stem(model), Source(1000, read), ChunkPlan(100, 0))
    next(blocks)
    for _ in range(3):
        assert computed.acquire(timeout=60)
    for _ in range(4):
        assert read_so_far.acquire(timeout=60)
    blocks.close()
    assert not computed.acquire(blocking=False)


def test_the_next_batch_is_started_before_the_current_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_works_ahead", lambda device: True)
    done: list[str] = []

    def to_cpu(tensor: Tensor) -> Callable[[], Tensor]:
        def waited() -> Tensor:
            if tensor.dtype == torch.bool:
                done.append("checked")
            return tensor

        return waited

    def model(batch: Tensor) -> Tensor:
        done.append("started")
        return batch.unsqueeze(1)

    monkeypatch.setattr(chunking, "_to_cpu", to_cpu)
    run(torch.ones(1, 400), ChunkPlan(100, 0), one_stem(model))
    assert done == ["started", *["started", "checked"] * 3, "checked"]


def test_songs_from_several_threads_are_computed_on_one_thread_and_give_the_same_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunking, "_works_ahead", lambda device: True)
    threads: list[str] = []
    together = threading.Barrier(4, timeout=60)

    def model(batch: Tensor) -> Tensor:
        threads.append(threading.current_thread().name)
        return two_stems(batch)

    def separated(mixture: Tensor) -> Tensor:
        together.wait()
        return run(mixture, ChunkPlan(100, 50), two(model, batch_size=4))

    mixtures = list(torch.randn(4, 2, 3000))
    with ThreadPoolExecutor(4) as pool:
        for mixture, got in zip(mixtures, pool.map(separated, mixtures), strict=True):
            assert torch.equal(got, run(mixture, ChunkPlan(100, 50), two(two_stems, batch_size=4)))
    assert set(threads) == {"compute on cpu_0"}


@pytest.mark.parametrize(
    "n_chunks, batch_size, sizes",
    [
        (1, 8, [1]),
        (3, 8, [4]),
        (5, 8, [8]),
        (9, 8, [8, 8]),
        (16, 8, [8, 8]),
        (3, 5, [4]),
        (7, 5, [5, 5]),
        (3, 1, [1] * 3),
    ],
)
def test_on_a_gpu_all_batches_of_a_song_have_the_same_size_which_depends_only_on_its_length(
    n_chunks: int, batch_size: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunking, "_works_ahead", lambda device: True)
    seen: list[Tensor] = []

    def model(batch: Tensor) -> Tensor:
        seen.append(batch)
        return two_stems(batch)

    mixture, plan = torch.randn(2, 100 * n_chunks), ChunkPlan(100, 0)
    result = run(mixture, plan, two(model, batch_size), Level(0.5))
    assert [len(batch) for batch in seen] == sizes
    assert not torch.cat(seen)[n_chunks:].any()
    assert torch.equal(result, run(mixture, plan, two(two_stems), Level(0.5)))


def test_on_a_gpu_a_batch_with_silent_chunks_is_padded_and_a_silent_batch_is_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunking, "_works_ahead", lambda device: True)
    sizes: list[int] = []

    def model(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return two_stems(batch)

    mixture = torch.randn(2, 1200)
    mixture[:, 100:300] = mixture[:, 400:800] = 0
    result = run(mixture, ChunkPlan(100, 0), two(model, batch_size=4))
    assert sizes == [4, 4]
    assert torch.equal(result, run(mixture, ChunkPlan(100, 0), two(two_stems)))


def test_on_a_gpu_no_more_is_read_ahead_for_a_longer_song(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_works_ahead", lambda device: True)
    furthest = samples = 0

    def read(start: int, stop: int) -> Tensor:
        nonlocal furthest
        furthest = max(furthest, stop)
        return torch.ones(1, stop - start)

    plan = ChunkPlan(100, 50)
    for block in separate(one_stem(identity, batch_size=2), Source(100_000, read), plan):
        samples += block.shape[-1]
        assert furthest <= samples + plan.chunk_samples + 4 * 2 * plan.chunk_hop


@pytest.mark.parametrize("where", ["read", "model", "progress", "caller"])
def test_any_error_reaches_the_caller_unchanged_and_leaves_no_thread(where: str, order: str) -> None:
    class StopError(Exception):
        pass

    count = 0

    def may_stop(here: str) -> None:
        nonlocal count
        count += here == where
        if count == 4:
            raise StopError

    def read(start: int, stop: int) -> Tensor:
        may_stop("read")
        return torch.ones(1, stop - start)

    def model(batch: Tensor) -> Tensor:
        may_stop("model")
        return batch.unsqueeze(1)

    threads = OtherThreads()
    progress = Progress(lambda share, stage: may_stop("progress"))
    blocks = separate(one_stem(model), Source(1000, read), ChunkPlan(100, 50), progress=progress)

    def use_all() -> None:
        for _ in blocks:
            may_stop("caller")

    with pytest.raises(StopError):
        use_all()
    blocks.close()
    assert not threads


def test_an_abandoned_song_leaves_no_thread(order: str) -> None:
    threads = OtherThreads()
    blocks = separate(one_stem(identity), ones(1000), ChunkPlan(100, 50))
    next(blocks)
    assert bool(threads) == (order == "ahead")
    blocks.close()
    assert not threads


# Two batches at a time, as on a CPU with several threads


@pytest.mark.parametrize("reflects_border", [True, False])
@pytest.mark.parametrize("length", [1, 16, 25, 33, 257, 1000])
def test_batches_in_pairs_give_the_same_samples_as_in_turn(length: int, reflects_border: bool) -> None:
    mixture = torch.randn(2, length)
    mixture[:, length // 3 : length // 2] = 0
    plan = ChunkPlan(16, 8, reflects_border)
    for batch_size in (1, 4):
        in_turn = two(two_stems, batch_size)
        shares: list[float] = []
        progress = Progress(lambda share, stage, shares=shares: shares.append(share))
        result = run(mixture, plan, replace(in_turn, in_pairs=True), Level(0.1, 0.7), progress)
        assert torch.equal(result, run(mixture, plan, in_turn, Level(0.1, 0.7)))
        assert shares == sorted(shares) and (shares[0], shares[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("n_chunks, alone", [(1, 1), (2, 0), (3, 1), (6, 0), (7, 1)])
def test_the_last_of_an_odd_number_of_batches_is_computed_alone_on_all_threads(n_chunks: int, alone: int) -> None:
    seen: list[tuple[bool, int]] = []
    caller, n_threads = threading.get_ident(), torch.get_num_threads()

    def model(batch: Tensor) -> Tensor:
        seen.append((threading.get_ident() == caller, torch.get_num_threads()))
        return batch.unsqueeze(1)

    run(torch.randn(1, 100 * n_chunks), ChunkPlan(100, 0), replace(one_stem(model), in_pairs=True))
    assert seen == [(False, -(-n_threads // 2))] * (n_chunks - alone) + [(True, n_threads)] * alone


def test_nan_from_a_model_in_pairs_is_an_error_that_says_where() -> None:
    def broken(batch: Tensor) -> Tensor:
        return torch.where(batch == 7, torch.nan, batch).unsqueeze(1)

    mixture = torch.ones(1, 1000)
    mixture[:, 650] = 7
    others = OtherThreads()
    with pytest.raises(EstimateError, match="gave NaN or Inf between samples 600 and 700"):
        run(mixture, ChunkPlan(100, 0), replace(one_stem(broken), in_pairs=True))
    assert not others


def test_an_abandoned_song_in_pairs_leaves_no_thread() -> None:
    others = OtherThreads()
    blocks = separate(replace(one_stem(identity), in_pairs=True), ones(1000), ChunkPlan(100, 50))
    next(blocks)
    assert others
    blocks.close()
    assert not others


# A GPU's memory


class SmallGpu:
    """A model on a GPU whose memory holds batches of `room` chunks."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sizes: list[int] = []  # of the batches that were tried
        self.attempts: list[weakref.ref[Tensor]] = []

    def __call__(self, batch: Tensor) -> Tensor:
        assert not any(attempt() is not None for attempt in self.attempts), "memory of a failed attempt is still held"
        self.sizes.append(len(batch))
        if len(batch) > self.room:
            activations = batch * 2
            self.attempts.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return two_stems(batch)


@pytest.mark.parametrize(
    "batch_size, room, sizes",
    [
        (4, 4, {"in turn": [4, 4, 4, 3], "ahead": [4, 4, 4, 4]}),
        (4, 3, {"in turn": [4, *[2] * 7, 1], "ahead": [4, *[2] * 8]}),
        (8, 2, {"in turn": [8, 4, *[2] * 7, 1], "ahead": [8, 4, *[2] * 8]}),
        (5, 1, {"in turn": [5, 2, *[1] * 15], "ahead": [5, 2, *[1] * 15]}),
        (99, 3, {"in turn": [15, 7, *[3] * 5], "ahead": [16, 8, 4, *[2] * 8]}),
    ],
)
def test_a_batch_that_memory_does_not_hold_is_halved_and_no_sample_changes(
    batch_size: int, room: int, sizes: dict[str, list[int]], order: str, caplog: pytest.LogCaptureFixture
) -> None:
    mixture, plan, model = torch.randn(2, 1234), ChunkPlan(128, 40), SmallGpu(room)
    result = run(mixture, plan, two(model, batch_size))
    assert torch.equal(result, run(mixture, plan, two(two_stems)))
    assert model.sizes == sizes[order]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == len(model.attempts)
    if warned:
        assert warned[0].startswith(f"the GPU's memory does not hold a batch of {sizes[order][0]} chunks: continuing ")


def test_one_chunk_that_memory_does_not_hold_is_an_error_that_says_what_to_do(order: str) -> None:
    model = SmallGpu(0)
    what_to_do = "choose a smaller chunk size, precision bf16 or fp16, or device cpu"
    with pytest.raises(
        EstimateError, match=f"^the memory of cpu does not hold one chunk of 128 samples: {what_to_do}$"
    ) as raised:
        run(torch.randn(2, 1234), ChunkPlan(128, 40), two(model, batch_size=4))
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert model.sizes == [4, 2, 1]


@pytest.mark.parametrize("kind", ["NaN", "no memory"])
def test_a_handled_error_keeps_no_tensors_alive(kind: str, order: str) -> None:
    held: list[weakref.ref[Tensor]] = []

    def model(batch: Tensor) -> Tensor:
        estimates = two_stems(batch) / 0
        held.append(weakref.ref(estimates))
        if kind == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return estimates

    gc.disable()  # a GPU's memory must be free without the garbage collector
    try:
        with pytest.raises(EstimateError):
            run(torch.randn(2, 1234), ChunkPlan(128, 40), two(model, batch_size=4))
        assert held and not any(each() is not None for each in held)
    finally:
        gc.enable()


def test_other_errors_of_the_model_are_not_mistaken_for_missing_memory() -> None:
    calls = 0

    def model(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(torch.randn(2, 1234), ChunkPlan(128, 40), two(model, batch_size=4))
    assert calls == 1


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuFFT error: CUFFT_ALLOC_FAILED",
    ],
)
def test_a_library_that_cannot_allocate_also_counts_as_missing_memory(words: str, order: str) -> None:
    def model(batch: Tensor) -> Tensor:
        if len(batch) > 2:
            raise RuntimeError(words)
        return two_stems(batch)

    mixture, plan = torch.randn(2, 1234), ChunkPlan(128, 40)
    assert torch.equal(run(mixture, plan, two(model, batch_size=8)), run(mixture, plan, two(two_stems)))


@pytest.mark.parametrize("where", [0, 500, 1100])
def test_from_the_first_batch_with_inf_the_spare_computes_the_rest_of_the_song(where: int, order: str) -> None:
    mixture, plan, asked = torch.randn(1, 1200), ChunkPlan(100, 0), []
    mixture[:, where] = 100.0

    def model(batch: Tensor) -> Tensor:
        return torch.where(batch > 50, torch.inf, batch * 2).unsqueeze(1)

    def spare() -> Callable[[Tensor], Tensor]:
        asked.append(True)
        return lambda batch: batch.unsqueeze(1) * 3

    for _ in range(2):  # the next song starts with the model again
        result = run(mixture, plan, one_stem(model, 2, spare))[0]
        first = where // 200 * 200
        factors = torch.where(torch.arange(1200) < first, 2.0, 3.0)
        assert (result - factors * mixture).abs().max() <= 1e-4
    assert len(asked) == 2


def test_nan_from_the_spare_is_an_error_that_says_where(order: str) -> None:
    def model(batch: Tensor) -> Tensor:
        return torch.where(batch > 40, torch.nan, batch).unsqueeze(1)

    with pytest.raises(EstimateError, match="NaN or Inf between samples 40 and 60:"):
        run(torch.arange(60.0)[None], ChunkPlan(20, 0), one_stem(model, spare=lambda: model))
