"""The queue of the local page: songs are received, separated in order, limited and removed."""

import io
import shutil
import socket
import threading
import time
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.common import PROJECT, read, song
from helpers.page_server import MAX_MIB, QUICK, Client, Process, idle_server, song_queue
from helpers.served_process import wait_for
from separation import Separator
from separation.audio.options import OutputOptions
from separation.engine.cache import Cache
from separation.engine.options import EngineOptions
from separation.web import queue
from separation.web.pace import REST
from separation.web.queue import MAX_SONGS

# A song's way through the queue


def test_stems_and_archive_equal_those_of_separate_file(server: Process, short: bytes, tmp_path: Path) -> None:
    id = server.send(short, "Höhle & Co.wav")
    status = server.wait_until_over(id)
    assert (status["state"], status["problem"], status["share"]) == ("done", "", 1)
    (tmp_path / "song.wav").write_bytes(short)
    separator = Separator(QUICK["recipe"], QUICK["stems"], options=EngineOptions(device="cpu"))
    files = separator.separate_file(tmp_path / "song.wav", tmp_path / "out", OutputOptions(format="flac"))
    assert list(status["files"]) == [*(path.name for path in files.values()), "stems.html"]
    archive = zipfile.ZipFile(io.BytesIO(server.ask("GET", f"/songs/{id}/stems.zip")[1]))
    assert archive.testzip() is None
    assert archive.namelist() == [f"Höhle & Co/{path.name}" for path in files.values()]
    for path in files.values():
        stem = server.ask("GET", f"/songs/{id}/{path.name}")[1]
        assert server.headers["Content-Disposition"].endswith(f"''H%C3%B6hle%20%26%20Co%20-%20{path.name}")
        assert len(stem) == status["files"][path.name]
        assert archive.read(f"Höhle & Co/{path.name}") == stem
        np.testing.assert_array_equal(read(stem), read(path))


@pytest.mark.slow
def test_songs_are_separated_in_order_and_cancelled_ones_leave_no_files(server: Process, short: bytes) -> None:
    working, first, second = (server.send(song(15, format="FLAC")), server.send(short), server.send(short))
    wait_for(lambda: server.status(working)["state"] == "separating", "its turn")
    wait_for(lambda: server.status(working)["share"] > 0.05, "the middle of the song")
    assert [server.status(id)["ahead"] for id in (working, first, second)] == [0, 1, 2]
    assert server.ask("DELETE", f"/songs/{first}") == (200, {})
    assert server.status(second)["ahead"] == 1
    assert server.ask("DELETE", f"/songs/{working}") == (200, {})
    assert server.wait_until_over(second)["state"] == "done"
    folders = {path.name for path in server.songs.iterdir()}
    assert second in folders and not folders & {working, first}
    status, message = server.ask("GET", f"/songs/{first}")
    assert (status, message) == (404, "this song is no longer on the server: send it again")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"words, not sound\n" * 50, "'no.txt' is not audio"),
        (b"", "'no.txt' is empty"),
        ("too long", "'no.txt' is longer than 30 s"),
    ],
)
def test_a_file_that_is_not_a_song_fails_with_the_engines_message(server: Process, content: Any, message: str) -> None:
    file = song(31, gain=0.01, format="FLAC") if content == "too long" else content
    id = server.send(file, "no.txt")
    status = server.wait_until_over(id)
    assert status["state"] == "failed"
    assert status["problem"].startswith(message)
    assert status["files"] == {}
    assert [path.name for path in (server.songs / id).iterdir()] == ["song.json"]


@pytest.mark.slow
def test_a_song_too_long_for_a_listening_page_still_has_its_stems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("separation.report.page.MAX_SECONDS", 0.5)
    with idle_server(tmp_path) as (client, songs, _):
        threading.Thread(target=songs.run, daemon=True).start()
        status = client.wait_until_over(client.send(song(1)))
    assert status["state"] == "done"
    assert list(status["files"]) == ["vocals.flac", "instrumental.flac"]
    assert status["problem"].startswith("cannot make the report of 'song.wav': 'song.wav' is longer than 0.5 s")


@pytest.mark.slow
def test_a_finished_song_tells_its_warnings_but_not_those_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "songs").mkdir()
    with idle_server(tmp_path / "songs", cache=Cache(tmp_path / "file")) as (client, songs, _):
        threading.Thread(target=songs.run, daemon=True).start()
        quiet, loud = client.send(song(1)), client.send(song(1, gain=4))
        assert [client.wait_until_over(id)["state"] for id in (quiet, loud)] == ["done", "done"]
        assert client.status(quiet)["problem"] == ""
        told = client.status(loud)["problem"]
    assert told.startswith("'song.wav': a stem peaks at") and told.endswith("so that none clips")


def test_waiting_songs_are_told_when_their_turn_comes(tmp_path: Path) -> None:
    with idle_server(tmp_path) as (client, songs, _):
        first, second, third = (client.send(b"1", seconds=seconds) for seconds in (100, 200, 300))
        other = client.send(b"1", seconds=100, stems="all_4")
        last = client.send(b"1", seconds=100)
        assert [client.status(id)["left"] for id in (first, second)] == [None, None]
        songs._worker.paces.add_models("demo vocals_instrumental", 10, 5)
        page = REST * 3  # for each second of the song and its stems
        assert client.status(second)["left"] == 100 * (0.5 + page)
        assert client.status(third)["left"] == 300 * (0.5 + page)
        assert client.status(other)["left"] == 600 * (0.5 + page)
        assert client.status(last)["left"] is None  # nothing is known of the other choice


# Uploads


def test_an_oversized_file_is_refused_before_the_upload(server: Process) -> None:
    order = {"name": "big.wav", "bytes": MAX_MIB * 2**20 + 1} | QUICK
    status, message = server.ask("POST", "/songs", order)
    assert (status, message) == (413, "'big.wav' has more than 3 MiB, the limit here: choose a smaller file")
    assert server.ask("POST", "/songs", order | {"bytes": MAX_MIB * 2**20})[0] == 201


def test_an_upload_must_have_the_announced_size(idle: Client, tmp_path: Path) -> None:
    id = idle.announce(bytes(1000))
    assert idle.ask("PUT", f"/songs/{id}", bytes(1001))[0] == 409
    assert idle.ask("PUT", f"/songs/{id}", b"0\r\n\r\n", Transfer_Encoding="chunked", Content_Length="1000")[0] == 411
    assert list(tmp_path.iterdir()) == []
    assert idle.ask("PUT", f"/songs/{id}", bytes(1000))[0] == 200
    assert idle.ask("PUT", f"/songs/{id}", bytes(1000))[0] == 409
    assert (tmp_path / id / "song" / "song.wav").read_bytes() == bytes(1000)


def test_an_upload_that_breaks_off_fails_and_is_removed(idle: Client, tmp_path: Path) -> None:
    id = idle.announce(bytes(10**6))
    host, port = idle.host.split(":")
    with socket.create_connection((host, int(port))) as sender:
        head = f"PUT /songs/{id} HTTP/1.1\r\nHost: {idle.host}\r\nX-Separation: 1\r\nContent-Length: 1000000\r\n\r\n"
        sender.sendall(head.encode() + bytes(1000))
    status = idle.wait_until_over(id)
    assert status["problem"] == "'song.wav' did not arrive completely: send it again"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["song.json"]


def test_a_cancelled_upload_is_removed(idle: Client, tmp_path: Path) -> None:
    id = idle.announce(bytes(3 * 2**20))
    host, port = idle.host.split(":")
    with socket.create_connection((host, int(port))) as sender:
        head = (
            f"PUT /songs/{id} HTTP/1.1\r\nHost: {idle.host}\r\nX-Separation: 1\r\nContent-Length: {3 * 2**20}\r\n\r\n"
        )
        sender.sendall(head.encode() + bytes(2**20))
        wait_for(lambda: idle.status(id)["share"] > 0.3, "the first third")
        assert idle.ask("DELETE", f"/songs/{id}")[0] == 200
        sender.sendall(bytes(2**20))
        wait_for(lambda: list(tmp_path.iterdir()) == [], "the file's removal")
        assert sender.recv(1) == b""


def test_uploads_are_refused_once_the_queue_is_closed(tmp_path: Path) -> None:
    with idle_server(tmp_path) as (client, songs, _):
        early = client.announce(b"1")
        songs.close()
        late = client.announce(b"1")
        assert [client.ask("PUT", f"/songs/{id}", b"1")[0] for id in (early, late)] == [409, 409]
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_without_a_path(
    idle: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=999)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        status, message = idle.ask("POST", "/songs", {"name": "song.wav", "bytes": 1000} | QUICK)
    assert status == 507 and message.startswith("the server's disk has no room for 'song.wav'")
    id = idle.announce(bytes(1000))
    (tmp_path / id).write_text("in the way")  # stands for any other file system error
    status, message = idle.ask("PUT", f"/songs/{id}", bytes(1000))
    assert (status, message) == (500, idle.status(id)["problem"])
    assert message == "the server failed (File exists): try again, or ask its operator to read the log"
    assert str(tmp_path) in capfd.readouterr().err


def test_uploads_and_waiting_songs_are_limited(idle: Client, short: bytes) -> None:
    order = {"name": "song.wav", "bytes": 1} | QUICK
    ids = [idle.announce(b"1") for _ in range(MAX_SONGS)]
    status, message = idle.ask("POST", "/songs", order)
    assert (status, message.split(",")[0]) == (503, f"{MAX_SONGS} songs are being sent")
    for id in ids:
        assert idle.ask("PUT", f"/songs/{id}", b"1")[0] == 200
    status, message = idle.ask("POST", "/songs", order)
    assert (status, message.split(",")[0]) == (503, f"{MAX_SONGS} songs are waiting")
    idle.ask("DELETE", f"/songs/{ids[0]}")
    idle.announce(short)


def test_the_slowest_upload_is_dropped_for_a_new_song(
    idle: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "SLOW_SECONDS", 0)
    ids, slowest = [idle.announce(bytes(10**6)) for _ in range(MAX_SONGS)], 7
    with ExitStack() as uploads:
        for number, id in enumerate(ids):
            head = f"PUT /songs/{id} HTTP/1.1\r\nHOST\r\nX-Separation: 1\r\nContent-Length: 1000000\r\n\r\n"
            uploads.enter_context(idle.connect(head + "x" * (10 if number == slowest else 5000)))
        states = ["receiving"] * MAX_SONGS
        wait_for(lambda: [idle.status(id)["state"] for id in ids] == states, "all uploads")
        wait_for(lambda: sum(idle.status(id)["share"] > 0 for id in ids) == MAX_SONGS - 1, "their first bytes")
        idle.announce(b"1")
        states[slowest] = "failed"
        assert [idle.status(id)["state"] for id in ids] == states
        problem = "'song.wav' was sent too slowly while others waited: send it again"
        assert idle.status(ids[slowest])["problem"] == problem
        assert [path.name for path in (tmp_path / ids[slowest]).iterdir()] == ["song.json"]


@pytest.mark.parametrize(
    "order, words",
    [
        (b"{", "is not valid JSON"),
        (b"[" * 60000, "is not valid JSON"),
        (b"[]", "must be an object"),
        ({"name": "song.wav"}, "give name, recipe"),
        ({"recipe": "../standard"}, "unknown recipe '../standard': choose one of best, "),
        ({"stems": "all_7"}, "recipe 'demo' has no stems 'all_7'"),
        ({"format": "exe"}, "output format 'exe' is not offered"),
        ({"bytes": -1}, "more than"),
        ({"bytes": "1"}, "give name, recipe"),
        ({"again": "unknown"}, "no longer on the server"),
        ({"model": "../configs/models/demo.yaml"}, "unknown model '../configs/models/demo.yaml': choose one"),
        ({"model": "demo", "part": [5, 3]}, "a part from 5s to 3s is empty"),
        ({"bytes": 10**400}, "more than"),
    ],
)
def test_an_invalid_announcement_gets_a_one_line_error(idle: Client, order: Any, words: str) -> None:
    if isinstance(order, dict) and "name" not in order:
        order = {"name": "song.wav", "bytes": 1} | QUICK | order
    status, message = idle.ask("POST", "/songs", order)
    assert status in (400, 404, 413)
    assert words in message and "\n" not in message and str(PROJECT) not in message


def test_ids_are_random_and_long(idle: Client) -> None:
    ids = {idle.announce(b"1") for _ in range(MAX_SONGS)}
    assert len(ids) == MAX_SONGS
    assert all(len(id) >= 22 for id in ids)  # 128 bits


@pytest.mark.parametrize(
    "name, kept",
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\fakepath\\song.mp3", "song.mp3"),
        ("..", "song"),
        ("/", "song"),
        ("", "song"),
        ('a\r\nSet-Cookie: b"<c>.wav', "a__Set-Cookie_ b__c_.wav"),
        ("\u202egnp.wav\0", "_gnp.wav_"),
        ("\ud800.wav", "_.wav"),
        ("歌" * 100, "歌" * 66),
        ("Ça va?.flac", "Ça va_.flac"),
    ],
)
def test_no_file_name_escapes_the_folder_or_breaks_a_header(idle: Client, tmp_path: Path, name: str, kept: str) -> None:
    id = idle.send(b"sound", name)
    assert idle.status(id)["name"] == kept
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {Path(id, "song", kept), Path(id, "song.json")}


# Removal


@pytest.mark.parametrize(
    "state, seconds",
    [("announced", 60), ("receiving", None), ("waiting", None), ("separating", None), ("done", 3600), ("failed", 3600)],
)
def test_a_song_expires_if_it_was_never_sent_or_finished_long_ago(
    state: str, seconds: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = song_queue(tmp_path, keep_seconds=3600)
    id = songs.announce({"name": "song.wav", "bytes": 1} | QUICK)
    songs._songs[id].state = state
    touched = songs._songs[id].touched = 1000.0  # round, so that differences are exact
    for later in (seconds or 10**9, (seconds or 10**9) + 1):
        monkeypatch.setattr(queue.time, "time", lambda now=touched + later: now)
        songs.sweep()
        assert (id in songs._songs) == (seconds is None or later <= seconds)


@pytest.mark.slow
def test_finished_songs_expire_unless_they_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with idle_server(tmp_path, keep_seconds=3) as (client, songs, _):
        working = threading.Thread(target=songs.run, daemon=True)  # ends with this process
        working.start()
        id = client.send(song(1))
        wait_for(lambda: client.status(id)["state"] == "done", "the end of the song")
        for _ in range(5):  # each download keeps it
            time.sleep(1)
            assert client.ask("GET", f"/songs/{id}/vocals.flac")[0] == 200
        wait_for(lambda: client.ask("GET", f"/songs/{id}")[0] == 404, "its removal")
        wait_for(lambda: not list(tmp_path.iterdir()), "the removal of its files")
        monkeypatch.setattr(queue, "ANNOUNCED_SECONDS", 0)
        announced = client.announce(b"1")
        wait_for(lambda: client.ask("GET", f"/songs/{announced}")[0] == 404, "the removal of what was never sent")
