"""Moises-Light equals the package moises-light 0.1.5 and loads as Music-Source-Separation-Training saves it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.recorded import assert_as_recorded
from helpers.small_model import (
    assert_chunks_are_alone,
    assert_half_precision_is_near,
    assert_near,
    identity,
    write_weights,
)
from separation import CheckpointError, load_model
from separation.models.kernels.native import NotFusedError
from separation.models.moises_light import MoisesLight, MoisesLightConfig

pytestmark = pytest.mark.usefixtures("one_thread")

STEMS = ("vocals", "drums")
TRANSFORMERS = {"heads": 2, "dim_head": 8, "ff_mult": 2}
SMALL: dict[str, Any] = {
    "sources": STEMS,
    "n_fft": 512,
    "hop_size": 128,
    "win_size": 512,
    "freq_dim": 128,
    "n_bands": 4,
    "G": 8,
    "n_split_enc": 2,
    "n_rope": 2,
    "bn_factor": 4,
}
OTHER: dict[str, Any] = {
    "sources": ("vocals",),
    "audio_channels": 1,
    "hop_size": 100,
    "win_size": 400,
    "freq_dim": 192,
    "n_bands": 3,
    "G": 6,
    "n_enc": 2,
    "n_dec": 2,
    "n_split_dec": 2,
    "bn_factor": 8,
    "edge_kernel_size": 1,
    "normalized": False,
    "use_mask": False,
    "norm_name": "LayerNorm",
    "act_name": "GELU",
}
RECORDED = [
    ({}, 6_000, """
    187.3266 189.8083 -1.75157 -1.85692 0.2811416 -0.5753837 -1.203543 -2.305924 -0.1654814 -1.098014 0.2720495
    0.3613509 -0.6141685 1.465806 0.2303588 0.1039454 -1.968658 0.2505545 0.7744461 0.378137 -0.1926889 0.2192547
    -0.1425274 -1.063184 1.038075 0.01376998
    """),
    (OTHER, 5_555, """
    2.135037 0.008964943 0.01851661 -0.03036251 0.007689327 0.004653011 -0.02143434 -0.0125383 -0.00927496
    0.01612146 -0.02089282 -0.02310119 -0.02774496 -0.00697103 0.004602798 -0.0182601 -0.009830568 0.01372955
    0.008126858 -0.0299108 0.003075953 -0.006132213 0.02619943 0.01578992 0.003170657
    """),
]  # fmt: skip


def make(**changes: Any) -> MoisesLight:
    torch.manual_seed(0)
    hyper = SMALL | {f"transformer_params_{name}": value for name, value in TRANSFORMERS.items()} | changes
    return MoisesLight(MoisesLightConfig(**hyper), identity(hyper["sources"], chunk_samples=6_000)).eval()


@pytest.mark.parametrize("changes, length, figures", RECORDED)
def test_output_equals_the_package(changes: dict[str, Any], length: int, figures: str) -> None:
    assert_as_recorded(make(**changes), length, figures)


def test_an_estimate_does_not_depend_on_the_other_chunks_of_the_batch() -> None:
    assert_chunks_are_alone(make())


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 25), (torch.float16, 40)])
def test_half_precision_stays_close_to_float32(precision: torch.dtype, decibels: float) -> None:
    assert_half_precision_is_near(make(), precision, decibels)


def test_the_kernels_refuse_it_and_another_attention_gives_the_same() -> None:
    model, chunks = make(), torch.randn(1, 2, 6_000) * 0.1
    with torch.inference_mode():
        expected = model(chunks)
        with pytest.raises(NotFusedError, match="there are none for Moises-Light"):
            model.prepare(torch.float32, attention="fused")
        model.prepare(torch.float32, attention="einsum")
        assert_near(model(chunks), expected)


def write_files(folder: Path, **changes: Any) -> Path:
    """A YAML as Music-Source-Separation-Training has it, and weights with the package's two buffers."""
    hyper = {key: list(value) if isinstance(value, tuple) else value for key, value in (SMALL | changes).items()}
    document = {
        "audio": {"chunk_size": 6_000, "num_channels": 2, "sample_rate": 44_100, "min_mean_abs": 0.001},
        "model": {"transformer_params": TRANSFORMERS | {"attn_dropout": 0.0, "flash_attn": True}} | hyper,
        "training": {"instruments": list(STEMS), "target_instrument": None},
    }
    (folder / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    buffers = {"stft_window": torch.hann_window(512), "freq_pad": torch.zeros(1, 4, 129, 1)}
    return write_weights(make().state_dict() | buffers, folder / "x.ckpt")


def test_a_trainers_pair_loads_as_it_is(tmp_path: Path) -> None:
    model = load_model(write_files(tmp_path))
    assert isinstance(model, MoisesLight) and model.stems == STEMS
    chunks = torch.randn(1, 2, 6_000) * 0.1
    with torch.inference_mode():
        assert_near(model(chunks), make()(chunks))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_rope": 3}, r"model\.n_rope is 3, the weights have 2"),
        ({"transformer_params": TRANSFORMERS | {"heads": 4}}, r"transformer_params_heads is 4, the weights have 2"),
        ({"transformer_params": TRANSFORMERS | {"window": 9}}, "has no hyper-parameter transformer_params_window"),
        ({"G": 9}, "G 9 and freq_dim 128 must be multiples of n_bands 4"),
        ({"freq_dim": 512}, "freq_dim is 512, and n_fft 512 has 257 bins"),
        ({"n_dec": 4}, "n_dec must be at most n_enc"),
        ({"norm_name": "RMSNorm"}, "norm_name is RMSNorm: use one of BatchNorm, InstanceNorm, LayerNorm"),
    ],
)
def test_an_invalid_configuration_is_a_one_line_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(write_files(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_the_packages_largest_faithful_preset_has_so_many_parameters() -> None:
    model = MoisesLight(MoisesLightConfig(), identity(MoisesLightConfig().sources))
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_451_216
