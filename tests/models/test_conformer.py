"""The Conformer and the first MelBand-Conformer equal the reference.

This is ZFTurbo/Music-Source-Separation-Training at ccc011a with the package conformer 0.3.2.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.common import quick_first
from helpers.recorded import assert_as_recorded
from helpers.small_model import assert_chunks_are_alone, assert_half_precision_is_near, identity, write_weights
from separation import load_model
from separation.checkpoints.build import with_architecture
from separation.checkpoints.catalogue import read_config
from separation.errors import CheckpointError, InputError
from separation.models.base import SeparationModel
from separation.models.conformer import Conformer, ConformerConfig, EarlyConfig, EarlyMelBandConformer

SMALL: dict[str, Any] = {"freq_bins": 257, "embed_dim": 32, "depth": 2, "dim_head": 16, "heads": 2}
STFT = {"n_fft": 512, "hop_length": 128}
OTHER = {"depth": 1, "dim_head": 8, "heads": 3, "in_channels": 1, "sources": 3, "hop_length": 16, "win_length": 256}
OTHER |= {"conv_kernel_size": 8, "ff_mult": 2, "conv_expansion_factor": 1}
EARLY: dict[str, Any] = {"dim": 32, "depth": 2, "dim_head": 16, "heads": 2, "stereo": True, "num_stems": 2}
RECORDED = [
    ({}, """
    12.93926 13.15401 -0.002169442 -0.07304233 -0.009394736 -0.02418408 -0.03943561 -0.1028623 0.05499648
    -0.03706777 -0.007926623 0.02225097 -0.05550128 -0.07760563 0.04187309 0.1117028 0.1359933 0.01562837
    -0.02535999 0.0144353 -0.01177934 0.0002206103 0.1113579 0.01050658 0.01547844 0.05604804
    """),
    (OTHER, """
    6.37204 6.650914 6.275239 -0.005954145 -0.06714642 -0.03570409 0.04409012 -0.05987562 -0.04163538 -0.03562404
    0.04168379 0.008222224 0.004733859 -0.07542337 -0.01555046 0.04650956 -0.001364002 0.08939506 -0.01614479
    0.003440113 0.03105167 -0.04405427 -0.009917199 -0.02567523 0.0735767 -0.004546799 -0.1018872
    """),
]  # fmt: skip
RECORDED_EARLY = """
    4.566622 4.577555 0.03237252 -0.02252594 0.00310275 -0.02446733 0.01465031 0.008022062 0.01227638 0.0001958838
    -0.01983644 -0.001815128 -0.02481201 0.00401353 -0.04693893 -0.007958109 0.02684531 0.01292609 -0.005951018
    0.01628949 -0.04597481 0.000832451 0.002506219 -0.01539864 -0.009359614 -0.002116496
"""


def make(**hyper: Any) -> Conformer:
    torch.manual_seed(0)
    config = ConformerConfig(**SMALL | STFT | hyper)
    return Conformer(config, identity("abc"[: config.sources], chunk_samples=12_000)).eval()


def early(**hyper: Any) -> EarlyMelBandConformer:
    torch.manual_seed(0)
    return EarlyMelBandConformer(EarlyConfig(**EARLY | hyper), identity("ab", chunk_samples=12_000)).eval()


@pytest.mark.parametrize("hyper, figures", RECORDED)
def test_the_conformer_equals_the_reference(hyper: dict[str, Any], figures: str) -> None:
    """The second has more frames than there are different distances."""
    assert_as_recorded(make(**hyper), 12_000, figures)


def test_the_first_melband_conformer_equals_the_reference() -> None:
    assert_as_recorded(early(freq_conformer_depth=1), 12_000, RECORDED_EARLY)


@pytest.mark.parametrize("model", quick_first([make, early], 1))
def test_chunks_do_not_depend_on_the_others(model: Callable[[], SeparationModel]) -> None:
    assert_chunks_are_alone(model())


def test_requested_stems_are_the_same_without_the_others() -> None:
    model, chunks = make(sources=3), torch.randn(1, 2, 5000)
    with torch.inference_mode():
        every, fewer = model(chunks), model.only(("c", "a"))(chunks)
    assert torch.equal(fewer, every[:, [2, 0]])


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 25), (torch.float16, 40)])
def test_half_precision_stays_close_to_float32(precision: torch.dtype, decibels: float) -> None:
    assert_half_precision_is_near(make(), precision, decibels)


def test_wrong_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match="freq_bins is 257 and n_fft 1024"):
        make(n_fft=1024)
    with pytest.raises(ValueError, match="sources is 4 and there are 3 stems"):
        make(sources=4)


def test_an_export_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be exported"):
        make().transform(12_000)


def write(folder: Path, document: dict[str, Any], model: SeparationModel) -> Path:
    (folder / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return write_weights(model.state_dict(), folder / "x.ckpt")


def conformer_document(**stft: Any) -> dict[str, Any]:
    """With the structure of config_musdb_conformers.yaml, in which a number has a comma."""
    return {
        "audio": {"chunk_size": 12_000, "num_channels": 2, "sample_rate": 44100, "min_mean_abs": 0.0},
        "model": SMALL | {"in_channels": 2, "sources": 2, "ff_mult": 4, "attn_dropout": 0.1, "ff_dropout": "0.1,"},
        "training": {"instruments": ["vocals", "other"], "target_instrument": None},
        "stft": {**STFT, "win_length": 512, "center": True} | stft,
    }


def test_a_published_conformer_loads_as_it_is(tmp_path: Path) -> None:
    weights, chunks = write(tmp_path, conformer_document(), make()), torch.randn(1, 2, 5000)
    assert read_config(weights).ignored == ()
    loaded = load_model(weights)
    assert type(loaded) is Conformer and loaded.stems == ("vocals", "other") and loaded.normalisation == "none"
    with torch.inference_mode():
        assert torch.equal(loaded(chunks), make()(chunks))


def test_frames_that_are_not_centred_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="center must be true in the section stft"):
        load_model(write(tmp_path, conformer_document(center=False), make()))


@pytest.mark.slow
def test_a_first_melband_conformer_loads_as_it_is(tmp_path: Path) -> None:
    document = {
        "audio": {"chunk_size": 12_000, "sample_rate": 44100},
        "model": EARLY | {"num_bands": 60, "conv_dropout": 0.0, "skip_connection": False},
        "training": {"instruments": ["vocals", "other"], "target_instrument": None},
    }
    loaded, chunks = load_model(write(tmp_path, document, early())), torch.randn(1, 2, 5000)
    assert type(loaded) is EarlyMelBandConformer
    with torch.inference_mode():
        assert torch.equal(loaded(chunks), early()(chunks))


def test_a_melband_conformers_yaml_without_weights_means_the_later_form(tmp_path: Path) -> None:
    document = {
        "audio": {"chunk_size": 12_000, "sample_rate": 44100},
        "model": EARLY | {"num_bands": 60, "time_conformer_depth": 1, "conv_dropout": 0.0},
        "training": {"instruments": ["vocals", "other"], "target_instrument": None},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    assert with_architecture(read_config(tmp_path / "x.yaml")).architecture == "mel_band_conformer"
