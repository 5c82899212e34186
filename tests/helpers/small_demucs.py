"""Small Demucs models, and the demucs package's estimates for the same mixture."""

from fractions import Fraction
from typing import Any

import torch
from demucs.apply import apply_model
from torch import Tensor, nn

from helpers.small_model import identity
from separation.engine.chunk_plan import ChunkPlan
from separation.engine.chunking import ReadyModel, separate
from separation.engine.song_waveforms import Samples
from separation.models.htdemucs import Demucs, DemucsModel, HDemucs, HTDemucs

SOURCES = ("drums", "bass", "other", "vocals")
CHUNK_SAMPLES = 22050
SMALL = {"sources": SOURCES, "channels": 8, "segment": Fraction(CHUNK_SAMPLES, 44100), "dconv_init": 0.5}
# The three classes, and a Hybrid Demucs that masks amplitudes, like two of mdx_extra's networks.
KINDS: dict[str, tuple[type[DemucsModel], dict[str, Any]]] = {
    "htdemucs": (HTDemucs, SMALL | {"bottom_channels": 16, "t_layers": 2, "t_heads": 2, "dconv_mode": 3}),
    "hdemucs": (HDemucs, SMALL),
    "amplitudes": (HDemucs, SMALL | {"cac": False, "hybrid_old": True, "norm_starts": 999}),
    "demucs": (Demucs, SMALL | {"lstm_layers": 1}),
}
# Lengths of songs: one sample, less than a chunk, whole chunks, and last chunks of various lengths.
LENGTHS = [1, 1000, 22050, 22051, 30000, 40000, 70001]


def network(seed: int, kind: str = "htdemucs") -> Any:
    architecture, arguments = KINDS[kind]
    torch.manual_seed(seed)
    return architecture.Network(**(arguments | {"sources": list(SOURCES)})).eval()


def model_of(networks: list[nn.Module], kind: str = "htdemucs", specialists: tuple[str, ...] = ()) -> DemucsModel:
    architecture, arguments = KINDS[kind]
    with torch.device("meta"):
        model = architecture(
            architecture.Config(**arguments),
            identity(specialists or SOURCES, chunk_samples=CHUNK_SAMPLES),
            specialists=specialists,
            members=len(networks),
        )
    parts = specialists or [str(number) for number in range(len(networks))]
    state = {
        architecture.key_prefix(part) + key: value
        for part, network in zip(parts, networks, strict=True)
        for key, value in network.state_dict().items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def run(model: DemucsModel, mixture: Tensor, overlap: float, batch_size: int = 1) -> Tensor:
    overlap_samples = CHUNK_SAMPLES - int((1 - overlap) * CHUNK_SAMPLES)
    plan = ChunkPlan(CHUNK_SAMPLES, overlap_samples, model.reflects_border, model.input_samples)
    blocks = separate(ReadyModel(model, len(model.stems), batch_size), Samples.of(mixture), plan)
    return torch.cat(list(blocks), dim=-1)


def song(length: int) -> Tensor:
    return torch.randn(2, length, generator=torch.Generator().manual_seed(length)) * 0.2


def by_demucs(network: nn.Module, mixture: Tensor, overlap: float = 0.25) -> Tensor:
    with torch.no_grad():
        return apply_model(network, mixture[None], shifts=0, overlap=overlap)[0]


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())
