"""MDX23C has the community's layout and equals an independent implementation."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from helpers.small_model import assert_chunks_are_alone, assert_half_precision_is_near, assert_near, identity
from helpers.small_unets import AUDIO, MODEL, STEMS, config_of, small_mdx23c
from separation import CheckpointError, Separator, load_model
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.engine.options import EngineOptions
from separation.models.mdx23c import MDX23C


def make_pair(stems: int, **changes: Any) -> tuple[MDX23C, torch.nn.Module]:
    """This project's model and the independent implementation, with the same random weights."""
    reference = pytest.importorskip("pymss_core.modules.mdx23c_tfc_tdf_v3", reason="needs pymss-core")
    from pymss_core.config import to_attrdict

    document = {
        "audio": {**AUDIO, **{key: value for key, value in changes.items() if key in AUDIO and key != "num_channels"}},
        "model": {**MODEL, **{key: value for key, value in changes.items() if key in MODEL}},
        "training": {"instruments": list(STEMS[:stems]), "target_instrument": None},
    }
    torch.manual_seed(0)
    theirs = reference.TFC_TDF_net(to_attrdict(document)).eval()
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if value.is_floating_point():  # a mistake would not show with gains of exactly one
                value.add_(torch.rand_like(value) * 0.2 if key.endswith("var") else torch.randn_like(value) * 0.02)
    with torch.device("meta"):
        ours = MDX23C(config_of(stems, **changes), identity(STEMS[:stems]))
    ours.load(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "stems, changes",
    [
        (2, {}),
        (1, {"norm": "BatchNorm", "act": "relu"}),
        (4, {"norm": "GroupNorm4", "act": "elu1.0", "num_subbands": 2}),
        (2, {"act": "relu", "scale": [2, 4], "growth": 0, "bottleneck_factor": 2}),
        (2, {"norm": "GroupNorm2", "num_blocks_per_scale": 3, "scale": [1, 2], "chunk_size": 64 * 20}),
        # The layouts of InstVoc HQ 2 and DrumSep, an eighth as wide and as long
        (2, {"n_fft": 8192, "hop_length": 1024, "dim_f": 4096, "chunk_size": 1024 * 31, "num_scales": 5}),
        (5, {"n_fft": 2048, "hop_length": 512, "dim_f": 1024, "chunk_size": 512 * 127, "num_scales": 5, "growth": 16}),
    ],
    ids=str,
)
def test_output_equals_the_independent_implementation(stems: int, changes: dict) -> None:
    ours, theirs = make_pair(stems, **changes)
    chunks = torch.randn(2, 2, ours.config.chunk_size) * 0.1
    with torch.inference_mode():
        got = ours(chunks)
        expected = theirs(chunks).reshape(got.shape)
    assert got.shape == (2, stems, 2, ours.config.chunk_size)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_output_equals_the_independent_implementation_at_full_width() -> None:
    changes = {"n_fft": 2048, "hop_length": 512, "dim_f": 1024, "chunk_size": 512 * 31}
    ours, theirs = make_pair(5, **changes, num_scales=5, num_channels=128, growth=128)
    chunks = torch.randn(1, 2, ours.config.chunk_size) * 0.1
    with torch.inference_mode():
        got = ours(chunks)
        expected = theirs(chunks)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name, parameters", [("mdx23c_instvoc_hq_2", 111_990_272), ("drumsep", 109_376_576)])
def test_the_public_checkpoints_have_so_many_parameters(name: str, parameters: int) -> None:
    description = read_config(name)
    model = build(description, ())
    assert isinstance(model, MDX23C) and model.config.audio_channels == 2
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("norm", ["InstanceNorm", "BatchNorm", "GroupNorm4"])
@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 35), (torch.float16, 50)])
def test_half_precision_stays_close_to_float32(precision: torch.dtype, decibels: float, norm: str) -> None:
    assert_half_precision_is_near(small_mdx23c(norm=norm), precision, decibels)


def test_an_estimate_does_not_depend_on_the_other_chunks_of_the_batch() -> None:
    assert_chunks_are_alone(small_mdx23c())


def test_silence_in_silence_out() -> None:
    model = small_mdx23c()
    with torch.inference_mode():
        assert not model(torch.zeros(1, 2, model.config.chunk_size)).any()


def test_requested_stems_are_the_same_without_the_others() -> None:
    model = small_mdx23c()
    chunks = torch.randn(1, 2, model.config.chunk_size) * 0.1
    fewer = model.only(("snare", "hihat", "cymbals")).only(("cymbals", "snare"))
    with torch.inference_mode():
        expected, got = model(chunks), fewer(chunks)
    assert fewer.stems == ("cymbals", "snare") and model.stems == STEMS
    assert_near(got, expected[:, [4, 1]])


def write_files(folder: Path, *, audio: dict | None = None, **model: Any) -> tuple[Path, Path]:
    """A community YAML and its weights. Both its `audio:` and its `model:` section have `num_channels`."""
    document = {
        "architecture": "mdx23c",
        "audio": {**AUDIO, **(audio or {})},
        "model": {**MODEL, **model},
        "training": {"instruments": list(STEMS), "target_instrument": None},
        "inference": {"normalize": False, "dim_t": 32},
    }
    path, weights = folder / "small.yaml", folder / "small.ckpt"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    torch.save({"state_dict": small_mdx23c().state_dict()}, weights)
    return path, weights


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_song_is_separated_in_chunks_of_the_models_length(tmp_path: Path, batch_size: int) -> None:
    path, weights = write_files(tmp_path)
    model = load_model(path, checkpoint=weights)
    assert isinstance(model, MDX23C) and model.config.num_channels == 8 and model.channels == 2
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[-1]))
    mixture = torch.randn(2, 7000) * 0.1
    stems = Separator.from_model(model, options=EngineOptions(batch_size=batch_size)).separate(mixture)
    assert list(stems) == list(STEMS) and all(stem.shape == (2, 7000) for stem in stems.values())
    assert set(lengths) == {AUDIO["chunk_size"]}
    silence = Separator.from_model(model).separate(torch.zeros(2, 5000))
    assert not any(stem.any() for stem in silence.values())
    if batch_size > 1:
        one: dict[str, Tensor] = Separator.from_model(model, options=EngineOptions(batch_size=1)).separate(mixture)
        assert all((stems[stem] - one[stem]).abs().max() <= 1e-6 for stem in STEMS)


@pytest.mark.parametrize(
    "audio, model, message",
    [
        ({"chunk_size": 64 * 30}, {}, "chunk_size 1920 gives 31 frames, but .* a multiple of 4"),
        ({"dim_f": 120}, {}, "dim_f 120 must be a multiple of 16"),
        ({"dim_f": 256}, {}, r"dim_f 256 must be .* at most 129"),
        ({}, {"norm": "LayerNorm"}, "unknown norm 'LayerNorm': use InstanceNorm"),
        ({}, {"act": "swish"}, "unknown act 'swish': use gelu"),
        ({}, {"act": "eluting"}, "unknown act 'eluting'"),
        ({}, {"norm": "GroupNorm3"}, "num_channels"),
        (
            {},
            {"num_channels": 16},
            r"small\.ckpt\) does not fit .*: model\.num_channels is 16, the weights have 8: correct",
        ),
    ],
)
def test_an_invalid_configuration_is_a_one_line_error(tmp_path: Path, audio: dict, model: dict, message: str) -> None:
    path, weights = write_files(tmp_path, audio=audio, **model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path, checkpoint=weights)
    assert "\n" not in str(caught.value)
