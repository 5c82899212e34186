"""The formats of the local page: what it offers, and what comes of each."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helpers.common import STEMS, needs_ffmpeg, read, song
from helpers.page_server import Process
from separation.audio.options import STEM_FILE
from separation.web import formats
from separation.web.formats import FORMATS, offered


def test_formats_that_need_ffmpeg_are_offered_only_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "is_installed", lambda: False)
    assert list(offered()) == ["wav", "wav24", "flac", "mp3", "reaper"]
    monkeypatch.setattr(formats, "is_installed", lambda: True)
    assert list(offered()) == list(FORMATS)
    assert {name for name, format in offered().items() if format["stems"] is not None} == {STEM_FILE}
    assert {name for name, format in offered().items() if format["stereo"]} == {STEM_FILE}


@pytest.mark.slow
def test_a_reaper_project_comes_with_its_stems_in_one_archive(server: Process, short: bytes) -> None:
    id = server.send(short, format="reaper")
    status = server.wait_until_over(id)
    assert list(status["files"]) == ["vocals.wav", "instrumental.wav", "stems.rpp", "stems.html"]
    archive = zipfile.ZipFile(io.BytesIO(server.ask("GET", f"/songs/{id}/stems.zip")[1]))
    assert archive.namelist() == ["song/vocals.wav", "song/instrumental.wav", "song/stems.rpp"]
    project = archive.read("song/stems.rpp").decode()
    assert all(f'FILE "{stem}.wav"' in project for stem in ("vocals", "instrumental"))
    page = server.ask("GET", f"/songs/{id}/stems.html")[1]
    assert '"\\u2193 REAPER project as zip": "stems.zip"' in page and "stems.rpp" not in page


@needs_ffmpeg
@pytest.mark.slow
def test_a_stem_file_has_a_page_a_mix_and_the_songs_name(server: Process) -> None:
    id = server.send(song(2), "Höhle.wav", format=STEM_FILE, stems="all_4")
    status = server.wait_until_over(id)
    assert (status["problem"], list(status["files"])) == ("", ["stems.stem.mp4", "stems.html"])
    assert server.ask("GET", f"/songs/{id}/stems.stem.mp4")[1][4:8] == b"ftyp"
    assert server.headers["Content-Disposition"].endswith("''H%C3%B6hle.stem.mp4")
    page = server.ask("GET", f"/songs/{id}/stems.html")[1]
    assert all(f'"name": "{stem}"' in page for stem in STEMS["all_4"])
    mix = read(server.ask("GET", f"/songs/{id}/mix.wav?drums=1&bass=1&other=1&vocals=1")[1])
    assert np.abs(mix - read(song(2))).max() < 0.2  # AAC


@pytest.mark.slow
def test_wav_has_24_bits_if_wanted(server: Process, short: bytes, tmp_path: Path) -> None:
    id = server.send(short, format="wav24")
    server.wait_until_over(id)
    stem = server.ask("GET", f"/songs/{id}/vocals.wav")[1]
    assert soundfile.info(io.BytesIO(stem)).subtype == "PCM_24"


@pytest.mark.slow
def test_a_mono_song_has_mono_stems_if_wanted(server: Process) -> None:
    mono = io.BytesIO()
    soundfile.write(mono, read(song(0.3)).mean(axis=1), 44100, format="WAV")
    id = server.send(mono.getvalue(), channels="source")
    assert server.wait_until_over(id)["state"] == "done"
    assert soundfile.info(io.BytesIO(server.ask("GET", f"/songs/{id}/vocals.flac")[1])).channels == 1
