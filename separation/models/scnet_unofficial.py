"""SCNet in the layout of amanteur/SCNet-PyTorch, which Music-Source-Separation-Training calls `scnet_unofficial`.

It follows the same paper as models/scnet.py (Tong et al. 2024, arXiv:2401.13276), but is another network: its strides
skip bins, its LSTMs have no residual connections, and they run along frames first.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.models.base import Identity, Normalisation, SeparationModel
from separation.models.layers import GroupNorm, chosen
from separation.models.scnet import time_convolution
from separation.models.shapes import Shapes, quotient
from separation.models.stft import Stft

COMPRESS, KERNEL = 4, 3  # of the convolutions along time


@dataclass(frozen=True, kw_only=True)
class SCNetUnofficialConfig:
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    dims: tuple[int, ...]  # features before and after each step
    bandsplit_ratios: tuple[float, ...]  # each band's share of the bins, low first
    downsample_strides: tuple[int, ...]
    n_conv_modules: tuple[int, ...]
    n_rnn_layers: int
    rnn_hidden_dim: int
    n_fft: int
    n_sources: int = 4
    hop_length: int = 1024
    win_length: int = 4096
    stft_normalized: bool = False
    use_mamba: bool = False

    def __post_init__(self) -> None:
        if self.use_mamba:
            raise ValueError("use_mamba is true, and only LSTMs are supported: use the program that it was made for")
        bands = len(self.bandsplit_ratios)
        if not bands == len(self.downsample_strides) == len(self.n_conv_modules):
            raise ValueError(
                "bandsplit_ratios, downsample_strides and n_conv_modules must have one value for each band"
            )
        if self.dims[0] not in (2, 4):
            raise ValueError(f"dims starts with {self.dims[0]}: use 4 for stereo, 2 for mono")
        if self.n_rnn_layers % 2:
            raise ValueError(
                f"n_rnn_layers is {self.n_rnn_layers}, but every second layer inverts a Fourier transform: "
                "use an even number"
            )

    @property
    def num_stems(self) -> int:
        return self.n_sources


class SCNetUnofficial(SeparationModel):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; T > n_fft // 2. Input and output are float32."""

    Config = SCNetUnofficialConfig
    TRAINING_KEYS = frozenset({"d_state", "d_conv", "d_expand"})  # of Mamba, which is refused
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"sd_blocks\.0\.sd_layers\.0\.downsample\.conv\.weight",
        r"dualpath_blocks\.layers\.0\.0\.rnn\..*",
    )
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.LSTM)
    normalisation: Normalisation = "none"

    def __init__(self, config: SCNetUnofficialConfig, identity: Identity) -> None:
        super().__init__(identity)
        self.config = config
        self.channels: int = config.dims[0] // 2
        self.least_samples: int = config.n_fft // 2 + 1
        self._stft = Stft(
            n_fft=config.n_fft,
            hop_length=config.hop_length,
            win_length=config.win_length,
            normalized=config.stft_normalized,
        )
        steps = list(pairwise(config.dims))
        outputs = [config.dims[0] * config.n_sources, *config.dims[1:]]
        self.sd_blocks: nn.ModuleList = nn.ModuleList(Compression(config, size_in, size) for size_in, size in steps)
        self.dualpath_blocks: nn.ModuleDict = nn.ModuleDict(
            {
                "layers": nn.ModuleList(
                    DualPath(config.dims[-1] * factor, config.rnn_hidden_dim * factor)
                    for factor in (1 + i % 2 for i in range(config.n_rnn_layers))
                )
            }
        )
        self.su_blocks: nn.ModuleList = nn.ModuleList(
            Expansion(config, size, size_out)
            for (_, size), size_out in reversed(list(zip(steps, outputs, strict=False)))
        )
        self._outputs = tuple(range(config.n_sources))

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        steps = shapes.count(r"sd_blocks\.(\d+)\..*")
        bands = shapes.count(r"sd_blocks\.0\.sd_layers\.(\d+)\..*")
        inputs = shapes.size("sd_blocks.0.sd_layers.0.downsample.conv.weight", 1)
        sizes = shapes.sizes((f"sd_blocks.{step}.global_conv2d.weight" for step in range(steps)), 0)
        last = f"su_blocks.{steps - 1}.su_layers.0.upsample.conv.weight"
        return {
            "dims": None if sizes is None else (inputs, *sizes),
            "bandsplit_ratios": bands,
            "downsample_strides": bands,
            "n_conv_modules": tuple(
                shapes.count(rf"sd_blocks\.0\.sd_layers\.{band}\.conv_modules\.(\d+)\..*") for band in range(bands)
            ),
            "n_rnn_layers": shapes.count(r"dualpath_blocks\.layers\.(\d+)\..*"),
            "rnn_hidden_dim": shapes.size("dualpath_blocks.layers.0.0.rnn.weight_hh_l0", 1),
            "n_sources": quotient(shapes.size(last, 1), inputs),
        }

    def forward(self, chunks: Tensor) -> Tensor:
        length = chunks.shape[-1]
        hop = self.config.hop_length
        spectrum = self._stft.spectrogram(F.pad(chunks, (0, hop - length % hop)))  # [B, C, F, N]
        x = rearrange(torch.view_as_real(spectrum), "b c f n ri -> b (c ri) f n")
        skips: list[Tensor] = []
        bins: list[int] = []
        for compress in self.sd_blocks:
            bins.append(x.shape[2])
            x, skip = compress(x)
            skips.append(skip)
        x = self._separate(x)
        for expand in self.su_blocks:
            x = expand(x, skips.pop(), bins.pop())
        spectra = rearrange(x.float(), "b (c ri s) f n -> b s c f n ri", c=self.channels, ri=2)
        spectra = chosen(spectra, self._outputs)
        return self._stft.waveform(torch.view_as_complex(spectra.contiguous()), length)

    def _separate(self, x: Tensor) -> Tensor:
        """`[B, D, F, N] -> [B, D, F, N]` in float32, because Fourier transforms do not support half precision."""
        x = rearrange(x.float(), "b d f n -> b f n d")
        frames = x.shape[2]
        for i, dual_path in enumerate(cast(Iterable[DualPath], self.dualpath_blocks["layers"])):
            x = dual_path(x)
            x = _inverse_fourier(x, frames) if i % 2 else _fourier(x)
        return rearrange(x, "b f n d -> b d f n")


def _fourier(x: Tensor) -> Tensor:
    """Frames `[B, F, N, D]` to alternating real and imaginary parts of bins, `[B, F, N // 2 + 1, 2 * D]`."""
    return torch.view_as_real(torch.fft.rfft(x, dim=2)).flatten(3)


def _inverse_fourier(x: Tensor, frames: int) -> Tensor:
    """The inverse of `_fourier`."""
    parts = x.unflatten(3, (-1, 2)).clone()
    parts[:, :, 0, :, 1] = 0  # unlike a CPU, cuFFT does not ignore imaginary parts of real bins
    if frames % 2 == 0:
        parts[:, :, -1, :, 1] = 0
    result: Tensor = torch.fft.irfft(torch.view_as_complex(parts), frames, dim=2)
    return result


def _band_limits(ratios: tuple[float, ...], bins: int) -> list[tuple[int, int]]:
    """The first bin of each band, and the one after its last."""
    return list(pairwise([0, *(int(end * bins) for end in accumulate(ratios))]))


class Compression(nn.Module):
    """Keeps some bins of each band, convolves each along time, and joins the bands."""

    def __init__(self, config: SCNetUnofficialConfig, size_in: int, size: int) -> None:
        super().__init__()
        self._ratios = config.bandsplit_ratios
        self.sd_layers: nn.ModuleList = nn.ModuleList(
            nn.ModuleDict(
                {
                    "downsample": nn.ModuleDict({"conv": nn.Conv2d(size_in, size, 1, (stride, 1))}),
                    "conv_modules": nn.ModuleList(
                        nn.ModuleDict({"sequential": time_convolution(size, size // COMPRESS, KERNEL)})
                        for _ in range(depth)
                    ),
                }
            )
            for stride, depth in zip(config.downsample_strides, config.n_conv_modules, strict=True)
        )
        self.global_conv2d: nn.Conv2d = nn.Conv2d(size, size, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, size_in, F, N]` to the next step's input and the skip connection, both `[B, size, F', N]`."""
        x = x.to(self.global_conv2d.weight.dtype)
        bands = []
        limits = _band_limits(self._ratios, x.shape[2])
        for (first, end), layers in zip(limits, cast(Iterable[Any], self.sd_layers), strict=True):
            band = F.gelu(layers["downsample"]["conv"](x[:, :, first:end]))
            rows = rearrange(band, "b d f n -> (b f) d n")
            for layer in layers["conv_modules"]:
                rows = rows + layer["sequential"](rows)
            bands.append(rearrange(rows, "(b f) d n -> b d f n", b=len(x)))
        skip = torch.cat(bands, dim=2)
        return self.global_conv2d(skip), skip


class DualPath(nn.ModuleList):
    """An LSTM along frames, then one along bins, `[B, F, N, D] -> [B, F, N, D]`."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__(
            nn.ModuleDict(
                {
                    "groupnorm": GroupNorm(1, size),
                    "rnn": nn.LSTM(size, hidden, bidirectional=True),
                    "fc": nn.Linear(2 * hidden, size),
                }
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        for layers, sequences, order in zip(cast(Iterable[Any], self), ("b f", "b n"), ("n", "f"), strict=True):
            y = layers["groupnorm"](rearrange(x, f"b f n d -> ({sequences}) d {order}"))
            linear = layers["fc"]
            y = linear(layers["rnn"](rearrange(y, "m d n -> n m d").to(linear.weight.dtype))[0]).float()
            x = rearrange(y, f"{order} ({sequences}) d -> b f n d", b=batch)
        return x


class Expansion(nn.Module):
    """Merges the features with a skip connection, and expands each band to its bins before the encoder's step."""

    def __init__(self, config: SCNetUnofficialConfig, size: int, size_out: int) -> None:
        super().__init__()
        self._ratios = config.bandsplit_ratios
        self.fusion_layer: nn.ModuleDict = nn.ModuleDict(
            {"conv": nn.Conv2d(2 * size, 2 * size, (3, 1), padding=(1, 0))}
        )
        self.su_layers: nn.ModuleList = nn.ModuleList(
            nn.ModuleDict({"upsample": nn.ModuleDict({"conv": nn.ConvTranspose2d(size, size_out, 1, (stride, 1))})})
            for stride in config.downsample_strides
        )

    def forward(self, x: Tensor, skip: Tensor, bins: int) -> Tensor:
        """`[B, size, F', N]` twice to `[B, size_out, bins, N]`."""
        fuse = cast(nn.Conv2d, self.fusion_layer["conv"])
        x = F.glu(fuse((x + skip).to(fuse.weight.dtype).repeat(1, 2, 1, 1)), dim=1)
        layers: list[Any] = [each["upsample"]["conv"] for each in cast(Iterable[Any], self.su_layers)]
        sizes = [end - first for first, end in _band_limits(self._ratios, bins)]
        compressed = [-(-size // layer.stride[0]) for size, layer in zip(sizes, layers, strict=True)]
        bands = zip(x.split(compressed, dim=2), layers, sizes, strict=True)
        return torch.cat([layer(band, output_size=[size, band.shape[3]]) for band, layer, size in bands], dim=2)
