"""The RoFormers' layers for a GPU equal the plain layers, here on the CPU."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.small_model import identity, small_model
from separation.checkpoints.load import load_model
from separation.evaluation.metrics import sdr
from separation.models.base import SeparationModel
from separation.models.kernels.native import NotFusedError
from separation.models.mel_band_roformer import MelBandRoFormer, MelBandRoFormerConfig


def mel_model() -> MelBandRoFormer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 16, "depth": 2, "dim_head": 16, "heads": 2, "num_bands": 6, "stft_n_fft": 128}
    config = MelBandRoFormerConfig(**sizes, stft_hop_length=32, stft_win_length=128, stereo=True, num_stems=2)
    return MelBandRoFormer(config, identity()).eval()


def varied(model: SeparationModel) -> SeparationModel:
    """Move gains and biases away from one and zero, as training does."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bias")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


MODELS = {
    "one head size a power of two": lambda: small_model(dim_head=16),
    "another": lambda: small_model(dim_head=12),
    "several layers along an axis": lambda: small_model(time_transformer_depth=2, depth=2),
    "shared biases": lambda: small_model(use_shared_bias=True, depth=2),
    "deeper masks": lambda: small_model(mask_estimator_depth=3),
    "mel bands": mel_model,
}


@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_the_layers_for_a_gpu_equal_the_plain_ones(kind: str) -> None:
    model = varied(MODELS[kind]())
    chunks = torch.randn(3, 2, 700)
    expected = model(chunks)
    model.prepare(torch.float32, attention="triton")
    assert sdr(expected.flatten(0, 2), model(chunks).flatten(0, 2)) > 90


@pytest.mark.parametrize("more", [{"use_pope": True}, {"linear_transformer_depth": 1}, {"skip_connection": True}])
@torch.inference_mode()
def test_a_model_with_unsupported_layers_is_left_unchanged(more: dict[str, Any]) -> None:
    model = small_model(**more)
    chunks = torch.randn(1, 2, 700)
    expected = model(chunks)
    with pytest.raises(NotFusedError, match="it does not support"):
        model.prepare(torch.float16, attention="triton")
    assert torch.equal(model(chunks), expected)


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[SeparationModel, Tensor, Tensor]]:
    """The demo model, chunks, and its estimates in float32."""
    model = load_model("demo", device="cpu", precision="fp32", attention="sdpa")
    chunks = torch.randn(2, 2, 44100, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.inference_mode():
        yield model, chunks, model(chunks).flatten(0, 2)


@pytest.mark.slow
@torch.inference_mode()
def test_half_precision_is_close_to_float32(demo: tuple[SeparationModel, Tensor, Tensor]) -> None:
    plain, chunks, expected = demo
    model = copy.deepcopy(plain)
    model.prepare(torch.float16, attention="triton")
    assert sdr(expected, model(chunks).flatten(0, 2)) > 60
    again = copy.deepcopy(model)
    again.to_precision(torch.bfloat16)
    assert {weight.dtype for name, weight in again.named_parameters() if "weights" in name} == {torch.bfloat16}
    assert sdr(expected, again(chunks).flatten(0, 2)) > 40
    assert sdr(expected, model(chunks).flatten(0, 2)) > 60


@torch.inference_mode()
def test_an_estimate_does_not_depend_on_the_other_chunks_of_the_batch(
    demo: tuple[SeparationModel, Tensor, Tensor],
) -> None:
    plain, chunks, _ = demo
    model = copy.deepcopy(plain)
    model.prepare(torch.float32, attention="triton")
    alone = torch.cat([model(chunk[None]) for chunk in chunks])
    assert (alone - model(chunks)).abs().max() <= 1e-5 * alone.abs().max()
