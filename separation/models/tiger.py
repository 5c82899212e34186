"""TIGER for the dialogue, effects and music of films (Xu et al. 2025, arXiv:2410.01469), in its authors' checkpoint
layout.

Each stem has a network of its own, which works on one channel. The spectrogram is split into bands. The same block
runs several times over them: along the bands of each frame, then along the frames of each band, in both cases by
convolutions of several resolutions and by attention.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.models.base import Identity, Normalisation, SeparationModel
from separation.models.shapes import Shapes, quotient
from separation.models.stft import Stft

NETWORKS = {"dialog": 2, "effect": 1, "music": 0}  # in the order of the stems; which output of each is used
# Bands from low to high: how many, and how wide in hertz. What is above them is one more.
BANDS = ((20, 50), (10, 100), (8, 250), (8, 500), (8, 1000), (2, 2000))
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True)
class TigerConfig:
    """The hyper-parameters, with their authors' names."""

    out_channels: int = 132  # features of a band
    in_channels: int = 256  # features within the convolutions
    num_blocks: int = 8  # times that the block runs
    upsampling_depth: int = 5  # resolutions
    att_n_head: int = 4
    att_hid_chan: int = 4  # features of a query
    win: int = 2048
    stride: int = 512
    num_sources: int = 3
    sample_rate: int = 44100  # hertz, for the bands

    def __post_init__(self) -> None:
        if self.num_sources <= max(NETWORKS.values()):
            raise ValueError(f"num_sources is {self.num_sources}, fewer than the {len(NETWORKS)} networks need")
        if self.out_channels % self.att_n_head or self.out_channels % self.num_sources:
            raise ValueError(f"out_channels {self.out_channels} is no multiple of att_n_head and of num_sources")
        if self.upsampling_depth < 2:
            raise ValueError(f"upsampling_depth is {self.upsampling_depth}: use 2 or more")
        if min(self.band_widths) < 1:
            raise ValueError(f"a band has no bin at win {self.win} and {self.sample_rate} Hz: correct one")

    @property
    def num_stems(self) -> int:
        return len(NETWORKS)

    @property
    def band_widths(self) -> tuple[int, ...]:
        """The number of bins of each band."""
        bins = self.win // 2 + 1
        widths = [int(hertz / (self.sample_rate / 2) * bins) for count, hertz in BANDS for _ in range(count)]
        return (*widths, bins - sum(widths))


class Tiger(SeparationModel):
    """Chunks of waveform `[B, 1, T]` to estimates `[B, S, 1, T]`, both float32; T > win // 2."""

    Config = TigerConfig
    TRAINING_KEYS = frozenset({"att_kernel_size", "att_stride"})  # which the authors' network does not use
    KEY_PATTERNS = tuple(rf"{name}\.separator\.freq_path\.0\.proj_1x1\.conv\.weight" for name in NETWORKS)
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d)
    normalisation: Normalisation = "none"

    def __init__(self, config: TigerConfig, identity: Identity) -> None:
        super().__init__(identity)
        self.channels = 1
        self.least_samples: int = config.win // 2 + 1
        self._stft = Stft(n_fft=config.win, hop_length=config.stride, win_length=config.win)
        self.dialog: Network = Network(config)
        self.effect: Network = Network(config)
        self.music: Network = Network(config)
        self._outputs = tuple(range(len(NETWORKS)))

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        path = "dialog.separator.freq_path"
        pattern = path.replace(".", r"\.")
        outputs = shapes.size("dialog.mask.0.1.weight", 0)
        return {
            "out_channels": shapes.size("dialog.BN.0.1.weight", 0),
            "in_channels": shapes.size(f"{path}.0.proj_1x1.conv.weight", 0),
            "upsampling_depth": shapes.count(pattern + r"\.0\.spp_dw\.(\d+)\..*"),
            "att_n_head": shapes.count(pattern + r"\.1\.Queries\.(\d+)\..*"),
            "att_hid_chan": shapes.size(f"{path}.1.Queries.0.conv.weight", 0),
            "num_sources": quotient(outputs, 4 * config.band_widths[0]),
        }

    def forward(self, chunks: Tensor) -> Tensor:
        spectrum = self._stft.spectrogram(chunks)[:, 0]  # [B, F, N]
        networks = [(getattr(self, name), source) for name, source in NETWORKS.items()]
        estimates = []
        for network, source in (networks[index] for index in self._outputs):
            mask = torch.view_as_complex(network(torch.view_as_real(spectrum), source))
            estimates.append(self._stft.waveform(spectrum * mask, chunks.shape[-1]))
        return torch.stack(estimates, dim=1)[:, :, None]


class Network(nn.Module):
    """A spectrogram `[B, F, N, 2]` to the mask `[B, F, N, 2]` of one of its sources."""

    def __init__(self, config: TigerConfig) -> None:
        super().__init__()
        size = config.out_channels
        self._widths, self._sources, self._repeats = config.band_widths, config.num_sources, config.num_blocks
        self.BN = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, 2 * width, EPS), nn.Conv1d(2 * width, size, 1)) for width in self._widths
        )
        self.separator: nn.ModuleDict = nn.ModuleDict(
            {
                "freq_path": _path(config),
                "frame_path": _path(config),
                "concat_block": nn.Sequential(nn.Conv2d(size, size, 1, groups=size), nn.PReLU()),
            }
        )
        outputs = 4 * config.num_sources
        self.mask: nn.ModuleList = nn.ModuleList(
            nn.Sequential(nn.PReLU(), nn.Conv1d(size, outputs * width, 1, groups=config.num_sources))
            for width in self._widths
        )

    def forward(self, spectrum: Tensor, source: int) -> Tensor:
        x = self._separate(self._features(spectrum))
        masks = []
        for features, width, (activate, linear) in zip(
            x.unbind(2), self._widths, cast(Iterable[Any], self.mask), strict=True
        ):
            parts = convolved(linear, activate(features)).unflatten(1, (2, 2, self._sources, width))
            mask = parts[:, 0] * torch.sigmoid(parts[:, 1])  # [B, 2, sources, width, N]
            excess = mask.sum(2)  # all sources are shifted alike, so that their masks sum to 1
            excess[:, 0] -= 1
            masks.append(mask[:, :, source] - excess / self._sources)
        return rearrange(torch.cat(masks, dim=2), "b ri f n -> b f n ri").contiguous()

    def _features(self, spectrum: Tensor) -> Tensor:
        """Spectrogram `[B, F, N, 2]` to `[B, D, K, N]`."""
        bands = rearrange(spectrum, "b f n ri -> b ri f n").split(self._widths, dim=2)
        features = [
            convolved(linear, norm(band.flatten(1, 2)))
            for band, (norm, linear) in zip(bands, cast(Iterable[Any], self.BN), strict=True)
        ]
        return torch.stack(features, dim=2)

    def _separate(self, mixture: Tensor) -> Tensor:
        """`[B, D, K, N] -> [B, D, K, N]`."""
        along_bands, along_frames, joined = cast(Iterable[Any], self.separator.values())
        mix, activate = joined
        x = mixture
        for number in range(self._repeats):
            if number:
                x = activate(convolved(mix, mixture + x))
            x = x + _along_last(along_bands, x.transpose(2, 3)).transpose(2, 3)
            x = x + _along_last(along_frames, x)
        return x


def _path(config: TigerConfig) -> nn.ModuleList:
    return nn.ModuleList([Resolutions(config), BandAttention(config), FeatureNorm(config.out_channels)])


def _along_last(path: Any, x: Tensor) -> Tensor:
    """Convolutions, attention and a norm along the last axis, `[B, D, P, Q] -> [B, D, P, Q]`."""
    convolve, attend, norm = path
    rows = convolve(rearrange(x, "b d p q -> (b p) d q"))
    result: Tensor = norm(attend(rearrange(rows, "(b p) d q -> b d p q", b=len(x))))
    return result


def convolved(layer: Any, x: Tensor) -> Tensor:
    """A convolution in the layer's precision; the result is float32."""
    y: Tensor = layer(x.to(layer.weight.dtype))
    return y.float()


class FeatureNorm(nn.Module):
    """A layer norm over the features of `[B, D, P, Q]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma: nn.Parameter = nn.Parameter(torch.ones(1, size, 1, 1))
        self.beta: nn.Parameter = nn.Parameter(torch.zeros(1, size, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.gamma + self.beta


class NormedConvolution(nn.Module):
    """A convolution and a norm over all of its output, `[B, size_in, Q] -> [B, size, Q']` in float32."""

    def __init__(self, size_in: int, size: int, kernel: int, *, activation: bool = False, **options: Any) -> None:
        super().__init__()
        self.conv: nn.Conv1d = nn.Conv1d(size_in, size, kernel, padding=(kernel - 1) // 2, **options)
        self.norm: nn.GroupNorm = nn.GroupNorm(1, size, eps=1e-8)
        if activation:
            self.act: nn.PReLU = nn.PReLU()
        self._is_active = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(convolved(self.conv, x))
        return cast(Tensor, self.act(y)) if self._is_active else y


class Injection(nn.Module):
    """Merges fine features `[B, D, Q]` with coarse ones `[B, D, Q']`, to `[B, D, Q]`."""

    def __init__(self, size: int, kernel: int = 1) -> None:
        super().__init__()
        make = partial(NormedConvolution, size, size, kernel, groups=size, bias=False)
        self.local_embedding: NormedConvolution = make()
        self.global_embedding: NormedConvolution = make()
        self.global_act: NormedConvolution = make()

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        gates = F.interpolate(torch.sigmoid(self.global_act(coarse)), size=fine.shape[-1], mode="nearest")
        spread = F.interpolate(self.global_embedding(coarse), size=fine.shape[-1], mode="nearest")
        merged: Tensor = self.local_embedding(fine) * gates + spread
        return merged


class Resolutions(nn.Module):
    """Convolutions along the last axis at several resolutions, each half of the last, `[B, D, Q] -> [B, D, Q]`."""

    def __init__(self, config: TigerConfig) -> None:
        super().__init__()
        size, wide, depth = config.out_channels, config.in_channels, config.upsampling_depth
        self.proj_1x1: NormedConvolution = NormedConvolution(size, wide, 1, activation=True)
        self.spp_dw: nn.ModuleList = nn.ModuleList(
            NormedConvolution(wide, wide, 5, stride=1 + bool(level), groups=wide) for level in range(depth)
        )
        self.loc_glo_fus: nn.ModuleList = nn.ModuleList(Injection(wide) for _ in range(depth))
        self.res_conv: nn.Conv1d = nn.Conv1d(wide, size, 1)
        self.globalatt: nn.ModuleDict = nn.ModuleDict(
            {
                "fc1": NormedConvolution(wide, wide, 1, bias=False),
                "dwconv": nn.Conv1d(wide, wide, 5, padding=2, groups=wide),
                "fc2": NormedConvolution(wide, wide, 1, bias=False),
            }
        )
        self.last_layer: nn.ModuleList = nn.ModuleList(Injection(wide, 5) for _ in range(depth - 1))

    def forward(self, x: Tensor) -> Tensor:
        levels: list[Tensor] = [self.proj_1x1(x)]
        for reduce in self.spp_dw:
            levels.append(reduce(levels[-1]))
        del levels[0]
        coarsest = levels[-1].shape[-1]
        pooled = sum((F.adaptive_avg_pool1d(level, coarsest) for level in levels), torch.zeros((), device=x.device))
        everywhere = self._mlp(pooled)
        merged = [merge(level, everywhere) for merge, level in zip(self.loc_glo_fus, levels, strict=True)]
        # As in its authors' program, the coarsest level is not merged again, and the first merge takes a finer one.
        top = len(levels) - 2
        y = merged[top - 1]
        for level in range(top, -1, -1):
            y = self.last_layer[level](merged[level], y)
        return x + convolved(self.res_conv, y)

    def _mlp(self, x: Tensor) -> Tensor:
        first, middle, last = cast(Iterable[Any], self.globalatt.values())
        y: Tensor = last(F.relu(convolved(middle, first(x))))
        return y


class Projection(nn.Module):
    """A convolution of length 1, an activation and a norm, `[B, size_in, P, Q] -> [B, size, P, Q]`."""

    def __init__(self, size_in: int, size: int) -> None:
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(size_in, size, 1)
        self.act: nn.PReLU = nn.PReLU()
        self.norm: FeatureNorm = FeatureNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.act(convolved(self.conv, x)))
        return y


class BandAttention(nn.Module):
    """Attention along the last axis, where a token is all features of all rows, `[B, D, P, Q] -> [B, D, P, Q]`."""

    def __init__(self, config: TigerConfig) -> None:
        super().__init__()
        size, heads = config.out_channels, config.att_n_head
        self.Queries: nn.ModuleList = nn.ModuleList(Projection(size, config.att_hid_chan) for _ in range(heads))
        self.Keys: nn.ModuleList = nn.ModuleList(Projection(size, config.att_hid_chan) for _ in range(heads))
        self.Values: nn.ModuleList = nn.ModuleList(Projection(size, size // heads) for _ in range(heads))
        self.attn_concat_proj: Projection = Projection(size, size)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[2]
        q, k, v = (
            torch.stack([rearrange(project(x), "b d p q -> b q (d p)") for project in projections], dim=1)
            for projections in (self.Queries, self.Keys, self.Values)
        )
        scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        attended = rearrange(scores.softmax(dim=-1) @ v, "b h q (d p) -> b (h d) p q", p=rows)
        y: Tensor = x + self.attn_concat_proj(attended)
        return y
