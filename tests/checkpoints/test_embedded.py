"""Weights files of Demucs, which describe their own network."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.common import quick_first
from helpers.demucs_files import CHUNK_SAMPLES, CLASSES, SOURCES, assert_separates_as, demucs_file, network, save
from helpers.small_model import chunks
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.load import load_model
from separation.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def test_a_safetensors_file_of_demucs_needs_no_yaml(tmp_path: Path) -> None:
    own = demucs_file(tmp_path / "0123abcd.safetensors")
    (tmp_path / "some_bag.yaml").write_text("models: ['0123abcd']\n")  # as Demucs publishes them beside its files
    model = load_model(tmp_path / "0123abcd.safetensors")
    assert (model.stems, model.chunk_samples, model.sample_rate) == (("drums", "bass"), 11025, 44100)
    assert torch.allclose(model(chunks(11025)), own(chunks(11025)), atol=1e-5)  # the attention backends differ


@pytest.mark.parametrize("segment", ["long", "1e999999999", "1/0", None, {"_type": "fraction", "numerator": "1"}])
def test_a_damaged_description_is_named(tmp_path: Path, segment: Any) -> None:
    demucs_file(tmp_path / "x.safetensors", segment=segment)
    with pytest.raises(CheckpointError, match=r"x\.safetensors has a damaged description of its network: put its YAML"):
        load_model(tmp_path / "x.safetensors")


def test_a_damaged_safetensors_file_without_a_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"x\.safetensors \(11 bytes\) is damaged, incomplete or not"):
        load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", quick_first(CLASSES, 1))
@pytest.mark.parametrize("suffix", quick_first([".th", ".pt"], 1))
def test_a_file_of_demucs_needs_no_yaml(name: str, suffix: str, tmp_path: Path) -> None:
    net = network(name)
    path = save(net, tmp_path).rename(tmp_path / f"alone{suffix}")
    model = load_model(path)
    assert (model.name, model.stems, model.sample_rate) == ("alone", tuple(SOURCES), 44100)
    assert model.chunk_samples == CHUNK_SAMPLES
    assert model.origin is not None and model.origin.architecture == name
    assert_separates_as(model, net)


@pytest.mark.parametrize("arguments, seconds", [({}, 10), ({"segment": 7.8}, 7.8), ({"segment": Fraction(39, 5)}, 7.8)])
def test_missing_arguments_have_the_defaults_of_demucs(
    tmp_path: Path, arguments: dict[str, Any], seconds: float
) -> None:
    net = network("htdemucs", **arguments)
    if not arguments:
        del net._init_args_kwargs[1]["segment"]
    assert read_config(save(net, tmp_path)).chunk_samples == seconds * 44100


def test_a_hostile_argument_in_a_file_without_a_yaml_is_named(tmp_path: Path) -> None:
    path = save(network("htdemucs"), tmp_path)
    saved = torch.load(path, weights_only=False)
    torch.save(saved | {"kwargs": {"depth": 10**9}}, tmp_path / "deep.th")
    with pytest.raises(CheckpointError, match=r"deep\.th .*depth is 1000000000, more than"):
        load_model(tmp_path / "deep.th")
