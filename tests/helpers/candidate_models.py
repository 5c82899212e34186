"""A user's folder of small models with random weights, to choose from."""

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from helpers.own_checkpoint import COMMUNITY, own_model

CHUNKS = {"audio": {"sample_rate": 44100, "chunk_size": 22_050}}  # a fifth of the calls that COMMUNITY's take


def put_candidate(folder: Path, name: str, *, seed: int = 0, **keys: Any) -> None:
    """A model of two stems, vocals and drums, with further keys in its YAML."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(COMMUNITY | CHUNKS | keys), encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in own_model().state_dict().items()
    }
    save_file(weights, folder / f"{name}.safetensors")
