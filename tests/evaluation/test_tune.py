"""Agreement is the SDR against the median of all candidates, and costs are those of the run."""

import json
import math
from pathlib import Path

import pytest
import torch

from helpers.candidate_models import put_candidate
from helpers.common import SONG
from separation.audio.waveform import SAMPLE_RATE
from separation.engine.options import EngineOptions
from separation.errors import CheckpointError, InputError
from separation.evaluation.candidates import Candidates, find_candidates
from separation.evaluation.metrics import sdr
from separation.evaluation.tune import MEANING, Result, Tuning, tune

CPU = EngineOptions(device="cpu", precision="fp32")


def noise(seed: int, seconds: float = 1.5) -> torch.Tensor:
    return torch.randn(2, int(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(seed)) / 10


def tuning(**stems: torch.Tensor) -> Tuning:
    return Tuning(
        song="song.wav",
        start_seconds=30,
        mixture=noise(0),
        candidates=Candidates("vocals", (), (), {}),
        reason="device cpu",
        results=tuple(
            Result(name=name, stem=stem, seconds=3, song_seconds=400, peak_bytes=2**30) for name, stem in stems.items()
        ),
        failed={},
    )


def test_agreement_is_the_sdr_against_the_median_of_all() -> None:
    stems = {"a": noise(1), "b": noise(1) + noise(2) / 10, "c": noise(3)}
    median = torch.stack(list(stems.values())).median(dim=0).values
    found = tuning(**stems).agreement_db()
    assert found == {name: pytest.approx(sdr(median, stem), abs=1e-4) for name, stem in stems.items()}
    assert found["c"] < 0 < found["a"]


def test_two_candidates_agree_equally_and_equal_ones_entirely() -> None:
    found = tuning(a=noise(1), b=noise(2)).agreement_db()
    assert found["a"] == pytest.approx(sdr((noise(1) + noise(2)) / 2, noise(1)), abs=1e-4)
    assert abs(found["a"] - found["b"]) < 0.1
    assert tuning(a=noise(1), b=noise(1)).agreement_db() == {"a": math.inf, "b": math.inf}


def test_silence_and_a_single_candidate_have_no_agreement() -> None:
    assert math.isnan(tuning(a=noise(1)).agreement_db()["a"])
    silence = torch.zeros_like(noise(1))
    assert all(map(math.isnan, tuning(a=silence, b=silence, c=noise(1)).agreement_db().values()))


def test_the_table_and_the_json_say_what_each_candidate_took() -> None:
    found = tuning(first=noise(1), second=noise(1))
    _, head, first, second, meaning = str(found).splitlines()
    assert head.split() == ["candidate", "seconds", "real-time", "whole", "song", "memory", "agreement"]
    assert first.split() == ["first", "3.00", "0.50x", "6:40", "min", "1024", "MiB", "equal"]
    assert second.split()[0] == "second" and meaning == MEANING
    printed = json.loads(found.as_json(Path("page.html")), parse_constant=pytest.fail)
    assert printed["candidates"][0] == {
        "name": "first",
        "seconds": 3,
        "times_realtime": 0.5,
        "song_seconds": 400,
        "peak_memory_mib": 1024,
        "agreement_db": "inf",
        "pairs_db": {"second": "inf"},
    }
    assert (printed["start_seconds"], printed["audio_seconds"], printed["page"]) == (30, 1.5, "page.html")
    assert found.facts()["first"] == ["3.00 s, 0.50x real-time", "whole song 6:40 min", "1024 MiB", "agreement equal"]


@pytest.fixture
def models(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEPARATION_MODELS", str(tmp_path / "models"))
    put_candidate(tmp_path / "models", "one", stems=["voice", "rest"])
    put_candidate(tmp_path / "models", "two", stems=["voice", "rest"], seed=1)
    return tmp_path / "models"


def test_all_candidates_get_the_same_seconds_of_the_song(models: Path) -> None:
    found = tune(SONG, find_candidates(None, "voice"), CPU, seconds=1)
    assert [result.name for result in found.results] == ["one", "two"] and not found.failed
    assert all(result.stem.shape == found.mixture.shape == (2, SAMPLE_RATE) for result in found.results)
    assert not torch.equal(found.results[0].stem, found.results[1].stem)
    assert all(result.song_seconds > 10 * result.seconds for result in found.results)  # the song has 15 s


@pytest.mark.slow
def test_a_candidate_that_fails_does_not_stop_the_others(models: Path) -> None:
    put_candidate(models, "broken", stems=["voice", "rest"])
    (models / "broken.safetensors").write_bytes(b"no weights")
    found = tune(SONG, find_candidates(None, "voice"), CPU, seconds=1)
    assert list(found.failed) == ["broken"] and "broken.safetensors" in found.failed["broken"]
    assert [result.name for result in found.results] == ["one", "two"]
    for name in ("one", "two"):
        (models / f"{name}.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"two\.safetensors"):
        tune(SONG, find_candidates(None, "voice"), CPU, seconds=1)


def test_a_tuning_that_cannot_be_done_is_an_error(models: Path) -> None:
    with pytest.raises(InputError, match="seconds is 61: choose a whole number from 1 to 60"):
        tune(SONG, find_candidates(None, "voice"), CPU, seconds=61)
    with pytest.raises(InputError, match="no model that gives lead_vocals is downloaded: run `separation models downl"):
        tune(SONG, find_candidates("karaoke", "lead_vocals"), CPU)
