"""The Demucs family under this project's chunking equals the demucs package's apply_model."""

import pytest
import torch
from demucs.apply import BagOfModels

from helpers.common import quick_first, slow
from helpers.small_demucs import (
    CHUNK_SAMPLES,
    KINDS,
    LENGTHS,
    SOURCES,
    by_demucs,
    model_of,
    network,
    relative_error,
    run,
    song,
)
from separation import ModelPool
from separation.engine import pool as pool_module
from separation.engine.options import EngineOptions
from separation.models.kernels.registry import cpu_fault

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("overlap, lengths", [(0.25, [1, 30_000]), slow((0.25, LENGTHS)), slow((0.5, LENGTHS[-2:]))])
@pytest.mark.parametrize("kind", KINDS)
def test_output_equals_apply_model_without_shifts(kind: str, overlap: float, lengths: list[int]) -> None:
    net = network(0, kind)
    model = model_of([net], kind)
    for length in lengths:
        mixture = song(length)
        expected = by_demucs(net, mixture, overlap)
        error = relative_error(run(model, mixture, overlap), expected)
        print(f"{kind}, overlap {overlap}, {length} samples: {error:.1e}")
        assert error <= 1e-4


@pytest.mark.slow
def test_several_networks_equal_the_bag_that_averages_them() -> None:
    nets = [network(seed, "hdemucs") for seed in range(2)]
    model = model_of(nets, "hdemucs")
    assert model.stems == SOURCES and model.only(("bass",)) is model
    for length in (1, 40_000):
        mixture = song(length)
        error = relative_error(run(model, mixture, 0.25), by_demucs(BagOfModels(nets), mixture))
        print(f"bag, {length} samples: {error:.1e}")
        assert error <= 1e-4


@torch.no_grad()
@pytest.mark.skipif(bool(cpu_fault()), reason=cpu_fault() or "kernels for CPUs work")
@pytest.mark.parametrize(
    "other, fault", [slow(("amplitudes", "networks that mask amplitudes")), ("demucs", "one branch")]
)
def test_in_a_bag_the_networks_that_have_faster_layers_get_them(
    other: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of([network(seed, "hdemucs") for seed in range(3)], "hdemucs")
    model.networks["1"] = network(1, other)
    model.networks["2"].hybrid_old = True  # another spectrogram
    chunks = torch.stack([song(CHUNK_SAMPLES), song(CHUNK_SAMPLES + 1)[:, 1:]])
    expected = model(chunks)
    with caplog.at_level("INFO", logger="separation"):
        model.fuse_for_cpu()
    kinds = [type(each).__name__ for each in model.networks.values()]
    assert [kinds[0], kinds[2]] == ["_FusedNetwork"] * 2 and kinds[1] != "_FusedNetwork"
    (message,) = caplog.messages
    assert "own layers for network 1 (" in message and fault in message
    assert relative_error(model(chunks), expected) <= 1e-5


@torch.no_grad()
@pytest.mark.skipif(bool(cpu_fault()), reason=cpu_fault() or "kernels for CPUs work")
def test_short_chunks_of_a_bag_are_extended_to_the_length_of_training() -> None:
    model = model_of([network(seed) for seed in range(2)])
    chunks = song(1000)[None]
    expected = model(chunks)
    model.fuse_for_cpu()
    assert relative_error(model(chunks), expected) <= 1e-5


@pytest.mark.slow
def test_specialists_equal_the_bag_and_only_requested_ones_are_built() -> None:
    nets = [network(seed) for seed in range(4)]
    mixture = song(50_000)
    bag = BagOfModels(nets, [[float(i == j) for j in range(4)] for i in range(4)])
    model = model_of([nets[1], nets[0]], specialists=("bass", "drums"))
    assert model.stems == ("bass", "drums")
    assert sum(p.numel() for p in model.parameters()) == 2 * sum(p.numel() for p in nets[0].parameters())
    assert relative_error(run(model, mixture, 0.25), by_demucs(bag, mixture)[[1, 0]]) <= 1e-4


def test_only_the_requested_specialists_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of([network(seed) for seed in range(3)], specialists=("drums", "bass", "other"))
    monkeypatch.setattr(pool_module, "load_model", lambda name, **options: model)
    ran: list[str] = []
    for stem, specialist in model.networks.items():
        specialist.register_forward_hook(lambda *_, stem=stem: ran.append(stem))
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    every = pool.get("htdemucs_ft", ("drums", "bass", "other"))
    alone = pool.get("htdemucs_ft", ("bass",))
    chunk = song(CHUNK_SAMPLES)[None]
    with torch.no_grad():
        estimates = alone(chunk)
        assert ran == ["bass"] and alone.stems == ("bass",)
        assert torch.equal(estimates[:, 0], every(chunk)[:, 1])
    assert every.stems == ("drums", "bass", "other")
    assert next(alone.parameters()) is next(every.parameters())


def test_a_network_of_all_stems_returns_all_of_them_for_any_request() -> None:
    model = model_of([network(0)])
    assert model.only(("bass",)) is model
    assert model.stems == SOURCES


@pytest.mark.parametrize("precision, decibels", quick_first([(torch.bfloat16, 25), (torch.float16, 42)], 1))
@pytest.mark.parametrize("kind", quick_first(KINDS, 1))
def test_half_precision_stays_close_to_float32(kind: str, precision: torch.dtype, decibels: float) -> None:
    model = model_of([network(0, kind)], kind)
    mixture = song(30_000)
    exact = run(model, mixture, 0.25)
    model.prepare(precision, attention="sdpa")
    error = run(model, mixture, 0.25) - exact
    near = 10 * torch.log10(exact.square().sum() / error.square().sum())
    print(f"{kind} in {precision}: {near:.1f} dB")
    assert near > decibels


@pytest.mark.parametrize("kind", quick_first(KINDS, 1))
def test_estimates_are_reproducible_and_independent_of_the_batch(kind: str) -> None:
    model = model_of([network(0, kind)], kind)
    mixture = song(60_000)
    alone = run(model, mixture, 0.25)
    assert torch.equal(run(model, mixture, 0.25), alone)
    assert relative_error(run(model, mixture, 0.25, batch_size=3), alone) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_silence_gives_silence_and_near_silence_gives_finite_samples(kind: str) -> None:
    model = model_of([network(0, kind)], kind)
    assert not run(model, torch.zeros(2, 30_000), 0.25).any()
    click = torch.zeros(2, 30_000)
    click[:, 0] = 1e-30
    assert run(model, click, 0.25).isfinite().all()
