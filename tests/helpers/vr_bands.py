"""Configurations of VR networks with the bands of Ultimate Vocal Remover's table."""

from collections.abc import Mapping
from typing import Any

import yaml
from torch import Tensor

from helpers.common import PROJECT
from helpers.recorded import drawn_weights
from separation.models.vr import VRConfig

TABLE = yaml.safe_load((PROJECT / "configs" / "uvr.yaml").read_text(encoding="utf-8"))
BANDS = TABLE["vr_bands"]
USED = sorted({entry["bands"] for entry in TABLE["vr"].values()})  # by known networks


def config_of(bands: str, **network: Any) -> VRConfig:
    """The configuration of a network with these bands, whose masks count for all but the margins of a window."""
    sizes = {key: tuple(value) if isinstance(value, list) else value for key, value in BANDS[bands].items()}
    channels, conversions = sizes.pop("channels"), sizes.pop("conversions")
    sizes["channels"] = conversions if network.get("nout_lstm") else (channels,) * len(conversions)
    frames = 512 - 2 * (64 if network.get("nout_lstm") else 128)
    chunk_size = frames * sizes["hop_lengths"][-1]
    return VRConfig(chunk_size=chunk_size, sample_rate=sizes["rates"][-1], **sizes, **network)


def vr_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Random weights of a VR network. Variances are positive."""
    drawn = drawn_weights({key: value for key, value in state.items() if value.ndim})
    positive = {key: 0.5 + value.abs() for key, value in drawn.items() if key.endswith("running_var")}
    return {**state, **drawn, **positive}
