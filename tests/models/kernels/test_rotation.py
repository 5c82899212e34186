"""Rotated features leave what a model computes as it is, and spread outliers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.small_model import identity
from separation.evaluation.metrics import sdr
from separation.models import ARCHITECTURES
from separation.models.kernels.native import NotFusedError
from separation.models.kernels.rotation import rotated_estimator, rotated_split, rotated_transformer, rotation
from separation.models.roformer import RoFormer


def make_model(family: str = "bs_roformer", **hyper: Any) -> RoFormer:
    """A small model whose gains and biases are not just ones and zeros."""
    architecture: Any = ARCHITECTURES[family]
    torch.manual_seed(0)
    sizes = {"dim": 96, "depth": 2, "heads": 2, "dim_head": 32, "stereo": True}
    model: RoFormer = architecture(architecture.Config(**sizes | hyper), identity(["vocals"])).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith(("gamma", "bias")) or "bias_0" in name:
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def rotated(model: RoFormer) -> RoFormer:
    """The model in float32 with everything rotated that can be, as for int8."""
    result = copy.deepcopy(model)
    features = isinstance(model.final_norm, nn.Module) and not isinstance(model.final_norm, nn.Identity)
    blocks: Any = model.layers
    result.layers = nn.ModuleList(
        nn.ModuleList(rotated_transformer(each, features=features) for each in block) for block in blocks
    )
    if features:
        split: Any = model.band_split
        pairs = [rotated_estimator(model.final_norm, each) for each in model.mask_estimators]  # type: ignore[arg-type]
        result.band_split = rotated_split(split)
        result.final_norm, result.mask_estimators = pairs[0][0], nn.ModuleList(pair[1] for pair in pairs)
    return result


@pytest.mark.parametrize("size", [2, 32, 72, 384, 512])
def test_a_rotation_is_orthogonal_and_has_no_large_entries(size: int) -> None:
    turn = rotation(size).double()
    assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-6)
    assert turn.abs().max() <= (2 / size) ** 0.5 + 1e-6


@pytest.mark.parametrize(
    "family, hyper",
    [
        ("bs_roformer", {}),
        ("bs_roformer", {"use_shared_bias": True, "skip_connection": True, "time_transformer_depth": 2}),
        ("mel_band_roformer", {}),
    ],
)
def test_a_rotated_model_gives_the_same_stems(family: str, hyper: dict[str, Any]) -> None:
    model = make_model(family, **hyper)
    chunks = torch.randn(1, 2, 20_000) * 0.1
    with torch.inference_mode():
        assert sdr(model(chunks).flatten(0, 2), rotated(model)(chunks).flatten(0, 2)) > 100


def test_linear_attention_is_refused() -> None:
    model: Any = make_model(linear_transformer_depth=1)
    with pytest.raises(NotFusedError, match="linear attention"):
        rotated_transformer(model.layers[0][0], features=True)


def test_the_original_keeps_its_weights() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    rotated(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def in_bytes(x: Tensor) -> Tensor:
    """x rounded as the kernels do: integers up to 127, times a scale per row."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def test_a_rotation_spreads_an_outlier_so_that_bytes_suffice() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(100, 512), torch.randn(64, 512)
    x[:, 7] *= 50
    weight[:, 7] /= 50  # a model hardly uses the outlier
    turn = rotation(512)
    exact = x @ weight.T
    plain = sdr(exact, in_bytes(x) @ in_bytes(weight).T)
    spread = sdr(exact, in_bytes(x @ turn) @ in_bytes(weight @ turn).T)
    assert plain < 30 and spread > plain + 5
