"""A song of a store is separated as a local one is."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import common
from helpers.command_line import settings_of
from helpers.common import quick_first
from helpers.s3_server import Bucket
from separation.audio.options import OutputOptions
from separation.batch import staged, stores
from separation.batch.job import AnySong, Job, Song
from separation.batch.separate import separate_song
from separation.batch.staged import separate_anywhere
from separation.batch.stored import StoredFolder
from separation.batch.urls import Url
from separation.engine.options import EngineOptions
from separation.engine.separator import Separator
from separation.progress import Progress
from separation.system.record import RECORD

STEMS = ("vocals", "instrumental")


@pytest.fixture(scope="module")
def separator() -> Separator:
    return Separator("demo", options=EngineOptions(device="cpu", chunk_seconds=4, overlap_seconds=1))


@pytest.fixture
def job() -> Job:
    return Job(settings_of("--recipe", "demo"), dict.fromkeys(STEMS, "demo"))


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The temporary folder, which is empty in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(staged, "gettempdir", lambda: str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "stored", ["both", *(pytest.param(name, marks=pytest.mark.slow) for name in ("song", "stems"))]
)
def test_the_stems_are_those_of_a_local_song_and_the_song_is_then_skipped(
    stored: str, bucket: Bucket, separator: Separator, job: Job, tmp_path: Path
) -> None:
    local = Song(tmp_path / "1.wav", tmp_path / "alone")
    local.path.write_bytes(common.song(0.3))
    bucket.put("1.wav", local.path.read_bytes())
    song = AnySong(local.path, tmp_path / "out")
    song = song if stored == "stems" else replace(song, path=Url("s3", bucket.name, "1.wav"))
    song = song if stored == "song" else replace(song, folder=Url("s3", bucket.name, "out"))
    shares: list[float] = []
    outcome = separate_anywhere(song, job, separator, Progress(lambda share, _: shares.append(share)))
    assert (outcome.status, outcome.path, outcome.error) == ("done", song.path, "") and shares == sorted(shares)
    separate_song(local, job, separator, Progress())
    for stem in STEMS:
        assert outcome.stems[stem] == song.folder / f"{stem}.wav"
        there = bucket.get(f"out/{stem}.wav") if stored != "song" else (tmp_path / "out" / f"{stem}.wav").read_bytes()
        assert there == (local.folder / f"{stem}.wav").read_bytes()
    if stored != "song":
        assert bucket.keys("out") == [f"out/{name}" for name in (RECORD, "instrumental.wav", "vocals.wav")]
    again = separate_anywhere(song, job, separator, Progress())
    assert again == replace(outcome, status="skipped", facts=again.facts)


@pytest.mark.slow
def test_a_page_and_an_analysis_are_added_from_the_stems_in_the_store(
    bucket: Bucket, separator: Separator, job: Job
) -> None:
    bucket.put("1.wav", common.song(0.5))
    song = AnySong(Url("s3", bucket.name, "1.wav"), Url("s3", bucket.name, "out"))
    first = separate_anywhere(song, job, separator, Progress())
    before = bucket.files.info(f"{bucket.name}/out/vocals.wav")["LastModified"]
    more: Any = None  # no model is needed
    job = replace(job, report=True, analyse=True)
    outcome = separate_anywhere(song, job, more, Progress())
    assert outcome.status == "done" and outcome.stems == first.stems and outcome.analysis is not None
    assert str(outcome.page) == f"{bucket}/out/stems.html" and b"vocals" in bucket.get("out/stems.html")
    assert bucket.files.info(f"{bucket.name}/out/vocals.wav")["LastModified"] == before
    assert separate_anywhere(song, job, more, Progress()) == replace(outcome, status="skipped")


def test_a_song_that_another_worker_has_finished_meanwhile_is_dropped(
    bucket: Bucket, separator: Separator, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("1.wav", common.song(0.3))
    song = AnySong(Url("s3", bucket.name, "1.wav"), Url("s3", bucket.name, "out"))

    def slow(*arguments: Any) -> Any:  # while another worker does it
        monkeypatch.setattr(staged, "separate_song", separate_song)
        assert separate_anywhere(song, job, separator, Progress()).status == "done"
        before.append(bucket.files.info(f"{bucket.name}/out/{RECORD}"))
        return separate_song(*arguments)

    before: list[Any] = []
    monkeypatch.setattr(staged, "separate_song", slow)
    assert separate_anywhere(song, job, separator, Progress()).status == "skipped"
    assert bucket.files.info(f"{bucket.name}/out/{RECORD}") == before[0]
    assert StoredFolder(replace(song, origin=staged._at_origin(song)[0].origin), job).run() is not None


@pytest.mark.parametrize(
    "kind, words",
    quick_first(
        [
            ("missing", "1.wav' does not exist: check the address"),
            ("damaged", "'1.wav' is not audio"),
            ("in the way", "out/vocals.wav' already exists and is not an object that this program wrote"),
            ("no bucket", "s3://missing-bucket does not exist: check the name of the bucket"),
        ],
        2,
    ),
)
def test_a_song_that_cannot_be_separated_fails_alone_and_leaves_nothing(
    kind: str, words: str, bucket: Bucket, separator: Separator, job: Job
) -> None:
    if kind != "missing":
        bucket.put("1.wav", b"words" if kind == "damaged" else common.song(0.3))
    if kind == "in the way":
        bucket.put("out/vocals.wav", b"mine")
    before = bucket.keys()
    there = "missing-bucket" if kind == "no bucket" else bucket.name
    song = AnySong(Url("s3", bucket.name, "1.wav"), Url("s3", there, "out"))
    outcome = separate_anywhere(song, job, separator, Progress())
    assert outcome.status == "failed" and words in outcome.error and not outcome.stems
    assert outcome.path == song.path and bucket.keys() == before


def test_a_full_temporary_folder_is_named(
    bucket: Bucket, separator: Separator, job: Job, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("1.wav", common.song(0.3))
    song = AnySong(Url("s3", bucket.name, "1.wav"), Url("s3", bucket.name, "out"))

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores.os, "replace", full)
    outcome = separate_anywhere(song, job, separator, Progress())
    assert outcome.error == (
        f"cannot write to the temporary folder {str(temporary)!r} (No space left on device): free space there, or set "
        "TMPDIR to another folder"
    )


def test_a_cancelled_song_leaves_nothing(bucket: Bucket, separator: Separator, job: Job) -> None:
    bucket.put("1.wav", common.song(0.3))
    song = AnySong(Url("s3", bucket.name, "1.wav"), Url("s3", bucket.name, "out"))
    for stage in ("downloading", "decoding", "uploading"):

        def cancel(share: float, now: str, stage: str = stage) -> None:
            if now == stage:
                raise KeyError(stage)

        with pytest.raises(KeyError, match=stage):
            separate_anywhere(song, job, separator, Progress(cancel))
        assert bucket.keys() == ["1.wav"]


@pytest.mark.slow
def test_objects_are_replaced_with_overwrite(bucket: Bucket, separator: Separator, job: Job) -> None:
    bucket.put("1.wav", common.song(0.3))
    bucket.put("out/vocals.wav", b"mine")
    song = AnySong(Url("s3", bucket.name, "1.wav"), Url("s3", bucket.name, "out"))
    job = replace(job, output=OutputOptions(overwrite=True))
    assert separate_anywhere(song, job, separator, Progress()).status == "done"
    assert bucket.get("out/vocals.wav") != b"mine"
