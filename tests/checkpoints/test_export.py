"""ONNX files: with the documented lines, ONNX Runtime gives the same stems as PyTorch."""

import json
import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from helpers.common import PROJECT
from helpers.small_model import identity
from separation.checkpoints.build import random_weights
from separation.checkpoints.load import load_model
from separation.cli.main import main
from separation.errors import EstimateError, InputError, OutputError
from separation.models.base import SeparationModel
from separation.models.htdemucs import HDemucs

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytestmark = pytest.mark.skipif(find_spec("onnxscript") is None, reason="needs onnxscript")
from separation.checkpoints import export as module  # noqa: E402
from separation.checkpoints.export import Export, export  # noqa: E402

SOURCES = ["drums", "bass", "other", "vocals"]
ROFORMER = {"dim": 8, "depth": 1, "stereo": True, "num_stems": 2, "dim_head": 4, "heads": 2, "stft_n_fft": 64}
ROFORMER |= {"stft_hop_length": 16, "stft_win_length": 64}
DEMUCS = {"sources": SOURCES, "channels": 4, "segment": "1/10", "depth": 2}
# A small model of each architecture: stems, chunk in samples, the `model:` section, and more of the `audio:` section.
MODELS: dict[str, tuple[list[str], int, dict[str, Any], dict[str, Any]]] = {
    "bs_roformer": (
        ["vocals", "other"],
        1000,
        ROFORMER | {"freqs_per_bands": [3] * 11, "stft_win_length": 50, "stft_normalized": True, "zero_dc": True},
        {},
    ),
    "mel_band_roformer": (
        ["vocals", "other"],
        4096,
        ROFORMER | {"num_bands": 6, "stft_n_fft": 256, "stft_win_length": 256, "linear_transformer_depth": 1},
        {},
    ),
    "mdx23c": (
        ["vocals", "other"],
        64 * 7,
        {"act": "gelu", "bottleneck_factor": 2, "growth": 4, "norm": "InstanceNorm", "num_blocks_per_scale": 1}
        | {"num_channels": 8, "num_scales": 1, "num_subbands": 2, "scale": [2, 2]},
        {"n_fft": 256, "hop_length": 64, "dim_f": 64, "num_channels": 2},
    ),
    "scnet": (
        SOURCES,
        3000,
        {"sources": SOURCES, "dims": [4, 8, 8], "nfft": 512, "hop_size": 128, "win_size": 512, "num_dplayer": 2},
        {},
    ),
    "htdemucs": (
        SOURCES,
        4410,
        DEMUCS | {"channels": 8, "nfft": 512, "bottom_channels": 8, "t_layers": 2, "t_heads": 2, "dconv_mode": 1},
        {},
    ),
    "hdemucs": (
        SOURCES,
        4410,
        DEMUCS | {"depth": 3, "nfft": 64, "hybrid_old": True, "channels": 8, "dconv_lstm": 2, "dconv_attn": 2},
        {},
    ),
    "demucs": (SOURCES, 4410, DEMUCS | {"lstm_layers": 1}, {}),
}
CODE = re.search(
    r"```python\n(import json\n.*?)```", (PROJECT / "docs" / "onnx.md").read_text(encoding="utf-8"), re.DOTALL
)


def write_model(architecture: str, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """The paths of the YAML and of random weights."""
    stems, chunk_size, hyper_parameters, audio = MODELS[architecture]
    document = {"architecture": architecture, "stems": stems, "model": hyper_parameters | changes}
    document |= {"audio": {"sample_rate": 44100, "chunk_size": chunk_size} | audio}
    path = folder / f"{architecture}.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    weights = folder / "x.safetensors"
    save_file(random_weights(path), weights)
    return path, weights


def noise(channels: int, samples: int) -> Tensor:
    return torch.randn(channels, samples, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MODELS)
def test_the_documented_lines_give_the_same_stems_as_pytorch(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, weights = write_model(architecture, tmp_path)
    exported = export(path, tmp_path / "model.onnx", checkpoint=weights)
    assert exported.error is not None and exported.error < 1e-4
    model = load_model(path, checkpoint=weights)
    session = onnxruntime.InferenceSession(exported.path)
    about = json.loads(session.get_modelmeta().custom_metadata_map["separation"])
    assert about["stems"] == list(model.stems) and about["sample_rate"] == 44100
    assert list(about["inputs"]) == [value.name for value in session.get_inputs()]
    assert list(about["outputs"]) == [value.name for value in session.get_outputs()]

    mixture = noise(model.channels, about["chunk_samples"])
    if about["transform"] is None:
        (stems,) = session.run(None, {"waveform": mixture[None].numpy()})[0]
    else:
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {"chunk": mixture.numpy()}
        assert CODE is not None
        exec(CODE[1], names)
        stems = names["stems"]
    with torch.inference_mode():
        expected = model(mixture[None])[0].numpy()
    assert stems.shape == expected.shape
    assert np.abs(stems - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    return write_model("bs_roformer", tmp_path)


@pytest.mark.slow
def test_the_command_writes_one_file_and_prints_its_inputs_and_outputs(
    small: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "out.onnx"
    assert main(["export", str(small[0]), str(target), "--random-weights"]) == 0
    printed, complaints = capfd.readouterr()
    shapes = r"spectrogram \[1, 2, 33, 63, 2\] -> spectrograms \[1, 2, 2, 33, 63, 2\]"
    assert re.fullmatch(rf"{target}: 0\.\d MB, {shapes}; ONNX Runtime agrees with PyTorch to \d\.\de-0\d\n", printed)
    assert complaints == ""
    assert [path.name for path in target.parent.iterdir()] == ["out.onnx"]
    assert str(PROJECT).encode() not in target.read_bytes()
    assert logging.getLogger("torch.onnx").isEnabledFor(logging.WARNING)


def test_without_onnxruntime_the_printed_line_says_that_the_file_is_not_checked() -> None:
    line = str(Export(path=Path("x.onnx"), n_bytes=1_500_000, inputs={"a": [1]}, outputs={"b": [2]}, error=None))
    assert line == "x.onnx: 1.5 MB, a [1] -> b [2]; not checked, because onnxruntime is not installed"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["out.bin"], "the output 'out.bin' must be a file whose name ends in .onnx"),
        (["folder.onnx"], "the output 'folder.onnx' must be a file"),
        (["out.onnx", "--random-weights", "--model-path", "x.ckpt"], "cannot be combined"),
        (["out.onnx", "--model-path", "none.ckpt"], "there is no file none.ckpt"),
    ],
)
def test_an_impossible_export_is_one_error_and_leaves_nothing(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = write_model("bs_roformer", tmp_path)[0]
    monkeypatch.chdir(tmp_path)
    Path("folder.onnx").mkdir()
    before = sorted(tmp_path.iterdir())
    assert main(["export", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert sorted(tmp_path.iterdir()) == before


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        InputError, match=r"the package onnxscript is missing: run `pip install onnx onnxscript onnxruntime`"
    ):
        export("demo", tmp_path / "out.onnx")


@pytest.mark.parametrize("part", [{"cac": False}, {"hybrid": False, "hybrid_old": False}])
def test_networks_that_mask_amplitudes_or_have_one_branch_cannot_be_exported(
    part: dict[str, Any], tmp_path: Path
) -> None:
    path = write_model("hdemucs", tmp_path, **part)[0]
    with pytest.raises(
        InputError, match=r"hdemucs cannot be exported \(one of its networks masks amplitudes or has one branch\)"
    ):
        export(path, tmp_path / "out.onnx", random=True)


def test_networks_with_different_spectrograms_cannot_be_exported() -> None:
    config = HDemucs.Config(sources=["a"], channels=4, depth=1, nfft=512)
    model = HDemucs(config, identity(["a"], name="two"), members=2)
    assert model.transform(1000) is not None
    other: Any = model.networks["1"]
    other.hybrid_old = True
    with pytest.raises(
        InputError, match=r"two cannot be exported \(its networks take different spectrograms\): choose another"
    ):
        model.transform(1000)


def test_an_architecture_without_a_core_cannot_be_exported() -> None:
    model = SeparationModel(identity(name="new"))
    with pytest.raises(InputError, match=r"new cannot be exported \(its architecture"):
        model.transform(1000)


@pytest.mark.slow
def test_a_file_that_differs_from_pytorch_is_not_kept(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.onnx"
    target.write_bytes(b"older")
    monkeypatch.setattr(module, "MOST_ERROR", 1e-9)
    with pytest.raises(OutputError, match=r"out\.onnx' already exists"):
        export(small[0], target, random=True)
    with pytest.raises(EstimateError, match=r"bs_roformer in ONNX Runtime differs from PyTorch by .*e-"):
        export(small[0], target, random=True, overwrite=True)
    assert target.read_bytes() == b"older"
    assert not list(tmp_path.glob(".separating*"))
