"""How LoRA adapters that adapters.py merges are scaled: by a YAML's section `lora`, or by the package peft's own file.

The section has the keys of Music-Source-Separation-Training. `file` is this project's: an adapter beside the YAML, a
file or the folder that peft saves. Such a folder's adapter_config.json takes the place of the section's other keys.

Nothing here imports PyTorch.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from separation.checkpoints.keys import section, take
from separation.documents import MOST_BYTES, DocumentError, escaped, first_line, quoted, read_json
from separation.errors import CheckpointError

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MERGE_BY_PEFT = "merge it by peft's merge_and_unload, and use the weights of the result"
# Settings of peft that change more than `lora_B @ lora_A`, or other weights too. Off is null, false or empty.
PEFT_OTHERS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "modules_to_save", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config"),
)
# Ways to initialise that leave the model's own weights as they are. The others of peft subtract the adapter from them.
PEFT_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The scale of adapters: `alpha / r`, or `alpha / sqrt(r)` if `is_rank_stabilised`."""

    r: int
    alpha: float
    enabled: tuple[bool, ...] = (True,)  # of the layers in the rows of one
    is_rank_stabilised: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)  # of layers whose names end with these, in place of `r`
    alphas: Mapping[str, float] = field(default_factory=dict)  # the same, of `alpha`
    file: Path | None  # an adapter in a file of its own
    source: Path  # the file that states all this

    def rank(self, layer: str) -> int:
        """The rank of a layer's adapter."""
        return self.ranks.get(_ending(layer, self.ranks), self.r)

    def scale(self, layer: str) -> float:
        """The factor of a layer's adapter."""
        rank = self.rank(layer)
        return self.alphas.get(_ending(layer, self.alphas), self.alpha) / (
            math.sqrt(rank) if self.is_rank_stabilised else rank
        )

    @property
    def identity(self) -> tuple[Any, ...]:
        """What the merged weights depend on, beside the adapter's."""
        return self.r, self.alpha, self.enabled, self.is_rank_stabilised, dict(self.ranks), dict(self.alphas)


def _ending(layer: str, names: Mapping[str, Any]) -> str:
    """The first of the names that is the layer's, or its end after a dot; empty if none is."""
    return next((name for name in names if f".{layer}".endswith(f".{name}")), "")


def lora_in(document: dict[str, Any], path: Path) -> Lora | None:
    """The YAML's `lora` section; None if it has none."""
    given = section(document, "lora", path)
    if not given:
        return None
    file = path.parent / take(given, "file", str, path) if "file" in given else None
    if file is not None and not file.exists():
        raise CheckpointError(f"{path}: there is no file {file}: correct the file in the section lora")
    if file is not None and (file.is_dir() or (file.parent / PEFT_CONFIG).is_file()):
        return _of_peft(file)
    enabled = given.get("enable_lora", [True])
    if not isinstance(enabled, list) or not enabled or not all(isinstance(each, bool) for each in enabled):
        raise CheckpointError(f"{path}: enable_lora must be a list of true and false, not {enabled!r}")
    if given.get("fan_in_fan_out"):
        raise CheckpointError(f"{path}: fan_in_fan_out must be false: no model here stores its weights transposed")
    return Lora(
        r=take(given, "r", int, path), alpha=_alpha(given, path, 1), enabled=tuple(enabled), file=file, source=path
    )


def _alpha(given: Mapping[str, Any], path: Path, default: float, key: str = "lora_alpha") -> float:
    alpha = given.get(key, default)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise CheckpointError(f"{path}: {escaped(key)} must be a positive number, not {quoted(alpha)}")
    return alpha


def _of_peft(file: Path) -> Lora:
    """The settings of an adapter that the package peft saved: a folder, or the file with its weights."""
    folder = file if file.is_dir() else file.parent
    config = folder / PEFT_CONFIG
    weights = [folder / name for name in PEFT_WEIGHTS if (folder / name).is_file()] if file.is_dir() else [file]
    if not config.is_file() or not weights:
        missing = " or ".join(PEFT_WEIGHTS) if config.is_file() else PEFT_CONFIG
        raise CheckpointError(f"the folder {folder} has no {missing}: name the folder of an adapter that peft saved")
    try:
        with config.open("rb") as stream:
            given = read_json(stream.read(MOST_BYTES + 1))
    except (DocumentError, OSError) as e:
        raise CheckpointError(f"{config} cannot be used ({first_line(e)}): get it again") from e
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        kind = given.get("peft_type") if isinstance(given, dict) else given
        raise CheckpointError(f"{config} is of an adapter of type {quoted(kind)}, not 'LORA': {MERGE_BY_PEFT}")
    others = [key for key in PEFT_OTHERS if given.get(key)]
    if given.get("bias", "none") != "none":
        others.append("bias")
    start = given.get("init_lora_weights")
    if not isinstance(start, str | bool | None) or start not in PEFT_STARTS:
        others.append("init_lora_weights")
    if others:
        values = ", ".join(f"{key} {quoted(given[key])}" for key in others)
        raise CheckpointError(f"{config} has {values}, which is not supported: {MERGE_BY_PEFT}")
    ranks, alphas = (_pattern(given, key, config) for key in ("rank_pattern", "alpha_pattern"))
    return Lora(
        r=take(given, "r", int, config, default=8),
        alpha=_alpha(given, config, 8),
        is_rank_stabilised=bool(given.get("use_rslora")),
        ranks={name: take(ranks, name, int, config) for name in ranks},
        alphas={name: _alpha(alphas, config, 0, name) for name in alphas},
        file=weights[0],
        source=config,
    )


def _pattern(given: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The values of single layers, by their names. Regular expressions are refused: they could take hours."""
    found = section(given, key, path)
    if wrong := next((name for name in found if not re.fullmatch(r"[\w.]+", name)), None):
        raise CheckpointError(f"{path}: {key} has {quoted(wrong)}, which is no layer's name: {MERGE_BY_PEFT}")
    return found
