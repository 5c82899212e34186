"""The tempo of drums is found, and nothing is made up where there is no beat."""

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from helpers.common import SONG
from separation.analysis.tempo import tempo
from separation.engine.song_waveforms import Samples

RATE = 44100


def drums(bpm: float, seconds: float = 16.0) -> Tensor:
    """A bass drum on beats 1 and 3, a snare drum on 2 and 4, and hi-hats in eighths; `[2, T]`."""
    noise = np.random.default_rng(0)
    time = np.arange(int(0.2 * RATE)) / RATE
    kick = np.sin(2 * np.pi * 60 * time) * np.exp(-time / 0.05)
    snare = (noise.standard_normal(len(time)) * 0.3 + np.sin(2 * np.pi * 190 * time)) * np.exp(-time / 0.04)
    hat = np.diff(noise.standard_normal(len(time)), 2, append=[0, 0]) * 0.05 * np.exp(-time / 0.01)
    samples = np.zeros(int(seconds * RATE) + len(time))
    for eighth in range(int(seconds * bpm / 30)):
        start = round(eighth * 30 / bpm * RATE)
        beat, is_off = divmod(eighth, 2)
        hit = hat if is_off else hat + (snare if beat % 2 else kick)
        samples[start : start + len(time)] += 0.3 * hit
    return torch.from_numpy(np.stack([samples, samples])[:, : int(seconds * RATE)].astype(np.float32))


def found(samples: Tensor, rate: int = RATE) -> float | None:
    return tempo(Samples.of(samples), rate)


@pytest.mark.parametrize("bpm", [68, 90.5, 123.4, 171])
def test_the_tempo_of_drums_is_found_to_half_a_percent(bpm: float) -> None:
    assert found(drums(bpm)) == pytest.approx(bpm, rel=0.005)


def test_the_level_does_not_matter() -> None:
    assert found(drums(100) * 0.01) == pytest.approx(100, rel=0.005)


def test_drums_out_of_phase_are_heard() -> None:
    assert found(drums(100) * torch.tensor([[1.0], [-1.0]])) == pytest.approx(100, rel=0.005)


@pytest.mark.parametrize("rate", [8000, 96000])
def test_the_sample_rate_does_not_matter(rate: int) -> None:
    assert found(drums(100 * RATE / rate, 16 * rate / RATE), rate) == pytest.approx(100, rel=0.005)


def test_the_demo_songs_drums_have_its_tempo() -> None:
    samples, rate = soundfile.read(SONG.with_name("stems") / "drums.ogg", dtype="float32")
    assert found(torch.from_numpy(samples.T.copy()), rate) == pytest.approx(128, rel=0.005)


@pytest.mark.parametrize("name", ["silence", "noise", "tone", "one hit", "a second", "nothing"])
def test_without_a_beat_there_is_no_tempo(name: str) -> None:
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 20 * RATE)).astype(np.float32)) * 0.1
    tone = torch.sin(torch.arange(10 * RATE) * 0.05).expand(2, -1) * 0.3
    one_hit = torch.zeros(2, 10 * RATE)
    one_hit[:, : RATE // 4] = drums(60)[:, : RATE // 4]
    sounds = {
        "silence": torch.zeros(2, 10 * RATE),
        "noise": noise,
        "tone": tone,
        "one hit": one_hit,
        "a second": drums(120, 1),
        "nothing": torch.zeros(2, 0),
    }
    assert found(sounds[name]) is None
