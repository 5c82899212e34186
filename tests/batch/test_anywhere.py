"""Songs are found in stores as they are in folders."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from helpers import common
from helpers.command_line import DEMO, json_lines, separate, settings_of
from helpers.common import PROJECT
from helpers.s3_server import Bucket
from separation.batch import anywhere, run
from separation.batch.anywhere import find_anywhere, unfinished_anywhere
from separation.batch.find import Found
from separation.batch.job import Job
from separation.batch.stores import StoredObject
from separation.batch.urls import Url
from separation.errors import InputError
from separation.system.record import RECORD

OBJECTS = ("music/1.wav", "music/a/2.flac", "music/a/b/3.mp3", "music/.hidden.wav", "music/a/note.txt", "other/4.wav")


@pytest.fixture
def music(bucket: Bucket) -> Bucket:
    for key in OBJECTS:
        bucket.put(key, b"x")
    return bucket


def found(given: Sequence[str], output: Path | Url) -> Found:
    return find_anywhere(given, output, lambda song: song)


def folders(given: Sequence[str], bucket: Bucket) -> dict[str, str]:
    """The songs and their folders, both without the bucket."""
    songs = found([f"{bucket}/{text}" for text in given], Url("s3", bucket.name, "out")).songs
    return {str(song.path).removeprefix(f"{bucket}/"): str(song.folder).removeprefix(f"{bucket}/") for song in songs}


def test_folders_objects_and_patterns_are_read_as_those_of_files(music: Bucket) -> None:
    everything = {"music/1.wav": "out/1", "music/a/2.flac": "out/a/2", "music/a/b/3.mp3": "out/a/b/3"}
    assert folders(["music"], music) == folders(["music/"], music) == folders(["music/**"], music) == everything
    assert folders(["music/a/2.flac", "music/a"], music) == {"music/a/2.flac": "out/2", "music/a/b/3.mp3": "out/b/3"}
    assert folders(["*/*.wav"], music) == {"music/1.wav": "out/music/1", "other/4.wav": "out/other/4"}
    assert folders(["music/**/*.mp3"], music) == {"music/a/b/3.mp3": "out/a/b/3"}
    assert folders([""], music)["other/4.wav"] == "out/other/4" and len(folders([""], music)) == 4
    assert "1 file without a suffix of audio or video (.txt 1)" in found([f"{music}/music"], Path("out")).note()


NAMES = ("Album [2020]/1 of 2.wav", "what?/#1 100%.wav", "ünïcode 音/é&+.wav", "/slash//2.wav")


def test_wildcards_in_names_that_exist_are_taken_literally_and_any_name_is_found(bucket: Bucket) -> None:
    for name in NAMES:
        bucket.put(f"music/{name}", b"x")
    bucket.put("/3.wav", b"x")
    for name in NAMES[:3]:
        folder = name.partition("/")[0]
        expected = {f"music/{name}": f"out/{Path(name).stem}"}
        for given in (f"music/{name}", f"music/{folder}", f"music/{folder}/", f"music/{folder}/*.wav"):
            assert folders([given], bucket) == expected, given
    assert folders(["music//slash"], bucket) == {"music//slash//2.wav": "out/2"}
    assert folders(["music"], bucket)["music//slash//2.wav"] == "out/slash/2"
    assert folders([""], bucket)["/3.wav"] == folders(["/3.wav"], bucket)["/3.wav"] == "out/3"


def test_songs_and_stems_may_be_in_different_places(music: Bucket, tmp_path: Path) -> None:
    (tmp_path / "5.wav").write_bytes(b"x")
    songs = found([f"{music}/other", str(tmp_path)], Url("s3", music.name, "out")).songs
    assert [str(song.folder) for song in songs] == [f"{music}/out/5", f"{music}/out/4"]
    assert songs[0].path == tmp_path / "5.wav"
    (song,) = found([f"{music}/other"], tmp_path / "out").songs
    assert (str(song.path), song.folder) == (f"{music}/other/4.wav", tmp_path / "out" / "4")


def test_stems_and_the_output_are_no_songs(music: Bucket) -> None:
    music.put("music/out/1/vocals.wav", b"x")
    assert "music/out/1/vocals.wav" in folders(["music"], music)
    songs = found([f"{music}/music"], Url("s3", music.name, "music/out")).songs
    assert len(songs) == 3
    record = (
        '{"version": 1, "files": [], "runs": [{"source": {}, "settings": {}, "stems": {"vocals": ["vocals.wav", 1]},'
        '"duration_seconds": 1, "elapsed_seconds": 1, "gain": 1}]}'
    )
    music.put(f"music/out/1/{RECORD}", record.encode())
    assert "music/out/1/vocals.wav" not in folders(["music"], music)
    (failed,) = found([f"{music}/music/out"], Path("out")).failed
    assert "has only stems that this program made: give the songs they came from" in failed.error
    with pytest.raises(InputError, match="is both the output folder and a folder of songs"):
        found([f"{music}/music/"], Url("s3", music.name, "music"))


@pytest.mark.parametrize(
    "address, words",
    [
        ("nothing.wav", "nothing.wav' does not exist: check the address"),
        ("music/a/note.txt/", "does not exist"),
        ("music/*.ogg", "has no audio file: check the address"),
    ],
)
def test_what_is_not_there_fails_alone(address: str, words: str, music: Bucket) -> None:
    result = found([f"{music}/{address}", f"{music}/other"], Path("out"))
    assert len(result.songs) == 1 and [words in outcome.error for outcome in result.failed] == [True]


def test_an_empty_bucket_is_not_missing(bucket: Bucket) -> None:
    (failure,) = found([str(bucket)], Path("out")).failed
    assert failure.error == f"'{bucket}' has no audio file: check the address"


def test_a_missing_bucket_fails_alone_and_as_the_output_at_once(music: Bucket) -> None:
    result = found(["s3://missing-bucket/a", f"{music}/other"], Path("out"))
    assert len(result.songs) == 1 and "s3://missing-bucket does not exist" in result.failed[0].error
    with pytest.raises(InputError, match="s3://missing-bucket does not exist: check the name of the bucket"):
        found([f"{music}/other"], Url("s3", "missing-bucket", "out"))


def test_two_songs_with_one_folder_are_refused(music: Bucket, tmp_path: Path) -> None:
    music.put("music/1.flac", b"x")
    result = found([f"{music}/music"], tmp_path / "out")
    assert len(result.songs) == 2
    errors = sorted(outcome.error for outcome in result.failed)
    assert len(errors) == 2 and all("would share the folder" in error for error in errors)


def test_a_name_that_leads_out_of_the_output_is_refused(tmp_path: Path) -> None:
    result = Found()
    up = StoredObject(Url("s3", "bucket", "music/../up.wav"), 1, "tag")
    assert not list(anywhere._StoreSearch(tmp_path, result)._song(up, PurePosixPath("../up.wav")))
    assert "'s3://bucket/music/../up.wav' has `..` in its name" in result.failed[0].error


@pytest.mark.slow
@pytest.mark.parametrize("many", [0, 99])
def test_finished_songs_are_skipped_and_a_stopped_refresh_resumes(
    many: int, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(anywhere, "MANY", many)
    for number in range(2):
        bucket.put(f"music/{number}.wav", common.song(0.2 + number / 10))
    (tmp_path / "2.wav").write_bytes(common.song(0.4))
    command = (f"{bucket}/music", tmp_path / "2.wav", "-o", f"{bucket}/out", "--json")
    assert separate(*command) == 0
    first = {line["song"]: line for line in json_lines(capsys.readouterr().out)}
    assert first.keys() == {f"{bucket}/music/0.wav", f"{bucket}/music/1.wav", str(tmp_path / "2.wav")}
    assert first[f"{bucket}/music/0.wav"]["stems"]["vocals"] == f"{bucket}/out/0/vocals.wav"
    monkeypatch.setattr(run, "load_separator", None)  # no model is loaded
    assert separate(*command) == 0
    for line in json_lines(capsys.readouterr().out):
        assert line == first[line["song"]] | {"status": "skipped", "tries": 0}
    monkeypatch.undo()
    songs = found([f"{bucket}/music"], Url("s3", bucket.name, "out")).songs
    job = Job(settings_of(*DEMO))
    assert unfinished_anywhere(songs, job)[0] == []
    left, outcomes = unfinished_anywhere(songs, job, force=True)
    assert left == songs and not outcomes
    assert unfinished_anywhere(songs, job)[0] == songs  # until they are separated again


@pytest.mark.slow
def test_tags_are_not_read_from_a_store(bucket: Bucket, capsys: pytest.CaptureFixture[str]) -> None:
    bucket.put("1.wav", common.song(0.2))
    assert separate(f"{bucket}/1.wav", "-o", f"{bucket}/out", "--name", "{artist}/{song}-{stem}.{ext}") == 2
    assert "--name takes no {artist} for songs in an object store" in capsys.readouterr().err
    assert separate(f"{bucket}/1.wav", "-o", f"{bucket}/out", "--name", "{song}-{stem}.{ext}") == 0
    assert [key for key in bucket.keys("out") if ".separation" not in key] == [
        "out/1-instrumental.wav",
        "out/1-vocals.wav",
    ]


def test_the_output_may_not_be_a_web_address(capsys: pytest.CaptureFixture[Any]) -> None:
    assert separate("1.wav", "-o", "https://host/folder") == 2
    assert "'https://host/folder' is no place to write to: give a folder, s3://BUCKET/FOLDER" in capsys.readouterr().err


GOOGLE = """
import sys
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


@pytest.mark.slow
def test_songs_and_stems_may_be_in_google_cloud_storage(tmp_path: Path) -> None:
    for package in ("gcsfs", "gcp_storage_emulator"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host = f"http://127.0.0.1:{port}"
    variables = {"STORAGE_EMULATOR_HOST": host, "no_proxy": "127.0.0.1", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    environment = os.environ | variables
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-W", "ignore", "-c", GOOGLE, str(port)], **quiet)
    try:
        address = f"{host}/upload/storage/v1/b/bucket/o?uploadType=media&name=music/1.wav"
        request = urllib.request.Request(address, common.song(0.3), {"Content-Type": "audio/wav"})
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(request).close()
                break
            except OSError:  # it is still starting
                assert time.monotonic() < deadline and server.poll() is None
                time.sleep(0.1)
        command = [sys.executable, "-m", "separation", "separate", "gs://bucket/music", "gs://none/1.wav", "--json"]
        command += ["-o", "gs://bucket/stems", *DEMO]
        for status in ("done", "skipped"):
            ran = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=200)
            lines = {line["song"]: line for line in json_lines(ran.stdout)}
            assert ran.returncode == 2 and "gs://none" in lines["gs://none/1.wav"]["error"], ran.stderr
            assert lines["gs://bucket/music/1.wav"]["status"] == status
        with urllib.request.urlopen(f"{host}/storage/v1/b/bucket/o?prefix=stems") as answer:
            names = sorted(item["name"] for item in json.load(answer)["items"])
        assert names == [f"stems/1/{name}" for name in (RECORD, "instrumental.wav", "vocals.wav")]
    finally:
        server.kill()
        server.wait()
