"""Hyper-parameters beyond the limits are refused before a network is built from them."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.common import quick_first
from helpers.small_model import HYPER_PARAMETERS, write_yaml
from separation.checkpoints.build import hyper_parameters, random_weights
from separation.checkpoints.catalogue import available, read_config
from separation.checkpoints.load import load_model
from separation.errors import CheckpointError
from separation.models.limits import MOST_TENSORS, Uninitialised, check_arguments

ROFORMER = HYPER_PARAMETERS
MEL = {key: value for key, value in ROFORMER.items() if key != "freqs_per_bands"} | {"num_bands": 8}
MDX23C = {"act": "gelu", "bottleneck_factor": 2, "growth": 8, "norm": "InstanceNorm", "num_blocks_per_scale": 1}
MDX23C |= {"num_channels": 8, "num_scales": 2, "num_subbands": 2, "scale": [2, 2], "num_stems": 2}
SCNET = {"sources": ["vocals", "drums"], "dims": [4, 8, 16], "nfft": 64, "hop_size": 16, "win_size": 64}
DEMUCS = {"sources": ["vocals", "drums"], "samplerate": 44100, "segment": 1, "channels": 8}
AUDIO = {"sample_rate": 44100, "chunk_size": 4096}
MDX23C_AUDIO = AUDIO | {"n_fft": 64, "hop_length": 16, "dim_f": 32, "num_channels": 2, "chunk_size": 4080}
SIZES = [
    2**20,
    10**12,
    -(10**12),
    math.inf,
    -math.inf,
    math.nan,
    0.5,
    True,
    "many",
    "9" * 100,
    [1],
    [[1]],
    {"a": 1},
    None,
]


def write(folder: Path, architecture: str, model: dict[str, Any]) -> Path:
    audio = MDX23C_AUDIO if architecture == "mdx23c" else AUDIO
    return write_yaml(folder, architecture=architecture, model=model, audio=audio)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message and len(message.replace(str(path), "")) < 250
    return message


@pytest.mark.parametrize(
    "architecture, model, changes, message",
    [
        ("bs_roformer", ROFORMER, {"depth": 10**12}, "depth is 1000000000000, more than 256"),
        ("bs_roformer", ROFORMER, {"num_stems": 10**9}, "num_stems is 1000000000, more than 256"),
        ("bs_roformer", ROFORMER, {"mask_estimator_depth": 10**9}, "mask_estimator_depth is 1000000000, more"),
        ("bs_roformer", ROFORMER, {"dim": 2**19, "heads": 2**9}, "it has more weights than any network"),
        ("bs_roformer", ROFORMER, {"dim": 2**62, "heads": 2**62}, "dim is 4611686018427387904, more than 1048576"),
        ("bs_roformer", ROFORMER, {"dim": math.inf}, "dim must be a whole number, not inf"),
        ("bs_roformer", ROFORMER, {"depth": True}, "depth must be a whole number, not True"),
        ("bs_roformer", ROFORMER, {"dim": -16}, "negative dimension"),
        ("bs_roformer", ROFORMER, {"freqs_per_bands": [1] * 300}, "the length of freqs_per_bands is 300, more than"),
        ("bs_roformer", ROFORMER, {"freqs_per_bands": [3] * 10 + [True]}, "freqs_per_bands must be a list, not"),
        ("bs_roformer", ROFORMER, {"stft_n_fft": 2**40}, "stft_n_fft is 1099511627776, more than 65536"),
        ("bs_roformer", ROFORMER, {"stereo": "yes and no"}, "stereo must be true or false, not 'yes and no'"),
        ("mel_band_roformer", MEL, {"num_bands": 10**9}, "num_bands is 1000000000, more than 256"),
        ("mel_band_roformer", MEL, {"sample_rate": 0}, "not valid"),
        ("mdx23c", MDX23C, {"num_scales": 10**9}, "num_scales is 1000000000, more than 256"),
        ("mdx23c", MDX23C, {"num_channels": 2**20}, "it has more weights than any network"),
        ("mdx23c", MDX23C, {"bottleneck_factor": 0}, "not valid: integer division or modulo by zero"),
        ("mdx23c", MDX23C, {"norm": "GroupNorm" + "9" * 100}, "the length of norm is 109, more than 64"),
        ("mdx23c", MDX23C, {"scale": [2]}, "not valid"),
        ("scnet", SCNET, {"conv_depths": [10**9] * 3}, "conv_depths is 1000000000, more than 256"),
        ("scnet", SCNET, {"num_dplayer": 10**10}, "num_dplayer is 10000000000, more than 256"),
        ("scnet", SCNET, {"band_SR": [math.nan, 1, 1]}, "band_SR must be a finite number or a text, not nan"),
        ("scnet", SCNET, {"compress": 0}, "not valid: integer division or modulo by zero"),
        ("scnet", SCNET, {"audio_channels": 3, "dims": [6, 8]}, "audio_channels must be 1 or 2, not 3"),
        ("htdemucs", DEMUCS, {"t_layers": 10**9}, "t_layers is 1000000000, more than 256"),
        ("htdemucs", DEMUCS, {"segment": "1e999999999 "}, "segment must be seconds such as 7.8 or 39/5"),
        ("htdemucs", DEMUCS, {"channels": 2**20}, "it has more weights than any network"),
        ("hdemucs", DEMUCS, {"multi_freqs": [0.1] * 1000}, "the length of multi_freqs is 1000, more than 256"),
        ("hdemucs", DEMUCS, {"nfft": 2**30}, "nfft is 1073741824, more than 65536"),
        ("demucs", DEMUCS, {"lstm_layers": 10**9}, "lstm_layers is 1000000000, more than 256"),
        ("demucs", DEMUCS, {"growth": 1e300}, "growth is 1e\\+300, more than 1048576"),
    ],
)
def test_a_size_beyond_the_limits_is_refused_before_the_network_is_built(
    architecture: str, model: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path, architecture, model | changes)
    with pytest.raises(CheckpointError, match=rf"small\.yaml: .*{message}"):
        load_model(path)
    with pytest.raises(CheckpointError, match=rf"small\.yaml: .*{message}"):
        random_weights(path)
    refusal(path)


@pytest.mark.parametrize(
    "architecture, model",
    quick_first(
        [
            ("bs_roformer", ROFORMER),
            ("mel_band_roformer", MEL),
            ("mdx23c", MDX23C),
            ("scnet", SCNET),
            ("hdemucs", DEMUCS),
        ],
        3,
    ),
)
def test_any_value_of_any_key_builds_or_raises_a_one_line_error(
    architecture: str, model: dict[str, Any], tmp_path: Path
) -> None:
    assert "is missing and has no url" in refusal(write(tmp_path, architecture, model))  # the network builds
    for key in model:
        for value in SIZES:
            refusal(write(tmp_path, architecture, model | {key: value}))


def test_a_chunk_of_too_many_frames_is_refused(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, model=ROFORMER | {"stft_hop_length": 1}, audio=AUDIO | {"chunk_size": 10**6})
    assert "chunk_size / stft_hop_length is 1000000, more than 32768" in refusal(path)
    path = write_yaml(tmp_path, model=ROFORMER | {"stft_hop_length": 1, "stft_n_fft": 4096})
    assert "n_fft / stft_hop_length is 4096, more than 64" in refusal(path)


def test_stems_are_counted_before_the_network_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    monkeypatch.setattr(nn.Module, "__init__", lambda self, *_, **__: built.append(self))
    assert "names 2 stems and num_stems is 255" in refusal(write_yaml(tmp_path, model=ROFORMER | {"num_stems": 255}))
    assert not built


def test_published_checkpoints_are_within_the_limits() -> None:
    for name in available():
        description = read_config(name)
        assert description.architecture is not None
        check_arguments(hyper_parameters(description), {})
    check_arguments({"segment": Fraction(39, 5), "num_stems": 53, "t_lr": None, "dim": 1024}, {"dim": int})


def test_weights_are_counted_before_they_take_memory() -> None:
    with Uninitialised(1000, "the file"):
        nn.Linear(10, 10)
        with pytest.raises(ValueError, match=r"it has more weights than the file \(1,000\)"):
            nn.Linear(2**31, 2**31)
    with Uninitialised():
        for _ in range(MOST_TENSORS):
            torch.empty(1)
        with pytest.raises(ValueError, match=f"it has more than {MOST_TENSORS:,} tensors"):
            torch.empty(1)
