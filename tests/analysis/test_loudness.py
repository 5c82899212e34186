"""Loudness is what the recommendations say it is: their own test signals, and ffmpeg on music."""

import math
import re
import subprocess

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.common import SONG, needs_ffmpeg, quick_first, read
from separation.analysis.facts import Loudness
from separation.analysis.loudness import k_weighting, loudness
from separation.engine.song_waveforms import Samples

RATE = 48000


def sine(parts: list[tuple[float, float]], hertz: float = 1000, rate: int = RATE, phase: float = 0) -> Tensor:
    """A stereo sine in parts of (level in dBFS, seconds), in phase throughout; `[2, T]`."""
    gains = np.concatenate([np.full(round(seconds * rate), 10 ** (level / 20)) for level, seconds in parts])
    wave = gains * np.sin(2 * np.pi * hertz * np.arange(len(gains)) / rate + math.radians(phase))
    return torch.from_numpy(np.stack([wave, wave]).astype(np.float32))


def measured(samples: Tensor, rate: int = RATE) -> Loudness:
    return loudness(Samples.of(samples), rate)


def test_the_filters_at_48_khz_are_those_of_the_recommendation() -> None:
    shelf, high_pass = k_weighting(48000)
    assert shelf.numerator == pytest.approx((1.53512485958697, -2.69169618940638, 1.19839281085285), abs=1e-12)
    assert shelf.denominator == pytest.approx((1, -1.69065929318241, 0.73248077421585), abs=1e-12)
    assert high_pass.numerator == (1, -2, 1)
    assert high_pass.denominator == pytest.approx((1, -1.99004745483398, 0.99007225036621), abs=1e-12)


# EBU Tech 3341, cases 1 to 5
@pytest.mark.parametrize(
    "parts, lufs",
    quick_first(
        [
            ([(-23, 20)], -23),
            ([(-33, 20)], -33),
            ([(-26, 20), (-20, 20.1), (-26, 20)], -23),
            ([(-36, 10), (-23, 60), (-36, 10)], -23),
            ([(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)], -23),
        ],
        1,
    ),
)
def test_integrated_loudness_is_gated(parts: list[tuple[float, float]], lufs: float) -> None:
    assert measured(sine(parts)).integrated_lufs == pytest.approx(lufs, abs=0.1)


@pytest.mark.parametrize("rate", [11025, 44100, 96000])
def test_the_sample_rate_does_not_matter(rate: int) -> None:
    assert measured(sine([(-23, 10)], rate=rate), rate).integrated_lufs == pytest.approx(-23, abs=0.1)


# EBU Tech 3342, cases 1 to 4
@pytest.mark.parametrize(
    "parts, range_lu",
    quick_first(
        [
            ([(-20, 20), (-30, 20)], 10),
            ([(-40, 20), (-20, 20)], 20),
            ([(-20, 20), (-15, 20)], 5),
            ([(-50, 20), (-35, 20), (-20, 20), (-35, 20), (-50, 20)], 15),
        ],
        1,
    ),
)
def test_the_range_is_between_quiet_and_loud_parts(parts: list[tuple[float, float]], range_lu: float) -> None:
    assert measured(sine(parts)).range_lu == pytest.approx(range_lu, abs=1)


# EBU Tech 3341, cases 15 to 18 and 19
@pytest.mark.parametrize(
    "divisor, phase, gain", [(4, 0, 0.5), (4, 45, 0.5), (6, 60, 0.5), (8, 67.5, 0.5), (4, 45, 1.41)]
)
@pytest.mark.parametrize("rate", [44100, 48000])
def test_the_true_peak_lies_between_samples(divisor: int, phase: float, gain: float, rate: int) -> None:
    samples = sine([(20 * math.log10(gain), 0.5)], rate / divisor, rate, phase)
    fade = torch.linspace(0, 1, rate // 100)  # without it, the step at the start overshoots
    samples[:, : len(fade)] *= fade
    samples[:, -len(fade) :] *= fade.flip(0)
    assert -0.4 < measured(samples, rate).true_peak_dbtp - 20 * math.log10(gain) < 0.2


def test_silence_and_too_little_music_have_no_loudness() -> None:
    assert measured(torch.zeros(2, 5 * RATE)) == Loudness(None, None, None)
    assert measured(torch.zeros(2, 0)) == Loudness(None, None, None)
    short = measured(sine([(-20, 0.3)]))
    assert (short.integrated_lufs, short.range_lu) == (None, None)
    assert short.true_peak_dbtp == pytest.approx(-20, abs=0.2)
    assert measured(sine([(-20, 2)])).range_lu is None


def test_blocks_leave_no_trace() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 25 * RATE)).astype(np.float32)) * 0.1
    whole, shifted = measured(noise), measured(torch.cat([torch.zeros(2, RATE), noise], dim=1))
    assert shifted.true_peak_dbtp == pytest.approx(whole.true_peak_dbtp, abs=1e-3)
    assert shifted.integrated_lufs == pytest.approx(whole.integrated_lufs, abs=0.05)


@needs_ffmpeg
def test_music_has_the_loudness_that_ffmpeg_measures() -> None:
    command = ["ffmpeg", "-nostats", "-i", SONG, "-af", "ebur128=peak=true", "-f", "null", "-"]
    summary = subprocess.run(command, capture_output=True, text=True, check=True).stderr.rpartition("Summary")[2]
    theirs = [float(re.search(rf"{name}:\s+(-?[\d.]+)", summary)[1]) for name in ("I", "LRA", "Peak")]
    ours = measured(torch.from_numpy(read(SONG).T.copy()), 44100)
    assert [ours.integrated_lufs, ours.range_lu, ours.true_peak_dbtp] == pytest.approx(theirs, abs=0.11)
