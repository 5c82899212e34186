"""The filters have the responses that their sources state."""

import math

import numpy as np
import pytest
import torch

from helpers.song_parts import RATE
from separation.evaluation.weighting import a_weighting_taps, hearing_taps, loudness_lufs


def decibels(taps: torch.Tensor, *hertz: int) -> list[float]:
    """The gain at these frequencies."""
    turns = torch.exp(
        -2j * torch.pi * torch.tensor(hertz)[:, None] / RATE * torch.arange(len(taps), dtype=torch.float64)
    )
    return (20 * (turns @ taps.to(turns.dtype)).abs().log10()).tolist()


def test_the_weighting_of_log_wmse_is_that_of_its_author() -> None:
    taps = hearing_taps()
    theirs = [-15.3193, -2.8754, 2.5342, 2.6442, 4.2360, -1.0150, -30.9410]  # filter_ir.pkl of log-wmse 0.2.0
    assert decibels(taps, 50, 120, 500, 1500, 3000, 10_000, 20_000) == pytest.approx(theirs, abs=1e-3)
    assert taps.argmax() == 1999
    torch.testing.assert_close(taps[:1999].flip(0), taps[2000:3999], rtol=0, atol=1e-15)  # delays nothing


def test_the_a_weighting_is_that_of_auraloss() -> None:
    taps = a_weighting_taps()
    theirs = [-0.0019269368, -0.0070691779, -0.0199580714, 0.2734031677, 0.5443199277]  # auraloss 0.4.0
    assert taps[[0, 25, 40, 49, 50]].tolist() == pytest.approx(theirs, abs=1e-7)


def test_the_a_weighting_is_close_to_the_standard() -> None:
    standard = [-3.2, 0.0, 1.2, 1.0]  # IEC 61672 at these frequencies
    assert decibels(a_weighting_taps(), 500, 1000, 2000, 4000) == pytest.approx(standard, abs=0.2)


def test_the_fit_equals_scipys() -> None:
    signal = pytest.importorskip("scipy.signal")
    from separation.evaluation.weighting import _least_squares_taps

    frequencies = np.linspace(0, 0.99, 60)
    response = np.random.Generator(np.random.PCG64(0)).random(60)
    theirs = signal.firls(31, frequencies, response)
    assert _least_squares_taps(31, frequencies, response) == pytest.approx(theirs, abs=1e-9)


def test_loudness_is_that_of_the_standard() -> None:
    at = torch.arange(10 * RATE) / RATE
    sine = torch.sin(2 * torch.pi * 997 * at)
    assert loudness_lufs(sine[None]) == pytest.approx(
        -3.01, abs=0.05
    )  # ITU-R BS.1770: a full-scale sine in one channel
    assert loudness_lufs(sine.expand(2, -1)) == pytest.approx(0, abs=0.05)
    assert loudness_lufs(0.1 * sine[None, :1000]) == pytest.approx(-23.01, abs=0.3)
    assert loudness_lufs(torch.sin(2 * torch.pi * 40 * at)[None]) < -8  # bass counts less
    assert loudness_lufs(torch.zeros(2, 100)) == -math.inf
