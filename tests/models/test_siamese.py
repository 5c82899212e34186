"""BS-SiameseRoFormer equals its reference and loads as published.

The figures come from models/bs_roformer/bs_siamese_roformer.py of noblebarkrr/mvsepless at 5f416ba. That of
openmirlab/bs-roformer-infer at cc42d46, written apart from it, computes the same.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.recorded import assert_as_recorded
from helpers.small_model import assert_half_precision_is_near, identity
from helpers.variants import assert_batch_and_stems_are_alone, assert_published_files_load, make_variant
from separation.models.kernels.native import NotFusedError
from separation.models.limits import Uninitialised
from separation.models.siamese import BSSiameseRoFormer

pytestmark = pytest.mark.usefixtures("one_thread")

KIND = "bs_siamese_roformer"
SMALL: dict[str, Any] = {"dim": 32, "depth": 2, "stereo": True, "dim_head": 16, "heads": 2}
DEEP: dict[str, Any] = {
    "num_stems": 2,
    "stereo": False,
    "time_transformer_depth": 2,
    "freq_transformer_depth": 3,
    "stft_hop_length": 441,
    "mask_estimator_depth": 1,
}
RECORDED = [
    ({}, 12_000, """
    7.463914 -0.03847159 -0.01153533 -0.02629912 0.006523661 -0.01663223 0.02321728 0.01155624 0.03893509 0.03938574
    -0.01143089 -0.02405331 -0.01097971 -0.03843252 0.04567406 -0.02683709 0.02597512 -0.01885358 -0.02737868
    0.04348508 -0.03196352 0.01643198 0.00259919 -0.01697326 0.03361737
    """),
    (DEEP, 12_345, """
    13.45216 13.59685 0.0243273 -0.01157459 0.00329284 -0.02362077 -0.1400081 0.01493092 -0.06064916 0.02890604
    0.06716472 0.05607776 0.04982047 0.1551766 0.05499843 0.08606285 -0.1286111 0.01427546 -0.1338694 0.0437151
    0.07138482 -0.02386647 0.04487557 -0.01777781 0.07972478 -0.08807417
    """),
]  # fmt: skip


@pytest.mark.parametrize("changes, length, figures", RECORDED)
def test_output_equals_the_reference(changes: dict[str, Any], length: int, figures: str) -> None:
    config = BSSiameseRoFormer.Config(**SMALL | changes)
    assert_as_recorded(BSSiameseRoFormer(config, identity(["a", "b"][: config.num_stems])), length, figures)


def test_chunks_and_stems_do_not_depend_on_the_others() -> None:
    assert_batch_and_stems_are_alone(KIND)


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 25), (torch.float16, 40)])
def test_half_precision_stays_close_to_float32(precision: torch.dtype, decibels: float) -> None:
    assert_half_precision_is_near(make_variant(KIND), precision, decibels)


@pytest.mark.parametrize("backend", ["fused", "triton"])
def test_the_kernels_refuse_it_and_leave_it_unchanged(backend: str) -> None:
    model, chunks = make_variant(KIND), torch.randn(1, 2, 3000)
    with torch.inference_mode():
        expected = model(chunks)
        with pytest.raises(NotFusedError, match="it does not support siamese transformer"):
            model.prepare(torch.float32, attention=backend)
        assert torch.equal(model(chunks), expected)


def test_a_published_pair_loads_as_it_is(tmp_path: Path) -> None:
    assert_published_files_load(KIND, tmp_path, depth=2)


@pytest.mark.parametrize("change", [{"use_pope": True}, {"skip_connection": True}, {"linear_transformer_depth": 1}])
def test_options_that_the_reference_lacks_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="skip_connection and use_shared_bias false, with two streams"):
        make_variant(KIND, **change)


def test_the_public_checkpoint_has_so_many_parameters() -> None:
    with Uninitialised():
        model = BSSiameseRoFormer(BSSiameseRoFormer.Config(dim=256, depth=12, stereo=True), identity(["vocals"]))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 51_080_204
    assert 0 < 204_682_749 - 4 * parameters < 500 * len(model.state_dict())  # bs_exp_siameseroformer.ckpt
