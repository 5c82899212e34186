"""The other SCNet equals the reference, ZFTurbo/Music-Source-Separation-Training at ccc011a."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.recorded import assert_as_recorded
from helpers.small_model import assert_chunks_are_alone, assert_half_precision_is_near, assert_near, identity
from separation import CheckpointError, Separator, load_model
from separation.models.scnet_unofficial import SCNetUnofficial, SCNetUnofficialConfig

pytestmark = pytest.mark.usefixtures("one_thread")

STEMS = ("drums", "bass", "other", "vocals")
SMALL: dict[str, Any] = {
    "dims": (4, 8, 12, 16),
    "bandsplit_ratios": (0.175, 0.392, 0.433),
    "downsample_strides": (1, 4, 16),
    "n_conv_modules": (3, 2, 1),
    "n_rnn_layers": 2,
    "rnn_hidden_dim": 16,
    "n_sources": 4,
    "n_fft": 512,
    "hop_length": 128,
    "win_length": 512,
}
MONO = {"n_sources": 2, "stft_normalized": True, "n_rnn_layers": 4, "rnn_hidden_dim": 12, "dims": (2, 8, 16)}
RECORDED = [
    ({}, 12_000, """
    4.652273 5.136927 5.614979 5.48616 0.03401831 -0.04380235 -0.01917997 -0.006044134 -0.01993534 0.01156052
    -0.02024432 0.04006209 -0.07329168 0.02593212 0.02319748 0.002811356 -0.01072549 0.01331522 -0.0162412
    0.00500334 -0.004363104 -0.02999349 0.02798795 -0.005093575 0.01127099 -0.0003732175 -0.0005834044 0.005966925
    """),
    (MONO, 12_927, """
    122.7018 86.898 1.416359 0.7326518 -0.4493203 -3.555726 0.6013845 -0.5890744 0.1093184 -0.5672299 0.2973852
    0.1537414 0.001662798 -0.5964854 -0.3819377 -1.603148 -0.05132224 0.6040555 -0.4531204 1.0708 -0.5489705
    -0.226523 1.166377 -0.1109199 0.1707308 -0.1822548
    """),
]  # fmt: skip


def make(**changes: Any) -> SCNetUnofficial:
    torch.manual_seed(0)
    config = SCNetUnofficialConfig(**SMALL | changes)
    return SCNetUnofficial(config, identity(STEMS[: config.n_sources], chunk_samples=12_000)).eval()


@pytest.mark.parametrize("changes, length, figures", RECORDED)
def test_output_equals_the_reference(changes: dict, length: int, figures: str) -> None:
    assert_as_recorded(make(**changes), length, figures)


def test_an_estimate_does_not_depend_on_the_other_chunks_of_the_batch() -> None:
    assert_chunks_are_alone(make())


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 20), (torch.float16, 35)])
def test_half_precision_stays_close_to_float32(precision: torch.dtype, decibels: float) -> None:
    assert_half_precision_is_near(make(), precision, decibels)


def test_requested_stems_are_the_same_without_the_others() -> None:
    model = make()
    chunks = torch.randn(1, 2, 12_000) * 0.1
    with torch.inference_mode():
        assert_near(model.only(("vocals", "bass"))(chunks), model(chunks)[:, [3, 1]])


def write_files(folder: Path, **model: Any) -> Path:
    hyper = SMALL | {"use_mamba": False, "d_state": 16, "d_conv": 4, "d_expand": 2} | model
    document = {
        "audio": {"sample_rate": 44100, "chunk_size": 12_000, "num_channels": 2, "min_mean_abs": 0.0},
        "model": {key: list(value) if isinstance(value, tuple) else value for key, value in hyper.items()},
        "training": {"instruments": list(STEMS), "target_instrument": None},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    torch.save(make().state_dict(), folder / "small.ckpt")
    return path


def test_a_published_yaml_and_its_weights_separate_a_song(tmp_path: Path) -> None:
    model = load_model(write_files(tmp_path))
    assert isinstance(model, SCNetUnofficial)
    stems = Separator.from_model(model).separate(torch.randn(2, 30_000) * 0.1)
    assert list(stems) == list(STEMS) and all(stem.shape == (2, 30_000) for stem in stems.values())


@pytest.mark.parametrize(
    "model, message",
    [
        ({"use_mamba": True}, "use_mamba is true, and only LSTMs are supported: use the program"),
        ({"n_rnn_layers": 3}, "n_rnn_layers is 3, .*: use an even number"),
        ({"downsample_strides": [1, 4]}, "must have one value for each band"),
        ({"dims": [8, 16]}, "dims starts with 8: use 4 for stereo, 2 for mono"),
        ({"rnn_hidden_dim": 24}, r"model\.rnn_hidden_dim is 24, the weights have 16"),
    ],
)
def test_an_invalid_configuration_is_a_one_line_error(tmp_path: Path, model: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(write_files(tmp_path, **model))
    assert "\n" not in str(caught.value)
