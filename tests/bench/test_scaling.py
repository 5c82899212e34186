"""scaling: its figures, of which memory is one that must stay true."""

import sys
from pathlib import Path

import pytest
import soundfile

import scaling

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's account of a process's memory")


def test_a_song_is_written_to_the_sample(tmp_path: Path) -> None:
    info = soundfile.info(scaling.write_song(tmp_path / "song.flac", 31.5))
    assert (info.frames, info.samplerate, info.channels) == (31.5 * 44100, 44100, 2)


@pytest.mark.slow
def test_six_stems_of_any_song_need_less_than_300_mib_above_the_loaded_model(tmp_path: Path) -> None:
    above = []
    for seconds in (30, 480):
        run = scaling.result(scaling.start(scaling.write_song(tmp_path / f"{seconds}.flac", seconds), "all_6"))
        above.append(run["peak"] - run["loaded"])
    assert max(above) < 300, above
    assert above[1] - above[0] < 50, above  # MiB; the longer song's stems alone have 970 MiB
