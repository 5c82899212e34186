"""The network of Demucs 1 and 2 (Défossez, Usunier, Bottou and Bach 2019, arXiv:1911.13254).

Its convolutions are not padded, unlike those of later versions: the estimate of a chunk is shorter than the chunk.
"""

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from inspect import Signature
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class OldDemucsConfig:
    """The arguments of the published files, and two that tell the versions apart."""

    sources: tuple[str, ...]
    audio_channels: int = 2
    channels: int = 64
    depth: int = 6
    rewrite: bool = True
    glu: bool = True
    upsample: bool = False
    rescale: float = 0.1
    resample: bool = True  # version 2 upsamples its input, version 1 does not
    kernel_size: int = 8
    stride: int = 4
    growth: float = 2.0
    lstm_layers: int = 2
    context: int = 3
    normalize: bool = False
    is_scaled: bool = True  # version 2 divides its input by 1.00001, version 1 does not
    samplerate: int = 44100
    segment: Any = 40  # the chunk in seconds


class OldDemucs(nn.Module):
    """Chunks `[B, C, T]` to estimates `[B, S, C, T]`, zeros where a chunk has too little context.

    The arguments are those of OldDemucsConfig.
    """

    __signature__: Signature = inspect.signature(OldDemucsConfig)
    architecture = "demucs_v2"

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        config = OldDemucsConfig(**arguments)
        if config.upsample:
            raise ValueError("upsample: only published networks are supported, and none has it")
        self.config = config
        self.sources: tuple[str, ...] = config.sources
        self.samplerate: int = config.samplerate
        self.segment: Any = config.segment
        kernel_size, stride = config.kernel_size, config.stride
        widths = [config.audio_channels, config.channels]
        for _ in range(config.depth - 1):
            widths.append(int(config.growth * widths[-1]))
        outputs = [len(config.sources) * config.audio_channels, *widths[1:]]
        gate, gates = (nn.GLU(dim=1), 2) if config.glu else (nn.ReLU(), 1)
        self.encoder: nn.ModuleList = nn.ModuleList()
        self.decoder: nn.ModuleList = nn.ModuleList()
        for scale in range(config.depth):
            before, width = widths[scale], widths[scale + 1]
            encode: list[nn.Module] = [nn.Conv1d(before, width, kernel_size, stride), nn.ReLU()]
            decode: list[nn.Module] = []
            if config.rewrite:
                encode += [nn.Conv1d(width, gates * width, 1), gate]
                decode += [nn.Conv1d(width, gates * width, config.context), gate]
            decode += [nn.ConvTranspose1d(width, outputs[scale], kernel_size, stride)]
            self.encoder.append(nn.Sequential(*encode))
            self.decoder.insert(0, nn.Sequential(*decode, *([nn.ReLU()] if scale else [])))
        self.lstm: _LSTM | None = _LSTM(widths[-1], config.lstm_layers) if config.lstm_layers else None

    def valid_length(self, length: int) -> int:
        """The samples, from `length` up, that the convolutions need for `length` samples of an estimate."""
        config, factor = self.config, 2 if self.config.resample else 1
        length *= factor
        for _ in range(config.depth):
            length = max(1, math.ceil((length - config.kernel_size) / config.stride) + 1) + config.context - 1
        for _ in range(config.depth):
            length = (length - 1) * config.stride + config.kernel_size
        return math.ceil(length / factor)

    def forward(self, mix: Tensor) -> Tensor:
        mono = mix.mean(dim=1, keepdim=True)
        mean = mono.mean(dim=-1, keepdim=True) if self.config.normalize else 0.0
        std = mono.std(dim=-1, keepdim=True) if self.config.normalize else 1.0
        x = (mix - mean) / (1e-5 + std) if self.config.is_scaled else mix
        if self.config.resample:
            x = _resampled(x, 1, 2)
        saved = []
        for encode in cast(Iterable[nn.Module], self.encoder):
            x = encode(x)
            saved.append(x)
        if self.lstm is not None:
            x = self.lstm(x)
        for decode in cast(Iterable[nn.Module], self.decoder):
            x = decode(x + _middle(saved.pop(), x.shape[-1]))
        if self.config.resample:
            x = _resampled(x, 2, 1)
        missing = mix.shape[-1] - x.shape[-1]
        padded = F.pad(x * std + mean, (missing // 2, missing - missing // 2))
        estimates: Tensor = padded.unflatten(1, (len(self.sources), self.config.audio_channels))
        return estimates


class _LSTM(nn.Module):
    """A bidirectional LSTM over time, `[B, D, T] -> [B, D, T]`."""

    def __init__(self, size: int, layers: int) -> None:
        super().__init__()
        self.lstm: nn.LSTM = nn.LSTM(size, size, layers, bidirectional=True)
        self.linear: nn.Linear = nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.lstm(x.permute(2, 0, 1))[0]).permute(1, 2, 0)
        return y


def _middle(x: Tensor, length: int) -> Tensor:
    """The `length` samples in the middle."""
    start = (x.shape[-1] - length) // 2
    return x[..., start : start + length]


@lru_cache(maxsize=8)
def _filters(rate: int, new_rate: int, device: torch.device) -> tuple[Tensor, int]:
    """A filter for each of `new_rate` consecutive output samples, `[new_rate, 1, taps]`, and the taps before them.

    It is the windowed sinc of the package julius, with 24 zero crossings on each side.
    """
    zeros, cut_off = 24, 0.945 * min(rate, new_rate)
    before = math.ceil(zeros * rate / cut_off)
    places = torch.arange(-before, before + rate, dtype=torch.float32) / rate
    times = torch.stack([(places - phase / new_rate) * cut_off for phase in range(new_rate)]).clamp(-zeros, zeros)
    with torch.inference_mode(False):
        filters = torch.sinc(times) * torch.cos(torch.pi * times / zeros / 2).square()
        return (filters / filters.sum(dim=1, keepdim=True))[:, None].to(device), before


def _resampled(x: Tensor, rate: int, new_rate: int) -> Tensor:
    """Waveforms `[B, C, T]` at `new_rate` instead of `rate` samples; their ends go on as they are."""
    filters, before = _filters(rate, new_rate, x.device)
    lines = F.pad(x.flatten(0, 1)[:, None], (before, before + rate), mode="replicate")
    y = F.conv1d(lines, filters.to(x.dtype), stride=rate).transpose(1, 2).flatten(1)
    waves: Tensor = y[:, : new_rate * x.shape[-1] // rate].unflatten(0, x.shape[:2])
    return waves
