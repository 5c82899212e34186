"""cuda_graphs, on a simulated GPU: a graph is used if and only if its replay gives the model's estimates."""

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import soundfile
import torch
from torch import Tensor

from helpers import simulated_gpu as simulated
from helpers.common import SONG
from helpers.small_model import quick_model
from separation import EstimateError, Separator
from separation.engine import cuda_graphs, gpu_models
from separation.engine.cuda_graphs import Graphed, captured
from separation.engine.options import EngineOptions
from separation.evaluation.metrics import sdr

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is there: test_on_gpu.py is for it"),
]

GPU = torch.device("cuda", 0)
SHAPE = (4, 2, 100)
QUICK = EngineOptions(chunk_seconds=4, overlap_seconds=3)


@pytest.fixture(autouse=True)
def simulated_card() -> Iterator[object]:
    with simulated.simulated_gpu() as card:
        yield card


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The log lines so far about how models run."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if "graph" in record.getMessage()]


def two_stems(batch: Tensor) -> Tensor:
    return torch.stack([batch * 0.5, batch.flip(-1)], dim=1)


class Counted:
    """A model that counts how often it is called."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.calls = 0
        self._model = model

    def __call__(self, batch: Tensor) -> Tensor:
        self.calls += 1
        return self._model(batch)


@torch.inference_mode()
def test_a_graph_gives_the_models_estimates_without_calling_it(said: Callable[[], list[str]]) -> None:
    model = Counted(two_stems)
    graphed = captured("small", model, SHAPE, GPU)
    assert isinstance(graphed, Graphed) and said() == ["small: runs as a CUDA graph, batches of 4"]
    calls = model.calls
    batches = torch.randn(3, *SHAPE)
    got = [graphed(batch.to(GPU)) for batch in batches]  # the next replay overwrites none of them
    assert all(torch.equal(each.cpu(), two_stems(batch)) for each, batch in zip(got, batches, strict=True))
    assert model.calls == calls
    assert torch.equal(graphed(batches[0, :3].to(GPU)).cpu(), two_stems(batches[0, :3]))
    assert model.calls == calls + 1  # another shape


@torch.inference_mode()
def test_a_capture_needs_little_more_memory_than_its_graph() -> None:
    shape = (8, 2, 100_000)
    torch.cuda.reset_peak_memory_stats()
    graphed = captured("small", two_stems, shape, GPU)
    assert isinstance(graphed, Graphed)
    estimates = 8 * 2 * 2 * 100_000 * 4  # bytes; the model's own estimates and the batch, half as large, are needed
    assert torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() < 2.5 * estimates


@pytest.mark.parametrize("fails_at_the_end", [False, True])
@torch.inference_mode()
def test_a_capture_that_runs_out_of_memory_frees_its_memory(
    fails_at_the_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(graph: object) -> None:
        gpu_end(graph)
        if fails_at_the_end:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def model(batch: Tensor) -> Tensor:
        within = batch * 2.0
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return two_stems(within)

    gpu_end = simulated.Graph.capture_end
    monkeypatch.setattr(simulated.Graph, "capture_end", end)
    captured("small", two_stems, SHAPE, GPU)  # creates what all graphs share
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *place: None)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *place: None)
    before = torch.cuda.memory_allocated()
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            captured("small", model, (4, 2, 100_000), GPU)
        cuda_graphs._captures(GPU).failed.clear()
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


@torch.inference_mode()
def test_tensors_that_a_graph_reads_stay_alive() -> None:
    tables = [torch.full((100,), 2.0, device=GPU)]
    graphed = captured("small", lambda batch: (batch * tables[0]).unsqueeze(1), SHAPE, GPU)
    assert isinstance(graphed, Graphed)
    assert tables[0].untyped_storage()._cdata in graphed._used
    tables.clear()
    batch = torch.randn(SHAPE)
    assert torch.equal(graphed(batch.to(GPU)).cpu(), 2 * batch.unsqueeze(1))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x * x.amax().item(),
        lambda x: x * 2 if x.amax() > 0 else x,
        lambda x: x * float(x.amax()),
        lambda x: x if torch.equal(x, x) else x * 2,
        lambda x: x * x[x > 0].mean(),
        lambda x: x * torch.ones(100).to(GPU),
        lambda x: x * torch.ones(100).pin_memory().to(GPU),
        lambda x: x + x[..., [0, 1]].sum(),
        lambda x: x + x[..., torch.tensor([0, 1])].sum(),
        lambda x: x.cpu().to(GPU),
        lambda x: x * torch.tensor([2.0], device=GPU),
    ],
)
@torch.inference_mode()
def test_a_model_that_waits_for_the_cpu_is_never_captured(
    wait: Callable[[Tensor], Tensor], said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("a capture was tried")

    monkeypatch.setattr(cuda_graphs, "Graphed", never)

    def model(batch: Tensor) -> Tensor:
        return wait(batch).unsqueeze(1)

    assert captured("small", model, SHAPE, GPU) is model
    assert len(said()) == 1 and said()[0].startswith("small: runs without a CUDA graph (it waits for the CPU: ")


@torch.inference_mode()
def test_operations_that_do_not_wait_are_not_mistaken_for_waits() -> None:
    table = torch.arange(100, device=GPU)

    def model(batch: Tensor) -> Tensor:
        x = batch.index_select(-1, table)[..., table].masked_fill(batch > 1, 0.0) * torch.tensor(2.0)
        x = torch.nn.functional.pad(x.half(), (0, 1)).float()[..., :-1]
        x[..., 0] = 3.0
        return torch.stack([x, torch.zeros(100, device=GPU).add_(1.0) * x], dim=1)

    assert isinstance(captured("small", model, SHAPE, GPU), Graphed)


@torch.inference_mode()
def test_a_model_whose_replay_differs_runs_without_a_graph(said: Callable[[], list[str]]) -> None:
    model = Counted(lambda batch: batch.unsqueeze(1) * model.calls)
    assert captured("small", model, SHAPE, GPU) is model
    assert said() == ["small: runs without a CUDA graph (its replay differs from its own estimates)"]


def failing(error: Exception) -> Callable[[Tensor], Tensor]:
    """A model that fails while it is captured."""

    def model(batch: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise error
        return two_stems(batch)

    return model


@torch.inference_mode()
def test_after_a_failed_capture_the_model_runs_without_a_graph(
    said: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[int, object]] = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *place: ended.append(place))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *place: ended.append(place))
    model = failing(RuntimeError("CUDA error: operation not permitted\nmore"))
    assert captured("small", model, SHAPE, GPU) is model
    assert ended == [(0, (0, 0))] * 2
    assert captured("other", two_stems, SHAPE, GPU) is two_stems
    assert said() == [
        "small: runs without a CUDA graph (CUDA error: operation not permitted)",
        "other: runs without a CUDA graph (an earlier capture failed)",
    ]


@pytest.mark.parametrize("has_ended", [True, False])
@torch.inference_mode()
def test_a_capture_that_runs_out_of_memory_is_an_out_of_memory_error(
    has_ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*place: object) -> None:
        if has_ended:
            raise RuntimeError("not currently recording to it")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *place: None)
    with pytest.raises(torch.OutOfMemoryError):
        captured("small", failing(torch.OutOfMemoryError("CUDA out of memory")), SHAPE, GPU)
    assert isinstance(captured("small", two_stems, SHAPE, GPU), Graphed) == has_ended


# The engine


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """Twelve seconds of the demo song, [2, T]."""
    audio, _ = soundfile.read(SONG, dtype="float32", frames=529_200)
    return torch.from_numpy(audio.T.copy())


@pytest.mark.slow
def test_a_song_has_the_same_samples_with_and_without_graphs(clip: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def separated() -> Tensor:
        separator = Separator.from_model(quick_model().to(GPU), options=replace(QUICK, batch_size=4))
        return separator.separate(clip)["vocals"]

    by_graphs = separated()
    monkeypatch.setattr(gpu_models, "captured", lambda name, model, shape, device: model)
    assert torch.equal(separated(), by_graphs)


@pytest.mark.slow
def test_a_song_that_overflows_in_float16_is_computed_in_bfloat16_and_so_is_the_next(
    clip: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def model(precision: torch.dtype) -> torch.nn.Module:
        made = quick_model()
        first = next(module for module in made.band_split.modules() if isinstance(module, torch.nn.Linear))
        first.weight.mul_(3e4)  # a norm follows
        made.to_precision(precision)
        return made

    with torch.inference_mode():
        expected = Separator.from_model(
            model(torch.float32), options=EngineOptions(chunk_seconds=4, overlap_seconds=3)
        ).separate(clip)["vocals"]
        separator = Separator.from_model(
            model(torch.float16).to(GPU), options=EngineOptions(chunk_seconds=4, overlap_seconds=3)
        )
    got = [separator.separate(clip)["vocals"] for _ in range(2)]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["quick: NaN or Inf in float16: the rest of this song is computed in bfloat16"] * 2
    assert torch.equal(got[0], got[1])
    assert sdr(expected, got[0]) > 20
    with torch.inference_mode():
        next(separator.models["quick"].parameters()).fill_(torch.nan)
    fresh = Separator.from_model(separator.models["quick"], options=QUICK)
    with pytest.raises(EstimateError, match="NaN or Inf between samples 0 and"):
        fresh.separate(clip)
