"""VR: the vocal remover networks of tsurumeso and Ultimate Vocal Remover, versions 5 and 5.1.

The song is resampled to several rates. Each gives a band of bins, and together they are one spectrogram: low bins are
finer than high ones. A network estimates a mask from its magnitudes. The mask gives one stem, the rest the other stem;
each band is inverted, and the bands are added at the sample rate of the next one.

A network sees `window_frames` frames, and its mask counts without a margin at both ends. The masks of a song lie
side by side, each in frames of its own. Magnitudes are relative to the largest one in the song. Resampling between
bands is polyphase, as in Ultimate Vocal Remover on Macs; it has other filters elsewhere.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from separation.models.base import Identity, Normalisation, SeparationModel
from separation.models.shapes import Shapes
from separation.models.stft import Stft, make_window

Matrix = tuple[tuple[float, float], tuple[float, float]]

# From left and right to the two channels that a network sees, and back. The factors are those of the program: some
# inverses are not exact.
CHANNELS: dict[str, tuple[Matrix, Matrix]] = {
    "stereo": (((1, 0), (0, 1)), ((1, 0), (0, 1))),
    "mid_side": (((0.5, 0.5), (1, -1)), ((1, 0.5), (1, -0.5))),
    "mid_side_b2": (((0.5, 1), (1, -0.5)), ((0.4, 0.8), (0.8, -0.4))),
    "mid_side_c": (((1, 0.25), (-0.25, 1)), ((1 / 1.0625, -1 / 4.25), (1 / 4.25, 1 / 1.0625))),
    "stereo_n": (((1 / 0.9375, 0.25 / 0.9375), (0.25 / 0.9375, 1 / 0.9375)), ((1, -0.25), (-0.25, 1))),
}
KAISER = 5.0  # the shape of the window of the resampling filter
FILTER_ZEROS = 10  # zero crossings of that filter on each side


@dataclass(frozen=True, kw_only=True)
class VRConfig:
    """The hyper-parameters. Lists have an entry for each band, the lowest first; frequencies are in bins of a band."""

    chunk_size: int  # samples of the frames whose mask counts
    sample_rate: int  # hertz; that of the last band
    num_stems: int = 2
    bins: int  # in the spectrogram of all bands, without the last one
    rates: tuple[int, ...]  # hertz
    hop_lengths: tuple[int, ...]
    n_ffts: tuple[int, ...]
    crop_starts: tuple[int, ...]  # the bins that a band has in the spectrogram
    crop_stops: tuple[int, ...]
    hpf_starts: tuple[int, ...]  # of the fade between bands; 0: none
    hpf_stops: tuple[int, ...]
    lpf_starts: tuple[int, ...]
    lpf_stops: tuple[int, ...]
    pre_filter_start: int  # of the fade at the top, in bins of the spectrogram
    pre_filter_stop: int
    channels: tuple[str, ...]  # names in CHANNELS; version 5 has the same for all bands
    nout: int  # features at the first scale
    nout_lstm: int = 0  # of version 5.1; 0: version 5, which has no LSTM
    aspp_layers: int = 5  # of version 5: branches of its atrous pyramid
    deep: bool = False  # of version 5: a fifth scale
    window_frames: int = 512
    aggression: float = 0.05  # by which the mask is sharpened
    is_vocal: bool = False  # whether the mask is for a voice or an instrument, which are sharpened more

    def __post_init__(self) -> None:
        lists = [value for name, value in vars(self).items() if isinstance(value, tuple)]
        if not self.rates or len(set(map(len, lists))) != 1:
            raise ValueError("the lists must have one entry for each band: correct them")
        if unknown := set(self.channels) - set(CHANNELS):
            raise ValueError(f"unknown channels {unknown.pop()!r}: use one of {', '.join(CHANNELS)}")
        if self.num_stems != 2 or any(number <= 0 for number in (*self.rates, *self.hop_lengths, *self.n_ffts)):
            raise ValueError("a VR network gives 2 stems, and rates, hop_lengths and n_ffts are positive: correct them")
        if any(
            hop * self.rates[-1] != self.hop_lengths[-1] * rate
            for hop, rate in zip(self.hop_lengths, self.rates, strict=True)
        ):
            raise ValueError("the frames of all bands must last equally long: correct rates or hop_lengths")
        if self.rates[-1] != self.sample_rate:
            raise ValueError(f"sample_rate is {self.sample_rate} and must be that of the last band: correct it")
        if sum(self.crop_stops) - sum(self.crop_starts) > self.bins:
            raise ValueError(f"the bands have more than {self.bins} bins: correct bins, crop_starts or crop_stops")
        if self.window_frames % 32 or not 0 < self.kept_frames <= self.window_frames - 2 * self.offset:
            raise ValueError(
                f"chunk_size {self.chunk_size} is {self.kept_frames} frames and must be at most "
                f"{self.window_frames - 2 * self.offset}, of a window_frames that is a multiple of 32: correct one"
            )
        if self.chunk_size % self.hop_lengths[-1]:
            raise ValueError(f"chunk_size {self.chunk_size} is not a whole number of frames: correct it")

    @property
    def offset(self) -> int:
        """Frames at each end of a window whose mask does not count."""
        return 64 if self.nout_lstm else 128

    @property
    def kept_frames(self) -> int:
        return self.chunk_size // self.hop_lengths[-1]

    @property
    def reach_frames(self) -> int:
        """Frames on each side of a frame that its Fourier transforms and the resampling reach."""
        return max(-(-n_fft // (2 * hop)) for n_fft, hop in zip(self.n_ffts, self.hop_lengths, strict=True)) + 2

    @property
    def margin_frames(self) -> int:
        """Frames before and after a chunk that the window, the Fourier transforms and the resampling need."""
        return max(self.offset, self.window_frames - self.offset - self.kept_frames) + self.reach_frames

    @property
    def input_samples(self) -> int:
        """Samples of a chunk and its margins."""
        return (self.kept_frames + 2 * self.margin_frames) * self.hop_lengths[-1]


class VR(SeparationModel):
    """Chunks of waveform `[B, 2, T]` to estimates `[B, 2, 2, T]`: what the mask keeps, and the rest.

    T is `input_samples`. The chunks are scaled so that the largest magnitude of the song's spectrogram is 1. Estimates
    are those of `kept_frames` frames; estimates of chunks side by side add up.
    """

    Config = VRConfig
    AUDIO_KEYS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"chunk_size": "chunk_size", "sample_rate": "sample_rate"}
    )
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"stg1_low_band_net\.(0\.)?enc1\..*",
        r"stg3_full_band_net\..*",
        r"out\.weight",
    )
    UNUSED_KEYS: ClassVar[str] = r"aux\d?_out\..*"  # only for training
    reflects_border = False
    fixed_chunk = True
    channels = 2

    def __init__(self, config: VRConfig, identity: Identity) -> None:
        super().__init__(identity)
        self.config = config
        self.spill_samples: int = config.reach_frames * config.hop_lengths[-1]
        self.normalisation: Normalisation = "spectrum"  # whatever the YAML requests
        width, lstm = config.nout, config.nout_lstm
        if lstm:
            bins = config.bins // 4  # of a half, at the second scale
            self.stg1_low_band_net: nn.Module = nn.Sequential(
                NewNet(2, width // 2, bins, lstm), Conv(width // 2, width // 4, 1, padding=0)
            )
            self.stg1_high_band_net: nn.Module = NewNet(2, width // 4, bins, lstm // 2)
            self.stg2_low_band_net: nn.Sequential = nn.Sequential(
                NewNet(width // 4 + 2, width, bins, lstm), Conv(width, width // 2, 1, padding=0)
            )
            self.stg2_high_band_net: NewNet = NewNet(width // 4 + 2, width // 2, bins, lstm // 2)
            self.stg3_full_band_net: nn.Module = NewNet(3 * width // 4 + 2, width, 2 * bins, lstm)
        else:
            self.stg1_low_band_net = OldNet(2, width, config)
            self.stg1_high_band_net = OldNet(2, width, config)
            self.stg2_bridge: Conv = Conv(width + 2, width // 2, 1, padding=0)
            self.stg2_full_band_net: OldNet = OldNet(width // 2, width, config)
            self.stg3_bridge: Conv = Conv(2 * width + 2, width, 1, padding=0)
            self.stg3_full_band_net = OldNet(width, 2 * width, config)
        self.out: nn.Conv2d = nn.Conv2d(width if lstm else 2 * width, 2, 1, bias=False)
        self._outputs = (0, 1)

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        if shapes.has(r"stg1_low_band_net\.0\..*"):
            return {
                "nout": shapes.size("out.weight", 1),
                "nout_lstm": shapes.size("stg3_full_band_net.lstm_dec2.dense.0.weight", 1),
                "bins": (shapes.size("stg3_full_band_net.lstm_dec2.dense.0.weight", 0) or 0) * 2 or None,
            }
        return {
            "nout": shapes.size("stg1_low_band_net.enc1.conv1.conv.0.weight", 0),
            "nout_lstm": 0,
            "aspp_layers": shapes.count(r"stg1_low_band_net\.aspp\.(conv\d)\..*"),
            "deep": shapes.has(r"stg1_low_band_net\.enc5\..*"),
        }

    def input_samples(self, length: int) -> int:
        return self.config.input_samples

    def to_precision(self, dtype: torch.dtype) -> None:
        self.precision = dtype  # weights stay in float32 and are cast when used

    def forward(self, chunks: Tensor) -> Tensor:
        config = self.config
        spectrum = bands_of(chunks, config)
        first = config.margin_frames - config.offset
        window = spectrum[..., first : first + config.window_frames]
        with torch.autocast(chunks.device.type, self.precision, enabled=self.precision != torch.float32):
            mask = self._mask(window.abs()).float()
        mask = mask[..., config.offset :][..., : config.kept_frames] ** _sharpening(config, mask.device)
        masks = torch.stack([mask if index == 0 else 1 - mask for index in self._outputs], dim=1)
        before = config.margin_frames
        missing = spectrum.shape[-1] - before - config.kept_frames
        return waves_of(spectrum[:, None] * F.pad(masks, (before, missing)), config)

    def spectral_peak(self, chunk: Tensor) -> float:
        """The largest magnitude in a chunk `[1, 2, T]`, without its margins."""
        first = self.config.margin_frames
        return float(bands_of(chunk, self.config)[..., first : first + self.config.kept_frames].abs().amax())

    def _mask(self, magnitudes: Tensor) -> Tensor:
        """Magnitudes `[B, 2, bins + 1, N]` to the mask of the same shape."""
        x = magnitudes[:, :, : self.config.bins]
        low, high = x.tensor_split([x.shape[2] // 2], dim=2)
        low_1, high_1 = self.stg1_low_band_net(low), self.stg1_high_band_net(high)
        first = torch.cat([low_1, high_1], dim=2)
        if self.config.nout_lstm:
            low_2 = self.stg2_low_band_net(torch.cat([low, low_1], dim=1))
            high_2 = self.stg2_high_band_net(torch.cat([high, high_1], dim=1))
            features = torch.cat([x, first, torch.cat([low_2, high_2], dim=2)], dim=1)
        else:
            second = self.stg2_full_band_net(self.stg2_bridge(torch.cat([x, first], dim=1)))
            features = self.stg3_bridge(torch.cat([x, first, second], dim=1))
        mask = torch.sigmoid(self.out(self.stg3_full_band_net(features)))
        return F.pad(mask, (0, 0, 0, 1), mode="replicate")


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class Conv(nn.Module):
    """A convolution, a batch norm and an activation."""

    def __init__(
        self, size_in: int, size: int, kernel: int = 3, *, stride: int = 1, padding: int = 1, leaky: bool = False
    ) -> None:
        super().__init__()
        activation = nn.LeakyReLU() if leaky else nn.ReLU()
        layer = nn.Conv2d(size_in, size, kernel, stride, padding, bias=False)
        self.conv: nn.Sequential = nn.Sequential(layer, nn.BatchNorm2d(size), activation)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class DilatedConv(nn.Module):
    """A dilated convolution, a batch norm and ReLU. If `separable`, each feature has a convolution, and a 1x1 one."""

    def __init__(self, size: int, dilation: int | tuple[int, int], *, separable: bool) -> None:
        super().__init__()
        groups = size if separable else 1
        layers = [nn.Conv2d(size, size, 3, 1, dilation, dilation, groups=groups, bias=False)]
        if separable:
            layers.append(nn.Conv2d(size, size, 1, bias=False))
        self.conv: nn.Sequential = nn.Sequential(*layers, nn.BatchNorm2d(size), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class Pyramid(nn.Module):
    """Convolutions side by side, each with another dilation, and one of the mean over bins."""

    def __init__(self, size: int, size_out: int, dilations: Sequence[int | tuple[int, int]], *, old: bool) -> None:
        super().__init__()
        self.conv1: nn.Sequential = nn.Sequential(nn.Identity(), Conv(size, size, 1, padding=0))
        self.conv2: Conv = Conv(size, size, 1, padding=0)
        for number, dilation in enumerate(dilations, start=3):
            self.add_module(f"conv{number}", DilatedConv(size, dilation, separable=old))
        self.n_branches: int = 2 + len(dilations)
        bottleneck = Conv(size * self.n_branches, size_out, 1, padding=0)
        self.bottleneck: nn.Sequential | Conv = nn.Sequential(bottleneck) if old else bottleneck

    def forward(self, x: Tensor) -> Tensor:
        mean = self.conv1(x.mean(dim=2, keepdim=True)).expand_as(x)
        others = [self.get_submodule(f"conv{number}")(x) for number in range(2, self.n_branches + 1)]
        y: Tensor = self.bottleneck(torch.cat([mean, *others], dim=1))
        return y


class Encoder(nn.Module):
    """Two convolutions; one of them halves bins and frames."""

    def __init__(self, size_in: int, size: int, *, old: bool) -> None:
        super().__init__()
        self.conv1: Conv = Conv(size_in, size, stride=1 if old else 2, leaky=True)
        self.conv2: Conv = Conv(size, size, stride=2 if old else 1, leaky=True)


def _enlarged(x: Tensor, skip: Tensor) -> Tensor:
    """Twice as many bins and frames, beside the features of the encoder."""
    x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    return torch.cat([x, skip], dim=1)


class OldDecoder(nn.Module):
    """A convolution of features, enlarged to the skip connection's size, and the skip connection (version 5)."""

    def __init__(self, size_in: int, size: int) -> None:
        super().__init__()
        self.conv: Conv = Conv(size_in, size)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y: Tensor = self.conv(_enlarged(x, skip))
        return y


class NewDecoder(nn.Module):
    """As OldDecoder, with the name that version 6 gives to the convolution."""

    def __init__(self, size_in: int, size: int) -> None:
        super().__init__()
        self.conv1: Conv = Conv(size_in, size)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y: Tensor = self.conv1(_enlarged(x, skip))
        return y


class OldNet(nn.Module):
    """A U-Net of version 5, `[B, size_in, F, N] -> [B, size, F, N]`."""

    def __init__(self, size_in: int, size: int, config: VRConfig) -> None:
        super().__init__()
        self.n_scales = 5 if config.deep else 4
        widths = [size << scale for scale in range(self.n_scales + 1)]
        for scale, (before, width) in enumerate(pairwise([size_in, *widths[:-1]]), start=1):
            self.add_module(f"enc{scale}", Encoder(before, width, old=True))
            self.add_module(f"dec{scale}", OldDecoder(3 * width, width))
        dilations = [4, 8, 16, 16, 16][: config.aspp_layers - 2]
        self.aspp: Pyramid = Pyramid(widths[-2], widths[-1], dilations, old=True)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for scale in range(1, self.n_scales + 1):
            encoder: Any = self.get_submodule(f"enc{scale}")
            skips.append(encoder.conv1(x))
            x = encoder.conv2(skips[-1])
        y: Tensor = self.aspp(x)
        for scale in range(self.n_scales, 0, -1):
            y = self.get_submodule(f"dec{scale}")(y, skips.pop())
        return y


class NewNet(nn.Module):
    """A U-Net of version 5.1 with an LSTM, `[B, size_in, F, N] -> [B, size, F, N]`."""

    def __init__(self, size_in: int, size: int, lstm_bins: int, lstm_size: int) -> None:
        super().__init__()
        self.enc1: Conv = Conv(size_in, size)
        widths = [size * factor for factor in (1, 2, 4, 6, 8)]
        for scale, (before, width) in enumerate(pairwise(widths), start=2):
            self.add_module(f"enc{scale}", Encoder(before, width, old=False))
        self.aspp: Pyramid = Pyramid(widths[-1], widths[-1], [(4, 2), (8, 4), (12, 6)], old=False)
        for scale, (width, after) in enumerate(pairwise(widths), start=1):
            self.add_module(f"dec{scale}", NewDecoder(width + after + (scale == 1), width))
        self.lstm_dec2: LSTMLayer = LSTMLayer(widths[1], lstm_bins, lstm_size)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.enc1(x)]
        for scale in range(2, 6):
            encoder: Any = self.get_submodule(f"enc{scale}")
            skips.append(encoder.conv2(encoder.conv1(skips[-1])))
        x = self.aspp(skips.pop())
        for scale in (4, 3, 2):
            x = self.get_submodule(f"dec{scale}")(x, skips.pop())
        x = torch.cat([x, self.lstm_dec2(x)], dim=1)
        y: Tensor = self.get_submodule("dec1")(x, skips.pop())
        return y


class LSTMLayer(nn.Module):
    """A bidirectional LSTM over frames, `[B, size, F, N] -> [B, 1, F, N]`."""

    def __init__(self, size: int, bins: int, lstm_size: int) -> None:
        super().__init__()
        self.conv: Conv = Conv(size, 1, 1, padding=0)
        self.lstm: nn.LSTM = nn.LSTM(bins, lstm_size // 2, bidirectional=True)
        self.dense: nn.Sequential = nn.Sequential(nn.Linear(lstm_size, bins), nn.BatchNorm1d(bins), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        frames = self.conv(x)[:, 0].permute(2, 0, 1)  # [N, B, F]
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = self.lstm(frames.float())[0]
            y = self.dense(y.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return y.permute(1, 2, 0)[:, None].to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Spectrograms of several bands


def bands_of(chunks: Tensor, config: VRConfig) -> Tensor:
    """Waveforms `[B, 2, T]` to the complex spectrogram of all bands `[B, 2, bins + 1, N]`."""
    wave, rate = chunks, config.rates[-1]
    parts: list[Tensor] = []
    for band in reversed(range(len(config.rates))):
        wave, rate = resampled(wave, rate, config.rates[band]), config.rates[band]
        stft = _stft(config, band)
        spectrum = _mixed(
            torch.stft(
                wave.flatten(0, 1),
                stft.n_fft,
                stft.hop_length,
                window=make_window("hann", stft.n_fft, wave.device),
                pad_mode="constant",
                return_complex=True,
            ).unflatten(0, wave.shape[:2]),
            CHANNELS[config.channels[band]][0],
        )
        parts.insert(0, spectrum[:, :, config.crop_starts[band] : config.crop_stops[band]])
    whole = torch.cat(parts, dim=2)
    missing = config.bins + 1 - whole.shape[2]
    return F.pad(whole, (0, 0, 0, missing)) * _top_fade(config, chunks.device)


def waves_of(spectra: Tensor, config: VRConfig) -> Tensor:
    """The inverse of `bands_of`: `[B, S, 2, bins + 1, N]` to waveforms `[B, S, 2, T]`."""
    wave, first = None, 0
    length = spectra.shape[-1] - 1  # frames
    for band, (start, stop) in enumerate(zip(config.crop_starts, config.crop_stops, strict=True)):
        stft, n_bins = _stft(config, band), stop - start
        spectrum = F.pad(spectra[..., first : first + n_bins, :], (0, 0, start, stft.n_fft // 2 + 1 - stop))
        spectrum = _mixed(spectrum * _band_fade(config, band, spectra.device), CHANNELS[config.channels[band]][1])
        part = stft.waveform(spectrum, length * stft.hop_length)
        wave = part if wave is None else resampled(wave, config.rates[band - 1], config.rates[band]) + part
        first += n_bins
    assert wave is not None
    return wave


def _stft(config: VRConfig, band: int) -> Stft:
    n_fft = config.n_ffts[band]
    return Stft(n_fft=n_fft, hop_length=config.hop_lengths[band], win_length=n_fft)


def _mixed(x: Tensor, matrix: Matrix) -> Tensor:
    """Two channels, the third axis from the end, combined to two others."""
    if matrix == CHANNELS["stereo"][0]:
        return x
    left, right = x.unbind(-3)
    return torch.stack([row[0] * left + row[1] * right for row in matrix], dim=-3)


@lru_cache(maxsize=32)
def _resampling_filters(up: int, down: int, device: torch.device) -> tuple[Tensor, int]:
    """A filter for each of `up` consecutive output samples, `[up, 1, taps]`, and the taps before the current sample.

    It is the windowed sinc of scipy.signal.resample_poly.
    """
    half = FILTER_ZEROS * max(up, down)
    times = np.arange(-half, half + 1)
    taps = np.sinc(times / max(up, down)) * np.kaiser(2 * half + 1, KAISER)
    taps *= up / taps.sum()
    first, last = -(half // up), ((up - 1) * down + half) // up
    filters = np.zeros((up, 1, last - first + 1))
    for phase in range(up):
        for place in range(first, last + 1):
            at = half + phase * down - up * place
            if 0 <= at <= 2 * half:
                filters[phase, 0, place - first] = taps[at]
    with torch.inference_mode(False):
        return torch.from_numpy(filters).float().to(device), -first


def resampled(x: Tensor, rate: int, new_rate: int) -> Tensor:
    """Waveforms `[..., T]` at another sample rate (hertz), in which they have a whole number of samples."""
    if rate == new_rate:
        return x
    shared = math.gcd(rate, new_rate)
    up, down = new_rate // shared, rate // shared
    filters, before = _resampling_filters(up, down, x.device)
    after = filters.shape[-1] - before
    lines = F.pad(x.reshape(-1, 1, x.shape[-1]), (before, after))
    steps = x.shape[-1] // down
    return F.conv1d(lines, filters, stride=down)[..., :steps].transpose(1, 2).reshape(*x.shape[:-1], steps * up)


# ---------------------------------------------------------------------------------------------------------------------
# Gains of bins


def _linear(first: float, last: float, number: int) -> list[float]:
    return [float(value) for value in np.linspace(first, last, number)]


def _falling(n_bins: int, start: int, stop: int, *, exact: bool) -> list[float]:
    """Gains that fall from 1 to 0. Version 5 (not `exact`) starts one bin later."""
    if exact:
        return [1.0] * (start - 1) + _linear(1, 0, stop - start + 1) + [0.0] * (n_bins - stop)
    fade = [1 - (bin_ + 1 - start) / (stop - start) if stop > start else 1.0 for bin_ in range(start, stop)]
    return ([1.0] * start + fade)[:stop] + [0.0] * (n_bins - stop)


def _rising(n_bins: int, start: int, stop: int, *, exact: bool) -> list[float]:
    """Gains that rise from 0 at bin `stop` to 1 at bin `start`."""
    if exact:
        return [0.0] * (stop + 1) + _linear(0, 1, 1 + start - stop) + [1.0] * (n_bins - start - 2)
    gains = [0.0] * (stop + 1) + [1.0] * (n_bins - stop - 1)
    for bin_ in range(start, stop, -1):
        gains[bin_] = 1 - (start + 1 - bin_) / (start - stop)
    return gains


@lru_cache(maxsize=32)
def _band_fade(config: VRConfig, band: int, device: torch.device) -> Tensor:
    """The gains of a band's bins before it is added to the others, `[F, 1]`."""
    n_bins, exact = config.n_ffts[band] // 2 + 1, bool(config.nout_lstm)
    gains = np.ones(n_bins)
    if config.hpf_starts[band] > 0:
        gains *= _rising(n_bins, config.hpf_starts[band], config.hpf_stops[band] - 1, exact=exact)
    if config.lpf_starts[band] > 0:
        gains *= _falling(n_bins, config.lpf_starts[band], config.lpf_stops[band], exact=exact)
    return _column(gains, device)


@lru_cache(maxsize=32)
def _top_fade(config: VRConfig, device: torch.device) -> Tensor:
    """The gains of the spectrogram's bins, `[bins + 1, 1]`."""
    start, stop, n_bins = config.pre_filter_start, config.pre_filter_stop, config.bins + 1
    if start <= 0:
        gains = [1.0] * n_bins
    elif config.nout_lstm or len(config.rates) == 1:
        gains = _falling(n_bins, start, stop, exact=bool(config.nout_lstm))
    else:
        gains, gain = [1.0] * n_bins, 1.0
        for bin_ in range(start + 1, stop):
            gain = 10 ** (-(bin_ - start) * (3.5 - gain) / 20)
            gains[bin_] = gain
    return _column(np.array(gains), device)


@lru_cache(maxsize=32)
def _sharpening(config: VRConfig, device: torch.device) -> Tensor:
    """The exponents of the mask, `[bins + 1, 1]`."""
    strength = 2 * config.aggression
    if strength and config.is_vocal:
        strength = 1 - strength
    low = config.crop_stops[0]
    return _column(np.array([1 + strength / 3] * low + [1 + strength] * (config.bins + 1 - low)), device)


def _column(values: np.ndarray[Any, np.dtype[np.float64]], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(values).float().to(device)[:, None]
