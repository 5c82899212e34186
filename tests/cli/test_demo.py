"""The demo song, its true stems, and the command `demo`."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helpers.command_line import contents, write_text
from helpers.common import PROJECT
from separation.cli.demo import run_demo
from separation.cli.main import main
from separation.errors import OutputError
from separation.system.record import RECORD

DEMO = PROJECT / "weights" / "demo"
STEMS = ("vocals", "drums", "bass", "guitar", "piano", "other")
HALF_STEP = 0.5 / 2**15  # of 16 bits


@pytest.fixture(scope="module")
def mixture() -> np.ndarray:
    audio, sample_rate = soundfile.read(DEMO / "song.flac", dtype="float64")
    assert sample_rate == 44100
    return audio


@pytest.fixture(scope="module")
def stems() -> dict[str, np.ndarray]:
    return {stem: soundfile.read(DEMO / "stems" / f"{stem}.ogg", dtype="float64")[0] for stem in STEMS}


def test_the_shipped_stems_sum_to_the_shipped_song_within_16_bit_rounding(
    mixture: np.ndarray, stems: dict[str, np.ndarray]
) -> None:
    assert all(stem.shape == mixture.shape for stem in stems.values())
    assert np.abs(sum(stems.values()) - mixture).max() <= HALF_STEP + 1e-6


def test_the_shipped_song_is_about_fifteen_seconds_of_unclipped_stereo(mixture: np.ndarray) -> None:
    assert mixture.shape[1] == 2
    assert 14 < len(mixture) / 44100 < 18
    assert np.abs(mixture).max() == pytest.approx(0.89, abs=0.002)


def test_every_shipped_stem_is_audible(stems: dict[str, np.ndarray]) -> None:
    for stem, audio in stems.items():
        assert np.sqrt(np.mean(audio**2)) > 0.02, stem


def test_the_shipped_files_name_their_title_artist_and_licence() -> None:
    for path in (DEMO / "song.flac", *(DEMO / "stems" / f"{stem}.ogg" for stem in STEMS)):
        with soundfile.SoundFile(path) as file:
            assert file.title.startswith("Demo song")
            assert file.artist == "separation demo"
            assert "CC BY 4.0" in file.license
            assert "FluidR3" in file.comment
            assert "Nagoya Institute of Technology" in file.comment


def test_what_ships_is_twelve_megabytes_at_most() -> None:
    shipped = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in shipped) <= 12_000_000


@pytest.mark.slow
def test_the_demo_separates_scores_and_draws(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    run = subprocess.run(
        [sys.executable, "-m", "separation", "demo", "-o", tmp_path, "--precision", "fp32"],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert "times real-time" in run.stdout
    assert (tmp_path / "stems.svg").exists()
    assert "SDR 10." in (tmp_path / "stems.html").read_text(encoding="utf-8")
    assert len(list(tmp_path.rglob("*.wav"))) == 8


@pytest.mark.parametrize("name", ["stems.svg", "stems.html", "all_6/bass.wav", RECORD, f"all_6/{RECORD}"])
def test_the_demo_refuses_a_users_file_before_it_loads_a_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("separation.cli.demo.ModelPool", None)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_text(tmp_path / name)
    with pytest.raises(OutputError, match=f"{name}' already exists"):
        run_demo(tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


@pytest.mark.slow
def test_the_demo_runs_again_but_replaces_a_users_file_only_with_overwrite(tmp_path: Path) -> None:
    assert main(["demo", "-o", str(tmp_path)]) == 0
    assert main(["demo", "-o", str(tmp_path)]) == 0
    write_text(tmp_path / "stems.svg")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert main(["demo", "-o", str(tmp_path), "--overwrite"]) == 0
    assert "<svg" in (tmp_path / "stems.svg").read_text(encoding="utf-8")
