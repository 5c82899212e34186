"""The tempo of a song, from the onsets of its drums.

An onset is a rise of the logarithmic energy in bands. The autocorrelation of the onsets peaks at the beat and at its
multiples, and also at parts and groups of beats. A prior for the tempi at which people tap decides between those (Ellis
2007, "Beat tracking by dynamic programming") and, between a tempo, half and twice of it, the backbeat too: a snare drum
that sounds on every other beat repeats after two beats, but not after one.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from separation.audio.waveform import Readable, read_padded

Floats = NDArray[np.float64]

SLOWEST, FASTEST = 50.0, 220.0  # BPM
PRIOR_BPM, PRIOR_OCTAVES = 110.0, 1.2  # centre and width of the prior, a normal distribution of the octave
BACKBEAT_HERTZ = (130.0, 2000.0)  # of the snare drum; bass drum and cymbals are mostly outside
BACKBEAT_WEIGHT = 1.0
MIN_SECONDS = 3.0  # of music, to tell a tempo
MIN_REGULARITY = 0.2  # correlation of the onsets with themselves some beats later; less is no beat

FRAMES_PER_SECOND = 100
FRAME_SECONDS = 0.046
BANDS, LOWEST_HERTZ = 32, 30.0
COMPRESSION = 1e4  # an energy of 1e-4 of full scale is where the logarithm begins
SEGMENT_SECONDS, SEGMENT_HOP_SECONDS = 12.0, 6.0  # of which the autocorrelations are averaged
BEATS = 4  # multiples of the beat that count
_READ_FRAMES = 1000


def tempo(wave: Readable, sample_rate: int) -> float | None:
    """The tempo in beats per minute; None if there is no regular beat, or too little music.

    Args:
        wave: `[C, T]`, best the drums alone.
        sample_rate: hertz.
    """
    if wave.n_samples < MIN_SECONDS * sample_rate:
        return None
    return _tempo(*onsets(wave, sample_rate))


def _tempo(all_onsets: Floats, snare_onsets: Floats, frame_rate: float) -> float | None:
    """The tempo: first the best one but for its octave, then the octave, then the decimals."""
    correlation = _autocorrelation(all_onsets, frame_rate)
    bpm = np.geomspace(SLOWEST, FASTEST, 600)
    best = bpm[np.argmax(_comb(correlation, 60 * frame_rate / bpm, BEATS) * _prior(bpm))]
    octaves = np.array([tempo for tempo in (best / 2, best, best * 2) if SLOWEST <= tempo <= FASTEST])
    lags = 60 * frame_rate / octaves
    snare = _autocorrelation(snare_onsets, frame_rate)
    backbeat = _at(snare, 2 * lags) - _at(snare, lags)
    coarse = octaves[np.argmax((_comb(correlation, lags, BEATS) + BACKBEAT_WEIGHT * backbeat) * _prior(octaves))]
    near = coarse * np.geomspace(0.97, 1.03, 601)
    regularity = _comb(correlation, 60 * frame_rate / near, 2 * BEATS)
    nearest = int(np.argmax(regularity))
    return float(near[nearest]) if regularity[nearest] >= MIN_REGULARITY else None


def _prior(bpm: Floats) -> Floats:
    prior: Floats = np.exp(-0.5 * (np.log2(bpm / PRIOR_BPM) / PRIOR_OCTAVES) ** 2)
    return prior


def onsets(wave: Readable, sample_rate: int) -> tuple[Floats, Floats, float]:
    """How much the level rises in each frame `[N]`: in all bands, and where the snare drum is; and frames a second."""
    hop = round(sample_rate / FRAMES_PER_SECOND)
    n_fft = 2 ** round(math.log2(FRAME_SECONDS * sample_rate))
    window = torch.hann_window(n_fft)
    filters, centres = _band_filters(n_fft, sample_rate)
    is_snare = (centres >= BACKBEAT_HERTZ[0]) & (centres < BACKBEAT_HERTZ[1])
    strengths: list[Floats] = []  # of blocks, [2, N]
    last: Floats | None = None
    for first in range(0, wave.n_samples // hop + 1, _READ_FRAMES):
        n_frames = min(_READ_FRAMES, wave.n_samples // hop + 1 - first)
        start = first * hop - n_fft // 2
        samples = read_padded(wave, start, start + (n_frames - 1) * hop + n_fft)
        spectrum = torch.fft.rfft(samples.unfold(1, n_fft, hop) * (window / window.sum()))  # [C, N, F]
        power = spectrum.abs().square().mean(dim=0).double().numpy()
        levels = np.log1p(COMPRESSION * (power @ filters))
        before = np.concatenate([levels[:1] if last is None else last, levels[:-1]])
        rises = np.maximum(levels - before, 0)
        strengths.append(np.stack([rises.mean(axis=1), rises[:, is_snare].mean(axis=1)]))
        last = levels[-1:]
    every, snare = np.concatenate(strengths, axis=1)
    return every, snare, sample_rate / hop


def _band_filters(n_fft: int, sample_rate: int) -> tuple[Floats, Floats]:
    """Triangles `[F, bands]` that are equally wide on the mel scale (O'Shaughnessy 1987); their centres in hertz."""
    mels = 1127 * np.log1p(np.arange(n_fft // 2 + 1) * sample_rate / n_fft / 700)
    edges = np.linspace(1127 * math.log1p(LOWEST_HERTZ / 700), mels[-1], BANDS + 2)
    triangles = np.maximum(0, 1 - np.abs(mels[:, None] - edges[None, 1:-1]) / (edges[1] - edges[0]))
    return triangles, 700 * np.expm1(edges[1:-1] / 1127)


def _autocorrelation(strengths: Floats, frame_rate: float) -> Floats:
    """The autocorrelation by lag in frames, averaged over segments; zeros if there are no onsets."""
    size = min(len(strengths), round(SEGMENT_SECONDS * frame_rate))
    n_lags = size * 3 // 4
    overlaps = size - np.arange(n_lags)
    total, n_segments = np.zeros(n_lags), 0
    for start in range(0, len(strengths) - size + 1, round(SEGMENT_HOP_SECONDS * frame_rate)):
        segment = strengths[start : start + size] - strengths[start : start + size].mean()
        power = np.abs(np.fft.rfft(segment, 2 * size)) ** 2
        correlation = np.fft.irfft(power)[:n_lags] / overlaps
        if correlation[0] > 1e-12:
            total += correlation / correlation[0]
            n_segments += 1
    return total / max(1, n_segments)


def _at(correlation: Floats, lags: Floats) -> Floats:
    """The autocorrelation at these lags in frames, interpolated; 0 beyond its end."""
    values: Floats = np.interp(lags, np.arange(len(correlation)), correlation, right=0.0)
    return values


def _comb(correlation: Floats, lags: Floats, beats: int) -> Floats:
    """The mean of the autocorrelation at the multiples of each lag that it reaches."""
    multiples = np.arange(1, beats + 1)[:, None] * lags
    n_reached = (multiples <= len(correlation) - 1).sum(axis=0)
    mean: Floats = _at(correlation, multiples).sum(axis=0) / np.maximum(n_reached, 1)
    return mean
