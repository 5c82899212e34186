"""scaling.py reports figures, and memory does not grow with the song."""

import shutil
import sys
from pathlib import Path

import pytest
import soundfile

import scaling
from helpers.common import GIVES_BACK

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's account of a process's memory")


def test_a_song_is_written_to_the_sample(tmp_path: Path) -> None:
    info = soundfile.info(scaling.write_song(tmp_path / "song.flac", 31.5))
    assert (info.frames, info.samplerate, info.channels) == (31.5 * 44100, 44100, 2)


@pytest.mark.slow
def test_six_stems_of_any_song_need_less_than_300_mib_above_the_loaded_model(tmp_path: Path) -> None:
    above = []
    for seconds in (30, 480):
        song = scaling.write_song(tmp_path / f"{seconds}.flac", seconds)
        run = scaling.result(scaling.start(song, "all_6", environment=GIVES_BACK))
        above.append(run["peak"] - run["loaded"])
    assert max(above) < 300, above
    assert above[1] - above[0] < 50, above  # MiB; the stems of the longer song alone take 970 MiB


@pytest.mark.slow
def test_an_hour_at_48_khz_needs_no_more_memory_than_three_minutes(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 9e9:
        pytest.skip("needs 9 GB of space for temporary files")
    peaks = []
    for seconds in (180, 3600):
        song = scaling.write_song(tmp_path / f"{seconds}.flac", seconds, 48000)
        peaks.append(scaling.result(scaling.start(song, "all_4", tiny=True))["peak"])
        infos = [soundfile.info(path) for path in (tmp_path / str(seconds)).glob("*.flac")]
        shutil.rmtree(tmp_path / str(seconds))
        song.unlink()
        assert {(info.name.split("/")[-1], info.frames, info.samplerate) for info in infos} == {
            ("vocals.flac", seconds * 48000, 48000),
            ("no_vocals.flac", seconds * 48000, 48000),
        }
    assert peaks[1] - peaks[0] < 50, peaks  # MiB; one stem of the longer song takes 1318 MiB
