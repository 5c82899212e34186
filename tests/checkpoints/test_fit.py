"""Weights that do not fit are an error that names the wrong key of the YAML, or the architecture."""

import copy
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.common import quick_first, quick_models
from helpers.demucs_files import demucs_file
from helpers.own_checkpoint import COMMUNITY, put
from helpers.small_model import HYPER_PARAMETERS, small_model, write_weights, write_yaml
from separation.checkpoints.build import build, random_weights
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.fit import sizes_that_differ
from separation.checkpoints.load import load_model
from separation.errors import CheckpointError
from separation.models.shapes import Shapes

pytestmark = pytest.mark.usefixtures("one_thread")

ROFORMER = HYPER_PARAMETERS | {"num_stems": 2, "time_transformer_depth": 1, "freq_transformer_depth": 1}
MEL = {key: value for key, value in ROFORMER.items() if key != "freqs_per_bands"}
MEL |= {"num_bands": 12, "stft_n_fft": 512, "stft_win_length": 512, "stft_hop_length": 128, "sample_rate": 44100}
SCNET = {
    "sources": ["vocals", "drums"],
    "audio_channels": 2,
    "dims": [4, 8, 16],
    "nfft": 256,
    "hop_size": 64,
    "win_size": 256,
    "num_dplayer": 2,
}
MDX23C = {"act": "gelu", "bottleneck_factor": 2, "growth": 8, "norm": "InstanceNorm", "num_blocks_per_scale": 1}
MDX23C |= {"num_channels": 8, "num_scales": 2, "num_subbands": 2, "scale": [2, 2], "num_stems": 2}
AUDIO = {"sample_rate": 44100, "chunk_size": 8190, "hop_length": 130, "n_fft": 256, "dim_f": 64, "num_channels": 2}
DEMUCS = {"sources": ["vocals", "drums"], "audio_channels": 2, "samplerate": 44100, "segment": 1, "channels": 8}
HTDEMUCS = DEMUCS | {"bottom_channels": 0, "t_layers": 2, "t_heads": 2, "nfft": 2048}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "bs_roformer": {"model": ROFORMER},
    "mel_band_roformer": {"model": MEL},
    "scnet": {"model": SCNET},
    "mdx23c": {"model": MDX23C, "audio": AUDIO},
    "htdemucs": {"model": HTDEMUCS, "audio": {"sample_rate": 44100, "chunk_size": 44100}},
    "hdemucs": {"model": DEMUCS | {"nfft": 2048}, "audio": {"sample_rate": 44100, "chunk_size": 44100}},
    "demucs": {"model": DEMUCS, "audio": {"sample_rate": 44100, "chunk_size": 44100}},
}
THREE = ["vocals", "drums", "bass"]
# Architecture, changes in the weights' configuration, and the error.
CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("bs_roformer", {"depth": 3}, "model.depth is 1, the weights have 3"),
    ("bs_roformer", {"dim": 24}, "model.dim is 16, the weights have 24"),
    ("bs_roformer", {"num_stems": 3}, "model.num_stems is 2, the weights have 3"),
    ("bs_roformer", {"stereo": False}, "model.stereo is true, the weights have false"),
    ("bs_roformer", {"heads": 4}, "model.heads is 2, the weights have 4"),
    ("bs_roformer", {"dim_head": 16}, "model.dim_head is 8, the weights have 16"),
    ("bs_roformer", {"mask_estimator_depth": 3}, "model.mask_estimator_depth is 2, the weights have 3"),
    ("bs_roformer", {"mlp_expansion_factor": 2}, "model.mlp_expansion_factor is 4, the weights have 2"),
    ("bs_roformer", {"time_transformer_depth": 2}, "model.time_transformer_depth is 1, the weights have 2"),
    ("bs_roformer", {"freq_transformer_depth": 3}, "model.freq_transformer_depth is 1, the weights have 3"),
    ("bs_roformer", {"linear_transformer_depth": 1}, "model.linear_transformer_depth is 0, the weights have 1"),
    ("bs_roformer", {"use_pope": True}, "model.use_pope is false, the weights have true"),
    ("bs_roformer", {"use_shared_bias": True}, "model.use_shared_bias is false, the weights have true"),
    (
        "bs_roformer",
        {"freqs_per_bands": [11, 11, 11]},
        "model.freqs_per_bands is [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3], the weights have [11, 11, 11]",
    ),
    (
        "bs_roformer",
        {"freqs_per_bands": [13] * 5, "stft_n_fft": 128, "stft_win_length": 128},
        "the weights have [13, 13, 13, 13, 13]; model.stft_n_fft is 64, the weights have 128",
    ),
    ("mel_band_roformer", {"num_bands": 14}, "model.num_bands is 12, the weights have 14"),
    ("mel_band_roformer", {"stereo": False}, "model.stereo is true, the weights have false"),
    ("mel_band_roformer", {"stft_n_fft": 1024}, "model.stft_n_fft is 512, the weights have 1024"),
    ("mel_band_roformer", {"sample_rate": 48000}, "model.sample_rate is 44100, the weights have 48000"),
    ("mel_band_roformer", {"mask_estimator_depth": 2}, "model.mask_estimator_depth is 1, the weights have 2"),
    ("mel_band_roformer", {"depth": 2}, "model.depth is 1, the weights have 2"),
    ("scnet", {"sources": THREE}, "model.sources has 2 entries, the weights are for 3"),
    (
        "scnet",
        {"audio_channels": 1, "dims": [2, 8, 16]},
        "model.audio_channels is 2, the weights have 1; model.dims is",
    ),
    ("scnet", {"dims": [4, 8]}, "model.dims is [4, 8, 16], the weights have [4, 8]"),
    ("scnet", {"num_dplayer": 4}, "model.num_dplayer is 2, the weights have 4"),
    ("scnet", {"conv_depths": [1, 2, 3]}, "model.conv_depths is [3, 2, 1], the weights have [1, 2, 3]"),
    ("scnet", {"band_kernel": [3, 4, 18]}, "model.band_kernel is [3, 4, 16], the weights have [3, 4, 18]"),
    ("scnet", {"compress": 2}, "model.compress is 4, the weights have 2"),
    ("scnet", {"conv_kernel": 5}, "model.conv_kernel is 3, the weights have 5"),
    ("scnet", {"expand": 2}, "model.expand is 1, the weights have 2"),
    ("mdx23c", {"num_channels": 16}, "model.num_channels is 8, the weights have 16"),
    ("mdx23c", {"growth": 4}, "model.growth is 8, the weights have 4"),
    ("mdx23c", {"num_scales": 1}, "model.num_scales is 2, the weights have 1"),
    ("mdx23c", {"num_blocks_per_scale": 2}, "model.num_blocks_per_scale is 1, the weights have 2"),
    ("mdx23c", {"num_subbands": 4}, "model.num_subbands is 2, the weights have 4"),
    ("mdx23c", {"num_stems": 3}, "model.num_stems is 2, the weights have 3"),
    ("mdx23c", {"bottleneck_factor": 4}, "model.bottleneck_factor is 2, the weights have 4"),
    ("mdx23c", {"audio": AUDIO | {"num_channels": 1}}, "audio.num_channels is 2, the weights have 1"),
    ("mdx23c", {"audio": AUDIO | {"dim_f": 128}}, "audio.dim_f is 64, the weights have 128"),
    ("htdemucs", {"sources": THREE}, "model.sources has 2 entries, the weights are for 3"),
    ("htdemucs", {"channels": 16}, "model.channels is 8, the weights have 16"),
    ("htdemucs", {"t_layers": 3}, "model.t_layers is 2, the weights have 3"),
    ("htdemucs", {"bottom_channels": 32}, "model.bottom_channels is 0, the weights have 32"),
    ("htdemucs", {"nfft": 4096}, "model.nfft is 2048, the weights have 4096"),
    ("htdemucs", {"depth": 3}, "model.depth is 4, the weights have 3"),
    ("hdemucs", {"channels": 16}, "model.channels is 8, the weights have 16"),
    ("hdemucs", {"sources": THREE}, "model.sources has 2 entries, the weights are for 3"),
    ("demucs", {"channels": 16}, "model.channels is 8, the weights have 16"),
    ("demucs", {"sources": THREE}, "model.sources has 2 entries, the weights are for 3"),
    ("demucs", {"depth": 5}, "model.depth is 6, the weights have 5"),
]


def write(folder: Path, architecture: str, changes: Mapping[str, Any] | None = None) -> Path:
    """A YAML of that architecture with changes of its `model:` section or of all of `audio:`."""
    changes = dict(changes or {})
    document = copy.deepcopy({"audio": {"sample_rate": 44100, "chunk_size": 44100}} | DOCUMENTS[architecture])
    document["audio"] = changes.pop("audio", document["audio"])
    document["model"] |= changes
    stems = document["model"].get("sources") or THREE[: document["model"]["num_stems"]]
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(document | {"architecture": architecture, "stems": stems}), encoding="utf-8")
    return path


@pytest.mark.parametrize("architecture, changes, said", quick_first(CHANGES, 20))
def test_a_wrong_size_is_named_with_its_key(
    architecture: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    weights = write_weights(random_weights(write(tmp_path, architecture, changes)), tmp_path / "weights.ckpt")
    path = write(tmp_path, architecture)
    with pytest.raises(CheckpointError) as caught:
        load_model(path, checkpoint=weights)
    sentence = str(caught.value)
    assert sentence.startswith(f"x ({weights}) does not fit {path}: ") and "\n" not in sentence
    assert sentence.endswith(": correct the YAML, or use the one that the weights were published with")
    assert said in sentence
    assert sentence.count("; ") == said.count("; ")  # no other key is named


@pytest.mark.parametrize("architecture", DOCUMENTS)
def test_fitting_weights_have_no_differences(architecture: str, tmp_path: Path) -> None:
    path = write(tmp_path, architecture)
    state = random_weights(path)
    assert (
        sizes_that_differ(read_config(path), Shapes({name: tuple(value.shape) for name, value in state.items()})) == []
    )
    load_model(path, checkpoint=write_weights(state, tmp_path / "weights.ckpt"))


@pytest.mark.parametrize("name", quick_models())
def test_every_shipped_model_fits_its_own_weights(name: str) -> None:
    description = read_config(name)
    specialists = tuple(file.stem for file in description.files if file.stem is not None)[:1]
    model = build(description, specialists)
    prefix = type(model).key_prefix(specialists[0] if specialists else "0")
    shapes = {key.removeprefix(prefix): tuple(value.shape) for key, value in model.state_dict().items()}
    assert sizes_that_differ(description, Shapes(shapes)) == []


@pytest.mark.parametrize("architecture", DOCUMENTS)
def test_weights_of_any_shape_are_compared(architecture: str, tmp_path: Path) -> None:
    path = write(tmp_path, architecture)
    description = read_config(path)
    own = {name: tuple(value.shape) for name, value in random_weights(path).items()}
    chance = random.Random(0)
    for _ in range(60):
        shapes = dict(own)
        for name in chance.sample(list(shapes), chance.choice([1, 5, len(shapes) // 2, len(shapes)])):
            del shapes[name]
            other = re.sub(r"\d+", lambda _: str(chance.choice([0, 1, 5])), name, count=1)
            if chance.random() < 0.7:
                shapes[other] = tuple(chance.choice([0, 1, 3, 16]) for _ in range(chance.randrange(5)))
        for said in sizes_that_differ(description, Shapes(shapes)):
            assert re.fullmatch(r"(model|audio)\.\w+ (is|has) .*, the weights (have|are for) .*", said)
            assert "None" not in said


def test_missing_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    state = small_model().state_dict()
    config = write_yaml(tmp_path)
    path = write_weights({"encoder.0.weight": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.ckpt\) is of another architecture or size \(.*missing .*1 of"):
        load_model(config, checkpoint=path)
    key = "final_norm.gamma"
    path = write_weights(state | {key: torch.zeros(24)}, tmp_path / "wide.ckpt")
    with pytest.raises(CheckpointError, match=rf"of another shape \({key}: \[24\] instead of \[16\]\)"):
        load_model(config, checkpoint=path)
    del state[key]
    with pytest.raises(CheckpointError, match=rf"1 of its keys are missing \({key}\)"):
        load_model(config, checkpoint=write_weights(state, tmp_path / "less.ckpt"))


def test_a_yaml_with_another_architecture_than_the_weights_is_named(tmp_path: Path) -> None:
    put(tmp_path, "x.yaml")
    write_weights(demucs_file(tmp_path / "demucs.safetensors").state_dict(), tmp_path / "x.ckpt")
    document = COMMUNITY | {"architecture": "bs_roformer"}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "x.ckpt")
    said = str(caught.value)
    assert "x.ckpt) has the weights of the architecture htdemucs, but" in said
    assert "x.yaml says bs_roformer (" in said and "of its keys are missing (" in said and "\n" not in said
