"""Scores by spectra equal those of Music-Source-Separation-Training, and read a song in blocks."""

import math

import pytest
import torch
from torch import Tensor

from helpers.song_parts import RATE, cases, song_parts
from separation.evaluation import spectral
from separation.evaluation.spectral import (
    Read,
    bleedless_and_fullness,
    l1_frequency,
    mel_filters,
    multi_resolution_stft,
)

# What utils/metrics.py of ZFTurbo/Music-Source-Separation-Training (ccc011a) gives with librosa 0.11.0, torchaudio
# 2.11.0 and auraloss 0.4.0: bleedless, fullness, l1_freq and aura_mrstft
RECORDED = {
    "whole": (17.443115, 49.145397, 59.508602, 2.335621),
    "short": (19.442797, 46.961632, 47.132919, 3.617668),
    "silent reference": (0.639799, 100.0, 21.252171, 1.460439),
    "silent estimate": (100.0, 0.655253, 21.020089, 0.000498),
    "silent start": (100.0, 34.034462, 70.494843, 25.064781),
    "equal": (100.0, 100.0, 100.0, 100.0),
}


def reader(samples: Tensor) -> Read:
    return lambda start, stop: samples[:, start:stop]


def scores_of(parts: dict[str, Tensor]) -> tuple[float, ...]:
    pair = reader(parts["reference"]), reader(parts["estimate"])
    n_samples = parts["reference"].shape[1]
    return (
        *bleedless_and_fullness(*pair, n_samples),
        l1_frequency(*pair, n_samples),
        multi_resolution_stft(*pair, n_samples),
    )


@pytest.fixture(scope="module")
def tensors() -> dict[str, dict[str, Tensor]]:
    return {
        case: {name: torch.from_numpy(samples) for name, samples in parts.items()} for case, parts in cases().items()
    }


@pytest.mark.parametrize("case", RECORDED)
def test_scores_equal_those_of_music_source_separation_training(
    case: str, tensors: dict[str, dict[str, Tensor]]
) -> None:
    assert scores_of(tensors[case]) == pytest.approx(RECORDED[case], abs=1e-4)


def test_a_song_in_many_blocks_scores_like_one_in_a_single_block(
    tensors: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scores_of(tensors["whole"])
    monkeypatch.setattr(spectral, "_BLOCK_SAMPLES", 3000)
    assert scores_of(tensors["whole"]) == pytest.approx(whole, rel=1e-5)


def test_no_more_than_a_block_of_a_long_song_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    monkeypatch.setattr(spectral, "_BLOCK_SAMPLES", 2**14)

    def read(start: int, stop: int) -> Tensor:
        nonlocal longest
        assert 0 <= start <= stop <= 4 * RATE
        longest = max(longest, stop - start)
        return torch.ones(1, stop - start)

    for score in (bleedless_and_fullness, l1_frequency, multi_resolution_stft):
        score(read, read, 4 * RATE)
    assert 2**14 < longest < 2**14 + 2**13


@pytest.mark.parametrize("n_samples, l1, mrstft", [(1, False, False), (1025, True, False), (2049, True, True)])
def test_music_that_is_too_short_for_a_frame_has_no_score(n_samples: int, l1: bool, mrstft: bool) -> None:
    parts = {name: torch.from_numpy(samples) for name, samples in song_parts(n_samples).items()}
    bleedless, fullness, *others = scores_of(parts)
    assert math.isfinite(bleedless) and math.isfinite(fullness)
    assert [math.isfinite(score) for score in others] == [l1, mrstft]


@pytest.mark.parametrize("n_fft, bands", [(4096, 512), (1024, 128), (2048, 128)])
def test_mel_filters_are_librosas(n_fft: int, bands: int) -> None:
    librosa_filters = pytest.importorskip("librosa.filters")
    theirs = librosa_filters.mel(sr=RATE, n_fft=n_fft, n_mels=bands)
    torch.testing.assert_close(mel_filters(n_fft, bands), torch.from_numpy(theirs), rtol=0, atol=2e-8)
