"""Small MDX23C and SCNet models with random weights."""

from typing import Any

import torch

from helpers.small_model import identity
from separation.models.mdx23c import MDX23C, MDX23CConfig
from separation.models.scnet import SCNet, SCNetConfig

STEMS = ("kick", "snare", "toms", "hihat", "cymbals")
AUDIO = {"n_fft": 256, "hop_length": 64, "dim_f": 128, "num_channels": 2, "chunk_size": 64 * 31, "sample_rate": 44100}
MODEL = {
    "act": "gelu",
    "bottleneck_factor": 4,
    "growth": 8,
    "norm": "InstanceNorm",
    "num_blocks_per_scale": 2,
    "num_channels": 8,
    "num_scales": 2,
    "num_subbands": 4,
    "scale": [2, 2],
}


def config_of(stems: int, **changes: Any) -> MDX23CConfig:
    document = {**AUDIO, "audio_channels": 2, **MODEL, **changes}
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in document.items()}
    del fields["sample_rate"]
    return MDX23CConfig(num_stems=stems, **fields)


def small_mdx23c(stems: int = 5, **changes: Any) -> MDX23C:
    torch.manual_seed(0)
    config = config_of(stems, **changes)
    return MDX23C(config, identity(STEMS[:stems], chunk_samples=config.chunk_size)).eval()


SOURCES = ("drums", "bass", "other", "vocals")
SMALL: dict[str, Any] = {
    "sources": SOURCES,
    "dims": (4, 8, 12, 16),
    "nfft": 512,
    "hop_size": 128,
    "win_size": 512,
    "num_dplayer": 2,
}
XL_IHF = {"band_SR": (0.23, 0.37, 0.4), "band_stride": (1, 4, 4), "band_kernel": (3, 4, 4), "conv_depths": (3, 3, 3)}


def small_scnet(**changes: Any) -> SCNet:
    torch.manual_seed(0)
    config = SCNetConfig(**SMALL | changes)
    return SCNet(config, identity(config.sources, chunk_samples=12_000)).eval()
