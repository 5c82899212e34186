"""The songs of the local page on disk: they survive the end of the server, and nothing is lost silently."""

import logging
import os
import secrets
import signal
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.common import song
from helpers.page_server import QUICK, Process, idle_server
from helpers.served_process import wait_for
from separation.analysis.facts import Loudness, SongAnalysis
from separation.audio.excerpt import Excerpt
from separation.cli.main import main
from separation.errors import InputError, OutputError
from separation.web.order import Order
from separation.web.queued import ID, ID_BYTES, STATE, WORK_PREFIX, QueuedSong, locked_folder, restored

STOPPED = "the server was stopped while 'song.flac' was being sent: send it again"
ORDER = Order("song.flac", "flac", "demo", "vocals_instrumental")


def put(folder: Path, state: str, content: bytes = b"sound", order: Order = ORDER, **values: Any) -> QueuedSong:
    """A song in a state, with its file and, if it is done, a stem."""
    id = secrets.token_urlsafe(ID_BYTES)
    queued = QueuedSong(id, order, len(content), folder / id, state, **values)
    queued.save()
    for path in (queued.path, queued.folder / "stems" / "vocals.flac"):
        path.parent.mkdir()
        path.write_bytes(content)
    if state == "done":
        queued.files = {"vocals.flac": queued.folder / "stems" / "vocals.flac"}
    queued.save()
    return queued


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# One song


def test_a_song_is_on_disk_as_it_is(tmp_path: Path) -> None:
    analysis = SongAnalysis(128.0, "F# minor", {"mixture": Loudness(-14.0, 5.5, None)})
    saved = put(tmp_path, "done", problem="no page", queued=5.0, analysis=analysis, is_damaged=True, is_video=True)
    os.utime(saved.folder / STATE, (7, 7))
    loaded = QueuedSong.load(saved.folder)
    for field in (
        "id",
        "order",
        "n_bytes",
        "folder",
        "state",
        "problem",
        "files",
        "queued",
        "analysis",
        "is_damaged",
        "is_video",
    ):
        assert getattr(loaded, field) == getattr(saved, field)
    assert loaded.touched == 7
    loaded.touch()
    assert QueuedSong.load(saved.folder).touched == pytest.approx(loaded.touched, abs=1)
    assert ID.fullmatch(saved.id)


def test_nobody_else_can_read_the_songs(tmp_path: Path) -> None:
    saved = put(tmp_path, "waiting")
    assert stat.S_IMODE(saved.folder.stat().st_mode) == 0o700


def test_a_song_that_failed_keeps_only_the_reason(tmp_path: Path) -> None:
    saved = put(tmp_path, "waiting")
    saved.fail("it is not music: sing")
    assert names(tmp_path) == [f"{saved.id}/{STATE}"]
    assert QueuedSong.load(saved.folder).problem == "it is not music: sing"


def test_a_damaged_song_keeps_its_file_as_long_as_that_is_complete(tmp_path: Path) -> None:
    saved = put(tmp_path, "separating", is_damaged=True)
    saved.fail("it is cut short: get the file again, or use what is there")
    assert names(tmp_path) == [f"{saved.id}/{STATE}", f"{saved.id}/song/song.flac"]
    (found,) = restored(tmp_path)
    assert (found.state, found.again, found.problem) == ("failed", "rest", saved.problem)
    saved.path.write_bytes(b"so")
    (found,) = restored(tmp_path)
    assert (found.state, found.again, found.problem) == ("failed", None, saved.problem)


# All songs


@pytest.mark.parametrize(
    "state, after, problem, kept",
    [
        ("waiting", "waiting", "", ["song.json", "song/song.flac"]),
        ("separating", "waiting", "", ["song.json", "song/song.flac"]),
        ("done", "done", "", ["song.json", "song/song.flac", "stems/vocals.flac"]),
        ("receiving", "failed", STOPPED, ["song.json"]),
    ],
)
def test_songs_go_on_where_they_were(tmp_path: Path, state: str, after: str, problem: str, kept: list[str]) -> None:
    saved = put(tmp_path, state)
    (found,) = restored(tmp_path)
    assert (found.id, found.state, found.problem) == (saved.id, after, problem)
    assert names(saved.folder) == kept
    (again,) = restored(tmp_path)
    assert (again.state, again.problem) == (after, problem)


def test_songs_keep_their_order(tmp_path: Path) -> None:
    ids = [put(tmp_path, "waiting", queued=when).id for when in (3.0, 1.0, 2.0)]
    assert [found.id for found in restored(tmp_path)] == [ids[1], ids[2], ids[0]]


@pytest.mark.parametrize(
    "state, gone, words",
    [
        ("waiting", "song/song.flac", "is not complete any more: send it again"),
        ("done", "stems/vocals.flac", "are not here any more: send it again"),
    ],
)
def test_a_song_whose_files_are_gone_says_so(tmp_path: Path, state: str, gone: str, words: str) -> None:
    saved = put(tmp_path, state)
    (saved.folder / gone).unlink()
    (found,) = restored(tmp_path)
    assert found.state == "failed" and words in found.problem


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "it is damaged"),
        ("[]", "it is damaged"),
        ("[" * 100_000, "it is damaged"),
        ('{"version": 1}', "it is damaged"),
        ('{"version": 2}', "it is damaged"),
        (None, "No such file or directory"),
        ("no_such_recipe", "unknown recipe 'no_such': choose one of"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(
    tmp_path: Path, text: str | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved = put(tmp_path, "waiting")
    record = saved.folder / STATE
    if text is None:
        record.unlink()
    else:
        other = record.read_text().replace('"demo"', '"no_such"')
        record.write_text(other if text == "no_such_recipe" else text)
    with caplog.at_level(logging.WARNING):
        (found,) = restored(tmp_path)
    assert (found.id, found.state) == (saved.id, "failed")
    assert found.problem.startswith("'song.flac' lost its place in the queue, because its record cannot be used (")
    assert reason in found.problem
    assert [str(record) in line and reason in line for line in caplog.messages] == [True]
    assert saved.path.is_file()  # until it expires


def test_what_a_killed_server_was_working_on_is_removed(tmp_path: Path) -> None:
    for state in ("waiting", "done"):
        saved = put(tmp_path, state)
        (saved.folder / f"{WORK_PREFIX}x").mkdir()
        (saved.folder / f"{WORK_PREFIX}x" / "mix.wav").write_bytes(b"half")
    assert [found.state for found in restored(tmp_path)] in (["waiting", "done"], ["done", "waiting"])
    assert not list(tmp_path.rglob("mix.wav"))


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "Album").mkdir()
    (tmp_path / "Album" / "song.flac").write_bytes(b"music")
    (tmp_path / ("x" * 22)).write_bytes(b"music")
    assert restored(tmp_path) == []
    assert names(tmp_path) == ["Album/song.flac", "x" * 22]


def test_two_servers_do_not_share_their_songs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEPARATION_SONGS", str(tmp_path / "songs"))
    other = "use its page, or set SEPARATION_SONGS to another folder"
    message = f"another server has the songs in '{tmp_path}/songs': {other}"
    with locked_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with pytest.raises(InputError) as refused, locked_folder():
            pass
        assert str(refused.value) == message
        assert main(["serve", "--port", "0", "--no-browser", "--device", "cpu"]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    with locked_folder():
        pass


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEPARATION_SONGS", str(tmp_path / "file" / "songs"))
    refused = pytest.raises(OutputError, match=r"cannot keep songs in '.*songs' .*: set SEPARATION_SONGS to another")
    with refused, locked_folder():
        pass


# Servers


def test_the_file_of_a_part_is_used_again_without_another_upload(tmp_path: Path, short: bytes) -> None:
    part = put(tmp_path, "done", short, replace(ORDER, part=Excerpt(0.5, 1), song_seconds=2.0))
    whole = put(tmp_path, "done", short)
    with idle_server(tmp_path) as (client, _, _):
        assert [client.status(song.id)["again"] for song in (part, whole)] == ["whole", None]
        order = {"name": "another name", "again": part.id} | QUICK
        status, answer = client.ask("POST", "/songs", order | {"stems": "all_4"})
        assert status == 201
        found = client.status(answer["id"])
        assert [found[key] for key in ("state", "name", "stems", "seconds")] == ["waiting", "song.flac", "all_4", 2.0]
        client.ask("DELETE", f"/songs/{part.id}")
        assert client.ask("POST", "/songs", order)[0] == 404
        whole.path.unlink()
        status, message = client.ask("POST", "/songs", order | {"again": whole.id})
        assert (status, message) == (409, "'song.flac' is not on the server any more: send it again")
    assert (tmp_path / answer["id"] / "song" / "song.flac").read_bytes() == short


def test_a_damaged_song_is_kept_by_the_next_server_and_can_be_ordered_again(tmp_path: Path) -> None:
    content = song(2)[: 2**18]  # of 705,644 bytes
    with idle_server(tmp_path) as (client, songs, _):
        threading.Thread(target=songs.run, daemon=True).start()
        refused = client.wait_until_over(id := client.send(content, channels="mono"))
        assert (refused["state"], refused["again"], refused["files"]) == ("failed", "rest", {})
        told = "'song.wav' is cut short (the last 1.26 s of 2.00 s are missing, from 0.74 s on)"
        assert refused["problem"] == f"{told}: get the file again, or use what is there"
    with idle_server(tmp_path) as (client, songs, _):
        kept = client.status(id)
        assert [kept[key] for key in ("state", "again", "problem")] == ["failed", "rest", refused["problem"]]
        order = {"name": "", "again": id, "accept_damaged": True, "channels": "mono"} | QUICK
        status, answer = client.ask("POST", "/songs", order)
        assert status == 201
        client.ask("DELETE", f"/songs/{id}")
    with idle_server(tmp_path) as (client, _, _):
        waiting = client.status(answer["id"])
        assert (waiting["state"], waiting["accept_damaged"], waiting["channels"]) == ("waiting", True, "mono")
    assert names(tmp_path / answer["id"]) == ["song.json", "song/song.wav"]


@pytest.mark.slow
def test_the_next_server_goes_on_with_the_songs(tmp_path: Path, short: bytes) -> None:
    with idle_server(tmp_path) as (client, _, _):
        waiting, gone = client.send(short, part=[0.5, 1]), client.send(short)
        client.ask("DELETE", f"/songs/{gone}")
        never = client.announce(short)
    done = put(tmp_path, "done").id
    with idle_server(tmp_path) as (client, songs, _):
        assert [client.status(id)["state"] for id in (done, waiting)] == ["done", "waiting"]
        assert [client.ask("GET", f"/songs/{id}")[0] for id in (gone, never)] == [404, 404]
        assert client.ask("GET", f"/songs/{done}/vocals.flac") == (200, b"sound")
        threading.Thread(target=songs.run, daemon=True).start()
        assert client.wait_until_over(waiting)["state"] == "done"
        stem = client.ask("GET", f"/songs/{waiting}/vocals.flac")[1]
    with idle_server(tmp_path) as (client, _, _):
        assert client.status(waiting)["part"] == [0.5, 1.0]
        assert client.ask("GET", f"/songs/{waiting}/vocals.flac") == (200, stem)
    with idle_server(tmp_path, keep_seconds=0) as (client, _, _):
        wait_for(lambda: client.ask("GET", f"/songs/{done}")[0] == 404, "its removal")
    assert not names(tmp_path)


@pytest.mark.slow
def test_a_killed_servers_songs_are_separated_by_the_next(tmp_path: Path, short: bytes) -> None:
    first = Process(tmp_path)
    done = first.send(short)
    assert first.wait_until_over(done)["state"] == "done"
    stem = first.ask("GET", f"/songs/{done}/vocals.flac")[1]
    working, waiting = first.send(song(15, format="FLAC")), first.send(short)
    sending = first.announce(bytes(10**6))
    head = f"PUT /songs/{sending} HTTP/1.1\r\nHOST\r\nX-Separation: 1\r\nContent-Length: 1000000\r\n\r\n"
    with first.connect(head + "x" * 1000):
        wait_for(lambda: first.status(sending)["share"] > 0, "the beginning of the upload")
        wait_for(lambda: first.status(working)["share"] > 0.1, "the middle of the song")
        first.stop(signal.SIGKILL)
    second = Process(tmp_path)
    try:
        assert second.status(done)["state"] == "done"
        assert second.ask("GET", f"/songs/{done}/vocals.flac") == (200, stem)
        assert second.status(sending)["problem"] == STOPPED.replace(".flac", ".wav")
        assert [second.wait_until_over(id)["state"] for id in (working, waiting)] == ["done", "done"]
        assert second.ask("GET", f"/songs/{waiting}/vocals.flac") == (200, stem)
        assert [path for path in (tmp_path / "songs").rglob("*") if path.name.startswith(".separating")] == []
    finally:
        assert second.stop(signal.SIGINT) == (0, "")
