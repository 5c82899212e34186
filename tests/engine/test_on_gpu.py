"""The engine on a real CUDA GPU: it gives the CPU's stems, however little memory is free, and frees its memory."""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from helpers.common import SONG
from helpers.small_model import quick_model
from separation import EstimateError, ModelPool, Separator
from separation.engine import chunking, cuda_graphs, gpu_models
from separation.engine.batch_memory import Model, chunk_memory_bytes
from separation.engine.chunk_plan import ChunkPlan
from separation.engine.chunking import ReadyModel, separate
from separation.engine.compute_thread import compute_thread
from separation.engine.cuda_graphs import Graphed, captured
from separation.engine.options import EngineOptions
from separation.engine.song_waveforms import Samples
from separation.evaluation.metrics import sdr
from separation.models.attention import BACKENDS, choose_attention, einsum_attention
from separation.models.base import SeparationModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GPU = torch.device("cuda")
# By precision: the least SDR in dB between stems that were computed in two ways.
NEAR = {"fp32": 60.0, "bf16": 40.0, "fp16": 50.0}
PRECISIONS = list(NEAR)
PLAN = ChunkPlan(4000, 1000)


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """Ten seconds of the demo song, [2, T]."""
    audio, _ = soundfile.read(SONG, dtype="float32", frames=441_000)
    return torch.from_numpy(audio.T.copy())


def stems(clip: Tensor, device: torch.device, precision: str, **options: int) -> dict[str, Tensor]:
    pool = ModelPool(EngineOptions(device=str(device), precision=precision))
    engine = EngineOptions(chunk_seconds=4, overlap_seconds=2, **options)
    return Separator("demo", "all_6", options=engine, pool=pool).separate(clip)


def two_stems(batch: Tensor) -> Tensor:
    return torch.stack([batch * 0.5, batch.flip(-1)], dim=1)


def run(mixture: Tensor, model=two_stems, batch_size: int = 4) -> Tensor:
    """The estimates of a model that runs on the GPU."""
    ready = ReadyModel(model, n_stems=2, batch_size=batch_size, device=GPU)
    return torch.cat(list(separate(ready, Samples.of(mixture), PLAN)), dim=-1)


def forget_earlier_tests() -> None:
    """Free the models and tensors that pytest keeps alive for a failed test."""
    compute_thread(GPU).run(gc.collect)  # on that thread, which then holds no reference to its last job
    torch.cuda.empty_cache()


@contextmanager
def memory_comes_back() -> Iterator[None]:
    """Everything that is allocated in the block is freed, without the garbage collector, which may run late."""
    forget_earlier_tests()
    before = torch.cuda.memory_allocated(GPU)
    gc.disable()
    try:
        yield
        compute_thread(GPU).run(int)  # as above
        assert torch.cuda.memory_allocated(GPU) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("precision, error", [(torch.float32, 1e-3), (torch.bfloat16, 0.02), (torch.float16, 0.02)])
@pytest.mark.parametrize("shape", [(62, 8, 801, 64), (801, 8, 62, 64), (2, 8, 336, 48), (5, 4, 100, 32)])
def test_every_attention_backend_equals_the_plain_definition(
    precision: torch.dtype, error: float, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *shape, device=GPU)
    expected = einsum_attention(q, k, v)
    for name in {choose_attention("auto", GPU, precision, shape[-1]).name, "sdpa"}:
        got = BACKENDS[name](q.to(precision), k.to(precision), v.to(precision)).float()
        assert (got - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_stems_equal_the_cpus(clip: Tensor, precision: str) -> None:
    expected = stems(clip, torch.device("cpu"), "fp32")
    for stem, got in stems(clip, GPU, precision).items():
        assert sdr(expected[stem], got) > NEAR[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_batch_size_changes_the_stems_by_no_more_than_rounding(clip: Tensor, precision: str) -> None:
    expected = stems(clip, GPU, precision, batch_size=1)
    for batch_size in (2, 5, 8):
        for stem, got in stems(clip, GPU, precision, batch_size=batch_size).items():
            assert sdr(expected[stem], got) > NEAR[precision]


def test_the_same_song_gives_the_same_samples(clip: Tensor) -> None:
    first, second = (stems(clip, GPU, "auto", batch_size=3) for _ in range(2))
    assert all(torch.equal(first[stem], second[stem]) for stem in first)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes per chunk that were measured so far."""
    measurements: list[int] = []

    def measure(model: Model, channels: int, samples: int, device: torch.device) -> int:
        measurements.append(chunk_memory_bytes(model, channels, samples, device))
        return measurements[-1]

    monkeypatch.setattr(gpu_models, "chunk_memory_bytes", measure)
    return measurements


def without_graphs(name: str, model: Model, shape: tuple[int, ...], device: torch.device) -> Model:
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_song_has_the_same_samples_with_and_without_graphs(
    clip: Tensor, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ModelPool(EngineOptions(device="cuda", precision=precision))
    options = {"pool": pool, "options": EngineOptions(chunk_seconds=4, overlap_seconds=3)}
    by_graphs = Separator("demo", "all_6", **options).separate(clip)
    assert all(isinstance(ready.model, Graphed) for ready in pool.on_gpu.ready.values())
    again = Separator("demo", "all_6", **options).separate(clip)
    pool.on_gpu.ready.clear()
    monkeypatch.setattr(gpu_models, "captured", without_graphs)
    plain = Separator("demo", "all_6", **options).separate(clip)
    for stem, expected in plain.items():
        assert torch.equal(by_graphs[stem], expected) and torch.equal(again[stem], expected)


def test_two_graphs_that_share_their_memory_do_not_disturb_each_other(clip: Tensor) -> None:
    pool = ModelPool(EngineOptions(device="cuda"))
    separators = [
        Separator("demo", "all_6", options=EngineOptions(chunk_seconds=n, overlap_seconds=2), pool=pool) for n in (4, 5)
    ]
    alone = [separator.separate(clip) for separator in separators]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda separator: separator.separate(clip), separators * 2))
    for got, expected in zip(together, alone * 2, strict=True):
        assert all(torch.equal(got[stem], expected[stem]) for stem in expected)


def waiting(batch: Tensor) -> Tensor:
    return two_stems(batch * float(batch.amax().clamp(0.5, 0.5)))


def failing(batch: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream().synchronize()
    return two_stems(batch)


def without_memory(batch: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        torch.empty(2**50, dtype=torch.uint8, device=GPU)
    return two_stems(batch)


def test_a_model_that_cannot_be_captured_runs_without_a_graph_and_memory_is_freed() -> None:
    thread = compute_thread(GPU)
    shape = (4, 2, 4000)
    try:
        assert isinstance(thread.run(captured, "small", two_stems, shape, thread.device), Graphed)
        assert thread.run(captured, "waiting", waiting, shape, thread.device) is waiting
        with pytest.raises(torch.OutOfMemoryError):
            thread.run(captured, "without memory", without_memory, shape, thread.device)
        assert isinstance(thread.run(captured, "small", two_stems, shape, thread.device), Graphed)
        assert thread.run(captured, "failing", failing, shape, thread.device) is failing
        torch.cuda.empty_cache()  # an error if the allocator still considers the capture active
        mixture = torch.randn(2, 100_000)
        assert torch.equal(run(mixture, failing), run(mixture))
    finally:
        cuda_graphs._captures.cache_clear()


def test_the_batch_size_does_not_depend_on_the_memory_that_other_programs_use(clip: Tensor) -> None:
    options = {"options": EngineOptions(chunk_seconds=4, overlap_seconds=2)}
    expected = Separator("demo", "all_6", pool=ModelPool(EngineOptions(device="cuda")), **options).separate(clip)
    forget_earlier_tests()
    free, _ = torch.cuda.mem_get_info(GPU)
    if free < 5 * 2**30:
        pytest.skip("needs 5 GiB of free memory on the GPU")
    others = torch.empty(free - 4 * 2**30, dtype=torch.uint8, device=GPU)
    try:
        got = Separator("demo", "all_6", pool=ModelPool(EngineOptions(device="cuda")), **options).separate(clip)
    finally:
        del others  # otherwise, if this fails, later tests have no memory
        torch.cuda.empty_cache()
    assert all(torch.equal(got[stem], expected[stem]) for stem in expected)


def test_a_batch_for_a_capped_memory_fits_without_being_halved(
    clip: Tensor, measured: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    forget_earlier_tests()
    cap = torch.cuda.memory_reserved(GPU) + 2**30
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        pool = ModelPool(EngineOptions(device="cuda"))
        Separator("demo", "all_6", options=EngineOptions(chunk_seconds=8, overlap_seconds=4), pool=pool).separate(clip)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (ready,) = pool.on_gpu.ready.values()
    (chunk_bytes,) = measured
    assert 3 * ready.batch_size * chunk_bytes <= cap
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_song_that_overflows_in_float16_is_computed_in_bfloat16(
    clip: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def model(precision: torch.dtype) -> SeparationModel:
        made = quick_model()
        first = next(module for module in made.band_split.modules() if isinstance(module, torch.nn.Linear))
        with torch.no_grad():
            first.weight.mul_(3e4)  # a norm follows
        made.to_precision(precision)
        return made

    options = {"options": EngineOptions(chunk_seconds=4, overlap_seconds=3)}
    expected = Separator.from_model(model(torch.float32), **options).separate(clip)["vocals"]
    separator = Separator.from_model(model(torch.float16).to(GPU), **options)
    got = [separator.separate(clip)["vocals"] for _ in range(2)]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["quick: NaN or Inf in float16: the rest of this song is computed in bfloat16"] * 2
    assert torch.equal(*got) and sdr(expected, got[0]) > 20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_the_second_gpu_gives_the_stems_of_the_first_without_using_the_first(clip: Tensor) -> None:
    expected = stems(clip, GPU, "auto")
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    got = stems(clip, torch.device("cuda:1"), "auto")
    assert torch.cuda.max_memory_allocated(0) == before
    assert all(sdr(expected[stem], got[stem]) > NEAR["fp16"] for stem in expected)


def test_working_ahead_changes_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = torch.randn(2, 100_000)
    ahead = run(mixture)
    monkeypatch.setattr(chunking, "_works_ahead", lambda device: False)  # and without padding
    assert torch.equal(run(mixture), ahead)
    cpu = separate(ReadyModel(two_stems, n_stems=2), Samples.of(mixture), PLAN)
    assert (torch.cat(list(cpu), dim=-1) - ahead).abs().max() <= 1e-6


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, unit_bytes = torch.randn(2, 100_000), 2**28
    expected = run(mixture)
    sizes: list[int] = []

    def model(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        torch.empty(len(batch), unit_bytes, dtype=torch.uint8, device=GPU)
        return two_stems(batch)

    forget_earlier_tests()
    room = torch.cuda.memory_reserved(GPU) + 2.5 * unit_bytes
    if torch.cuda.mem_get_info(GPU)[0] < 3 * unit_bytes:
        pytest.skip("needs 768 MiB of free memory on the GPU")
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(GPU).total_memory)
    try:
        result = run(mixture, model, batch_size=8)
        assert sizes[:3] == [8, 4, 2]
        assert set(sizes[2:]) == {2}
        assert torch.equal(result, expected)
        unit_bytes *= 4
        with pytest.raises(EstimateError, match=r"the memory of cuda:\d does not hold one chunk of 4000 samples"):
            run(mixture, model)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_batch_needs_no_more_memory_than_was_estimated(
    clip: Tensor, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_models, "captured", without_graphs)
    pool = ModelPool(EngineOptions(device="cuda", precision="auto"))
    options = {"pool": pool, "options": EngineOptions(chunk_seconds=4, overlap_seconds=3)}
    Separator("demo", "all_6", **options).separate(clip)
    (chunk_bytes,) = measured
    forget_earlier_tests()
    before = torch.cuda.memory_allocated(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    Separator(
        "demo", "all_6", pool=pool, options=EngineOptions(chunk_seconds=4, overlap_seconds=3, batch_size=8)
    ).separate(clip)
    estimates = 8 * 6 * 2 * 4 * 44100 * 4  # bytes of a batch; two are kept while a third is computed
    assert 0 < torch.cuda.max_memory_allocated(GPU) - before <= 1.25 * 8 * chunk_bytes + 2 * estimates


@pytest.mark.parametrize("end", ["finished", "an error", "given up"])
def test_the_memory_of_a_song_is_freed(clip: Tensor, tmp_path: Path, end: str) -> None:
    class StopError(Exception):
        pass

    def stop(share: float, stage: str) -> None:
        if end == "given up" and share > 0.5:
            raise StopError

    separator = Separator(
        "demo",
        "all_6",
        pool=ModelPool(EngineOptions(device="cuda", precision="fp32")),
        options=EngineOptions(chunk_seconds=4, overlap_seconds=2),
    )
    song = tmp_path / "song.wav"
    soundfile.write(song, clip.T.numpy(), 44100, subtype="FLOAT")
    separator.separate_file(song, tmp_path)  # creates windows and workspaces, which stay
    if end == "an error":
        with torch.inference_mode():
            next(separator.models["demo"].parameters()).fill_(torch.nan)  # a graph reads it from where it was
        with memory_comes_back(), pytest.raises(EstimateError):
            separator.separate_file(song, tmp_path)
    elif end == "given up":
        with memory_comes_back(), pytest.raises(StopError):
            separator.separate_file(song, tmp_path, progress=stop)
    else:
        with memory_comes_back():
            separator.separate_file(song, tmp_path)
