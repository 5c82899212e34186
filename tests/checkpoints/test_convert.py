"""`models convert` writes any checkpoint as safetensors."""

import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from helpers.small_model import (
    RunsCode,
    assert_same_model,
    chunks,
    convert_to,
    small_model,
    write_yaml,
)
from separation.checkpoints.convert import convert
from separation.checkpoints.load import load_model
from separation.errors import CheckpointError, InputError, OutputError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_converted_checkpoint_is_the_same_model_and_names_its_source(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    angles = [key for key in state if key.endswith("rotary_embed.freqs")]
    saved = {f"module.{key}": state[angles[0]] if key in angles else value for key, value in state.items()}
    assert len({value.data_ptr() for value in saved.values()}) < len(
        saved
    )  # some share memory, which safetensors refuses
    target, sha256 = convert_to(tmp_path / "out", {"epoch": 3, "state_dict": saved})
    assert target.stat().st_mode == (target.parent / "x.ckpt").stat().st_mode
    with safe_open(target, framework="pt") as opened:
        assert opened.metadata() == {"source_sha256": sha256, "source_name": "x.ckpt"}
        assert set(opened.keys()) == set(state)
    assert_same_model(load_model(write_yaml(tmp_path), checkpoint=target), small_model(), chunks())
    assert sorted(path.name for path in target.parent.iterdir()) == ["x.ckpt", "x.safetensors"]


def test_tensors_keep_their_types(tmp_path: Path, state: dict[str, Tensor]) -> None:
    target, _ = convert_to(tmp_path, {key: value.half() for key, value in state.items()})
    assert {value.dtype for value in load_file(target).values()} == {torch.float16}


def test_an_unusable_checkpoint_is_refused_and_nothing_is_written(tmp_path: Path, state: dict[str, Tensor]) -> None:
    target, ran = tmp_path / "out" / "x.safetensors", tmp_path / "ran"
    torch.save({"state_dict": state, "extra": RunsCode(ran)}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match="would run code"):
        convert(tmp_path / "code.ckpt", target)
    torch.save({"epoch": 3}, tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="has no state dict"):
        convert(tmp_path / "none.ckpt", target)
    with pytest.raises(CheckpointError, match="there is no file"):
        convert(tmp_path / "nothing.ckpt", target)
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"must end in \.safetensors"):
        convert(tmp_path / "x.ckpt", tmp_path / "x.bin")
    assert not ran.exists() and not target.parent.exists()


def test_an_unwritable_target_is_an_error(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "x.ckpt")
    (tmp_path / "taken.safetensors" / "inside").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"taken\.safetensors' is a folder"):
        convert(tmp_path / "x.ckpt", tmp_path / "taken.safetensors")
    with pytest.raises(OutputError, match=r"cannot write to '.*x\.ckpt'"):
        convert(tmp_path / "x.ckpt", tmp_path / "x.ckpt" / "x.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.safetensors", "x.ckpt"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "x.ckpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes; writing more fails as on a full disk
    try:
        with pytest.raises(OutputError, match=r"cannot write to '.*x\.safetensors' \(.*too large") as caught:
            convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]
