"""The key of chords is found in any tuning, and nothing is made up where there is no pitch."""

import numpy as np
import pytest
import torch
from torch import Tensor

from separation.analysis.key import TONICS, key
from separation.engine.song_waveforms import Samples

RATE = 44100
MAJOR = ((0, 4, 7), (5, 9, 12), (7, 11, 14), (0, 4, 7))  # I IV V I
MINOR = ((0, 3, 7), (5, 8, 12), (7, 11, 14), (0, 3, 7))  # i iv V i


def chords(tonic: int, degrees: tuple[tuple[int, ...], ...], *, rate: int = RATE, a_hertz: float = 440) -> Tensor:
    """Chords of a second over a bass, with overtones; the tonic is in semitones over C. `[2, T]`."""
    time = np.arange(rate) / rate
    parts = []
    for chord in degrees:
        part = np.zeros(rate)
        for note in (chord[0] - 12, *chord):
            hertz = a_hertz * 2 ** ((tonic + note - 9) / 12)
            part += sum(np.sin(2 * np.pi * hertz * k * time) / k**2 for k in (1, 2, 3, 4))
        parts.append(0.05 * part)
    samples = np.concatenate(parts).astype(np.float32)
    return torch.from_numpy(np.stack([samples, samples]))


def found(samples: Tensor, rate: int = RATE) -> str | None:
    return key(Samples.of(samples), rate)


@pytest.mark.parametrize("tonic", range(12))
def test_every_key_is_found(tonic: int) -> None:
    assert found(chords(tonic, MAJOR)) == f"{TONICS['major'][tonic]} major"
    assert found(chords(tonic, MINOR)) == f"{TONICS['minor'][tonic]} minor"


def test_keys_have_few_accidentals() -> None:
    assert found(chords(1, MAJOR)) == "Db major" and found(chords(1, MINOR)) == "C# minor"
    assert found(chords(10, MAJOR)) == "Bb major" and found(chords(8, MINOR)) == "G# minor"


@pytest.mark.parametrize("a_hertz", [430, 449])
def test_a_song_in_another_tuning_has_its_key(a_hertz: float) -> None:
    assert found(chords(2, MAJOR, a_hertz=a_hertz)) == "D major"


@pytest.mark.parametrize("rate", [8000, 96000])
def test_the_sample_rate_does_not_matter(rate: int) -> None:
    assert found(chords(4, MINOR, rate=rate), rate) == "E minor"


def test_an_instrument_out_of_phase_is_heard() -> None:
    assert found(chords(0, MAJOR) * torch.tensor([[1.0], [-1.0]])) == "C major"


def test_without_pitches_or_harmony_there_is_no_key() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 20 * RATE)).astype(np.float32)) * 0.1
    tone = torch.sin(torch.arange(10 * RATE) * 0.05).expand(2, -1) * 0.3
    assert [found(sound) for sound in (torch.zeros(2, RATE), torch.zeros(2, 0), noise, tone)] == [None] * 4
