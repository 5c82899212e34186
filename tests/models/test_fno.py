"""BS-RoFormer FNO equals the reference, SUC-DriverOld/MSST-WebUI at 2aee2cc with neuraloperator 2.0.0."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.recorded import assert_as_recorded
from helpers.small_model import identity
from helpers.variants import (
    assert_batch_and_stems_are_alone,
    assert_fused_layers_are_equal,
    assert_gpu_layers_are_equal,
    assert_published_files_load,
    make_variant,
)
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.state_dict import open_weights
from separation.errors import InputError
from separation.models.bs_roformer import BSRoFormerConfig
from separation.models.fno import BSRoFormerFNO

KIND = "bs_roformer_fno"
OTHER: dict[str, Any] = {"num_stems": 2, "stereo": False, "depth": 2, "freqs_per_bands": (13, 100, 400)}
OTHER |= {"stft_n_fft": 1024, "stft_win_length": 1024, "stft_hop_length": 128}
RECORDED = [
    ({}, 12_000, """
    4.569526 0.01692618 0.01681646 0.01470938 -0.009621547 0.003771828 0.02535268 -0.01291237 0.01855531 0.02923202
    0.003472625 -0.01269618 0.002756799 0.01953989 -0.01070936 -0.02078491 0.002198783 -0.04259028 0.01154436
    -0.02549973 0.006940812 0.01793711 0.002394603 0.0001530528 -0.02569044
    """),
    (OTHER, 9_000, """
    4.551116 3.196421 0.0288224 0.03634143 -0.01416796 0.02579847 -0.0162851 -0.006758932 -0.001183233 0.0008703606
    0.00713429 0.02236419 -0.02200447 -0.04734851 -0.0411344 -0.0003138047 0.001435239 -0.01092766 -0.02968971
    -0.04631721 0.04952373 -0.005165909 0.003965654 -0.01181165 0.01310616 0.007909628
    """),
]  # fmt: skip


@pytest.mark.parametrize("hyper, length, figures", RECORDED)
def test_output_equals_the_reference(hyper: dict[str, Any], length: int, figures: str) -> None:
    config = BSRoFormerConfig(**{"dim": 32, "depth": 1, "stereo": True, "dim_head": 16, "heads": 2} | hyper)
    assert_as_recorded(BSRoFormerFNO(config, identity(["a", "b"][: config.num_stems])), length, figures)


@pytest.mark.slow
def test_the_published_model_has_the_size_of_its_file() -> None:
    description = read_config("bs_roformer_inst_fno_unwa")
    model = build(description)
    assert sum(parameter.numel() for parameter in model.parameters()) == 81_142_540
    overhead = (description.files[0].bytes or 0) - sum(weight.nbytes for weight in model.state_dict().values())
    assert 0 < overhead < 500 * len(model.state_dict())


def test_chunks_and_stems_do_not_depend_on_the_others() -> None:
    assert_batch_and_stems_are_alone(KIND)


def test_the_layers_in_c_plus_plus_equal_the_plain_ones() -> None:
    assert_fused_layers_are_equal(KIND, 3e-6)


def test_the_layers_for_a_gpu_equal_the_plain_ones() -> None:
    assert_gpu_layers_are_equal(KIND, 3e-6)


def test_a_published_pair_loads_as_it_is(tmp_path: Path) -> None:
    assert_published_files_load(KIND, tmp_path)


def test_the_arguments_that_the_package_puts_among_the_weights_are_ignored(tmp_path: Path) -> None:
    state = make_variant(KIND).state_dict()
    arguments = {"n_modes": (64,), "non_linearity": torch.nn.functional.gelu, "args": ()}
    torch.save({**state, "_metadata": arguments}, tmp_path / "x.ckpt")
    assert list(open_weights(tmp_path / "x.ckpt").tensors) == list(state)


def test_an_export_is_refused_because_the_estimators_have_fourier_transforms() -> None:
    with pytest.raises(InputError, match="cannot be exported"):
        make_variant(KIND).transform(8192)


def test_a_chunk_may_have_fewer_frames_than_the_operators_have_frequencies() -> None:
    with torch.inference_mode():
        assert make_variant(KIND)(torch.randn(1, 2, 1025)).shape == (1, 1, 2, 1025)
