"""The `lora` section of a YAML, for adapters that adapters.py merges into the weights.

It has the keys of Music-Source-Separation-Training. `file` is this project's: an adapter's file beside the YAML.

Nothing here imports PyTorch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from separation.checkpoints.keys import section, take
from separation.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The `lora` section of a YAML."""

    r: int
    alpha: float
    enabled: tuple[bool, ...]  # of the layers in the rows of one
    file: Path | None  # an adapter in a file of its own
    source: Path  # the YAML


def lora_in(document: dict[str, Any], path: Path) -> Lora | None:
    """The YAML's `lora` section; None if it has none."""
    given = section(document, "lora", path)
    if not given:
        return None
    alpha, enabled = given.get("lora_alpha", 1), given.get("enable_lora", [True])
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e6:
        raise CheckpointError(f"{path}: lora_alpha must be a positive number, not {alpha!r}")
    if not isinstance(enabled, list) or not enabled or not all(isinstance(each, bool) for each in enabled):
        raise CheckpointError(f"{path}: enable_lora must be a list of true and false, not {enabled!r}")
    if given.get("fan_in_fan_out"):
        raise CheckpointError(f"{path}: fan_in_fan_out must be false: no model here stores its weights transposed")
    file = path.parent / take(given, "file", str, path) if "file" in given else None
    return Lora(r=take(given, "r", int, path), alpha=alpha, enabled=tuple(enabled), file=file, source=path)
