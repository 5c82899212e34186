"""BS-RoFormer HyperACE equals an independent implementation."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.common import quick_first
from helpers.fused import needs_fused
from helpers.recorded import drawn_weights
from helpers.small_model import identity
from helpers.variants import (
    HYPER,
    assert_batch_and_stems_are_alone,
    assert_fused_layers_are_equal,
    assert_gpu_layers_are_equal,
    assert_published_files_load,
    varied,
)
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.models.hyperace import CHANNELS, BSRoFormerHyperACE, HyperACEConfig, Segmentation, SegmentationEstimator
from separation.models.kernels.fused import FusedMaskEstimator
from separation.models.layers import band_masks

KIND = "bs_roformer_hyperace"


def largest_relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


SHAPES = [(1, channels, 12 >> scale, 15 >> max(0, scale - 1)) for scale, channels in enumerate(CHANNELS)]
IMAGE = torch.randn(1, 32, 96, 15)
SCALES = [torch.randn(shape) for shape in SHAPES]


@pytest.mark.parametrize(
    "part, inputs",
    [
        ("backbone.stem", (IMAGE,)),
        ("backbone.p2", (torch.randn(1, 64, 48, 15),)),
        ("backbone.p3", (torch.randn(1, 256, 24, 15),)),
        ("backbone.p4", (torch.randn(1, 384, 24, 15),)),
        ("backbone.p5", (torch.randn(1, 512, 24, 15),)),
        ("hyperace", (SCALES,)),
        ("decoder", (SCALES, torch.randn(SHAPES[2]))),
        ("upsample_head", (torch.randn(1, 256, 12, 15),)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_part_of_the_branch_equals_the_independent_implementation(part: str, inputs: tuple[Any, ...]) -> None:
    ours, theirs = (each.get_submodule(part) for each in branches())
    with torch.inference_mode():
        assert largest_relative_error(ours(*inputs), theirs(*inputs)) <= 1e-5


@pytest.mark.slow
@needs_fused
def test_the_branch_has_these_parts_in_this_order_and_is_added_to_the_mlps() -> None:
    """Its norms multiply rounding by a thousand, so that two correct implementations agree less than their parts."""
    ours, theirs = branches()
    estimator = SegmentationEstimator(HyperACEConfig(**HYPER), (60,) * 14 + (188,), 2).eval()
    estimator.segm = ours
    features = torch.randn(96, 1, 15, 32)
    with torch.inference_mode():
        expected = theirs(features.permute(1, 3, 0, 2)).permute(2, 0, 3, 1).flatten(2)
        assert largest_relative_error(ours(features), expected) <= 0.01
        masks = estimator(features)
        assert torch.equal(masks, band_masks(estimator.to_freqs, features) + ours(features))
        assert largest_relative_error(estimator.for_gpu(torch.float32)(features), masks) <= 1e-6
        fused = estimator.fused(nn.Identity, lambda mlps: FusedMaskEstimator(nn.Identity(), mlps, torch.float32))
        assert largest_relative_error(fused(features), masks) <= 1e-6


@cache
def branches() -> tuple[Segmentation, torch.nn.Module]:
    """This project's branch and the peer's, with the same weights."""
    peer = pytest.importorskip("pymss_core.modules.bs_roformer.hyperace_segm", reason="needs pymss-core")
    theirs = peer.SegmModel(in_bands=15, in_dim=32, out_bins=257).eval()
    theirs.load_state_dict(drawn_weights(theirs.state_dict()))
    ours = Segmentation(32, 15, 257).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "more", quick_first([{}, {"num_stems": 2, "stft_hop_length": 441, "mask_estimator_depth": 3}], 1)
)
def test_output_equals_the_independent_implementation(more: dict[str, Any]) -> None:
    peer = pytest.importorskip("pymss_core.modules.bs_roformer", reason="needs pymss-core")
    theirs = peer.BSRoformerHyperACE(**HYPER, time_transformer_depth=1, freq_transformer_depth=1, **more).eval()
    theirs.set_mask_mode("full")  # otherwise it leaves the branch out
    torch.manual_seed(0)
    theirs.load_state_dict(varied(theirs.state_dict()))
    config = HyperACEConfig(**HYPER | more)
    ours = BSRoFormerHyperACE(config, identity(["a", "b"][: config.num_stems]))
    ours.load(theirs.state_dict())
    chunks = torch.randn(2, 2, 12_000) * 0.1
    with torch.inference_mode():
        expected = theirs(chunks).reshape(2, -1, 2, 12_000)
        assert largest_relative_error(ours(chunks), expected) <= 1e-5


@pytest.mark.parametrize("name", ["instrumental", "vocals"])
def test_the_published_models_have_the_size_of_their_files(name: str) -> None:
    description = read_config(f"bs_roformer_hyperace_v2_{name}_unwa")
    model = build(description)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert weights == 72_042_108 and len(model.state_dict()) == 1170
    assert 0 < (description.files[0].bytes or 0) - 4 * weights < 500 * 1170


def test_only_stereo_models_of_version_2_are_built() -> None:
    with pytest.raises(ValueError, match="stereo must be true"):
        HyperACEConfig(**HYPER | {"stereo": False})
    with pytest.raises(ValueError, match="hyperace_version 1 is not supported"):
        HyperACEConfig(**HYPER, hyperace_version=1)


@pytest.mark.slow
def test_chunks_and_stems_do_not_depend_on_the_others() -> None:
    assert_batch_and_stems_are_alone(KIND)


@pytest.mark.slow
def test_the_layers_in_c_plus_plus_equal_the_plain_ones() -> None:
    assert_fused_layers_are_equal(KIND, 1e-5)


@pytest.mark.slow
def test_the_layers_for_a_gpu_equal_the_plain_ones() -> None:
    assert_gpu_layers_are_equal(KIND, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"use_mask_estimator_hyper_ace": True, "hyperace_version": 2}])
def test_a_published_pair_loads_as_it_is(tmp_path: Path, more: dict[str, Any]) -> None:
    assert_published_files_load(KIND, tmp_path, **more)
