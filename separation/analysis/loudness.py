"""Loudness after ITU-R BS.1770-4 and EBU R128: integrated loudness, loudness range and true peak.

The song is read once, in blocks. What stays in memory are ten numbers for each second of it.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv1d
from torchaudio.functional import lfilter

from separation.analysis.facts import Loudness
from separation.audio.waveform import BLOCK_SAMPLES, Readable, read_padded

Floats = NDArray[np.float64]

STEPS_PER_SECOND = 10  # blocks of 400 ms overlap by three quarters, so one starts every 100 ms
BLOCK_STEPS, SHORT_TERM_STEPS = 4, 30  # 400 ms and 3 s
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU, RANGE_GATE_LU = -10.0, -20.0  # below the mean loudness of what passes the absolute gate
RANGE_PERCENTILES = (10, 95)
OFFSET = -0.691  # so that a sine of 1 kHz and 0 dBFS in one channel has -3.01 LUFS

# The two filters of the K-weighting as analogue prototypes, from which the recommendation's coefficients at 48 kHz
# follow by the bilinear transform.
_SHELF_HERTZ, _SHELF_Q, _SHELF_DECIBELS = 1681.974450955533, 0.7071752369554196, 3.999843853973347
_SHELF_MIDDLE = 0.4996667741545416  # exponent of the gain in the middle of the shelf
_HIGH_PASS_HERTZ, _HIGH_PASS_Q = 38.13547087602444, 0.5003270373238773
_SETTLE_SECONDS = 0.25  # after which the slower filter has decayed by 500 dB
_READ_SECONDS = 10
# The interpolator of the true peak: within 0.02 dB up to 19 kHz at 44.1 kHz.
_HALF_TAPS, _KAISER_BETA = 16, 6.0


class Biquad(NamedTuple):
    """The coefficients of a filter of second order, of z^0, z^-1 and z^-2."""

    numerator: tuple[float, float, float]
    denominator: tuple[float, float, float]


def loudness(wave: Readable, sample_rate: int) -> Loudness:
    """Measure a waveform `[2, T]`; both channels count alike. The rate is in hertz."""
    energies = np.fromiter(_step_energies(wave, sample_rate), np.float64)
    peak = _true_peak(wave, sample_rate)
    return Loudness(
        integrated_lufs=_integrated(_windows(energies, BLOCK_STEPS)),
        range_lu=_range(_windows(energies, SHORT_TERM_STEPS)),
        true_peak_dbtp=20 * math.log10(peak) if peak else None,
    )


def k_weighting(sample_rate: int) -> tuple[Biquad, Biquad]:
    """The filters of the K-weighting (BS.1770-4, Annex 1) at a sample rate in hertz: a high shelf and a high pass."""
    k = math.tan(math.pi * _SHELF_HERTZ / sample_rate)
    high = 10 ** (_SHELF_DECIBELS / 20)
    middle = high**_SHELF_MIDDLE
    scale = 1 + k / _SHELF_Q + k * k
    shelf = Biquad(
        (
            (high + middle * k / _SHELF_Q + k * k) / scale,
            2 * (k * k - high) / scale,
            (high - middle * k / _SHELF_Q + k * k) / scale,
        ),
        (1.0, 2 * (k * k - 1) / scale, (1 - k / _SHELF_Q + k * k) / scale),
    )
    k = math.tan(math.pi * _HIGH_PASS_HERTZ / sample_rate)
    scale = 1 + k / _HIGH_PASS_Q + k * k
    high_pass = Biquad((1.0, -2.0, 1.0), (1.0, 2 * (k * k - 1) / scale, (1 - k / _HIGH_PASS_Q + k * k) / scale))
    return shelf, high_pass


def _step_energies(wave: Readable, sample_rate: int) -> Iterator[float]:
    """The mean square of each complete 100 ms after the K-weighting, summed over the channels."""
    step, settle = round(sample_rate / STEPS_PER_SECOND), round(_SETTLE_SECONDS * sample_rate)
    filters = [
        (torch.tensor(biquad.denominator, dtype=torch.float64), torch.tensor(biquad.numerator, dtype=torch.float64))
        for biquad in k_weighting(sample_rate)
    ]
    n_steps, at_once = wave.n_samples // step, _READ_SECONDS * STEPS_PER_SECOND
    for first in range(0, n_steps, at_once):
        last = min(first + at_once, n_steps)
        samples: Tensor = read_padded(wave, first * step - settle, last * step).double()
        for denominator, numerator in filters:
            samples = lfilter(samples, denominator, numerator, clamp=False)
        squares = np.square(samples[:, settle:].numpy()).reshape(samples.shape[0], last - first, step)
        yield from squares.mean(axis=2).sum(axis=0).tolist()


def _windows(energies: Floats, steps: int) -> Floats:
    """The energy of each window of that many steps; one starts at every step."""
    if len(energies) < steps:
        return np.empty(0)
    means: Floats = np.lib.stride_tricks.sliding_window_view(energies, steps).mean(axis=1)
    return means


def _lufs(energy: float) -> float:
    return OFFSET + 10 * math.log10(energy)


def _energy(lufs: float) -> float:
    return float(10 ** ((lufs - OFFSET) / 10))


def _gated(energies: Floats, relative_gate_lu: float) -> Floats:
    """The energies that pass the absolute gate, and then the gate relative to their mean; empty for silence."""
    energies = energies[energies > _energy(ABSOLUTE_GATE_LUFS)]
    if not len(energies):
        return energies
    return energies[energies > _energy(_lufs(float(energies.mean())) + relative_gate_lu)]


def _integrated(energies: Floats) -> float | None:
    gated = _gated(energies, RELATIVE_GATE_LU)
    return _lufs(float(gated.mean())) if len(gated) else None


def _range(energies: Floats) -> float | None:
    """The loudness range of EBU Tech 3342: between two percentiles of the short-term loudness."""
    gated = _gated(energies, RANGE_GATE_LU)
    if not len(gated):
        return None
    low, high = np.percentile(10 * np.log10(gated), RANGE_PERCENTILES)
    return float(high - low)


def _true_peak(wave: Readable, sample_rate: int) -> float:
    """The largest magnitude at 4 times the sample rate, or less if that is 176.4 kHz at least (BS.1770-4, Annex 2)."""
    factor = 4 if sample_rate < 88200 else 2 if sample_rate < 176400 else 1
    kernel = _between_samples(factor)
    peak = 0.0
    for start in range(0, wave.n_samples, BLOCK_SAMPLES):
        stop = min(start + BLOCK_SAMPLES, wave.n_samples)
        samples = read_padded(wave, start - _HALF_TAPS + 1, stop + _HALF_TAPS)
        peak = max(peak, float(samples[:, _HALF_TAPS - 1 : -_HALF_TAPS].abs().max()))
        if factor > 1:
            peak = max(peak, float(conv1d(samples[:, None], kernel).abs().max()))
    return peak


@cache
def _between_samples(factor: int) -> Tensor:
    """The taps `[factor - 1, 1, 2 * _HALF_TAPS]` that interpolate between two samples: a sinc in a Kaiser window."""
    delays = torch.arange(1, factor, dtype=torch.float64)[:, None] / factor
    position = torch.arange(1 - _HALF_TAPS, _HALF_TAPS + 1, dtype=torch.float64) - delays
    window = torch.special.i0(_KAISER_BETA * (1 - (position / _HALF_TAPS).square()).sqrt())
    taps: Tensor = torch.sinc(position) * window
    return (taps / taps.sum(dim=1, keepdim=True)).float()[:, None]
