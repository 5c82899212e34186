"""A song is analysed from its stems, or from the mixture alone, without its length in memory."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from helpers.common import SONG, read
from separation import Excerpt, analyse
from separation.analysis.key import key
from separation.analysis.loudness import loudness
from separation.analysis.song import analyse_waves
from separation.analysis.tempo import tempo
from separation.audio.waveform import Waveform

RATE = 44100
STEMS = SONG.with_name("stems")
FOUR = {stem: STEMS / f"{stem}.ogg" for stem in ("vocals", "drums", "bass", "other")}
SIX = {path.stem: path for path in STEMS.glob("*.ogg")}


def write(path: Path, samples: np.ndarray) -> Path:
    soundfile.write(path, samples, RATE, subtype="FLOAT")
    return path


def test_the_demo_song_is_as_it_was_rendered() -> None:
    analysis = analyse(SONG, SIX)
    assert analysis.tempo_bpm == pytest.approx(128, rel=0.005)
    assert analysis.key == "E major"
    assert list(analysis.loudness) == ["mixture", *SIX]
    assert analysis.loudness["mixture"].integrated_lufs == pytest.approx(-15.1, abs=0.05)


def test_the_song_alone_will_do() -> None:
    analysis = analyse(SONG, {})
    assert analysis.tempo_bpm == pytest.approx(128, rel=0.005)
    assert analysis.key == "E major"


@pytest.mark.slow
def test_a_song_without_drums_has_no_tempo_and_one_of_drums_has_no_key(tmp_path: Path) -> None:
    silence = write(tmp_path / "silence.wav", 1e-5 * read(STEMS / "drums.ogg"))
    assert analyse(SONG, {**FOUR, "drums": silence}).tempo_bpm is None
    assert analyse(SONG, {**FOUR, "bass": silence, "other": silence}).key is None


@pytest.mark.parametrize("n_samples", [1, RATE // 3])
@pytest.mark.parametrize("gain", [0, 1])
def test_silence_and_a_song_shorter_than_a_beat_are_none(tmp_path: Path, n_samples: int, gain: int) -> None:
    song = write(tmp_path / "song.wav", gain * read(SONG)[:n_samples])
    analysis = analyse(song, {"drums": song, "bass": song, "other": song})
    assert analysis.tempo_bpm is None
    assert analysis.loudness["drums"].integrated_lufs is None
    if not gain:
        assert analysis.key is None


def test_a_part_of_a_song_is_measured_there(tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", np.concatenate([read(SONG)[: 5 * RATE] * 0.1, read(SONG)]))
    loud = analyse(song, {}, excerpt=Excerpt(5)).loudness["mixture"]
    assert loud == analyse(SONG, {}).loudness["mixture"]


def test_the_files_beside_the_stems_are_left_out(tmp_path: Path) -> None:
    drums, no_audio = write(tmp_path / "drums.wav", read(SONG)[:RATE]), tmp_path / "stems.rpp"
    no_audio.write_text("<REAPER_PROJECT>", encoding="utf-8")
    analysis = analyse(drums, {"drums": drums, "project": no_audio, "video": no_audio})
    assert list(analysis.loudness) == ["mixture", "drums"]


def test_an_exception_in_the_progress_cancels(tmp_path: Path) -> None:
    def cancel(share: float, stage: str) -> None:
        if stage == "finding the key":
            raise KeyError(stage)

    with pytest.raises(KeyError):
        analyse(SONG, {}, folder=tmp_path, progress=cancel)
    assert list(tmp_path.iterdir()) == []


class Long:
    """Noise of any length; keeps how much was read at once."""

    def __init__(self, seconds: int) -> None:
        self.n_samples, self.most = seconds * RATE, 0

    def read(self, start: int, stop: int) -> Tensor:
        self.most = max(self.most, stop - start)
        return torch.zeros(2, stop - start)


@pytest.mark.parametrize("measure", [tempo, key, loudness])
def test_a_long_song_is_read_in_blocks(measure: object) -> None:
    assert callable(measure)
    song = Long(60)
    measure(song, RATE)
    assert song.most < 15 * RATE


def test_waveforms_are_analysed_without_files(tmp_path: Path) -> None:
    with Waveform(tmp_path) as wave:
        wave.append(torch.from_numpy(read(SONG).T.copy()))
        assert analyse_waves({"mixture": wave}) == analyse(SONG, {})
