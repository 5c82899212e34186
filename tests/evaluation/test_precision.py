"""Precisions are compared with float32 on a song, and the advice follows from the figures."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from helpers.common import SONG
from separation.audio.waveform import SAMPLE_RATE, Waveform
from separation.cli.main import main
from separation.evaluation.precision import PrecisionComparison, PrecisionResult, _distances, loudest_part


def comparison(**others: tuple[float, float]) -> PrecisionComparison:
    """fp32 in 10 s, and others with their seconds and their distance to it in dB."""
    results = {"fp32": (10.0, float("inf")), **others}
    return PrecisionComparison(
        song="song.wav",
        start_seconds=3,
        audio_seconds=30,
        models=("demo",),
        device="cpu",
        results=tuple(
            PrecisionResult(name=name, seconds=seconds, distance_db={"vocals": db, "other": float("nan")})
            for name, (seconds, db) in results.items()
        ),
    )


@pytest.mark.parametrize(
    "others, recommended, reason",
    [
        ({"bf16": (4, 55), "int8": (2, 41)}, "int8", "5.0 times as fast as fp32, and 41 dB below the stems its error"),
        ({"bf16": (4, 55), "int8": (2, 36)}, "bf16", "2.5 times as fast as fp32, and 55 dB below the stems its error"),
        ({"bf16": (4, 36), "int8": (2, 31)}, "int8", "hardly audible: keep fp32 if you have the time"),
        ({"bf16": (4, 29)}, "fp32", "nothing here is both faster and close to it"),
        ({"bf16": (11, 60)}, "fp32", "nothing here is both faster and close to it"),
        ({"bf16": (4, float("inf"))}, "bf16", "with the same stems"),
        ({}, "fp32", "nothing here is both faster and close to it"),
    ],
)
def test_the_fastest_inaudible_precision_is_recommended(
    others: dict[str, tuple[float, float]], recommended: str, reason: str
) -> None:
    compared = comparison(**others)
    assert compared.recommended.name == recommended
    assert compared.recommendation.startswith(f"use --precision {recommended}: ") and reason in compared.recommendation


def test_quiet_and_equal_stems_are_named_so() -> None:
    compared = comparison(bf16=(4, 55.04))
    fp32, bf16 = (line.split() for line in str(compared).splitlines()[-2:])
    assert fp32 == ["fp32", "10.00", "equal", "quiet"] and bf16 == ["bf16", "4.00", "55.0", "quiet"]
    found = [each["distance_db"] for each in json.loads(compared.as_json())["precisions"]]
    assert found == [{"vocals": "inf", "other": None}, {"vocals": 55.0, "other": None}]


def test_a_stem_far_below_the_song_does_not_count() -> None:
    song = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    exact = {"loud": song, "quiet": song * 0.009, "soft": song * 0.011}
    found = _distances(song, exact, {stem: value * 1.01 for stem, value in exact.items()})
    assert np.isnan(found["quiet"])
    assert found["loud"] == pytest.approx(40, abs=0.01) and found["soft"] == pytest.approx(40, abs=0.01)


@pytest.mark.parametrize("seconds, start, length", [(1, 3, 1), (2, 2, 2), (5, 0, 4.5), (100, 0, 4.5)])
def test_the_excerpt_is_the_loudest_part_of_the_song(seconds: int, start: int, length: float, tmp_path: Path) -> None:
    levels = torch.tensor([0.1, 0.3, 0.4, 0.5, 0.1]).repeat_interleave(SAMPLE_RATE)[: int(4.5 * SAMPLE_RATE)]
    with Waveform(tmp_path) as song:
        song.append(levels.expand(2, -1))
        found, excerpt = loudest_part(song, seconds)
    assert found == start * SAMPLE_RATE
    assert torch.equal(excerpt, levels[found : found + int(length * SAMPLE_RATE)].expand(2, -1))


@pytest.mark.slow
def test_the_demo_model_is_compared_on_a_song(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    song = tmp_path / "mine.wav"
    samples, rate = soundfile.read(SONG, frames=4 * SAMPLE_RATE)
    soundfile.write(song, samples, rate)
    options = ["--recipe", "demo", "--stems", "all_4", "--device", "cpu", "--seconds", "2"]
    assert main(["bench", *options, "--compare-precision", str(song), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["song"] == "mine.wav" and found["audio_seconds"] == 2 and found["models"] == ["demo"]
    first, *others = found["precisions"]
    assert first["precision"] == "fp32" and first["worst_db"] == "inf"
    for each in others:  # none on a CPU without them
        assert list(each["distance_db"]) == ["vocals", "drums", "bass", "other"]
        assert each["worst_db"] == min(each["distance_db"].values()) > 30
    assert found["recommended"] in found["recommendation"]


@pytest.mark.parametrize(
    "options, words",
    [
        (("--compare-precision", "missing.wav"), "missing.wav"),
        (("--compare-precision", str(SONG), "--seconds", "0"), "seconds is 0: choose a whole number from 1 up"),
        (("--compare-precision", str(SONG), "--precision", "int8"), "does not take --precision"),
        (("--compare-precision", str(SONG), "--cold-start"), "does not take --cold-start"),
        (("--compare-precision", str(SONG), "--runs", "2"), "does not take --runs"),
        (("--compare-precision", str(SONG), "--recipe", "none"), "none"),
    ],
)
def test_an_impossible_comparison_is_a_one_line_error(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [] if "--recipe" in options else ["--recipe", "demo"]
    assert main(["bench", *recipe, "--device", "cpu", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and words in captured.err
