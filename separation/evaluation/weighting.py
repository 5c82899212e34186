"""Filters that weight frequencies as the ear does, at 44100 Hz. Each is symmetric in time: it delays nothing."""

import cmath
import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from separation.audio.waveform import SAMPLE_RATE

Floats = NDArray[np.float64]

_HEARING_TAPS = 4000
_HEARING_FFT = 8192  # of the response that the taps are made from
_A_WEIGHTING_TAPS = 101
_A_WEIGHTING_POINTS = 512  # of the response that the taps are fitted to


@cache
def hearing_taps() -> Tensor:
    """The taps `[4000]` of log-WMSE's frequency weighting, float64; the tap for no delay is number 1999.

    The magnitude of four filters in a row: a high shelf of 5 dB at 1500 Hz, a high pass at 120 Hz, a peak of 2.5 dB at
    500 Hz, and a low pass at 10 kHz, applied forwards and backwards. The parameters and the lengths are those of
    nomonosound/log-wmse-audio-quality 0.2.0 (dev/create_freq_weighting_filter_ir.py), after Fenton and Lee 2017.
    """
    bins = _HEARING_FFT // 2 + 1
    angles = np.arange(bins) * np.pi / bins  # not up to pi itself: the original's last bin is half a bin lower
    response = np.ones(bins)
    for numerator, denominator in (
        _high_shelf(1500, 5, 1 / math.sqrt(2)),
        _high_pass(120, 1 / math.sqrt(2)),
        _peak(500, 2.5, 1.5 / math.sqrt(2)),
        *[_first_order_low_pass(10_000)] * 2,
    ):
        response *= np.abs(_at(numerator, angles) / _at(denominator, angles))
    taps = np.fft.fftshift(np.fft.irfft(response, _HEARING_FFT))
    start = bins - _HEARING_TAPS // 2
    return torch.from_numpy(taps[start : start + _HEARING_TAPS].copy())


@cache
def a_weighting_taps() -> Tensor:
    """The taps `[101]` of the A-weighting in auraloss 0.4.0, float32.

    The analogue filter of IEC 61672 becomes a digital one by the bilinear transform, and the taps are the linear-phase
    filter that is closest to its magnitude (least squares), after Wright and Välimäki 2019, arXiv:1911.08922. The
    frequencies are the standard's. The gain is auraloss' own: 10^(1.9997/20).
    """
    corners = [2 * math.pi * hertz for hertz in (20.598997, 107.65265, 737.86223, 12194.217)]
    poles = [corners[0], corners[0], corners[1], corners[2], corners[3], corners[3]]
    hertz = np.arange(_A_WEIGHTING_POINTS) * SAMPLE_RATE / 2 / _A_WEIGHTING_POINTS
    s = 2j * SAMPLE_RATE * np.tan(np.pi * hertz / SAMPLE_RATE)  # the bilinear transform
    response = np.abs(corners[3] ** 2 * 10 ** (1.9997 / 20) * s**4 / np.prod([s + pole for pole in poles], axis=0))
    return torch.from_numpy(_least_squares_taps(_A_WEIGHTING_TAPS, 2 * hertz / SAMPLE_RATE, response)).float()


def _least_squares_taps(n_taps: int, frequencies: Floats, response: Floats) -> Floats:
    """The taps of the symmetric filter that is closest to a response in bands (Selesnick 2005, "firls").

    The bands lie between points 0 and 1, 2 and 3 and so on, in which the response is linear. What is between the bands
    does not count. Frequencies are relative to half the sample rate.
    """
    half = n_taps // 2
    low, high = frequencies[::2], frequencies[1::2]
    slope = (response[1::2] - response[::2]) / (high - low)
    offset = response[::2] - slope * low

    def integral(order: Floats, at: Floats) -> Floats:  # of cos(pi order x) from 0 to `at`
        return at * np.sinc(order * at)

    orders = np.arange(n_taps, dtype=np.float64)[:, None]
    products = (integral(orders, high) - integral(orders, low)).sum(axis=1)  # over all bands
    index = np.arange(half + 1)
    matrix = products[np.abs(index[:, None] - index)] + products[index[:, None] + index]

    k = orders[1 : half + 1]
    ramp = (high * np.sin(np.pi * k * high) - low * np.sin(np.pi * k * low)) / (np.pi * k)
    ramp += (np.cos(np.pi * k * high) - np.cos(np.pi * k * low)) / (np.pi * k) ** 2
    flat = integral(orders[: half + 1], high) - integral(orders[: half + 1], low)
    target = offset * flat + slope * np.concatenate([[(high**2 - low**2) / 2], ramp])
    cosines = np.linalg.solve(matrix, target.sum(axis=1))
    return np.concatenate([cosines[:0:-1], [2 * cosines[0]], cosines[1:]])


def loudness_lufs(audio: Tensor) -> float:
    """The loudness of `[C, T]` in LUFS by ITU-R BS.1770 without its gate; -inf for silence.

    The two filters of its K-weighting have the parameters of pyloudnorm 0.1: a high shelf of 4 dB at 1500 Hz and a high
    pass at 38 Hz.
    """
    n_fft = 2 ** math.ceil(math.log2(max(2, audio.shape[1])))
    angles = np.linspace(0, np.pi, n_fft // 2 + 1)
    weights = np.full(len(angles), 2.0)  # each bin but the first and the last stands for two
    weights[[0, -1]] = 1
    for numerator, denominator in (_high_shelf(1500, 4, 1 / math.sqrt(2)), _high_pass(38, 0.5)):
        weights *= np.abs(_at(numerator, angles) / _at(denominator, angles)) ** 2
    power = torch.fft.rfft(audio.double(), n_fft).abs().square().sum(dim=0)
    mean_square = float(power @ torch.from_numpy(weights)) / n_fft / audio.shape[1]
    return -0.691 + 10 * math.log10(mean_square) if mean_square else -math.inf


# ---------------------------------------------------------------------------------------------------------------------
# Digital filters of second order: numerator and denominator, from z^0 to z^-2. All but the last are those of Robert
# Bristow-Johnson's "Cookbook formulae for audio EQ biquad filter coefficients".

Coefficients = tuple[Floats, Floats]


def _high_shelf(hertz: float, gain_db: float, q: float) -> Coefficients:
    """Raises what is above `hertz` by `gain_db`."""
    gain, cosine, alpha = 10 ** (gain_db / 40), *_angle(hertz, q)
    more, less, width = gain + 1, gain - 1, 2 * math.sqrt(gain) * alpha
    return (
        gain * np.array([more + less * cosine + width, -2 * (less + more * cosine), more + less * cosine - width]),
        np.array([more - less * cosine + width, 2 * (less - more * cosine), more - less * cosine - width]),
    )


def _high_pass(hertz: float, q: float) -> Coefficients:
    """Removes what is below `hertz`. With `q` of 1/sqrt(2), a Butterworth filter."""
    cosine, alpha = _angle(hertz, q)
    return (1 + cosine) / 2 * np.array([1.0, -2.0, 1.0]), np.array([1 + alpha, -2 * cosine, 1 - alpha])


def _peak(hertz: float, gain_db: float, q: float) -> Coefficients:
    """Raises what is around `hertz` by `gain_db`."""
    gain, cosine, alpha = 10 ** (gain_db / 40), *_angle(hertz, q)
    return (
        np.array([1 + alpha * gain, -2 * cosine, 1 - alpha * gain]),
        np.array([1 + alpha / gain, -2 * cosine, 1 - alpha / gain]),
    )


def _first_order_low_pass(hertz: float) -> Coefficients:
    tangent = math.tan(math.pi * hertz / SAMPLE_RATE)
    return np.array([tangent, tangent, 0]), np.array([tangent + 1, tangent - 1, 0])


def _angle(hertz: float, q: float) -> tuple[float, float]:
    """The cosine of the frequency's angle, and half its sine divided by `q`."""
    turn = cmath.exp(2j * math.pi * hertz / SAMPLE_RATE)
    return turn.real, turn.imag / (2 * q)


def _at(coefficients: Floats, angles: Floats) -> NDArray[np.complex128]:
    """The value of a polynomial in z^-1 at these angles on the unit circle."""
    return np.asarray(np.polynomial.polynomial.polyval(np.exp(-1j * angles), coefficients))
