"""chunking: any model, any length, exact reconstruction, cross-faded chunk borders, flat memory."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from separation.engine import chunking
from separation.engine.chunking import (
    ChunkPlan,
    chunk_memory_bytes,
    chunks,
    fades,
    fitting_batch_size,
    read_extended,
    separate,
)
from separation.errors import EstimateError, InputError
from separation.progress import Progress


def identity(batch: Tensor) -> Tensor:
    return batch.unsqueeze(1)


def run(mixture: Tensor, plan: ChunkPlan, model=identity, n_stems: int = 1, **options) -> Tensor:
    blocks = separate(
        model, lambda start, stop: mixture[:, start:stop], mixture.shape[1], plan, n_stems=n_stems, **options
    )
    return torch.cat(list(blocks), dim=-1)


@pytest.mark.parametrize("reflects_border", [True, False])
@pytest.mark.parametrize("chunk, overlap", [(16, 8), (16, 4), (16, 12), (16, 15), (16, 0), (15, 7), (1, 0), (100, 50)])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 100, 257])
def test_an_identity_model_returns_its_input(length: int, chunk: int, overlap: int, reflects_border: bool) -> None:
    mixture = torch.randn(2, length)
    for batch_size in (1, 3):
        result = run(mixture, ChunkPlan(chunk, overlap, reflects_border), batch_size=batch_size)
        assert result.shape == (1, 2, length)
        assert (result[0] - mixture).abs().max() <= 1e-6


def two_stems(batch: Tensor) -> Tensor:
    """A model that tells chunks and their samples apart."""
    return torch.stack([batch.sin() + batch.amax(-1, keepdim=True), batch.flip(-1)], dim=1)


def in_plain_steps(mixture: Tensor, plan: ChunkPlan, offset: float, scale: float) -> Tensor:
    """What `separate` gives with `two_stems`: the whole song at once, one chunk after the other."""
    channels, total = mixture.shape
    room = plan.chunk_samples + plan.overlap_samples  # around the song, for all that a chunk may reach
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
        shift = 0  # a short last chunk is centred in what is around it
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
    """Reading, computing and what the caller does one after the other, or at once in threads as for a GPU."""
    monkeypatch.setattr(chunking, "_is_asynchronous", lambda device: request.param == "ahead")
    return request.param


@pytest.mark.parametrize("reflects_border", [True, False])
@pytest.mark.parametrize("chunk, overlap", [(16, 8), (16, 12), (15, 7), (16, 0), (1, 0), (100, 50)])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 33, 257])
def test_every_sample_is_that_of_the_plain_steps(
    length: int, chunk: int, overlap: int, reflects_border: bool, order: str
) -> None:
    mixture = torch.randn(2, length)
    mixture[:, length // 3 : length // 2] = 0
    plan = ChunkPlan(chunk, overlap, reflects_border)
    expected = in_plain_steps(mixture, plan, 0.1, 0.7)
    for batch_size in (1, 4):
        result = run(mixture, plan, two_stems, 2, batch_size=batch_size, offset=0.1, scale=0.7)
        assert result.shape == expected.shape
        assert (result - expected).abs().max() <= 2e-6  # products and sums are rounded once together, not each


def test_every_second_and_overlap_of_the_contract_reconstructs_a_song() -> None:
    rate = 100  # samples a second: the plan only knows samples
    mixture = torch.randn(2, 61 * rate + 17)
    for chunk_seconds in range(4, 31):
        for overlap_seconds in range(1, min(chunk_seconds, 9)):
            plan = ChunkPlan(chunk_seconds * rate, overlap_seconds * rate)
            assert (run(mixture, plan)[0] - mixture).abs().max() <= 1e-6


@pytest.mark.parametrize("overlap", [4, 8, 12, 16])
def test_overlap_not_below_the_chunk_is_refused(overlap: int) -> None:
    with pytest.raises(InputError, match="overlap"):
        ChunkPlan(4, overlap)


def test_a_gain_error_in_one_chunk_is_cross_faded_and_never_stepped() -> None:
    calls = 0

    def second_chunk_louder(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return batch.unsqueeze(1) * (2.0 if calls == 2 else 1.0)

    mixture = torch.ones(1, 1000)
    result = run(mixture, ChunkPlan(200, 100), second_chunk_louder)[0, 0]
    steps = result.diff().abs()
    assert result.max() == pytest.approx(2.0, abs=0.02)
    assert steps.max() <= 1.0 / 100 + 1e-4  # the whole gain error spread over the overlap


@pytest.mark.parametrize("batch_size", [2, 3, 5, 64])
def test_batch_size_does_not_change_a_sample(batch_size: int) -> None:
    mixture = torch.randn(2, 1234)

    def model(batch: Tensor) -> Tensor:
        return torch.stack([batch.sin(), batch * batch.mean(-1, keepdim=True)], dim=1)

    plan = ChunkPlan(128, 40)
    assert torch.equal(run(mixture, plan, model, 2), run(mixture, plan, model, 2, batch_size=batch_size))


def test_chunks_of_silence_are_not_computed_and_give_silence() -> None:
    seen = []

    def model(batch: Tensor) -> Tensor:
        seen.append(batch.shape[0])
        return batch.unsqueeze(1) + 0.5

    mixture = torch.zeros(2, 1000)
    mixture[:, 800:] = 0.3
    result = run(mixture, ChunkPlan(100, 50), model, batch_size=4)
    assert result[..., :700].abs().max() == 0
    assert sum(seen) < len(list(chunks(ChunkPlan(100, 50), 1000)))
    assert run(torch.zeros(2, 1000), ChunkPlan(100, 50), model).abs().max() == 0


def test_offset_and_scale_are_undone() -> None:
    mixture = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.2
    seen: list[Tensor] = []

    def model(batch: Tensor) -> Tensor:
        seen.append(batch)
        return batch.unsqueeze(1)

    result = run(mixture, ChunkPlan(500, 0, False), model, offset=0.2, scale=0.1)
    assert seen[0].std() == pytest.approx(1.0, rel=0.1)
    assert (result[0] - mixture).abs().max() <= 1e-6


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_nan_out_is_an_error_that_says_where(batch_size: int, order: str) -> None:
    def model(batch: Tensor) -> Tensor:
        return torch.where(batch > 40, torch.nan, batch).unsqueeze(1)

    with pytest.raises(EstimateError, match="NaN or Inf between samples 30 and 50:"):
        run(torch.arange(60.0)[None], ChunkPlan(20, 10), model, batch_size=batch_size)
    assert run(torch.arange(40.0)[None], ChunkPlan(20, 10), model).shape == (1, 1, 40)


def test_memory_does_not_grow_with_the_song() -> None:
    largest, furthest = 0, 0

    def read(start: int, stop: int) -> Tensor:
        nonlocal largest, furthest
        largest, furthest = max(largest, stop - start), max(furthest, stop)
        return torch.ones(1, stop - start)

    plan = ChunkPlan(100, 50)
    samples = 0
    for block in separate(identity, read, 100_000, plan, n_stems=1, batch_size=2):
        assert block.shape[:2] == (1, 1)
        assert block.shape[-1] <= plan.chunk_samples + 2 * plan.chunk_hop
        samples += block.shape[-1]
        assert furthest <= samples + plan.chunk_samples  # nothing is read long before it is needed
    assert samples == 100_000
    assert largest <= plan.chunk_samples


def test_progress_rises_to_1_and_raising_from_it_cancels() -> None:
    shares: list[float] = []
    progress = Progress(lambda share, stage: shares.append(share))
    run(torch.ones(1, 1000), ChunkPlan(100, 50), batch_size=4, progress=progress)
    assert shares[0] == 0.0 and shares[-1] == 1.0 and len(shares) > 3
    assert shares == sorted(shares)

    class StopError(Exception):
        pass

    def cancel(share: float, stage: str) -> None:
        if share:
            raise StopError

    with pytest.raises(StopError):
        run(torch.ones(1, 1000), ChunkPlan(100, 50), progress=Progress(cancel))


def test_the_border_is_reflected_and_beyond_it_lies_silence() -> None:
    song = torch.arange(1.0, 5.0)[None]  # 1 2 3 4

    def read(start: int, stop: int) -> Tensor:
        return song[:, start:stop]

    assert read_extended(read, -2, 6, 4, border=2).tolist() == [[3, 2, 1, 2, 3, 4, 3, 2]]
    assert read_extended(read, -5, 4, 4, border=5).tolist() == [[0, 0, 4, 3, 2, 1, 2, 3, 4]]
    assert read_extended(lambda a, b: song[:, :1][:, a:b], -2, 3, 1, border=2).tolist() == [[0, 0, 1, 0, 0]]


def test_fades_are_never_zero_and_sum_to_a_constant_over_the_overlap() -> None:
    for overlap in (1, 2, 7, 50):
        weights = fades(100, overlap)
        assert weights.min() > 0
        assert (weights[:overlap] + weights[-overlap:] - 1).abs().max() < 1e-6


# Ahead, as for a GPU


class OtherThreads:
    """The threads that this test has started and that still run, but for the one that computes, which stays."""

    def __init__(self) -> None:
        self._before = set(threading.enumerate())

    def __bool__(self) -> bool:
        started = set(threading.enumerate()) - self._before
        return any(not thread.name.startswith("compute on") for thread in started)


def test_two_more_batches_are_computed_and_the_one_after_them_read_while_the_caller_has_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunking, "_is_asynchronous", lambda device: True)
    computed, read_so_far = threading.Semaphore(0), threading.Semaphore(0)

    def model(batch: Tensor) -> Tensor:
        computed.release()
        return batch.unsqueeze(1)

    def read(start: int, stop: int) -> Tensor:
        if stop > start:
            read_so_far.release()
        return torch.ones(1, stop - start)

    blocks = separate(model, read, 1000, ChunkPlan(100, 0), n_stems=1)
    next(blocks)
    for _ in range(3):
        assert computed.acquire(timeout=60)
    for _ in range(4):
        assert read_so_far.acquire(timeout=60)
    blocks.close()
    assert not computed.acquire(blocking=False)  # no more than that


def test_the_next_batch_is_started_before_the_one_at_hand_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_is_asynchronous", lambda device: True)
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
    run(torch.ones(1, 400), ChunkPlan(100, 0), model)
    assert done == ["started", *["started", "checked"] * 3, "checked"]


def test_songs_in_several_threads_are_computed_by_one_and_each_comes_out_as_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunking, "_is_asynchronous", lambda device: True)
    threads: list[str] = []
    together = threading.Barrier(4, timeout=60)

    def model(batch: Tensor) -> Tensor:
        threads.append(threading.current_thread().name)
        return two_stems(batch)

    def separated(mixture: Tensor) -> Tensor:
        together.wait()
        return run(mixture, ChunkPlan(100, 50), model, 2, batch_size=4)

    mixtures = list(torch.randn(4, 2, 3000))
    with ThreadPoolExecutor(4) as pool:
        for mixture, got in zip(mixtures, pool.map(separated, mixtures), strict=True):
            assert torch.equal(got, run(mixture, ChunkPlan(100, 50), two_stems, 2, batch_size=4))
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
def test_ahead_all_batches_of_a_song_have_one_size_that_follows_from_its_length_alone(
    n_chunks: int, batch_size: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunking, "_is_asynchronous", lambda device: True)
    seen: list[Tensor] = []

    def model(batch: Tensor) -> Tensor:
        seen.append(batch)
        return two_stems(batch)

    mixture, plan = torch.randn(2, 100 * n_chunks), ChunkPlan(100, 0)
    result = run(mixture, plan, model, 2, batch_size=batch_size, offset=0.5)
    assert [len(batch) for batch in seen] == sizes
    assert not torch.cat(seen)[n_chunks:].any()
    assert torch.equal(result, run(mixture, plan, two_stems, 2, offset=0.5))


def test_ahead_a_batch_with_silent_chunks_is_filled_up_too_and_one_of_silence_alone_is_not_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunking, "_is_asynchronous", lambda device: True)
    sizes: list[int] = []

    def model(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return two_stems(batch)

    mixture = torch.randn(2, 1200)
    mixture[:, 100:300] = mixture[:, 400:800] = 0
    result = run(mixture, ChunkPlan(100, 0), model, 2, batch_size=4)
    assert sizes == [4, 4]
    assert torch.equal(result, run(mixture, ChunkPlan(100, 0), two_stems, 2))


def test_what_is_under_way_does_not_grow_with_the_song(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "_is_asynchronous", lambda device: True)
    furthest = samples = 0

    def read(start: int, stop: int) -> Tensor:
        nonlocal furthest
        furthest = max(furthest, stop)
        return torch.ones(1, stop - start)

    plan = ChunkPlan(100, 50)
    for block in separate(identity, read, 100_000, plan, n_stems=1, batch_size=2):
        samples += block.shape[-1]
        assert furthest <= samples + plan.chunk_samples + 4 * 2 * plan.chunk_hop


@pytest.mark.parametrize("where", ["read", "model", "progress", "caller"])
def test_an_error_anywhere_comes_through_as_it_is_and_leaves_no_thread(where: str, order: str) -> None:
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
    blocks = separate(model, read, 1000, ChunkPlan(100, 50), n_stems=1, progress=progress)

    def use_all() -> None:
        for _ in blocks:
            may_stop("caller")

    with pytest.raises(StopError):
        use_all()
    blocks.close()
    assert not threads


def test_a_song_that_is_given_up_leaves_no_thread(order: str) -> None:
    threads = OtherThreads()
    blocks = separate(identity, lambda start, stop: torch.ones(1, stop - start), 1000, ChunkPlan(100, 50), n_stems=1)
    next(blocks)
    assert bool(threads) == (order == "ahead")
    blocks.close()
    assert not threads


# A GPU's memory


class SmallGpu:
    """A model on a GPU that holds `room` chunks at once."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.sizes: list[int] = []  # of the batches asked for
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
    result = run(mixture, plan, model, 2, batch_size=batch_size)
    assert torch.equal(result, run(mixture, plan, two_stems, 2))
    assert model.sizes == sizes[order]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == len(model.attempts)
    if warned:
        assert warned[0].startswith(f"the GPU's memory does not hold {sizes[order][0]} chunks at once: from here on ")


def test_one_chunk_that_memory_does_not_hold_is_an_error_that_says_what_to_do(order: str) -> None:
    model = SmallGpu(0)
    what_to_do = "choose a smaller chunk size, precision bf16 or fp16, or device cpu"
    with pytest.raises(
        EstimateError, match=f"^the memory of cpu does not hold one chunk of 128 samples: {what_to_do}$"
    ) as raised:
        run(torch.randn(2, 1234), ChunkPlan(128, 40), model, 2, batch_size=4)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert model.sizes == [4, 2, 1]


@pytest.mark.parametrize("kind", ["NaN", "no memory"])
def test_an_error_that_is_dealt_with_holds_no_tensors(kind: str, order: str) -> None:
    held: list[weakref.ref[Tensor]] = []

    def model(batch: Tensor) -> Tensor:
        estimates = two_stems(batch) / 0
        held.append(weakref.ref(estimates))
        if kind == "no memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return estimates

    gc.disable()  # a GPU's memory must not wait for it
    try:
        with pytest.raises(EstimateError):
            run(torch.randn(2, 1234), ChunkPlan(128, 40), model, 2, batch_size=4)
        assert held and not any(each() is not None for each in held)
    finally:
        gc.enable()


def test_another_error_of_the_model_is_not_taken_for_missing_memory() -> None:
    calls = 0

    def model(batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(torch.randn(2, 1234), ChunkPlan(128, 40), model, 2, batch_size=4)
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
def test_a_library_that_cannot_allocate_is_missing_memory_too(words: str, order: str) -> None:
    def model(batch: Tensor) -> Tensor:
        if len(batch) > 2:
            raise RuntimeError(words)
        return two_stems(batch)

    mixture, plan = torch.randn(2, 1234), ChunkPlan(128, 40)
    assert torch.equal(run(mixture, plan, model, 2, batch_size=8), run(mixture, plan, two_stems, 2))


@pytest.mark.parametrize("where", [0, 500, 1100])
def test_from_where_a_model_gives_no_number_its_spare_computes_to_the_songs_end(where: int, order: str) -> None:
    mixture, plan, asked = torch.randn(1, 1200), ChunkPlan(100, 0), []
    mixture[:, where] = 100.0

    def model(batch: Tensor) -> Tensor:
        return torch.where(batch > 50, torch.inf, batch * 2).unsqueeze(1)

    def spare() -> Callable[[Tensor], Tensor]:
        asked.append(True)
        return lambda batch: batch.unsqueeze(1) * 3

    for _ in range(2):  # the next song begins with the model again
        result = run(mixture, plan, model, batch_size=2, spare=spare)[0]
        first = where // 200 * 200
        factors = torch.where(torch.arange(1200) < first, 2.0, 3.0)
        assert (result - factors * mixture).abs().max() <= 1e-4
    assert len(asked) == 2


def test_a_spare_that_gives_no_number_either_is_an_error_that_says_where(order: str) -> None:
    def model(batch: Tensor) -> Tensor:
        return torch.where(batch > 40, torch.nan, batch).unsqueeze(1)

    with pytest.raises(EstimateError, match="NaN or Inf between samples 40 and 60:"):
        run(torch.arange(60.0)[None], ChunkPlan(20, 0), model, spare=lambda: model)


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
def test_a_batch_is_a_power_of_two_that_takes_a_third_of_the_gpus_memory_at_most(
    total_gib: float, fraction: float, chunk_gib: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(total_memory=int(total_gib * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda gpu: fraction)
    assert fitting_batch_size(int(chunk_gib * 2**30), torch.device("cuda")) == expected


def test_a_chunks_memory_is_that_which_computing_one_adds(gpu_statistics: None) -> None:
    seen: list[Tensor] = []

    def model(batch: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()  # else what a gradient would need is kept, and measured
        seen.append(batch)
        return two_stems(batch)

    # The statistics are a GPU's, the computing is done here.
    assert chunk_memory_bytes(model, 2, 1000, torch.device("cpu")) == 700
    assert [chunk.shape for chunk in seen] == [(1, 2, 1000)] * 2  # before the second, all that lasts is made
    with pytest.raises(EstimateError, match="does not hold one chunk of 1000 samples"):
        chunk_memory_bytes(SmallGpu(0), 2, 1000, torch.device("cpu"))
