"""A song's folder in a store always has a record that describes the stems that are there, or none that counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.common import quick_first
from helpers.s3_server import Bucket
from separation.audio.options import OutputOptions
from separation.batch.job import AnySong, Job, Origin
from separation.batch.stored import StoredFolder, Upload
from separation.batch.stores import Store, StoredObject
from separation.batch.urls import Url
from separation.errors import OutputError
from separation.progress import Progress
from separation.system.record import RECORD, Record

NAMES = ["vocals.wav", "instrumental.wav"]
JOB = Job({"format": "wav"}, {"vocals": "demo", "instrumental": "demo"})


def song_in(bucket: Bucket, name: str = "1.wav", tag: str = "tag") -> AnySong:
    path = Url("s3", bucket.name, name)
    return AnySong(path, Url("s3", bucket.name, "out/1"), origin=Origin(str(path), 7, tag))


def made(folder: Path, content: bytes, song: AnySong) -> dict[str, Any]:
    """The run of stems with this content in a local folder, as `separate_song` records it."""
    assert song.origin is not None
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        (folder / name).write_bytes(content + name.encode())
    source = {"name": song.path.name, "path": song.origin.path, "bytes": 7, "tag": song.origin.tag, "sha256": "1"}
    stems = {name.partition(".")[0]: (name, (folder / name).stat().st_size) for name in NAMES}
    run = {"source": source, "settings": JOB.settings, "stems": stems}
    run |= {"duration_seconds": 1.0, "elapsed_seconds": 1.0, "gain": 1.0}
    record = Record().with_files(folder, {name: folder / name for name in NAMES}).with_run(run)
    (folder / RECORD).write_text(record.text())
    return run


def publish(folder: Path, content: bytes, song: AnySong, progress: Progress = Progress()) -> None:
    run = made(folder, content, song)
    Upload(song, JOB, folder, NAMES).publish(run, progress)


def stems(bucket: Bucket) -> set[bytes]:
    """How the stems in the bucket begin."""
    return {bucket.get(f"out/1/{name}").removesuffix(name.encode()) for name in NAMES}


def test_a_published_song_is_done_until_a_stem_or_the_song_changes(bucket: Bucket, tmp_path: Path) -> None:
    song = song_in(bucket)
    assert StoredFolder(song, JOB).run() is None
    publish(tmp_path / "a", b"a", song)
    run = StoredFolder(song, JOB).run()
    assert run is not None and StoredFolder(song, JOB).is_complete(run)
    outcome = StoredFolder(song, JOB).outcome("skipped", run)
    assert str(outcome.stems["vocals"]) == f"{bucket}/out/1/vocals.wav" and outcome.path == song.path
    assert StoredFolder(song_in(bucket, tag="new"), JOB).run() is None
    assert StoredFolder(song, Job({"format": "flac"}, JOB.stems)).run() is None
    bucket.put("out/1/vocals.wav", b"bvocals.wav")  # of the same size
    assert StoredFolder(song, JOB).run() is None


def test_an_object_that_this_program_did_not_write_and_another_songs_stems_are_not_replaced(
    bucket: Bucket, tmp_path: Path
) -> None:
    song = song_in(bucket)
    bucket.put("out/1/vocals.wav", b"mine")
    with pytest.raises(OutputError, match=r"vocals\.wav' already exists and is not an object that this program wrote"):
        StoredFolder(song, JOB).check(None)
    StoredFolder(song, Job(JOB.settings, JOB.stems, OutputOptions(overwrite=True))).check(None)
    bucket.remove("out/1/vocals.wav")
    publish(tmp_path / "a", b"a", song)
    StoredFolder(song_in(bucket, tag="new"), JOB).check(None)  # a new version of the song may replace its stems
    with pytest.raises(OutputError, match=f"'{bucket}/out/1' has the stems of another song, '{bucket}/1.wav'"):
        StoredFolder(song_in(bucket, "2.wav", "other"), JOB).check(None)
    bucket.remove(f"out/1/{RECORD}")  # as if a worker had died before it wrote the record
    StoredFolder(song, JOB).check(None)
    listed = {found.url: found for found in Store("s3").objects(song.folder)}
    StoredFolder(song, JOB, listed.get).check(None)


def test_an_upload_that_fails_removes_what_it_added(bucket: Bucket, tmp_path: Path) -> None:
    def cancel(share: float, stage: str) -> None:
        if share > 0.5:
            raise KeyError("cancelled")

    with pytest.raises(KeyError, match="cancelled"):
        publish(tmp_path / "a", b"a", song_in(bucket), Progress(cancel))
    assert bucket.keys() == []


@pytest.mark.parametrize("n_steps", quick_first(range(4), 2))
def test_two_workers_that_publish_one_song_at_once_never_leave_a_mixture(
    n_steps: int, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second worker does all of its work after any request of the first that writes or looks."""
    song, steps = song_in(bucket), [0]
    upload, write, head = Store.upload, Store.write, Store.head
    other = tmp_path / "b"

    def interfere() -> None:
        steps[0] += 1
        if steps[0] == n_steps + 1:
            publish(other, b"b", song)

    def uploaded(self: Store, *arguments: Any) -> StoredObject:
        found = upload(self, *arguments)
        interfere()
        return found

    def written(self: Store, *arguments: Any) -> None:
        write(self, *arguments)
        interfere()

    def looked(self: Store, url: Url) -> StoredObject | None:
        found = head(self, url)
        if steps[0] == 3:  # after the record
            interfere()
        return found

    monkeypatch.setattr(Store, "upload", uploaded)
    monkeypatch.setattr(Store, "write", written)
    monkeypatch.setattr(Store, "head", looked)
    publish(tmp_path / "a", b"a", song)
    assert steps[0] > n_steps
    monkeypatch.undo()
    assert len(stems(bucket)) == 1
    assert StoredFolder(song, JOB).run() is not None
    assert len(json.loads(bucket.get(f"out/1/{RECORD}"))["runs"]) == 1


def test_a_worker_that_dies_between_two_stems_of_a_finished_song_is_seen(bucket: Bucket, tmp_path: Path) -> None:
    song = song_in(bucket)
    publish(tmp_path / "a", b"a", song)
    made(tmp_path / "b", b"b", song)
    Store("s3").upload(tmp_path / "b" / "vocals.wav", song.folder / "vocals.wav", "another run")
    assert StoredFolder(song, JOB).run() is None
    publish(tmp_path / "a", b"a", song)
    assert StoredFolder(song, JOB).run() is not None and stems(bucket) == {b"a"}
