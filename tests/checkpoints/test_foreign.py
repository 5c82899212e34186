"""Models that this program does not support are refused by name, not with a request for a YAML."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.small_model import small_model, write_weights, write_yaml
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.load import load_model
from separation.cli.main import main
from separation.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")

UNSUPPORTED = "this architecture is not supported, use "
OTHER = "the program that it was made for"
END = UNSUPPORTED + OTHER
MSST = "Music-Source-Separation-Training"
VERSION_2 = "one of version 2, such as bs_roformer_hyperace_v2_vocals_unwa"
SAME_PACKAGES = "the program and the version of its packages that it was trained with"


@pytest.mark.parametrize("suffix, what", [(".tflite", "for TensorFlow Lite"), (".h5", "for TensorFlow")])
def test_a_file_for_another_runtime_is_recognised_by_its_suffix(
    tmp_path: Path, suffix: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"UVR_MDXNET_1{suffix}"
    path.write_bytes(b"\x08\x07\x12\x07pytorch")
    given = [
        ["--model-path", str(path)],
        ["--model-name", str(path.with_suffix(""))],
        ["--model-dir", str(tmp_path), "--model-name", path.stem],
        ["--model-name", "demo", "--model-path", str(path)],
    ]
    (tmp_path / "song.wav").write_bytes(b"")
    for options in given:
        assert main(["separate", str(tmp_path / "song.wav"), "-o", str(tmp_path / "out"), *options]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{path} is a network" in said and what in said and said.endswith(f"{END}\n")
    path.unlink()
    assert main(["separate", str(tmp_path / "song.wav"), "-o", str(tmp_path / "out"), "--model-path", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: there is no file {path}: ")


def test_a_damaged_file_is_an_error_without_a_request_for_a_yaml(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(CheckpointError, match=r"x\.pth .* is damaged, incomplete or not a PyTorch checkpoint"):
        load_model(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"model": {"num_repeat_mask": 8, "feature_dim": 128}}, "a BS-Mamba2, whose layers are those of the package"),
        ({"architecture": "torchseg"}, "a network of segmentation_models_pytorch or TorchSeg, whose layers are"),
        ({"training": {"model_type": "swin_upernet"}}, "a Swin-UperNet, whose layers are those of the package"),
    ],
)
def test_the_yaml_of_an_unsupported_model_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    drop = ("files",) if "architecture" in changes else ("files", "architecture")
    path = write_yaml(tmp_path, drop=drop, **changes)
    with pytest.raises(CheckpointError, match=rf"small\.yaml is .*{what}.*: {UNSUPPORTED}{MSST}$"):
        read_config(path)


@pytest.mark.parametrize(
    "key, what, end",
    [
        (
            "layers.0.1.layers.0.0.static_alpha",
            "a RoFormer with hyper-connections, which versions of their package",
            SAME_PACKAGES,
        ),
        (
            "mask_estimators.0.segm.hyperace.high_order_branch.2.cv1.bn.bias",
            "a BS-RoFormer HyperACE of version 1",
            VERSION_2,
        ),
        ("mask_estimators.0.other.0.0.to_qkv.weight", "a RoFormer with other mask estimators", OTHER),
        (
            "base_model.model.layers.0.1.layers.0.0.to_qkv.lora_A.default.weight",
            "a model with LoRA adapters as the package peft holds both in memory",
            "the model's own weights and the folder that peft's save_pretrained writes",
        ),
        ("separator.0.mamba.A_log", "a BS-Mamba2, whose layers are those of the package mamba_ssm for CUDA", MSST),
        (
            "unet_model.encoder.conv_stem.weight",
            "a network of segmentation_models_pytorch or TorchSeg, whose layers",
            MSST,
        ),
        (
            "swin_upernet_model.decode_head.classifier.weight",
            "a Swin-UperNet, whose layers are those of the package",
            MSST,
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["bs_roformer", None])
def test_the_weights_of_an_unsupported_model_are_refused_by_name(
    tmp_path: Path, key: str, what: str, end: str, architecture: str | None
) -> None:
    weights = write_weights(small_model().state_dict() | {key: torch.zeros(2)}, tmp_path / "x.ckpt")
    path = write_yaml(tmp_path, drop=("files",) if architecture else ("files", "architecture"))
    with pytest.raises(CheckpointError, match=rf"x\.ckpt is {what}.*: {UNSUPPORTED}{end}$"):
        load_model(path, checkpoint=weights)


def test_an_unsupported_model_in_the_users_folder_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEPARATION_MODELS", str(tmp_path))
    write_weights({"unet_model.encoder.conv_stem.weight": torch.zeros(2)}, tmp_path / "vr.pth")
    assert main(["models", "list"]) == 2
    captured = capsys.readouterr()
    assert (
        f"error: {tmp_path / 'vr.pth'} is a network of segmentation_models_pytorch or TorchSeg, whose layers are those "
        f"of the package timm: {UNSUPPORTED}{MSST}\n" in captured.out
    )
    assert "htdemucs_ft " in captured.out and "models cannot be used: check vr\n" in captured.err
