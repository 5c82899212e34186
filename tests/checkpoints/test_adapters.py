"""LoRA adapters are merged into the weights on load."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.functional import conv2d

from helpers.small_model import DOCUMENT, small_model, write_weights
from separation import load_model
from separation.checkpoints.adapters import merged
from separation.checkpoints.lora import Lora
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
            r"r 4 and enable_lora does not fit the LoRA adapter of layers\.0.*\[6, 16\] and \[32, 3\]",
        ),
        ({"enable_lora": [True, True, True]}, "r 3 and enable_lora does not fit the LoRA adapter"),
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


# ---------------------------------------------------------------------------------------------------------------------
# Adapters that the package peft saved


def peft_adapter() -> dict[str, Tensor]:
    """As peft's save_pretrained has them for two linear layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{QKV}.lora_A": (R, 16), f"{QKV}.lora_B": (48, R), f"{OUT}.lora_A": (R, 64), f"{OUT}.lora_B": (16, R)}
    names = {f"base_model.model.{name}.weight": shape for name, shape in shapes.items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def write_peft(
    folder: Path,
    settings: dict[str, Any] | None = None,
    adapter: dict[str, Tensor] | None = None,
    *,
    file: str = "x_lora_",
    suffix: str = "safetensors",
) -> Path:
    """A model, and an adapter in the folder that its YAML names, as Music-Source-Separation-Training leaves them."""
    (folder / "x_lora_").mkdir()
    given = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "bias": "none", "init_lora_weights": True}
    given |= {"use_dora": False, "target_modules": ["to_qkv", "4"], "fan_in_fan_out": False} | (settings or {})
    (folder / "x_lora_" / "adapter_config.json").write_text(json.dumps(given), encoding="utf-8")
    write_weights(adapter or peft_adapter(), folder / "x_lora_" / f"adapter_model.{suffix}")
    path = write(folder, {}, small_model().state_dict())
    document = yaml.safe_load((folder / "x.yaml").read_text()) | {"lora": {"file": file}}
    (folder / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "settings, scales",
    [
        ({}, (ALPHA / R, ALPHA / R)),
        ({"use_rslora": True}, (ALPHA / math.sqrt(R), ALPHA / math.sqrt(R))),
        ({"alpha_pattern": {"to_qkv": 6}, "rank_pattern": {"net.4": R}, "r": R}, (6 / R, ALPHA / R)),
        ({"alpha_pattern": {"qkv": 6}}, (ALPHA / R, ALPHA / R)),
        ({"r": 1, "rank_pattern": {QKV: R, "4": R}, "init_lora_weights": "gaussian"}, (ALPHA / R, ALPHA / R)),
    ],
    ids=str,
)
@pytest.mark.parametrize("file, suffix", [("x_lora_", "safetensors"), ("x_lora_/adapter_model.bin", "bin")])
def test_an_adapter_of_peft_is_merged_with_the_scale_of_its_own_settings(
    tmp_path: Path, settings: dict[str, Any], scales: tuple[float, float], file: str, suffix: str
) -> None:
    path, lora = write_peft(tmp_path, settings, file=file, suffix=suffix), peft_adapter()
    right = {name: value.clone() for name, value in small_model().state_dict().items()}
    for layer, scale in zip((QKV, OUT), scales, strict=True):
        first, second = (lora[f"base_model.model.{layer}.lora_{which}.weight"] for which in "AB")
        right[f"{layer}.weight"] += scale * second @ first
    state = load_model(path, attention="sdpa").state_dict()
    assert state.keys() == right.keys()
    assert all((state[name] - value).abs().max() <= 1e-5 for name, value in right.items())


def test_an_adapter_of_a_convolution_is_merged() -> None:
    """As two convolutions after another, of which the second has a kernel of one place."""
    lora = Lora(r=2, alpha=6, file=None, source=Path("adapter_config.json"))
    weight, first, second = torch.randn(5, 3, 4, 3), torch.randn(2, 3, 4, 3), torch.randn(5, 2, 1, 1)
    found = merged({"conv.weight": weight, "conv.lora_A": first, "conv.lora_B": second}, lora, {})
    x = torch.randn(1, 3, 9, 9)
    expected = conv2d(x, weight) + 3 * conv2d(conv2d(x, first), second)
    assert (conv2d(x, found["conv.weight"]) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_settings_of_an_adapter_of_peft_are_part_of_the_identity(tmp_path: Path) -> None:
    found = []
    for name, settings in (("a", {}), ("b", {"use_rslora": True}), ("c", {"alpha_pattern": {"to_qkv": 6}})):
        (tmp_path / name).mkdir()
        origin = load_model(write_peft(tmp_path / name, settings)).origin
        assert origin is not None
        found.append(origin.hyper_parameters["lora"])
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 4}, r"adapter_config\.json: r 4 does not fit the LoRA adapter of layers\.0.*\[3, 16\] and \[48, 3\]"),
        ({"peft_type": "LOHA"}, "is of an adapter of type 'LOHA', not 'LORA': merge it by peft's merge_and_unload"),
        ({"use_dora": True}, "has use_dora True, which is not supported: merge it by peft's merge_and_unload"),
        ({"bias": "all", "modules_to_save": ["norm"]}, r"has modules_to_save \['norm'\], bias 'all', which is not"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa_niter_4', which is not supported"),
        ({"init_lora_weights": [1]}, r"has init_lora_weights \[1\], which is not supported"),
        ({"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern has '\(a\+\)\+\$', which is no layer's name: merge"),
        ({"rank_pattern": {"to_qkv": 0}}, "to_qkv must be a positive integer, not 0"),
        ({"lora_alpha": "8"}, "lora_alpha must be a positive number, not '8'"),
    ],
)
def test_adapters_of_peft_that_are_not_supported_are_errors(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(write_peft(tmp_path, settings))


def test_a_folder_without_an_adapter_of_peft_is_an_error(tmp_path: Path) -> None:
    path = write_peft(tmp_path)
    (tmp_path / "x_lora_" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"x_lora_ has no adapter_model\.safetensors or adapter_model\.bin: name"):
        load_model(path)
    (tmp_path / "x_lora_" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"x_lora_ has no adapter_config\.json: name the folder"):
        load_model(path)


def test_an_adapter_of_peft_with_other_weights_is_an_error(tmp_path: Path) -> None:
    more = {"base_model.model.final_norm.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"has base_model\.model\.final_norm\.weight, which is no matrix of an"):
        load_model(write_peft(tmp_path, adapter=peft_adapter() | more))


def test_an_adapter_of_peft_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    write_peft(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter without its model: give the model's weights"):
        load_model(tmp_path / "x_lora_" / "adapter_model.safetensors")
