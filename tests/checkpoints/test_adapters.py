"""LoRA adapters are merged into the weights on load."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from helpers.small_model import DOCUMENT, small_model, write_weights
from separation import load_model
from separation.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")

QKV, OUT = "layers.0.0.layers.0.0.to_qkv", "layers.0.1.layers.0.1.net.4"  # [48, 16] and [16, 64]
R, ALPHA = 3, 12


def adapters() -> dict[str, Tensor]:
    """As loralib's MergedLinear has them for queries and values of one layer, and its Linear for another."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        f"{QKV}.lora_A": (2 * R, 16),
        f"{QKV}.lora_B": (32, R),
        f"{OUT}.lora_A": (R, 64),
        f"{OUT}.lora_B": (16, R),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def expected() -> dict[str, Tensor]:
    """The merged weights, row by row."""
    weights = {name: value.clone() for name, value in small_model().state_dict().items()}
    lora = adapters()
    first, second = lora[f"{QKV}.lora_A"], lora[f"{QKV}.lora_B"]
    for row in range(16):
        queries = sum(second[row, k] * first[k] for k in range(R))
        values = sum(second[16 + row, k] * first[R + k] for k in range(R))
        weights[f"{QKV}.weight"][row] += ALPHA / R * queries
        weights[f"{QKV}.weight"][32 + row] += ALPHA / R * values
        out = sum(lora[f"{OUT}.lora_B"][row, k] * lora[f"{OUT}.lora_A"][k] for k in range(R))
        weights[f"{OUT}.weight"][row] += ALPHA / R * out
    return weights


def write(folder: Path, lora: dict[str, Any] | None, weights: dict[str, Tensor]) -> Path:
    """A community YAML, with the section of Music-Source-Separation-Training, and weights."""
    document = {key: value for key, value in DOCUMENT.items() if key != "files"}
    if lora is not None:
        document |= {"lora": {"r": R, "lora_alpha": ALPHA, "lora_dropout": 0.05, "merge_weights": False} | lora}
    (folder / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return write_weights(weights, folder / "x.ckpt")


def assert_merged(path: Path) -> None:
    state, right = load_model(path, attention="sdpa").state_dict(), expected()
    assert state.keys() == right.keys()
    assert all((state[name] - value).abs().max() <= 1e-5 for name, value in right.items())


def checksums(path: Path) -> dict[str, str]:
    origin = load_model(path).origin
    assert origin is not None
    return {part: checksum() for part, checksum in origin.weights.items()}


ENABLED = {"enable_lora": [True, False, True], "fan_in_fan_out": False}


def test_adapters_in_the_file_of_the_weights_are_merged(tmp_path: Path) -> None:
    assert_merged(write(tmp_path, ENABLED, small_model().state_dict() | adapters()))


def test_an_adapter_in_a_file_beside_the_yaml_is_merged_and_part_of_the_identity(tmp_path: Path) -> None:
    path = write(tmp_path, ENABLED | {"file": "adapter.pt"}, small_model().state_dict())
    torch.save({"model_state_dict": adapters(), "epoch": 3}, tmp_path / "adapter.pt")
    assert_merged(path)
    before = checksums(path)
    torch.save({"model_state_dict": {name: 2 * value for name, value in adapters().items()}}, tmp_path / "adapter.pt")
    after = checksums(path)
    assert before["0"] == after["0"] and before["lora"] != after["lora"]


def test_layers_fused_for_the_cpu_have_the_merged_weights(tmp_path: Path) -> None:
    path, chunks = write(tmp_path, ENABLED, small_model().state_dict() | adapters()), torch.randn(1, 2, 700)
    right = small_model()
    right.load(expected())
    with torch.inference_mode():
        assert (load_model(path)(chunks) - right(chunks)).abs().max() <= 1e-4 * right(chunks).abs().max()


def test_a_section_without_adapters_changes_nothing(tmp_path: Path) -> None:
    state = small_model().state_dict()
    loaded = load_model(write(tmp_path, ENABLED, state), attention="sdpa").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    "lora, message",
    [
        (None, "has a LoRA adapter, and the YAML has no section lora with r and lora_alpha"),
        (
            ENABLED | {"r": 4},
            r"r 4 and enable_lora do not fit the LoRA adapter of layers\.0.*\[6, 16\] and \[32, 3\]",
        ),
        ({"enable_lora": [True, True, True]}, "r 3 and enable_lora do not fit the LoRA adapter"),
        (ENABLED | {"lora_alpha": "many"}, "lora_alpha must be a positive number, not 'many'"),
        (ENABLED | {"enable_lora": 3}, "enable_lora must be a list of true and false"),
        (ENABLED | {"fan_in_fan_out": True}, "fan_in_fan_out must be false"),
        (ENABLED | {"file": "other.pt"}, r"there is no file .*other\.pt"),
        (ENABLED | {"file": "x.ckpt"}, r"x\.ckpt is not a LoRA adapter of loralib"),
    ],
)
def test_adapters_that_do_not_fit_are_errors(tmp_path: Path, lora: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(write(tmp_path, lora, small_model().state_dict() | adapters()))


def test_half_an_adapter_is_an_error(tmp_path: Path) -> None:
    half = {name: value for name, value in adapters().items() if name != f"{OUT}.lora_B"}
    with pytest.raises(CheckpointError, match=rf"has a LoRA adapter without {OUT}\.lora_B"):
        load_model(write(tmp_path, ENABLED, small_model().state_dict() | half))


def test_an_adapter_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter without its model: give the model's weights"):
        load_model(write(tmp_path, ENABLED, adapters()))
