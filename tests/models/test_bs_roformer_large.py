"""BS-RoFormer Large v2 equals the reference's mask estimators, undef13/splifft at f02a28b."""

from pathlib import Path
from typing import Any

import pytest

from helpers.recorded import assert_as_recorded
from helpers.small_model import identity
from helpers.variants import (
    assert_batch_and_stems_are_alone,
    assert_fused_layers_are_equal,
    assert_gpu_layers_are_equal,
    assert_published_files_load,
)
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.models.bs_roformer import BSRoFormerConfig
from separation.models.bs_roformer_large import BSRoFormerLarge

KIND = "bs_roformer_large_v2"
OTHER: dict[str, Any] = {"num_stems": 2, "stereo": False, "depth": 2, "freqs_per_bands": (13, 100, 400)}
OTHER |= {"stft_n_fft": 1024, "stft_win_length": 1024, "stft_hop_length": 128}
OTHER |= {"mask_estimator_depth": 3, "mlp_expansion_factor": 2}
RECORDED = [
    ({}, 12_000, """
    6.243386 0.0009885837 4.75345e-05 -0.003500541 -0.03697043 -0.00601636 -0.005299794 -0.04674727 -0.003151468
    0.003530865 -0.0505588 0.0003960167 0.03124406 -0.002890001 0.03992883 -0.03276253 -0.03919002 -0.02041931
    -0.004483796 0.01780788 0.0182613 -0.05552476 0.0157761 0.02822062 -0.01491259
    """),
    (OTHER, 9_000, """
    2.322275 2.560375 -0.003478205 -0.03128625 -0.01086797 -0.001803286 -0.02143627 0.02362077 -0.007936966
    0.007264163 0.0003880847 -0.00012675 -0.007559593 -0.0144462 -0.01826774 -0.003428055 -0.02682103 -0.003867505
    0.005854266 0.03300558 -0.00949286 0.008556579 0.004220264 -0.01227805 -0.02742431 0.0165232
    """),
]  # fmt: skip


@pytest.mark.parametrize("hyper, length, figures", RECORDED)
def test_output_equals_the_reference(hyper: dict[str, Any], length: int, figures: str) -> None:
    config = BSRoFormerConfig(**{"dim": 32, "depth": 1, "stereo": True, "dim_head": 16, "heads": 2} | hyper)
    assert_as_recorded(BSRoFormerLarge(config, identity(["a", "b"][: config.num_stems])), length, figures)


def test_the_published_model_has_the_size_of_its_file() -> None:
    description = read_config("bs_roformer_large_v2_inst_unwa")
    model = build(description)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert weights == 59_469_196
    overhead = (description.files[0].bytes or 0) - 4 * weights
    assert 0 < overhead < 500 * len(model.state_dict())


def test_chunks_and_stems_do_not_depend_on_the_others() -> None:
    assert_batch_and_stems_are_alone(KIND)


def test_the_layers_in_c_plus_plus_equal_the_plain_ones() -> None:
    assert_fused_layers_are_equal(KIND, 3e-6)


def test_the_layers_for_a_gpu_equal_the_plain_ones() -> None:
    assert_gpu_layers_are_equal(KIND, 3e-6)


def test_a_published_pair_loads_as_it_is(tmp_path: Path) -> None:
    assert_published_files_load(KIND, tmp_path)
