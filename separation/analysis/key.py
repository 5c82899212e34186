"""The key of a song, from its pitched instruments.

The peaks of each spectrum are counted by pitch class. The key is the one whose profile correlates best with the counts
(Krumhansl 1990), with the profiles that Albrecht and Shanahan 2013, "The use of large corpora to train a new type of
key-finding algorithm", counted in a corpus of music.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from separation.audio.waveform import Readable, read_padded

Floats = NDArray[np.float64]

# As musicians spell them, with the fewer accidentals; of F# and Gb major, and Eb and D# minor, which have six each, the
# usual one.
TONICS = {
    "major": ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B"),
    "minor": ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "G#", "A", "Bb", "B"),
}
# How often each degree, in semitones over the tonic, sounds in music in a key.
PROFILES = {
    "major": (0.238, 0.006, 0.111, 0.006, 0.137, 0.094, 0.016, 0.214, 0.009, 0.080, 0.008, 0.081),
    "minor": (0.220, 0.006, 0.104, 0.123, 0.019, 0.103, 0.012, 0.214, 0.062, 0.022, 0.061, 0.052),
}
MIN_CORRELATION = 0.65  # less is no key

FRAME_SECONDS = 0.37  # long enough to tell semitones apart in the bass
LOWEST_HERTZ, HIGHEST_HERTZ = 55.0, 2000.0
MIN_MAGNITUDE = 1e-4  # of a frame's loudest peak; full scale is 1
MIN_SHARE = 0.01  # of a frame's loudest peak, for the others
BINS = 120  # of an octave, so that a tuning other than 440 Hz is found
_READ_FRAMES = 64


def key(wave: Readable, sample_rate: int) -> str | None:
    """The key, such as "F# minor" or "Bb major"; None if nothing has a pitch, or no key fits.

    Args:
        wave: `[C, T]`, best the bass and the harmony without drums and vocals.
        sample_rate: hertz.
    """
    counts = pitch_classes(_octave(wave, sample_rate))
    if counts is None:
        return None
    correlation, name = max(
        (float(np.corrcoef(counts, np.roll(profile, tonic))[0, 1]), f"{TONICS[mode][tonic]} {mode}")
        for mode, profile in PROFILES.items()
        for tonic in range(12)
    )
    return name if correlation >= MIN_CORRELATION else None


def pitch_classes(octave: Floats) -> Floats | None:
    """The share of each pitch class, C first, in an octave of BINS; None if it is empty or even.

    The tuning is the mean deviation of all peaks from the tempered scale.
    """
    numbers = np.arange(BINS) * 12 / BINS
    tuning = np.angle((octave * np.exp(2j * np.pi * numbers)).sum()) / (2 * np.pi)
    counts = np.zeros(12)
    np.add.at(counts, np.round(numbers - tuning).astype(int) % 12, octave)
    return counts / counts.sum() if np.ptp(counts) > 0 else None


def _octave(wave: Readable, sample_rate: int) -> Floats:
    """The spectral peaks of all frames, folded into one octave from C, `[BINS]`."""
    n_fft = 2 ** round(math.log2(FRAME_SECONDS * sample_rate))
    hop = n_fft // 2
    window = torch.hann_window(n_fft)
    octave = np.zeros(BINS)
    for first in range(0, wave.n_samples // hop + 1, _READ_FRAMES):
        n_frames = min(_READ_FRAMES, wave.n_samples // hop + 1 - first)
        start = first * hop - hop
        samples = read_padded(wave, start, start + (n_frames - 1) * hop + n_fft)
        spectrum = torch.fft.rfft(samples.unfold(1, n_fft, hop) * (window * 2 / window.sum()))  # [C, N, F]
        for magnitudes in spectrum.abs().square().mean(dim=0).sqrt().double().numpy():
            octave += _folded_peaks(magnitudes, sample_rate / n_fft)
    return octave


def _folded_peaks(magnitudes: Floats, bin_hertz: float) -> Floats:
    """The peaks of a spectrum `[F]`, folded into one octave `[BINS]`; the largest counts 1."""
    low, high = math.ceil(LOWEST_HERTZ / bin_hertz), int(HIGHEST_HERTZ / bin_hertz)
    before, here, after = magnitudes[low - 1 : high - 1], magnitudes[low:high], magnitudes[low + 1 : high + 1]
    peaks = np.flatnonzero((here > before) & (here >= after) & (here > here.max() * MIN_SHARE))
    octave = np.zeros(BINS)
    if not len(peaks) or here.max() < MIN_MAGNITUDE:
        return octave
    left, middle, right = (np.log(values[peaks] + 1e-12) for values in (before, here, after))
    offset = 0.5 * (left - right) / (left - 2 * middle + right)  # of the parabola through three bins
    pitch = 12 * np.log2((low + peaks + offset) * bin_hertz / 440) + 9  # semitones over a C
    np.add.at(octave, np.round(pitch * BINS / 12).astype(int) % BINS, here[peaks] / here.max())
    return octave
