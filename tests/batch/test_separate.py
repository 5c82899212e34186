"""A song is separated, analysed and given a page, each only if it is not done."""

import re
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from helpers import common
from helpers.command_line import json_lines, separate, write_songs
from helpers.common import needs_ffmpeg
from separation.audio.options import OutputOptions
from separation.batch import separate as one_song
from separation.batch.done import unfinished
from separation.batch.job import Job, Song
from separation.batch.separate import separate_song
from separation.engine.options import EngineOptions
from separation.engine.separator import Separator
from separation.progress import Progress
from separation.system.names import Place, song_fields
from separation.system.record import RECORD


@pytest.mark.slow
def test_a_page_is_added_to_finished_stems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_songs(tmp_path, "1.wav")
    assert separate(tmp_path / "1.wav", "-o", tmp_path / "out") == 0
    before = (tmp_path / "out" / "1" / "vocals.wav").stat().st_mtime_ns
    for status in ("done", "skipped"):
        capsys.readouterr()
        assert separate(tmp_path / "1.wav", "-o", tmp_path / "out", "--report", "--json") == 0
        assert json_lines(capsys.readouterr().out)[0]["status"] == status
    assert (tmp_path / "out" / "1" / "stems.html").exists()
    assert (tmp_path / "out" / "1" / "vocals.wav").stat().st_mtime_ns == before


def test_songs_in_one_folder_are_skipped_when_they_are_done_and_do_not_replace_one_another(tmp_path: Path) -> None:
    place = partial(Place.of, "{artist}/{song} {stem}.{ext}")
    songs = []
    for number, name in enumerate(("a", "b")):
        (tmp_path / f"{name}.wav").write_bytes(common.song(0.3 + number / 10))
        at = place(song_fields(name, {}, "demo"))
        songs.append(Song(tmp_path / f"{name}.wav", tmp_path / "out" / at.folder, replace(at, folder="")))
    job = Job({}, {"vocals": "demo", "instrumental": "demo"}, OutputOptions(name="{artist}/{song} {stem}.{ext}"))
    separator = Separator("demo", options=EngineOptions(device="cpu"))
    assert unfinished(songs, job) == (songs, [])
    outcomes = [separate_song(song, job, separator, Progress()) for song in songs]
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    folder = tmp_path / "out" / "Unknown artist"
    visible = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert visible == ["a instrumental.wav", "a vocals.wav", "b instrumental.wav", "b vocals.wav"]
    left, finished = unfinished(songs, job)
    assert left == [] and [outcome.stems for outcome in finished] == [outcome.stems for outcome in outcomes]
    (folder / "b vocals.wav").unlink()
    assert unfinished(songs, job)[0] == songs[1:]
    other = Song(tmp_path / "b.wav", folder, songs[0].place)
    assert "has the stems of another song" in unfinished([other], job)[1][0].error


@pytest.mark.slow
def test_an_analysis_is_recorded_and_can_follow_later_without_separating_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_songs(tmp_path, "1.wav", seconds=4)
    command = (tmp_path / "1.wav", "-o", tmp_path / "out", "--json", "--report")
    assert separate(*command) == 0
    (plain,) = json_lines(capsys.readouterr().out)
    assert "analysis" not in plain
    assert '"tempo": null, "key": null' in Path(plain["page"]).read_text(encoding="utf-8")
    assert separate(*command, "--analyse") == 0
    (analysed,) = json_lines(capsys.readouterr().out)
    assert analysed["status"] == "done" and analysed["elapsed_seconds"] == plain["elapsed_seconds"]
    assert analysed["analysis"]["tempo_bpm"] == pytest.approx(128, rel=0.01)
    assert list(analysed["analysis"]["loudness"]) == ["mixture", *analysed["stems"]]
    assert re.search(r'"tempo": 12[78]\.', Path(plain["page"]).read_text(encoding="utf-8"))
    assert separate(*command, "--analyse") == 0
    (skipped,) = json_lines(capsys.readouterr().out)
    assert skipped == {**analysed, "status": "skipped", "tries": 0}


@pytest.mark.slow
def test_a_damaged_record_of_an_analysis_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_songs(tmp_path, "1.wav", seconds=1)
    command = (tmp_path / "1.wav", "-o", tmp_path / "out", "--analyse", "--json")
    assert separate(*command) == 0
    record = tmp_path / "out" / "1" / RECORD
    record.write_text(record.read_text().replace("tempo_bpm", "speed"))
    first, again = capsys.readouterr().out, separate(*command)
    assert again == 0
    assert json_lines(capsys.readouterr().out) == json_lines(first)


@pytest.mark.slow
def test_songs_with_tempo_and_key_in_their_names_are_named_when_they_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_songs(tmp_path, "a.wav", seconds=4)
    template = "{bpm} {key}/{song} ({stem}).{ext}"
    command = (tmp_path / "a.wav", "-o", tmp_path / "out", "--json", "--reaper", "--name", template)
    assert separate(*command) == 0
    (made,) = json_lines(capsys.readouterr().out)
    analysis = made["analysis"]
    assert analysis["tempo_bpm"] == pytest.approx(128, abs=0.5)
    folder = tmp_path / "out" / f"128 {analysis['key'].replace(' major', '').replace(' minor', 'm')}"
    assert made["stems"]["vocals"] == str(folder / "a (vocals).wav") and Path(made["stems"]["vocals"]).exists()
    project = Path(made["stems"]["project"])
    assert project.exists() and f"{folder.name}/a (vocals).wav" in project.read_text(encoding="utf-8")
    monkeypatch.setattr(one_song.Separator, "separate_file", None)  # nothing is separated again
    assert separate(*command) == 0
    assert json_lines(capsys.readouterr().out) == [{**made, "status": "skipped", "tries": 0}]
    assert separate(*command, "--report") == 0
    (with_page,) = json_lines(capsys.readouterr().out)
    page = Path(with_page["page"])
    assert page == tmp_path / "out" / "a (stems).html" and page.exists() and with_page["stems"] == made["stems"]


@pytest.mark.slow
def test_names_with_the_tempo_that_clash_are_refused_as_early_as_they_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_songs(tmp_path / "music", "a.wav", "b.wav", seconds=4)
    out = tmp_path / "out"
    assert separate(tmp_path / "music", "-o", out, "--name", "{bpm} {stem}.{ext}") == 2
    told = capsys.readouterr().err
    assert told.count("would share the file") == 2 and "{bpm} {stem}.{ext}" in told and not out.exists()
    assert told.count(": add a field to the name, such as {song} or {folder}, or separate each with its own -o\n") == 2
    out.mkdir()
    (out / "128 vocals.wav").write_text("mine")
    command = (tmp_path / "music" / "a.wav", "-o", out, "--name", "{bpm} {stem}.{ext}")
    assert separate(*command) == 2
    assert "128 vocals.wav' already exists and is not a file" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["128 vocals.wav"]
    assert (out / "128 vocals.wav").read_text() == "mine"
    assert separate(*command, "--overwrite") == 0
    assert (out / "128 instrumental.wav").exists()
    song = (tmp_path / "music" / "a.wav").rename(out / "128 drums.wav")
    before = song.read_bytes()
    options = ("-o", out, "--name", "{bpm} {stem}.{ext}", "--overwrite", "--only", "drums")
    assert separate(song, *options) == 2
    assert "a stem would overwrite the song" in capsys.readouterr().err and song.read_bytes() == before


@needs_ffmpeg
def test_only_a_song_that_must_have_a_picture_keeps_its_video(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_songs(tmp_path, "1.wav")
    (tmp_path / "2.mp3").write_text("words")
    plain, broken = (Song(tmp_path / name, tmp_path / "out") for name in ("1.wav", "2.mp3"))
    job = Job({}, output=OutputOptions(video="vocals"))
    assert one_song._video(plain, job) is None
    assert caplog.messages == ["there is no picture, so only the stems are written"]
    for song, of in ((plain, replace(job, needs_picture=True)), (broken, job)):  # whose errors come later
        assert one_song._video(song, of) == "vocals"


@needs_ffmpeg
@pytest.mark.slow
def test_songs_without_a_picture_in_a_folder_of_videos_get_their_stems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    music, out = tmp_path / "phone", tmp_path / "out"
    write_songs(music, "song.wav")
    (music / "broken.mp3").write_text("words")
    picture = ("-f", "lavfi", "-i", "testsrc=size=64x48:rate=25:duration=0.3")
    encoding = ("-c:v", "mpeg4", "-c:a", "aac", "-shortest", str(music / "clip.mp4"))
    subprocess.run(["ffmpeg", "-v", "error", *picture, "-i", str(music / "song.wav"), *encoding], check=True)
    command = ("-o", out, "--video", "instrumental", "--json")
    for statuses in (["failed", "done", "done"], ["failed", "skipped", "skipped"]):
        assert separate(music, *command) == 2
        captured = capsys.readouterr()
        lines = sorted(json_lines(captured.out), key=lambda line: line["song"])
        assert [line["status"] for line in lines] == statuses
        assert "'broken.mp3' is not audio" in lines[0]["error"]
        assert [*lines[1]["stems"]] == ["vocals", "instrumental", "video"] and lines[1]["warnings"] == []
        assert [*lines[2]["stems"]] == ["vocals", "instrumental"]
        assert lines[2]["warnings"] == ["'song.wav': there is no picture, so only the stems are written"]
    assert (out / "clip" / "video.mp4").exists() and not list((out / "song").glob("video*"))
    assert separate(music / "song.wav", music / "clip.mp4", "-o", tmp_path / "named", "--video", "vocals") == 0
    capsys.readouterr()
    assert separate(music / "song.wav", "-o", tmp_path / "alone", "--video", "vocals") == 2
    assert capsys.readouterr().err == "error: 'song.wav' has no picture: leave the video out\n"
    assert not (tmp_path / "alone").exists()
