"""The `lora` section of a YAML."""

from pathlib import Path

import pytest

from separation.checkpoints.lora import Lora, lora_in
from separation.errors import CheckpointError


def test_a_yaml_without_the_section_has_no_adapters() -> None:
    assert lora_in({}, Path("x.yaml")) is None


def test_the_adapter_s_file_is_beside_the_yaml_and_defaults_are_those_of_loralib(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    found = lora_in({"lora": {"r": 8, "file": "a.pt"}}, tmp_path / "x.yaml")
    assert found == Lora(r=8, alpha=1, enabled=(True,), file=tmp_path / "a.pt", source=tmp_path / "x.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"x\.yaml: there is no file .*x_lora: correct the file in the section lora"
    ):
        lora_in({"lora": {"file": "x_lora"}}, tmp_path / "x.yaml")


@pytest.mark.parametrize("text", ["{", "[]", "x" * 300_000, '{"peft_type": "LORA", "peft_type": "LORA"}'])
def test_settings_of_peft_that_cannot_be_read_are_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json (cannot be used|is of an adapter of type \[\])"):
        lora_in({"lora": {"file": "."}}, tmp_path / "x.yaml")
