"""log-WMSE equals that of other programs, and reads a song in blocks."""

from importlib import import_module

import pytest
import torch

from helpers.song_parts import Samples, cases
from separation.evaluation.log_wmse import Read, log_wmse

# What utils/metrics.py of ZFTurbo/Music-Source-Separation-Training (ccc011a) gives with torch-log-wmse 0.3.1. Except
# for a silent mixture, log-wmse-audio-quality 0.2.0 gives the same.
RECORDED = {
    "whole": 20.022390,
    "short": 19.831875,
    "silent reference": 2.597708,
    "silent estimate": 1.786723,
    "silent start": 17.206030,
    "equal": 73.682724,
    "silent mixture": -109.030830,
}


def score(parts: dict[str, Samples]) -> float:
    def reader(name: str) -> Read:
        return lambda start, stop: torch.from_numpy(parts[name])[:, start:stop]

    return log_wmse(reader("mixture"), reader("reference"), reader("estimate"), parts["mixture"].shape[1])


@pytest.fixture(scope="module")
def songs() -> dict[str, dict[str, Samples]]:
    return cases()


@pytest.mark.parametrize("case", RECORDED)
def test_log_wmse_equals_that_of_music_source_separation_training(
    case: str, songs: dict[str, dict[str, Samples]]
) -> None:
    assert score(songs[case]) == pytest.approx(RECORDED[case], abs=1e-5)


def test_the_level_of_the_song_does_not_matter(songs: dict[str, dict[str, Samples]]) -> None:
    quieter = {name: samples / 8 for name, samples in songs["whole"].items()}
    assert score(quieter) == pytest.approx(score(songs["whole"]), abs=1e-4)


@pytest.mark.parametrize("block_samples", [1000, 2**12 + 1])
def test_a_song_in_many_blocks_scores_like_one_in_a_few(
    block_samples: int, songs: dict[str, dict[str, Samples]], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = score(songs["short"])
    monkeypatch.setattr(import_module("separation.evaluation.log_wmse"), "_BLOCK_SAMPLES", block_samples)
    assert score(songs["short"]) == pytest.approx(few, abs=1e-9)
