"""HTDemucs: the demucs package's network under this project's chunking gives what demucs' own apply_model gives."""

from fractions import Fraction

import pytest
import torch
from demucs.apply import BagOfModels, apply_model
from demucs.htdemucs import HTDemucs as Network

from separation import ModelPool, separator
from separation.chunking import ChunkPlan, separate
from separation.models.htdemucs import HTDemucs, HTDemucsConfig

SOURCES = ("drums", "bass", "other", "vocals")
SMALL = {
    "sources": SOURCES,
    "channels": 8,
    "bottom_channels": 16,
    "t_layers": 2,
    "t_heads": 2,
    "depth": 4,
    "nfft": 4096,
}
SMALL |= {"segment": Fraction(1, 2), "dconv_mode": 3}


def network(seed: int) -> Network:
    torch.manual_seed(seed)
    return Network(**(SMALL | {"sources": list(SOURCES)})).eval()


def model_of(networks: list[Network], specialists: tuple[str, ...] | None = None) -> HTDemucs:
    with torch.device("meta"):
        model = HTDemucs(HTDemucsConfig(**SMALL), specialists=specialists)
    state = {
        HTDemucs.key_prefix(stem) + key: value
        for stem, network in zip(specialists or (None,), networks, strict=True)
        for key, value in network.state_dict().items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    model.chunk_samples = 22050
    return model.eval()


def run(model: HTDemucs, mixture: torch.Tensor, overlap: float) -> torch.Tensor:
    hop = int((1 - overlap) * model.chunk_samples)
    plan = ChunkPlan(model.chunk_samples, model.chunk_samples - hop, model.reflects_border)
    blocks = separate(model, lambda a, b: mixture[:, a:b], mixture.shape[1], plan, n_stems=len(model.stems))
    return torch.cat(list(blocks), dim=-1)


@pytest.mark.parametrize("overlap", [0.25, 0.5])
@pytest.mark.parametrize("length", [1, 1000, 22050, 22051, 30000, 40000, 70001])
def test_output_equals_apply_model_without_shifts(length: int, overlap: float) -> None:
    net = network(0)
    mixture = torch.randn(2, length) * 0.2
    with torch.no_grad():
        expected = apply_model(net, mixture[None], shifts=0, overlap=overlap)[0]
    got = run(model_of([net]), mixture, overlap)
    assert got.shape == expected.shape == (4, 2, length)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_specialists_equal_the_bag_and_only_those_asked_for_are_there() -> None:
    nets = [network(seed) for seed in range(4)]
    mixture = torch.randn(2, 50_000) * 0.2
    bag = BagOfModels(nets, [[float(i == j) for j in range(4)] for i in range(4)])
    with torch.no_grad():
        expected = apply_model(bag, mixture[None], shifts=0, overlap=0.25)[0]
    model = model_of([nets[1], nets[0]], ("bass", "drums"))
    got = run(model, mixture, 0.25)
    assert model.stems == ("bass", "drums")
    assert sum(p.numel() for p in model.parameters()) == 2 * sum(p.numel() for p in nets[0].parameters())
    assert (got - expected[[1, 0]]).abs().max() <= 1e-4 * expected.abs().max()


def test_of_loaded_specialists_only_those_asked_for_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of([network(seed) for seed in range(3)], ("drums", "bass", "other"))
    monkeypatch.setattr(separator, "load_model", lambda name, **options: model)
    ran: list[str] = []
    for stem, specialist in model.specialists.items():
        specialist.register_forward_hook(lambda *_, stem=stem: ran.append(stem))
    pool = ModelPool("cpu", "fp32")
    every = pool.get("htdemucs_ft", ("drums", "bass", "other"))
    alone = pool.get("htdemucs_ft", ("bass",))
    chunk = torch.randn(1, 2, 22050) * 0.2
    with torch.no_grad():
        estimates = alone(chunk)
        assert ran == ["bass"] and alone.stems == ("bass",)
        assert torch.equal(estimates[:, 0], every(chunk)[:, 1])
    assert every.stems == ("drums", "bass", "other")
    assert next(alone.parameters()) is next(every.parameters())


def test_a_network_of_all_stems_is_itself_for_any_of_them() -> None:
    model = model_of([network(0)])
    assert model.only(("bass",)) is model
    assert model.stems == SOURCES


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 30), (torch.float16, 45)])
def test_half_precision_stays_near_float32(precision: torch.dtype, decibels: float) -> None:
    model = model_of([network(0)])
    mixture = torch.randn(2, 30_000) * 0.2
    exact = run(model, mixture, 0.25)
    model.prepare(precision, attention="sdpa")
    error = run(model, mixture, 0.25) - exact
    assert 10 * torch.log10(exact.square().sum() / error.square().sum()) > decibels


def test_the_same_input_gives_the_same_samples() -> None:
    model = model_of([network(0)])
    mixture = torch.randn(2, 40_000) * 0.2
    assert torch.equal(run(model, mixture, 0.25), run(model, mixture, 0.25))
