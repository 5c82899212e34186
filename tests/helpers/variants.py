"""Small models of the RoFormers' variants, and what must be true of each."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from helpers.fused import why_not_fused
from helpers.small_model import assert_chunks_are_alone, identity, write_weights
from separation import load_model
from separation.models import ARCHITECTURES
from separation.models.roformer import RoFormer

BANDS = (25, 50, 50, 100, 100, 200, 200, 300)
HYPER: dict[str, Any] = {"dim": 32, "depth": 1, "stereo": True, "dim_head": 32, "heads": 2, "freqs_per_bands": BANDS}
STEMS = ("vocals", "drums", "bass")
TARGET = ("other",)
CHUNK = 8192


def make_variant(kind: str, **hyper: Any) -> RoFormer:
    """With random weights, also for gains, since a mistake would not show with ones and zeros."""
    torch.manual_seed(0)
    architecture: Any = ARCHITECTURES[kind]
    config = architecture.Config(**HYPER | hyper)
    model: RoFormer = architecture(config, identity(STEMS[: config.num_stems], chunk_samples=CHUNK)).eval()
    model.load(varied(model.state_dict()))
    return model


def varied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with some noise; those at the end of HyperACE's branch, which multiplies rounding, are tiny."""
    floats = {key: value for key, value in state.items() if value.dtype != torch.int64}
    noisy = state | {key: value + torch.randn_like(value) * 0.02 for key, value in floats.items()}
    return {key: value * 1e-6 if key.endswith("head.final_conv.weight") else value for key, value in noisy.items()}


def assert_batch_and_stems_are_alone(kind: str) -> None:
    assert_chunks_are_alone(make_variant(kind))
    model, chunks = make_variant(kind, num_stems=3), torch.randn(1, 2, 5000)
    with torch.inference_mode():
        every, fewer = model(chunks), model.only(("bass", "vocals"))(chunks)
    assert torch.equal(fewer, every[:, [2, 0]])


def assert_fused_layers_are_equal(kind: str, error: float) -> None:
    """The layers in C++ give the same in float32, whatever the number of stems, and are near in bfloat16 and int8."""
    if fault := why_not_fused():
        pytest.skip(fault)
    model, chunks = make_variant(kind, num_stems=2), torch.randn(1, 2, 6000) * 0.1
    with torch.inference_mode():
        expected = model(chunks)
        for dtype, allowed in ((torch.float32, error), (torch.bfloat16, 0.1), (torch.int8, 0.2)):
            fused = copy.deepcopy(model)
            fused.prepare(dtype, attention="fused")
            assert float((fused(chunks) - expected).norm() / expected.norm()) < allowed


def assert_gpu_layers_are_equal(kind: str, error: float) -> None:
    """The layers for a GPU, computed in float32 by their plain twins, give the same."""
    model, chunks = make_variant(kind, num_stems=2), torch.randn(1, 2, 6000) * 0.1
    with torch.inference_mode():
        expected = model(chunks)
        model.fuse_for_gpu(torch.float32)
        assert float((model(chunks) - expected).norm() / expected.norm()) < error


def assert_published_files_load(kind: str, folder: Path, **more: Any) -> None:
    """A community YAML that names no architecture and its weights load; the result is the model that wrote them."""
    model = make_variant(kind, **{key: value for key, value in more.items() if key in ("depth", "num_stems")})
    weights = write_weights(model.state_dict(), folder / "x.ckpt")
    document = {
        "audio": {"chunk_size": CHUNK, "dim_f": 1024, "dim_t": 801, "hop_length": 512, "sample_rate": 44100},
        "model": HYPER | {"freqs_per_bands": list(BANDS), "num_stems": 1, "flash_attn": True, "attn_dropout": 0} | more,
        "training": {"instruments": ["vocals", "other"], "target_instrument": "other"},
        "inference": {"batch_size": 1, "num_overlap": 4},
    }
    (folder / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    loaded = load_model(weights, attention="sdpa")
    assert type(loaded) is ARCHITECTURES[kind] and loaded.stems == TARGET and loaded.chunk_samples == CHUNK
    chunks = torch.randn(1, 2, 5000)
    with torch.inference_mode():
        assert torch.equal(loaded(chunks), model(chunks))
