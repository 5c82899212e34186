"""The `lora` section of a YAML."""

from pathlib import Path

from separation.checkpoints.lora import Lora, lora_in


def test_a_yaml_without_the_section_has_no_adapters() -> None:
    assert lora_in({}, Path("x.yaml")) is None


def test_the_adapter_s_file_is_beside_the_yaml_and_defaults_are_those_of_loralib() -> None:
    found = lora_in({"lora": {"r": 8, "file": "a.pt"}}, Path("models/x.yaml"))
    assert found == Lora(r=8, alpha=1, enabled=(True,), file=Path("models/a.pt"), source=Path("models/x.yaml"))
