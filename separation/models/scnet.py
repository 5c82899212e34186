"""SCNet: sparse compression network (Tong et al. 2024, arXiv:2401.13276), in the community's checkpoint layout.

The spectrogram's real and imaginary parts are channels. Each step of the encoder compresses a low, a middle and a high
band with different strides. Between encoder and decoder, pairs of LSTMs run along bins and along frames, alternately on
the frames and on their Fourier transform. The decoder returns the stems' spectrograms.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.models.base import Identity, Normalisation, Transform
from separation.models.fast_core import FastCoreModel
from separation.models.kernels.scnet_core import SCNetCore
from separation.models.kernels.unet_cpu import for_cpu
from separation.models.layers import GroupNorm, chosen, join_weights
from separation.models.shapes import Shapes, quotient
from separation.models.stft import Stft, Window


@dataclass(frozen=True, kw_only=True)
class SCNetConfig:
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    sources: tuple[str, ...] = ("drums", "bass", "other", "vocals")
    audio_channels: int = 2
    dims: tuple[int, ...] = (4, 32, 64, 128)  # features before and after each step
    nfft: int = 4096
    hop_size: int = 1024
    win_size: int = 4096
    normalized: bool = True
    band_SR: tuple[float, float, float] = (0.175, 0.392, 0.433)  # noqa: N815 - each band's share of the bins, low first
    band_stride: tuple[int, int, int] = (1, 4, 16)
    band_kernel: tuple[int, int, int] = (3, 4, 16)
    conv_depths: tuple[int, int, int] = (3, 2, 1)
    compress: int = 4
    conv_kernel: int = 3
    num_dplayer: int = 6
    expand: int = 1

    def __post_init__(self) -> None:
        if self.dims[0] != 2 * self.audio_channels:
            raise ValueError(
                f"dims starts with {self.dims[0]}, not with 2 * audio_channels = {2 * self.audio_channels}: correct it"
            )
        for name in ("band_SR", "band_stride", "band_kernel", "conv_depths"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} has {len(getattr(self, name))} values: use one for each of the 3 bands")
        if self.num_dplayer % 2:
            raise ValueError(
                f"num_dplayer is {self.num_dplayer}, but every second layer inverts a Fourier transform: "
                "use an even number"
            )

    @property
    def num_stems(self) -> int:
        return len(self.sources)


class SCNet(FastCoreModel):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; T > nfft // 2.

    Input and output are float32. Convolutions, linear layers and LSTMs may be in bfloat16 or float16 (see
    `to_precision`).
    """

    Config: ClassVar[type] = SCNetConfig
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"encoder\.0\.SDlayer\.convs\.0\.weight",
        r"separation_net\.dp_modules\.0\.lstm_layers\.0\..*",
    )
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.LSTM)
    WINDOW: ClassVar[Window] = "rectangular"
    lowest_capability: ClassVar[tuple[int, int]] = (8, 0)
    # In bfloat16, all but the LSTMs compute in float32.
    cpu_core_precisions: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)
    # It has no norm before its first layer, and was trained on tracks at their original level.
    normalisation: Normalisation = "none"

    def __init__(self, config: SCNetConfig, identity: Identity) -> None:
        super().__init__(identity)
        self.config = config
        self.channels: int = config.audio_channels
        self.least_samples: int = config.nfft // 2 + 1
        self._stft = Stft(
            n_fft=config.nfft,
            hop_length=config.hop_size,
            win_length=config.win_size,
            normalized=config.normalized,
            window=self.WINDOW,
        )
        steps = list(zip(config.dims, config.dims[1:], strict=False))
        outputs = [config.dims[0] * config.num_stems, *config.dims[1:]]
        self.encoder: nn.ModuleList = nn.ModuleList(Encoder(config, size_in, size) for size_in, size in steps)
        self.separation_net: nn.ModuleDict = nn.ModuleDict({"dp_modules": nn.ModuleList(self._dual_paths(config))})
        self.decoder: nn.ModuleList = nn.ModuleList(
            nn.ModuleList([Fusion(size), Upsampling(config, size, size_out)])
            for (_, size), size_out in reversed(list(zip(steps, outputs, strict=False)))
        )
        self._outputs = tuple(range(config.num_stems))

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        steps = shapes.count(r"encoder\.(\d+)\..*")
        inputs = shapes.size("encoder.0.SDlayer.convs.0.weight", 1)
        sizes = shapes.sizes((f"encoder.{step}.globalconv.weight" for step in range(steps)), 0)
        first = "encoder.0.conv_modules.0.layers.0"
        narrow = shapes.size(f"{first}.6.weight", 1)
        config_fits = sizes and narrow == sizes[0] // config.compress
        return {
            "audio_channels": quotient(inputs, 2),
            "dims": None if sizes is None else (inputs, *sizes),
            "sources": quotient(shapes.size(f"decoder.{steps - 1}.1.convtrs.0.weight", 1), inputs),
            "band_kernel": shapes.sizes((f"encoder.0.SDlayer.convs.{band}.weight" for band in range(3)), 2),
            "conv_depths": tuple(
                shapes.count(rf"encoder\.0\.conv_modules\.{band}\.layers\.(\d+)\..*") for band in range(3)
            ),
            "compress": config.compress if config_fits else quotient(sizes[0] if sizes else None, narrow),
            "conv_kernel": shapes.size(f"{first}.1.weight", 2),
            "num_dplayer": shapes.count(r"separation_net\.dp_modules\.(\d+)\..*"),
            "expand": quotient(
                shapes.size("separation_net.dp_modules.0.lstm_layers.0.weight_hh_l0", 1), sizes[-1] if sizes else None
            ),
        }

    @classmethod
    def _dual_paths(cls, config: Any) -> Iterator[nn.Module]:
        """The layers between encoder and decoder, each `[B, F, N, D] -> [B, F, N, D]`."""
        for i in range(config.num_dplayer):
            yield DualPath(config.dims[-1] * (1 + i % 2), config.expand)

    def forward(self, chunks: Tensor) -> Tensor:
        length = chunks.shape[-1]
        spectrum = self._stft.spectrogram(F.pad(chunks, (0, self._missing(length))))  # [B, C, F, N]
        network = self._core or partial(self._network, fourier=(_fourier, _inverse_fourier))
        spectra = self._spectra(torch.view_as_real(spectrum), network)
        return self._stft.waveform(torch.view_as_complex(spectra.contiguous()).transpose(-1, -2), length)

    def make_gpu_core(self) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
        return SCNetCore(self, (_fourier, _inverse_fourier), num_stems=self.config.num_stems)

    def make_cpu_core(self) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
        layers = for_cpu(self, but=Fusion)
        fourier, num_stems = (_fourier, _inverse_fourier), self.config.num_stems
        return SCNetCore(layers, fourier, num_stems=num_stems, cpu_precision=self.precision)

    @property
    def cast_weight(self) -> Tensor:
        return cast(Encoder, self.encoder[0]).globalconv.weight

    def _update_core(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.LSTM):
                join_weights(module)
        super()._update_core()

    def _missing(self, length: int) -> int:
        """The number of zeros to append, so that the number of frames is even, as `_inverse_fourier` needs."""
        hop = self.config.hop_size
        return ((length // hop + 1) // 2 * 2 + 1) * hop - length

    def transform(self, length: int) -> Transform:
        return Transform.of(self._stft, zeros_after=self._missing(length))

    def core(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (spectrum,) = inputs
        spectra = self._spectra(spectrum, partial(self._network, fourier=(_fourier_product, _inverse_fourier_product)))
        return (rearrange(spectra, "b s c n f ri -> b s c f n ri"),)

    def _spectra(self, spectrum: Tensor, network: "Network") -> Tensor:
        """The mixture's spectrogram `[B, C, F, N, 2]` to the wanted stems' `[B, S, C, N, F, 2]`."""
        return network(spectrum, self._outputs)

    def _network(self, spectrum: Tensor, outputs: tuple[int, ...], fourier: "Fourier") -> Tensor:
        """The plain layers as a `Network`, with the Fourier transforms of `_separate`."""
        x = rearrange(spectrum, "b c f n ri -> b (c ri) f n")
        skips: list[tuple[Tensor, list[int], list[int]]] = []
        for encode in self.encoder:
            x, skip, sizes, sizes_before = encode(x)
            skips.append((skip, sizes, sizes_before))
        x = self._separate(x, fourier)
        for fuse, upsample in cast(Iterable[Any], self.decoder):
            skip, sizes, sizes_before = skips.pop()
            x = upsample(fuse(x, skip), sizes, sizes_before)
        spectra = rearrange(x.float(), "b (s c ri) f n -> b s c n f ri", c=self.channels, ri=2)
        return chosen(spectra, outputs)

    def _separate(self, x: Tensor, fourier: "Fourier") -> Tensor:
        """`[B, D, F, N] -> [B, D, F, N]` in float32, because Fourier transforms do not support half precision."""
        x = rearrange(x.float(), "b d f n -> b f n d")
        for i, dual_path in enumerate(cast(Iterable[nn.Module], self.separation_net["dp_modules"])):
            x = fourier[i % 2](dual_path(x))
        return rearrange(x, "b f n d -> b d f n")


# The mixture's spectrogram [B, C, F, N, 2] and the indices of stems to their spectrograms [B, S, C, N, F, 2].
Network = Callable[[Tensor, tuple[int, ...]], Tensor]


# A Fourier transform along frames, [B, F, N, D] -> [B, F, N // 2 + 1, 2 * D], real parts first; and its inverse for an
# even N.
Fourier = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _fourier(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x, dim=2, norm="ortho")
    return torch.cat([spectrum.real, spectrum.imag], dim=-1)


def _inverse_fourier(x: Tensor) -> Tensor:
    spectrum = torch.complex(*x.chunk(2, dim=-1))
    # Unlike a CPU, cuFFT does not ignore the imaginary parts of the first and the last bin.
    torch.view_as_real(spectrum)[:, :, :: spectrum.shape[2] - 1, :, 1] = 0
    frames: Tensor = torch.fft.irfft(spectrum, dim=2, norm="ortho")
    return frames


def _fourier_product(x: Tensor) -> Tensor:
    """`_fourier` as a matrix product, which every runtime supports."""
    cos, sin = _waves(x.shape[2])
    return torch.cat([cos @ x, -sin @ x], dim=-1)


def _inverse_fourier_product(x: Tensor) -> Tensor:
    """`_inverse_fourier` as a matrix product."""
    frames = 2 * x.shape[2] - 2
    cos, sin = _waves(frames)
    weights = torch.full((frames // 2 + 1,), 2.0)  # all bins but the first and the last count twice
    weights[0] = weights[-1] = 1.0
    real, imaginary = x.chunk(2, dim=-1)
    return (cos.T * weights) @ real - (sin.T * weights) @ imaginary


def _waves(frames: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each bin, `[frames // 2 + 1, frames]`, on the CPU."""
    turns = torch.outer(torch.arange(frames // 2 + 1), torch.arange(frames)) % frames  # integers, so this is exact
    angles = turns.double() * (2 * math.pi / frames)
    return (angles.cos() * frames**-0.5).float(), (angles.sin() * frames**-0.5).float()


class Encoder(nn.Module):
    """Compresses three bands, convolves each along time, and joins them."""

    def __init__(self, config: SCNetConfig, size_in: int, size: int) -> None:
        super().__init__()
        self.shares: tuple[float, float, float] = config.band_SR
        self.kernels: tuple[int, int, int] = config.band_kernel
        self.strides: tuple[int, int, int] = config.band_stride
        self.SDlayer: nn.ModuleDict = nn.ModuleDict(
            {
                "convs": nn.ModuleList(
                    nn.Conv2d(size_in, size, (kernel, 1), (stride, 1))
                    for kernel, stride in zip(self.kernels, self.strides, strict=True)
                )
            }
        )
        self.conv_modules: nn.ModuleList = nn.ModuleList(
            TimeConvolutions(size, depth, config.compress, config.conv_kernel) for depth in config.conv_depths
        )
        self.globalconv: nn.Conv2d = nn.Conv2d(size, size, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """`[B, size_in, F, N]` to the next step's input and the decoder's skip connection, both `[B, size, F', N]`.

        Also returns the number of bins of each band after and before the compression.
        """
        sizes_before = self.band_sizes(x.shape[2])
        bands = []
        layers: Iterable[Any] = zip(cast(nn.ModuleList, self.SDlayer["convs"]), self.conv_modules, strict=True)
        for i, (band, (compress, convolve)) in enumerate(zip(x.split(sizes_before, dim=2), layers, strict=True)):
            bands.append(F.gelu(convolve(compress(self.padded(band, i).to(compress.weight.dtype)))))
        joined = torch.cat(bands, dim=2)
        return self.globalconv(joined), joined, [band.shape[2] for band in bands], sizes_before

    def band_sizes(self, bins: int) -> list[int]:
        """The number of bins of each band."""
        low, middle = math.ceil(bins * self.shares[0]), math.ceil(bins * (self.shares[0] + self.shares[1]))
        return [low, middle - low, bins - middle]

    def padded(self, band: Tensor, index: int) -> Tensor:
        """Pad the bins of a band, `[B, size_in, F, N]`, with zeros for its convolution."""
        kernel, stride = self.kernels[index], self.strides[index]
        missing = kernel - 1 if stride == 1 else -band.shape[2] % stride
        return F.pad(band, (0, 0, missing // 2, missing - missing // 2))


def time_convolution(size: int, narrow: int, kernel: int) -> nn.Sequential:
    """The branch of a residual convolution along time, `[B, size, N] -> [B, size, N]`."""
    return nn.Sequential(
        GroupNorm(1, size),
        nn.Conv1d(size, 2 * narrow, kernel, padding=kernel // 2),
        nn.GLU(dim=1),
        nn.Conv1d(narrow, narrow, kernel, padding=kernel // 2, groups=narrow),
        GroupNorm(1, narrow),
        nn.SiLU(),
        nn.Conv1d(narrow, size, 1),
    )


class TimeConvolutions(nn.Module):
    """Residual convolutions along time, separately for each bin, `[B, D, F, N] -> [B, D, F, N]`."""

    def __init__(self, size: int, depth: int, compress: int, kernel: int) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(
            time_convolution(size, size // compress, kernel) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        x = rearrange(x, "b d f n -> (b f) d n")
        for layer in self.layers:
            x = x + layer(x)
        return rearrange(x, "(b f) d n -> b d f n", b=batch)


class DualPath(nn.Module):
    """An LSTM along bins, then one along frames, `[B, F, N, D] -> [B, F, N, D]`."""

    def __init__(self, size: int, expand: int) -> None:
        super().__init__()
        hidden = size * expand
        self.lstm_layers: nn.ModuleList = nn.ModuleList(nn.LSTM(size, hidden, bidirectional=True) for _ in range(2))
        self.linear_layers: nn.ModuleList = nn.ModuleList(nn.Linear(2 * hidden, size) for _ in range(2))
        self.norm_layers: nn.ModuleList = nn.ModuleList(GroupNorm(1, size) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        layers = zip(self.norm_layers, self.lstm_layers, self.linear_layers, ("f (b n) d", "n (b f) d"), strict=True)
        for norm, lstm, linear, sequences in cast(Iterable[Any], layers):
            y = rearrange(norm(x.permute(0, 3, 1, 2)), f"b d f n -> {sequences}")
            y = linear(lstm(y.to(linear.weight.dtype))[0])
            x = x + rearrange(y, f"{sequences} -> b f n d", b=batch)
        return x


class Fusion(nn.Module):
    """Merges the decoder's features with a skip connection, both `[B, D, F, N]`, to the same shape."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(2 * size, 2 * size, 3, padding=1)

    @property
    def weight(self) -> Tensor:
        """`[2 * D, D, 3, 3]`: the sum of both halves, because the layer was trained on two copies of its input."""
        first, second = self.conv.weight.chunk(2, dim=1)
        return (first.float() + second.float()).to(self.conv.weight.dtype)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        weight = self.weight
        return F.glu(F.conv2d((x + skip).to(weight.dtype), weight, self.conv.bias, padding=1), dim=1)


class Upsampling(nn.Module):
    """Splits the bins into three bands and expands each to the number of bins before the encoder's step."""

    def __init__(self, config: SCNetConfig, size: int, size_out: int) -> None:
        super().__init__()
        self.convtrs: nn.ModuleList = nn.ModuleList(
            nn.ConvTranspose2d(size, size_out, (kernel, 1), (stride, 1))
            for kernel, stride in zip(config.band_kernel, config.band_stride, strict=True)
        )

    def forward(self, x: Tensor, sizes: list[int], sizes_before: list[int]) -> Tensor:
        """`[B, size, sum(sizes), N] -> [B, size_out, sum(sizes_before), N]`."""
        bands = []
        for band, expand, size in zip(x.split(sizes, dim=2), self.convtrs, sizes_before, strict=True):
            band = expand(band)
            bands.append(band.narrow(2, (band.shape[2] - size) // 2, size))
        return torch.cat(bands, dim=2)
