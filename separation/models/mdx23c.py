"""MDX23C: TFC-TDF-UNet v3 (Kim, Lee and Jung 2023, arXiv:2306.09382), in the community's checkpoint layout.

The spectrogram's real and imaginary parts are split into sub-bands, which are stacked as channels. A U-Net runs over
frames and bins. Its blocks combine 3x3 convolutions with a bottleneck of two linear layers over all bins of a frame.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.models.base import Identity, Normalisation, Transform
from separation.models.fast_core import FastCoreModel
from separation.models.kernels.mdx23c_core import MDX23CCore
from separation.models.kernels.unet_cpu import for_cpu
from separation.models.layers import GroupNorm
from separation.models.shapes import Shapes, quotient
from separation.models.stft import Stft


@dataclass(frozen=True, kw_only=True)
class MDX23CConfig:
    """The hyper-parameters, with the names that community YAML files use in `audio:` and `model:`."""

    num_stems: int
    n_fft: int
    hop_length: int
    dim_f: int  # how many bins are used, starting from the lowest
    chunk_size: int  # samples
    audio_channels: int = 2  # `num_channels` in `audio:`
    num_channels: int  # features at the first scale
    growth: int  # features that each scale adds
    num_scales: int
    scale: tuple[int, int]  # the factors by which a scale reduces frames and bins
    num_blocks_per_scale: int
    bottleneck_factor: int
    num_subbands: int
    norm: str
    act: str

    @property
    def numbers(self) -> int:
        """R: how many numbers a frame has for each bin and channel; 2, the real and the imaginary part."""
        return 2

    @property
    def n_bins(self) -> int:
        """F: bins that the network takes."""
        return self.dim_f

    def __post_init__(self) -> None:
        frames = self.chunk_size // self.hop_length + 1
        frames_unit, bins_unit = (factor**self.num_scales for factor in self.scale)
        if frames % frames_unit:
            raise ValueError(
                f"chunk_size {self.chunk_size} gives {frames} frames, but scale and num_scales need a multiple of "
                f"{frames_unit}: correct one of them"
            )
        if self.dim_f % (self.num_subbands * bins_unit) or self.dim_f > self.n_fft // 2 + 1:
            raise ValueError(
                f"dim_f {self.dim_f} must be a multiple of {self.num_subbands * bins_unit} (by num_subbands and scale) "
                f"and at most {self.n_fft // 2 + 1} (by n_fft): correct one of them"
            )


class MDX23C(FastCoreModel):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; T must be `chunk_samples`.

    Input and output are float32. Convolutions and linear layers may be in bfloat16 or float16 (see `to_precision`).
    """

    Config: ClassVar[type] = MDX23CConfig
    AUDIO_KEYS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {key: key for key in ("n_fft", "hop_length", "dim_f", "chunk_size")} | {"num_channels": "audio_channels"}
    )
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"encoder_blocks\.0\.tfc_tdf\.blocks\.0\.tdf\.2\.weight",
        r"bottleneck_block\.blocks\.0\..*",
    )
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    # Winograd's convolution outruns a direct one in bfloat16.
    cpu_core_precisions: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)
    # Its residual path is linear, and it was trained on tracks at their original level.
    normalisation: Normalisation = "none"
    fixed_chunk = True  # its norms are over a whole chunk

    def __init__(self, config: MDX23CConfig, identity: Identity) -> None:
        super().__init__(identity)
        self.config = config
        self.channels: int = config.audio_channels
        self.least_samples: int = config.n_fft // 2 + 1
        self._stft = Stft(n_fft=config.n_fft, hop_length=config.hop_length, win_length=config.n_fft)
        inputs = config.numbers * config.audio_channels * config.num_subbands
        sizes = [config.num_channels + config.growth * scale for scale in range(config.num_scales + 1)]
        bins = config.n_bins // config.num_subbands
        self.first_conv: nn.Conv2d = nn.Conv2d(inputs, sizes[0], 1, bias=False)
        self.encoder_blocks: nn.ModuleList = nn.ModuleList()
        self.decoder_blocks: nn.ModuleList = nn.ModuleList()
        for size, larger in pairwise(sizes):
            down = nn.Conv2d(size, larger, config.scale, config.scale, bias=False)
            up = nn.ConvTranspose2d(larger, size, config.scale, config.scale, bias=False)
            self.encoder_blocks.append(
                nn.ModuleDict(
                    {
                        "tfc_tdf": Blocks(config, size, size, bins),
                        "downscale": nn.ModuleDict({"conv": _activated(config, size, down)}),
                    }
                )
            )
            self.decoder_blocks.insert(
                0,
                nn.ModuleDict(
                    {
                        "upscale": nn.ModuleDict({"conv": _activated(config, larger, up)}),
                        "tfc_tdf": Blocks(config, 2 * size, size, bins),
                    }
                ),
            )
            bins //= config.scale[1]
        self.bottleneck_block: Blocks = Blocks(config, sizes[-1], sizes[-1], bins)
        self.final_conv: nn.Sequential = nn.Sequential(
            nn.Conv2d(inputs + sizes[0], sizes[0], 1, bias=False),
            _activation(config),
            nn.Conv2d(sizes[0], config.num_stems * inputs, 1, bias=False),
        )
        self._outputs = tuple(range(config.num_stems))

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        features, inputs = (shapes.size("first_conv.weight", axis) for axis in (0, 1))
        down, bottleneck = "encoder_blocks.0.downscale.conv.2.weight", "encoder_blocks.0.tfc_tdf.blocks.0.tdf.2.weight"
        larger, bins = shapes.size(down, 0), shapes.size(bottleneck, 1)
        channels = config.audio_channels
        if (
            inputs == config.numbers * (3 - channels) * config.num_subbands
        ):  # mono instead of stereo, or the other way around
            channels = 3 - channels
        bands = quotient(inputs, config.numbers * channels)
        return {
            "num_channels": features,
            "audio_channels": channels,
            "num_subbands": bands,
            "num_scales": shapes.count(r"encoder_blocks\.(\d+)\..*"),
            "growth": None if larger is None or features is None else larger - features,
            "scale": tuple(shapes.size(down, axis) for axis in (2, 3)),
            "num_blocks_per_scale": shapes.count(r"encoder_blocks\.0\.tfc_tdf\.blocks\.(\d+)\..*"),
            "dim_f": bins and bands and bins * bands,
            "bottleneck_factor": quotient(bins, shapes.size(bottleneck, 0)),
            "num_stems": quotient(shapes.size("final_conv.2.weight", 0), inputs),
        }

    def forward(self, chunks: Tensor) -> Tensor:
        spectrum = self._taken(self._stft.spectrogram(chunks))
        if self._core is not None:
            spectra = self._given(self._core(spectrum, self._outputs))
            return self._stft.waveform(spectra.transpose(-1, -2), chunks.shape[-1])
        features = self._features(spectrum)
        return torch.stack([self._estimate(index, features, chunks.shape[-1]) for index in self._outputs], 1)

    def make_gpu_core(self) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
        return MDX23CCore(self, num_stems=self.config.num_stems, num_subbands=self.config.num_subbands)

    def make_cpu_core(self) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
        layers = for_cpu(self)
        return MDX23CCore(layers, num_stems=self.config.num_stems, num_subbands=self.config.num_subbands)

    @property
    def cast_weight(self) -> Tensor:
        return self.first_conv.weight

    def transform(self, length: int) -> Transform:
        return Transform.of(self._stft, bins=self.config.dim_f)

    def core(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        features = self._features(*inputs)
        spectra = [self._spectrum(index, features) for index in self._outputs]
        return (rearrange(torch.stack(spectra, dim=1), "b s c n f ri -> b s c f n ri"),)

    def _taken(self, spectrum: Tensor) -> Tensor:
        """What the network takes of a complex spectrogram `[B, C, F, N]`: real numbers `[B, C, F, N, R]`."""
        return torch.view_as_real(spectrum[..., : self.config.dim_f, :])

    def _given(self, values: Tensor) -> Tensor:
        """The complex spectrograms `[..., N, F]` of the network's `[..., N, F, R]`."""
        return torch.view_as_complex(values.contiguous())

    def _features(self, spectrum: Tensor) -> Tensor:
        """The spectrogram `[B, C, F, N, R]` to features `[B, D, N, F / K]`; K is the number of sub-bands."""
        dtype = self.first_conv.weight.dtype
        mixture = rearrange(spectrum, "b c (k f) n ri -> b (c ri k) n f", k=self.config.num_subbands).to(dtype)
        first = x = self.first_conv(mixture)
        skips = []
        for block in cast(Iterable[Any], self.encoder_blocks):
            x = block["tfc_tdf"](x)
            skips.append(x)
            x = block["downscale"]["conv"](x)
        x = self.bottleneck_block(x)
        for block in cast(Iterable[Any], self.decoder_blocks):
            x = torch.cat([block["upscale"]["conv"](x), skips.pop()], dim=1)
            x = block["tfc_tdf"](x)
        masked = (x.float() * first.float()).to(dtype)
        features: Tensor = self.final_conv[:2](torch.cat([mixture, masked], dim=1))
        return features

    def _estimate(self, index: int, features: Tensor, length: int) -> Tensor:
        """One stem's estimate `[B, C, length]`."""
        spectrum = self._given(self._spectrum(index, features))
        return self._stft.waveform(spectrum.transpose(-1, -2), length)

    def _spectrum(self, index: int, features: Tensor) -> Tensor:
        """One stem's spectrogram `[B, C, N, F, R]`, a view."""
        weight = cast(nn.Conv2d, self.final_conv[2]).weight.chunk(self.config.num_stems)[index]
        values = F.conv2d(features, weight).float()
        sizes = {"c": self.channels, "k": self.config.num_subbands}
        return rearrange(values, "b (c ri k) n f -> b c n (k f) ri", **sizes)


class Blocks(nn.Module):
    """The blocks of one scale, one after another, `[B, size_in, N, F] -> [B, size, N, F]`."""

    def __init__(self, config: MDX23CConfig, size_in: int, size: int, bins: int) -> None:
        super().__init__()
        self.blocks: nn.Sequential = nn.Sequential(
            *(Block(config, size if i else size_in, size, bins) for i in range(config.num_blocks_per_scale))
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(x)
        return y


class Block(nn.Module):
    """A convolution, two linear layers over bins, and a convolution, `[B, size_in, N, F] -> [B, size, N, F]`."""

    def __init__(self, config: MDX23CConfig, size_in: int, size: int, bins: int) -> None:
        super().__init__()
        narrow = bins // config.bottleneck_factor
        self.tfc1: nn.Sequential = _activated(config, size_in, nn.Conv2d(size_in, size, 3, padding=1, bias=False))
        self.tdf: nn.Sequential = nn.Sequential(
            *_activated(config, size, nn.Linear(bins, narrow, bias=False)),
            *_activated(config, size, nn.Linear(narrow, bins, bias=False)),
        )
        self.tfc2: nn.Sequential = _activated(config, size, nn.Conv2d(size, size, 3, padding=1, bias=False))
        self.shortcut: nn.Conv2d = nn.Conv2d(size_in, size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tfc1(x)
        z: Tensor = self.tfc2(y + self.tdf(y)) + self.shortcut(x)
        return z


def _activated(config: MDX23CConfig, features: int, layer: nn.Module) -> nn.Sequential:
    """A norm, an activation, and the layer."""
    return nn.Sequential(_norm(config, features), _activation(config), layer)


def _norm(config: MDX23CConfig, features: int) -> nn.Module:
    """The norm that the Config names: InstanceNorm, BatchNorm, or GroupNorm and the number of groups."""
    if config.norm == "InstanceNorm":
        return nn.InstanceNorm2d(features, affine=True)
    if config.norm == "BatchNorm":
        return nn.BatchNorm2d(features)
    groups = config.norm.removeprefix("GroupNorm")
    if not groups.isdecimal():
        raise ValueError(f"unknown norm {config.norm!r}: use InstanceNorm, BatchNorm or GroupNorm4")
    return GroupNorm(int(groups), features)


def _activation(config: MDX23CConfig) -> nn.Module:
    """The activation that the Config names: gelu, relu, or elu and its alpha."""
    alpha = config.act.removeprefix("elu")
    if config.act in ("gelu", "relu"):
        return nn.GELU() if config.act == "gelu" else nn.ReLU()
    try:
        return nn.ELU(float(alpha))
    except ValueError as e:
        raise ValueError(f"unknown act {config.act!r}: use gelu, relu or elu1.0") from e
