"""Scores by short-time spectra: bleedless, fullness, L1 frequency and multi-resolution STFT, from 0 to 100.

Each equals the score of that name in ZFTurbo/Music-Source-Separation-Training (utils/metrics.py). They are read block
by block, so that memory does not grow with the song.

Signals are given as functions that read samples `[start, stop)` of all channels, `[C, stop - start]`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from separation.audio.waveform import SAMPLE_RATE
from separation.evaluation.weighting import a_weighting_taps
from separation.models.stft import Window, make_window

Read = Callable[[int, int], Tensor]

RANGE_DB = 80  # of bleedless and fullness: what is further below the loudest point counts as if it were there
_LEAST = 1e-10  # magnitude of a mel band, for bleedless and fullness
_LEAST_POWER = 1e-8  # of a bin, for multi-resolution STFT
_BLOCK_SAMPLES = 2**19  # in memory at once, per channel


def bleedless_and_fullness(reference: Read, estimate: Read, n_samples: int) -> tuple[float, float]:
    """How little an estimate has that its reference has not, and how little it lacks, each from 0 to 100.

    In a spectrogram of 512 mel bands (4096 samples, hops of 1024) in decibels, the mean of all positive differences is
    what bleeds in, the mean of all negative ones is what is missing. A mean of d dB scores `100 / (1 + d)`.
    """
    frames = _Frames(4096, 1024, reflected=False)
    filters = mel_filters(frames.n_fft, 512)
    signals = (reference, estimate)
    floors = []
    for read in signals:
        loudest = max(float((filters @ block).max()) for block in frames.magnitudes(read, n_samples))
        floors.append(20 * math.log10(max(loudest, _LEAST)) - RANGE_DB)
    sums, counts = [0.0, 0.0], [0, 0]  # of what is too much, of what is missing
    for blocks in zip(*(frames.magnitudes(read, n_samples) for read in signals), strict=True):
        true, estimated = (
            (20 * (filters @ block).clamp(min=_LEAST).log10()).clamp(min=floor)
            for block, floor in zip(blocks, floors, strict=True)
        )
        difference = estimated - true
        for index, part in enumerate((difference[difference > 0], -difference[difference < 0])):
            sums[index] += float(part.sum(dtype=torch.float64))
            counts[index] += part.numel()
    bleedless, fullness = (100 / (1 + total / max(count, 1)) for total, count in zip(sums, counts, strict=True))
    return bleedless, fullness


def l1_frequency(reference: Read, estimate: Read, n_samples: int) -> float:
    """`100 / (1 + 10 d)`, where d is the mean difference of the magnitudes of two spectrograms.

    2048 samples with a rectangular window, hops of 1024. Magnitudes are not normalised, so the level of the music
    counts. NaN for music of less than 1025 samples.
    """
    frames = _Frames(2048, 1024, window="rectangular")
    if not frames.fit(n_samples):
        return math.nan
    total, count = 0.0, 0
    for true, estimated in zip(*(frames.magnitudes(read, n_samples) for read in (reference, estimate)), strict=True):
        total += float((estimated - true).abs().sum(dtype=torch.float64))
        count += true.numel()
    return 100 / (1 + 10 * total / count)


def multi_resolution_stft(reference: Read, estimate: Read, n_samples: int) -> float:
    """`100 / (1 + 10 d)`, where d is auraloss' multi-resolution STFT loss (Yamamoto et al. 2020, arXiv:1910.11480).

    For 1024, 2048 and 4096 samples, with hops of a quarter, in 128 mel bands after A-weighting: the spectral
    convergence, in which the estimate's energy is the divisor, plus the mean difference of the logarithms; the mean of
    the three. NaN for music of less than 2049 samples.
    """
    losses = []
    for n_fft in (1024, 2048, 4096):
        frames = _Frames(n_fft, n_fft // 4)
        if not frames.fit(n_samples):
            return math.nan
        filters = mel_filters(n_fft, 128)
        weighted = (partial(_a_weighted, read, n_samples) for read in (reference, estimate))
        error = energy = logarithms = 0.0
        count = 0
        for blocks in zip(*(frames.magnitudes(read, n_samples, _LEAST_POWER) for read in weighted), strict=True):
            true, estimated = (filters @ block for block in blocks)
            error += float((estimated - true).square().sum(dtype=torch.float64))
            energy += float(estimated.square().sum(dtype=torch.float64))
            logarithms += float((estimated.log() - true.log()).abs().sum(dtype=torch.float64))
            count += true.numel()
        losses.append(math.sqrt(error / energy) + logarithms / count)
    return 100 / (1 + 10 * sum(losses) / len(losses))


@cache
def mel_filters(n_fft: int, bands: int) -> Tensor:
    """Triangular filters `[bands, F]` with equal areas from 0 to 22050 Hz, as librosa's `filters.mel` makes them.

    The scale is Slaney's (Auditory Toolbox, 1998): linear up to 1000 Hz, logarithmic above.
    """
    mel_per_hertz, knee, step = 3 / 200, 1000.0, math.log(6.4) / 27
    top = knee * mel_per_hertz + math.log(SAMPLE_RATE / 2 / knee) / step
    mels = np.linspace(0, top, bands + 2)
    beyond = np.maximum(mels - knee * mel_per_hertz, 0)
    edges = np.where(beyond > 0, knee * np.exp(beyond * step), mels / mel_per_hertz)
    bins = np.arange(n_fft // 2 + 1) * SAMPLE_RATE / n_fft
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return torch.from_numpy(triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).float()


@dataclass(frozen=True)
class _Frames:
    """The frames of a spectrogram, which are centred on multiples of the hop."""

    n_fft: int
    hop_length: int
    reflected: bool = True  # at the ends; else zeros
    window: Window = "hann"

    def fit(self, n_samples: int) -> bool:
        """Whether music of this length can be reflected at its ends."""
        return n_samples > self.n_fft // 2

    def magnitudes(self, read: Read, n_samples: int, least_power: float = 0.0) -> Iterator[Tensor]:
        """The magnitudes in float32 in blocks of frames, `[C, F, N]`. No power of a bin is below `least_power`."""
        n_frames, most = n_samples // self.hop_length + 1, max(1, _BLOCK_SAMPLES // self.hop_length)
        extended = partial(_reflected if self.reflected else _zero_padded, read, n_samples)
        window = make_window(self.window, self.n_fft, torch.device("cpu"))
        for first in range(0, n_frames, most):
            last = min(first + most, n_frames) - 1
            half = self.n_fft // 2
            samples = extended(first * self.hop_length - half, last * self.hop_length + half).float()
            spectrum = torch.stft(
                samples, self.n_fft, self.hop_length, window=window, center=False, return_complex=True
            )
            power = spectrum.real.square() + spectrum.imag.square()
            yield power.clamp(min=least_power).sqrt()


def _zero_padded(read: Read, n_samples: int, start: int, stop: int) -> Tensor:
    """Samples `[start, stop)`, with zeros outside of the song."""
    first, last = min(max(start, 0), n_samples), max(min(stop, n_samples), 0)
    return pad(read(first, last), (first - start, stop - last))


def _reflected(read: Read, n_samples: int, start: int, stop: int) -> Tensor:
    """Samples `[start, stop)`, where the song goes on backwards at its ends; these are at most `n_samples - 1` away."""
    before = read(1, 1 - start).flip(-1) if start < 0 else None
    after = read(2 * n_samples - 1 - stop, n_samples - 1).flip(-1) if stop > n_samples else None
    middle = read(max(start, 0), min(stop, n_samples))
    return torch.cat([part for part in chain((before, middle, after)) if part is not None], dim=-1)


def _a_weighted(read: Read, n_samples: int, start: int, stop: int) -> Tensor:
    taps = a_weighting_taps()
    half = len(taps) // 2
    samples = _zero_padded(read, n_samples, start - half, stop + half).float()
    return conv1d(samples[:, None], taps[None, None])[:, 0]
