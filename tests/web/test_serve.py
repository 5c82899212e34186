"""The page for people without a terminal: what its server takes and refuses, and what one does with it in a browser."""

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.browser import Browser
from helpers.common import PROJECT, SONG, STEMS, needs_chromium, read, song
from helpers.served_process import wait_for
from separation import Separator
from separation.audio.options import OutputOptions
from separation.cli.main import main
from separation.engine.options import EngineOptions
from separation.engine.separator import ModelPool
from separation.errors import InputError
from separation.web import serve
from separation.web.connections import Limits
from separation.web.serve import KEEP_SECONDS, MAX_SONGS, Server, Songs

MAX_MIB = 3
QUICK = {"recipe": "demo", "stems": "vocals_instrumental", "format": "flac"}


class Client:
    """Speaks HTTP to the page's server as the page itself does, unless told to do otherwise."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host = url.split("/")[2]

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """The status and the answer: what JSON holds, else a text, else bytes. A header that is `-` is left out."""
        connection = http.client.HTTPConnection(self.host, timeout=60)
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        sent = {"X-Separation": "test"} | {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, content, {name: value for name, value in sent.items() if value != "-"})
            response = connection.getresponse()
            self.headers, answer = response.headers, response.read()
        finally:
            connection.close()
        kind = response.headers.get("Content-Type", "")
        if kind == "application/json":
            return response.status, json.loads(answer)
        return response.status, answer.decode() if kind.startswith("text/") else answer

    def connect(self, sent: str | bytes = b"") -> socket.socket:
        """A connection on which that has been sent; `HOST` in it stands for the header of that name."""
        host, port = self.host.split(":")
        connection = socket.create_connection((host, int(port)), timeout=30)
        content = sent.encode() if isinstance(sent, str) else sent
        connection.sendall(content.replace(b"HOST", f"Host: {self.host}".encode()))
        return connection

    def answers(self, sent: str | bytes) -> list[int]:
        """The statuses of all answers that come on a connection on which that was sent, until the server closes it."""
        with self.connect(sent) as connection:
            return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d+) ", rest(connection), re.MULTILINE)]

    def announce(self, content: bytes, name: str = "song.wav", **choice: str) -> str:
        status, answer = self.ask("POST", "/songs", {"name": name, "bytes": len(content)} | QUICK | choice)
        assert status == 201
        return str(answer["id"])

    def send(self, content: bytes, name: str = "song.wav", **choice: str) -> str:
        id = self.announce(content, name, **choice)
        assert self.ask("PUT", f"/songs/{id}", content) == (200, {})
        return id

    def status(self, id: str) -> dict[str, Any]:
        status, answer = self.ask("GET", f"/songs/{id}")
        assert status == 200
        return answer

    def over(self, id: str) -> dict[str, Any]:
        wait_for(lambda: self.status(id)["state"] in ("done", "failed"), "the end of the song")
        return self.status(id)


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    with connection.makefile("rb") as file:
        return file.read()


class Process(Client):
    """`python -m separation serve` with its temporary files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.temporary = folder
        limits = {"SEPARATION_MAX_MIB": str(MAX_MIB), "SEPARATION_MAX_SECONDS": "30"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "separation", "serve", "--port", "0", "--no-browser", "--device", "cpu"],
            cwd=PROJECT,
            env=os.environ | limits | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job ignores it, and so would this one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert self.process.stdout is not None
        super().__init__(self.process.stdout.readline().split()[0])

    def stop(self, signal_number: int) -> tuple[int, str]:
        """The exit code and what it said on stderr."""
        self.process.send_signal(signal_number)
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said

    def leftovers(self) -> list[str]:
        return [path.name for path in self.temporary.iterdir() if not path.name.startswith("torchinductor")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    running = Process(tmp_path_factory.mktemp("served"))
    yield running
    code, said = running.stop(signal.SIGTERM)
    assert (code, said) == (128 + signal.SIGTERM, "")
    assert running.leftovers() == []


@contextmanager
def idle_server(folder: Path, limits: Limits | None = None, **options: Any) -> Iterator[tuple[Client, Songs, Server]]:
    """A server in this process that takes songs and separates none of them."""
    songs = Songs(folder, ModelPool(EngineOptions(device="cpu")), **options)
    with Server("127.0.0.1", 0, songs, limits) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield Client(running.url), songs, running
        finally:
            songs.close()
            running.shutdown()
            thread.join()


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Client]:
    with idle_server(tmp_path) as (client, _, _):
        yield client


@pytest.fixture(scope="module")
def short() -> bytes:
    return song(2)


# --- a song's way


def test_stems_and_the_archive_are_those_of_separate_file(server: Process, short: bytes, tmp_path: Path) -> None:
    id = server.send(short, "Höhle & Co.wav")
    status = server.over(id)
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


def test_songs_wait_for_their_turn_and_a_cancelled_one_leaves_nothing(server: Process, short: bytes) -> None:
    working, first, second = (server.send(song(15, format="FLAC")), server.send(short), server.send(short))
    wait_for(lambda: server.status(working)["state"] == "separating", "its turn")
    wait_for(lambda: server.status(working)["share"] > 0.05, "the middle of the song")
    assert [server.status(id)["ahead"] for id in (working, first, second)] == [0, 1, 2]
    assert server.ask("DELETE", f"/songs/{first}") == (200, {})
    assert server.status(second)["ahead"] == 1
    assert server.ask("DELETE", f"/songs/{working}") == (200, {})
    assert server.over(second)["state"] == "done"
    folders = {path.name for path in server.temporary.glob("separation-*/*")}
    assert second in folders and not folders & {working, first}
    status, sentence = server.ask("GET", f"/songs/{first}")
    assert (status, sentence) == (404, "this song is no longer here: send it again")


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"words, not sound\n" * 50, "'no.txt' is not audio"),
        (b"", "'no.txt' is empty"),
        ("too long", "'no.txt' is longer than 30 s"),
    ],
)
def test_what_is_no_song_fails_with_the_engines_sentence(server: Process, content: Any, sentence: str) -> None:
    file = song(31, gain=0.01, format="FLAC") if content == "too long" else content
    id = server.send(file, "no.txt")
    status = server.over(id)
    assert status["state"] == "failed"
    assert status["problem"].startswith(sentence)
    assert status["files"] == {}
    assert not list(server.temporary.glob(f"separation-*/{id}"))


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 0), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_ends_it_in_the_middle_of_a_song_and_nothing_is_left(tmp_path: Path, number: int, code: int) -> None:
    server = Process(tmp_path)
    working, _ = server.send(song(15, format="FLAC")), server.send(song(2))
    receiving = server.announce(bytes(10**6))
    with socket.create_connection((server.host.split(":")[0], int(server.host.split(":")[1]))) as sender:
        head = f"PUT /songs/{receiving} HTTP/1.1\r\nHost: {server.host}\r\nX-Separation: 1\r\nContent-Length: 1000000"
        sender.sendall(f"{head}\r\n\r\n".encode() + bytes(1000))
        wait_for(lambda: server.status(receiving)["state"] == "receiving", "the third song")
        wait_for(lambda: server.status(working)["state"] == "separating", "the first song")
        assert server.leftovers() != []
        assert server.stop(number) == (code, "")
    assert server.leftovers() == []


# --- limits


def test_a_file_beyond_the_limit_is_refused_before_it_is_sent(server: Process) -> None:
    order = {"name": "big.wav", "bytes": MAX_MIB * 2**20 + 1} | QUICK
    status, sentence = server.ask("POST", "/songs", order)
    assert (status, sentence) == (413, "'big.wav' has more than 3 MiB, the limit here: choose a smaller file")
    assert server.ask("POST", "/songs", order | {"bytes": MAX_MIB * 2**20})[0] == 201


def test_what_is_sent_must_be_as_long_as_announced(idle: Client, tmp_path: Path) -> None:
    id = idle.announce(bytes(1000))
    assert idle.ask("PUT", f"/songs/{id}", bytes(1001))[0] == 409
    assert idle.ask("PUT", f"/songs/{id}", b"0\r\n\r\n", Transfer_Encoding="chunked", Content_Length="1000")[0] == 411
    assert list(tmp_path.iterdir()) == []
    assert idle.ask("PUT", f"/songs/{id}", bytes(1000))[0] == 200
    assert idle.ask("PUT", f"/songs/{id}", bytes(1000))[0] == 409
    assert (tmp_path / id / "song" / "song.wav").read_bytes() == bytes(1000)


def test_a_song_that_breaks_off_is_failed_and_removed(idle: Client, tmp_path: Path) -> None:
    id = idle.announce(bytes(10**6))
    host, port = idle.host.split(":")
    with socket.create_connection((host, int(port))) as sender:
        head = f"PUT /songs/{id} HTTP/1.1\r\nHost: {idle.host}\r\nX-Separation: 1\r\nContent-Length: 1000000\r\n\r\n"
        sender.sendall(head.encode() + bytes(1000))
    status = idle.over(id)
    assert status["problem"] == "'song.wav' did not come completely: send it again"
    assert list(tmp_path.iterdir()) == []


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


def test_what_still_comes_while_the_server_ends_is_not_written(tmp_path: Path) -> None:
    with idle_server(tmp_path) as (client, songs, _):
        early = client.announce(b"1")
        songs.close()
        late = client.announce(b"1")
        assert [client.ask("PUT", f"/songs/{id}", b"1")[0] for id in (early, late)] == [404, 409]
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_without_a_path(
    idle: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=999)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        status, sentence = idle.ask("POST", "/songs", {"name": "song.wav", "bytes": 1000} | QUICK)
    assert (status, sentence[:37]) == (507, "the server's disk has no room for the")
    id = idle.announce(bytes(1000))
    (tmp_path / id).write_text("in the way")  # as any other error of the file system
    status, sentence = idle.ask("PUT", f"/songs/{id}", bytes(1000))
    assert (status, sentence) == (500, idle.status(id)["problem"])
    assert sentence == "the server failed (Not a directory): try again, or tell its operator, whose log says more"
    assert str(tmp_path) in capfd.readouterr().err


def test_only_so_many_songs_wait(idle: Client, short: bytes) -> None:
    order = {"name": "song.wav", "bytes": 1} | QUICK
    ids = [idle.announce(b"1") for _ in range(MAX_SONGS)]
    status, sentence = idle.ask("POST", "/songs", order)
    assert (status, sentence.split(",")[0]) == (503, f"{MAX_SONGS} songs are being sent")
    for id in ids:
        assert idle.ask("PUT", f"/songs/{id}", b"1")[0] == 200
    status, sentence = idle.ask("POST", "/songs", order)
    assert (status, sentence.split(",")[0]) == (503, f"{MAX_SONGS} songs are waiting")
    idle.ask("DELETE", f"/songs/{ids[0]}")
    idle.announce(short)


def test_slow_uploads_make_way_for_another_song_the_slowest_first(
    idle: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "SLOW_SECONDS", 0)
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
        assert idle.status(ids[slowest])["problem"] == "'song.wav' came too slowly while others waited: send it again"
        assert not (tmp_path / ids[slowest]).exists()


@pytest.mark.parametrize(
    "state, seconds",
    [("announced", 60), ("receiving", None), ("waiting", None), ("separating", None), ("done", 3600), ("failed", 3600)],
)
def test_a_song_is_forgotten_when_it_was_never_sent_or_has_been_over_for_long_enough(
    state: str, seconds: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = Songs(tmp_path, ModelPool(EngineOptions(device="cpu")), keep_seconds=3600)
    id = songs.announce({"name": "song.wav", "bytes": 1} | QUICK)
    songs._songs[id].state = state
    touched = songs._songs[id].touched
    for later in (seconds or 10**9, (seconds or 10**9) + 1):
        monkeypatch.setattr(serve.time, "monotonic", lambda now=touched + later: now)
        songs.sweep()
        assert (id in songs._songs) == (seconds is None or later <= seconds)


@pytest.mark.slow
def test_what_is_over_is_removed_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with idle_server(tmp_path, keep_seconds=3) as (client, songs, _):
        working = threading.Thread(target=songs.work, daemon=True)  # which ends with this process
        working.start()
        id = client.send(song(1))
        wait_for(lambda: client.status(id)["state"] == "done", "the end of the song")
        for _ in range(5):  # whoever fetches it keeps it
            time.sleep(1)
            assert client.ask("GET", f"/songs/{id}/vocals.flac")[0] == 200
        wait_for(lambda: client.ask("GET", f"/songs/{id}")[0] == 404, "its removal")
        wait_for(lambda: not list(tmp_path.iterdir()), "its files' removal")
        monkeypatch.setattr(serve, "ANNOUNCED_SECONDS", 0)
        announced = client.announce(b"1")
        wait_for(lambda: client.ask("GET", f"/songs/{announced}")[0] == 404, "the removal of what was never sent")


def test_a_song_that_is_too_long_for_a_page_has_its_stems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("separation.report.page.MAX_SECONDS", 0.5)
    with idle_server(tmp_path) as (client, songs, _):
        threading.Thread(target=songs.work, daemon=True).start()
        status = client.over(client.send(song(1)))
    assert status["state"] == "done"
    assert list(status["files"]) == ["vocals.flac", "instrumental.flac"]
    assert status["problem"].startswith("there is no report of song.wav: 'song.wav' is longer than 0.5 s")


# --- strangers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil", ""])
@pytest.mark.parametrize("method, path", [("GET", "/"), ("POST", "/songs"), ("GET", "/songs/x")])
def test_a_name_that_is_not_this_machines_is_not_answered(idle: Client, host: str, method: str, path: str) -> None:
    status, sentence = idle.ask(method, path, Host=host)
    assert status == 421
    assert sentence == "this is not an address of the page: take the one that the terminal shows"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8765", "[::1]:8765", "192.168.1.2"])
def test_an_address_and_this_machines_name_are_answered(idle: Client, host: str) -> None:
    assert idle.ask("GET", "/", Host=host)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"X_Separation": "-"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},  # another program's page on this machine
    ],
)
def test_other_sites_cannot_announce_send_or_remove(idle: Client, headers: dict[str, str]) -> None:
    id = idle.announce(b"1")
    order = {"name": "song.wav", "bytes": 1} | QUICK
    assert idle.ask("POST", "/songs", order, **headers)[0] == 403
    assert idle.ask("PUT", f"/songs/{id}", b"1", **headers)[0] == 403
    assert idle.ask("DELETE", f"/songs/{id}", **headers)[0] == 403
    assert idle.ask("OPTIONS", "/songs", **headers)[0] == 204  # what a browser asks before it sends such a header
    assert not [name for name in idle.headers if name.lower().startswith("access-control-")]  # and takes for a no
    assert idle.status(id)["state"] == "announced"
    assert idle.ask("DELETE", f"/songs/{id}", Origin=f"http://{idle.host}")[0] == 200


def test_answers_cannot_be_framed_sniffed_or_kept(idle: Client) -> None:
    idle.ask("GET", "/")
    assert "frame-ancestors 'none'" in idle.headers["Content-Security-Policy"]
    assert "default-src 'none'" in idle.headers["Content-Security-Policy"]
    assert idle.headers["X-Content-Type-Options"] == "nosniff"
    assert idle.headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in idle.headers
    assert "Python" not in idle.headers["Server"]


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
def test_no_name_leads_out_of_the_folder_or_spoils_a_header(idle: Client, tmp_path: Path, name: str, kept: str) -> None:
    id = idle.send(b"sound", name)
    assert idle.status(id)["name"] == kept
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path(id, "song", kept)]


@pytest.mark.parametrize("path", ["../../{id}/song/song.wav", "..%2Fsong%2Fsong.wav", "song/song.wav", "song.wav", "."])
def test_no_path_leads_to_another_file(idle: Client, short: bytes, path: str) -> None:
    id = idle.send(short)
    status, sentence = idle.ask("GET", f"/songs/{id}/{path.format(id=id)}")
    assert status == 404
    assert isinstance(sentence, str)
    assert idle.ask("GET", f"/songs/{id}/stems.zip")[0] == 404
    assert idle.ask("GET", "/../serve.py")[0] == idle.ask("GET", "/serve.html")[0] == 404


@pytest.mark.parametrize(
    "order, words",
    [
        (b"{", "is not valid JSON"),
        (b"[" * 60000, "is not valid JSON"),
        (b"[]", "give all five"),
        ({"name": "song.wav"}, "give all five"),
        ({"recipe": "../standard"}, "unknown recipe '../standard': choose one of demo, "),
        ({"stems": "all_7"}, "recipe 'demo' has no stems 'all_7'"),
        ({"format": "exe"}, "output format 'exe' is not offered"),
        ({"bytes": -1}, "more than"),
        ({"bytes": "1"}, "give all five"),
        ({"bytes": 10**400}, "more than"),
    ],
)
def test_an_announcement_that_makes_no_sense_is_refused_in_one_sentence(idle: Client, order: Any, words: str) -> None:
    if isinstance(order, dict) and "name" not in order:
        order = {"name": "song.wav", "bytes": 1} | QUICK | order
    status, sentence = idle.ask("POST", "/songs", order)
    assert status in (400, 413)
    assert words in sentence and "\n" not in sentence and str(PROJECT) not in sentence


def test_a_request_without_or_with_too_great_a_length_is_refused(idle: Client) -> None:
    assert idle.ask("POST", "/songs", b"1", Content_Length="x")[0] == 411
    assert idle.ask("POST", "/songs", b"1", Content_Length="70000")[0] == 413


def test_ids_cannot_be_guessed(idle: Client) -> None:
    ids = {idle.announce(b"1") for _ in range(MAX_SONGS)}
    assert len(ids) == MAX_SONGS
    assert all(len(id) >= 22 for id in ids)  # 128 bits


def test_a_port_that_is_taken_is_one_line(idle: Client, capsys: pytest.CaptureFixture[str]) -> None:
    port = idle.host.split(":")[1]
    assert main(["serve", "--port", port, "--no-browser"]) == 2
    assert capsys.readouterr().err == (
        f"error: cannot serve on 127.0.0.1 port {port} (Address already in use): choose another --port or --host\n"
    )
    with pytest.raises(InputError, match="port 70000"):
        Server("127.0.0.1", 70000, Songs(Path(), ModelPool(EngineOptions(device="cpu"))))


# --- HTTP


PATHS = ["/", "/songs", "/songs/x", "/songs/x/vocals.wav", "/songs/x/stems.zip"]


@pytest.mark.parametrize("path", PATHS)
def test_each_path_says_what_it_takes(idle: Client, path: str) -> None:
    taken = {"/songs": {"POST"}, "/songs/x": {"DELETE", "GET", "HEAD", "PUT"}}.get(path, {"GET", "HEAD"})
    assert idle.ask("OPTIONS", path)[0] == 204
    assert idle.headers["Allow"] == ", ".join(sorted({"OPTIONS"} | taken))
    for method in {"GET", "HEAD", "POST", "PUT", "DELETE"} - taken:
        assert idle.ask(method, path)[0] == 405
        assert idle.headers["Allow"] == ", ".join(sorted({"OPTIONS"} | taken))
    assert idle.ask("PATCH", path)[0] == 501


@pytest.mark.parametrize("path", PATHS[:1] + PATHS[2:])
def test_head_has_gets_headers_and_no_content(idle: Client, path: str) -> None:
    path = path.replace("x", idle.announce(b"1"))
    status, _ = idle.ask("GET", path)
    headers = dict(idle.headers)
    with idle.connect(f"HEAD {path} HTTP/1.1\r\nHOST\r\n\r\n") as connection:
        head, _, content = rest(connection).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0].split()[1] == str(status) and content == b""
    assert dict(line.split(": ", 1) for line in lines[1:]) | {"Date": headers["Date"]} == headers


@pytest.fixture(scope="module")
def stem(server: Process, short: bytes) -> tuple[str, bytes]:
    """The path and the content of one that was made."""
    id = server.send(short)
    assert server.over(id)["state"] == "done"
    path = f"/songs/{id}/vocals.flac"
    status, content = server.ask("GET", path)
    assert status == 200 and len(content) > 1000
    assert "flac" in server.headers["Content-Type"] and server.headers["Accept-Ranges"] == "bytes"
    return path, content


@pytest.mark.parametrize(
    "asked, start, stop",
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-299", 100, 300),
        ("bytes=900-", 900, None),
        ("bytes=-7", -7, None),
        ("bytes=5-999999999999", 5, None),
        ("bytes=-999999999999", 0, None),
    ],
)
def test_a_range_of_a_stem_is_answered_with_just_that(
    server: Process, stem: tuple[str, bytes], asked: str, start: int, stop: int | None
) -> None:
    path, content = stem
    assert server.ask("GET", path, Range=asked) == (206, content[start:stop])
    first = start % len(content)
    last = first + len(content[start:stop]) - 1
    assert server.headers["Content-Range"] == f"bytes {first}-{last}/{len(content)}"
    assert server.ask("HEAD", path, Range=asked) == (206, b"")
    assert server.headers["Content-Length"] == str(last - first + 1)


@pytest.mark.parametrize("asked", ["bytes={size}-", "bytes=999999999999-", "bytes=-0"])
def test_a_range_outside_of_a_stem_is_refused(server: Process, stem: tuple[str, bytes], asked: str) -> None:
    path, content = stem
    assert server.ask("GET", path, Range=asked.format(size=len(content))) == (416, b"")
    assert server.headers["Content-Range"] == f"bytes */{len(content)}"


@pytest.mark.parametrize(
    "asked", ["bytes=-", "bytes=9-3", "bytes=0-1,4-5", "lines=1-2", "bytes=a-b", "bytes=" + "9" * 99]
)
def test_what_is_no_single_range_is_answered_with_all(server: Process, stem: tuple[str, bytes], asked: str) -> None:
    assert server.ask("GET", stem[0], Range=asked) == (200, stem[1])


def test_a_part_of_a_stem_goes_on_only_if_the_stem_is_still_the_same(server: Process, stem: tuple[str, bytes]) -> None:
    path, content = stem
    server.ask("HEAD", path)
    tag = server.headers["ETag"]
    assert server.ask("GET", path, Range="bytes=9-", If_Range=tag) == (206, content[9:])
    assert server.ask("GET", path, Range="bytes=9-", If_Range='"another"') == (200, content)
    assert server.ask("GET", path, If_None_Match=tag) == (304, b"")


def test_a_client_of_http_1_0_gets_an_archive_without_chunks(server: Process, stem: tuple[str, bytes]) -> None:
    path = f"{stem[0].rpartition('/')[0]}/stems.zip"
    with server.connect(f"GET {path} HTTP/1.0\r\nHOST\r\n\r\n") as connection:
        content = rest(connection).partition(b"\r\n\r\n")[2]
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert archive.testzip() is None and archive.read("song/vocals.flac") == stem[1]


HIDDEN = "GET / HTTP/1.1\r\nHOST\r\n\r\n"
ANNOUNCE = "POST /songs HTTP/1.1\r\nHOST\r\nX-Separation: 1\r\n"


@pytest.mark.parametrize(
    "sent, status",
    [
        (f"GET /x HTTP/1.1\r\nHOST\r\nContent-Length: {len(HIDDEN)}\r\n\r\n{HIDDEN}", 404),
        (HIDDEN * 3, 200),
        (f"{ANNOUNCE}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{HIDDEN}", 411),
        (f"{ANNOUNCE}Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n{HIDDEN}", 411),
        (f"{ANNOUNCE}Content-Length: 2\r\nContent-Length: 90\r\n\r\n{{}}{HIDDEN}", 400),
        (f"{ANNOUNCE}Content-Length: 2, 2\r\n\r\n{{}}{HIDDEN}", 411),
        (f"{ANNOUNCE}Content-Length: +2\r\n\r\n{{}}{HIDDEN}", 411),
        (f"{ANNOUNCE}Content-Length : 2\r\n\r\n{{}}{HIDDEN}", 400),
        (f"{ANNOUNCE}Content-Length: 2\r\n\r\n{{}}{HIDDEN}", 400),  # the announcement is empty
        ("GET / HTTP/1.1\r\nHOST\r\nHost: evil.example\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHOST\r\nno header\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\nHOST\r\nX: {'a' * 70_000}\r\n\r\n", 431),
        ("GET / HTTP/1.1\r\nHOST\r\n" + "X: a\r\n" * 200 + "\r\n", 431),
        (f"GET /{'a' * 70_000} HTTP/1.1\r\nHOST\r\n\r\n", 414),
        ("GET / HTTP/9.9\r\nHOST\r\n\r\n", 505),
        ("GET /\r\n\r\n", 421),
        ("GET / HTTP/1.0\r\n\r\n", 421),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\r\n", 400),  # somebody tries https
        (bytes(range(256)) * 8, 400),
        ("GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHOST\r\n\r\n", 404),
        ("GET /söngs/\0/../歌 HTTP/1.1\r\nHOST\r\n\r\n", 404),
    ],
)
def test_whatever_is_sent_on_a_connection_has_one_answer(idle: Client, sent: str | bytes, status: int) -> None:
    assert idle.answers(sent) == [status]


def test_a_refused_upload_is_told_why_although_the_rest_of_it_is_not_read(idle: Client) -> None:
    status, sentence = idle.ask("PUT", "/songs/x", bytes(3 * 2**20))
    assert (status, sentence) == (404, "this song is no longer here: send it again")


# --- clients that say little


HALF = "GET / HTTP/1.1\r\nX: half a head"


def test_half_open_connections_keep_nobody_out(tmp_path: Path) -> None:
    with idle_server(tmp_path, Limits(connections=8, per_address=6)) as (client, _, _), ExitStack() as stack:
        half_open = [stack.enter_context(client.connect(HALF)) for _ in range(30)]
        assert client.ask("GET", "/")[0] == 200
        assert all(connection.recv(1) == b"" for connection in half_open[:24])
        assert len([thread for thread in threading.enumerate() if "process_request_thread" in thread.name]) <= 7


def test_who_has_asked_is_answered_however_many_come_before_the_answer_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with idle_server(tmp_path, Limits(connections=4, per_address=4)) as (client, _, _), ExitStack() as stack:
        real = serve._page

        def page(max_mib: float) -> bytes:
            half_open = [stack.enter_context(client.connect(HALF)) for _ in range(20)]
            assert half_open[0].recv(1) == b""  # it has made way
            return real(max_mib)

        monkeypatch.setattr(serve, "_page", page)
        assert client.ask("GET", "/")[0] == 200


@pytest.mark.parametrize("sent", ["", HALF, f"{ANNOUNCE}Content-Length: 50\r\n\r\n{{", "GET / HTTP/1.1\r\n"])
def test_who_does_not_come_to_the_end_of_a_request_is_cut_off(tmp_path: Path, sent: str) -> None:
    with idle_server(tmp_path, Limits(head_seconds=0.1)) as (client, _, _), client.connect(sent) as connection:
        assert b" 200 " not in rest(connection)


def test_a_song_that_comes_too_slowly_is_failed_and_removed(tmp_path: Path) -> None:
    with idle_server(tmp_path, Limits(pause_seconds=0.2)) as (client, _, _):
        id = client.announce(bytes(10**6))
        head = f"PUT /songs/{id} HTTP/1.1\r\nHOST\r\nX-Separation: 1\r\nContent-Length: 1000000\r\n\r\n"
        with client.connect(head) as connection, suppress(ConnectionError):
            while not connection.send(b"x") or client.status(id)["state"] in ("announced", "receiving"):
                time.sleep(0.02)
        assert client.status(id)["problem"] == "'song.wav' did not come completely: send it again"
        assert list(tmp_path.iterdir()) == []


def test_who_does_not_take_a_file_is_cut_off(tmp_path: Path) -> None:
    with idle_server(tmp_path, Limits(pause_seconds=0.2, linger_seconds=0.1)) as (client, songs, server):
        id = client.send(b"1")
        (tmp_path / "large.wav").write_bytes(bytes(16 * 2**20))
        songs._songs[id].files = {"large.wav": tmp_path / "large.wav"}
        with client.connect(f"GET /songs/{id}/large.wav HTTP/1.1\r\nHOST\r\n\r\n") as connection:
            assert connection.recv(9) == b"HTTP/1.1 "
            wait_for(lambda: not server.connections.count(), "the end of the connection")


def test_where_descriptors_run_out_the_server_waits_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    waited: list[float] = []
    with Server("127.0.0.1", 0, Songs(tmp_path, ModelPool(EngineOptions(device="cpu")))) as server:
        monkeypatch.setattr(serve.time, "sleep", waited.append)
        with Client(server.url).connect() as connection:
            before = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (connection.fileno() + 1, before[1]))
            try:
                with pytest.raises(OSError, match="Too many open files"):
                    server.get_request()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
            assert waited == [0.1]
            server.get_request()[0].close()


# --- in a browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser, server: Process, tmp_path: Path) -> Iterator[Browser]:
    """The page, just opened, without a song; downloads go to `tmp_path`. Afterwards it has complained of nothing."""
    chromium.open(server.url)
    chromium.run("localStorage.clear()")
    chromium.open(server.url)
    chromium.developer("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    chromium.console(), chromium.requests()
    yield chromium
    assert chromium.console() == []
    asked = {url for url in chromium.requests() if not url.startswith(("data:", "chrome:"))}
    assert all(url.startswith(server.url) for url in asked), asked


def select(browser: Browser, **choice: str) -> None:
    for name, value in choice.items():
        script = """const select = document.getElementById(arguments[0]); select.value = arguments[1];
            select.dispatchEvent(new Event("change", { bubbles: true })); return select.value"""
        assert browser.run(script, name, value) == value


def card(browser: Browser, number: int = 0) -> str:
    """All that a song's card says; the newest is the first."""
    return str(browser.run("return document.querySelectorAll('li')[arguments[0]]?.innerText ?? ''", number))


def downloaded(path: Path) -> bytes:
    wait_for(path.exists, f"the download of {path.name}", seconds=20)
    return path.read_bytes()


@needs_chromium
@pytest.mark.slow
def test_a_song_from_choosing_it_to_hearing_and_keeping_its_stems(
    browser: Browser, server: Process, tmp_path: Path
) -> None:
    select(browser, recipe="demo", stems="all_6", format="flac")
    assert browser.run("return document.querySelector('#start').disabled")
    browser.choose("input", SONG)
    assert browser.run("return document.querySelector('#chosen').textContent") == "song.flac, 1.5 MB"
    browser.click("#start")
    seen: set[float] = set()

    def done() -> bool:
        seen.add(float(browser.run("return document.querySelector('li progress').value")))
        return "Done" in card(browser)

    wait_for(done, "the end of the song")
    assert len(seen) > 2
    assert browser.run("return document.querySelector('#said').textContent") == "song.flac: Done"
    files = Separator("demo", "all_6", options=EngineOptions(device="cpu")).separate_file(
        SONG, tmp_path / "out", OutputOptions(format="flac")
    )
    browser.click("[aria-label='Download drums: song.flac']")
    np.testing.assert_array_equal(read(downloaded(tmp_path / "song - drums.flac")), read(files["drums"]))
    browser.click("[aria-label='Download all as zip: song.flac']")
    archive = zipfile.ZipFile(io.BytesIO(downloaded(tmp_path / "song - stems.zip")))
    assert archive.namelist() == [f"song/{stem}.flac" for stem in STEMS["all_6"]]
    for stem, path in files.items():
        np.testing.assert_array_equal(read(archive.read(f"song/{stem}.flac")), read(path))

    browser.click("[aria-label='Listen to song.flac']")
    level = """const track = player.tracks.find(track => track.name === arguments[0]);
        return 20 * Math.log10(level(track, new Float32Array(2048)) + 1e-9)"""
    wait_for(lambda: browser.run("return globalThis.play !== undefined && !play.disabled"), "the player")
    browser.click("#play")
    wait_for(lambda: browser.run(level, "drums") > -40, "the drums")
    browser.click("[aria-label='Mute drums']")
    wait_for(lambda: browser.run(level, "drums") < -90, "the drums' silence")
    wait_for(lambda: browser.run(level, "bass") > -40, "the bass")
    links = browser.run("return [...document.querySelectorAll('nav a')].map(each => each.textContent)")
    assert links == ["← all songs", *(f"↓ {stem}" for stem in STEMS["all_6"]), "↓ all as zip"]
    browser.click("nav a:nth-of-type(2)")
    np.testing.assert_array_equal(read(downloaded(tmp_path / "song - vocals.flac")), read(files["vocals"]))
    browser.click("nav a")
    wait_for(lambda: "Done" in card(browser), "the song on the page again")
    browser.click("[aria-label='Remove song.flac']")
    assert card(browser) == ""
    wait_for(lambda: not list(server.temporary.glob("separation-*/*/stems/guitar.flac")), "its removal")


@needs_chromium
@pytest.mark.slow
def test_dropped_songs_wait_in_line_and_can_be_cancelled(browser: Browser, short: bytes) -> None:
    select(browser, recipe="demo", format="mp3")
    script = """const transfer = new DataTransfer();
        for (const [name, text] of arguments[0]) {
            transfer.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name));
        }
        document.querySelector("h1").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}))"""

    long, brief = (base64.b64encode(content).decode() for content in (song(15, format="FLAC"), short))
    browser.run(script, [["<b>1</b>.flac", long], ["2.wav", brief]])
    assert browser.run("return document.querySelector('#chosen').textContent").startswith("2 files")
    browser.press("\ue007")  # the drop has moved the focus to the button
    wait_for(lambda: "1 song before it" in card(browser, 1), "the second song's place in the line")
    assert card(browser).startswith("<b>1</b>.flac")
    browser.click("[aria-label='Cancel <b>1</b>.flac']")
    assert "Cancelled" in card(browser)
    wait_for(lambda: "Done" in card(browser, 1), "the end of the second song")
    browser.open(browser.run("return location.href"))
    wait_for(lambda: "Done" in card(browser), "the second song after a reload")
    assert card(browser, 1) == ""


@needs_chromium
@pytest.mark.slow
def test_a_song_that_there_is_no_room_for_is_sent_when_there_is(browser: Browser, short: bytes, tmp_path: Path) -> None:
    select(browser, recipe="demo")
    full = """const asked = fetch, full = () => Promise.resolve(new Response("20 songs are waiting", {status: 503}));
        globalThis.refused = 0;
        globalThis.fetch = (path, how) => how.method === "POST" && ++refused < 3 ? full() : asked(path, how)"""
    browser.run(full)
    (tmp_path / "song.flac").write_bytes(short)
    browser.choose("input", tmp_path / "song.flac")
    browser.click("#start")
    wait_for(lambda: browser.run("return refused") == 1, "the refusal")
    assert "Waiting to be sent" in card(browser)
    wait_for(lambda: "Done" in card(browser), "the end of the song")
    assert browser.run("return refused") == 3


@needs_chromium
@pytest.mark.slow
def test_a_wrong_file_and_one_too_large_say_so(browser: Browser, tmp_path: Path) -> None:
    select(browser, recipe="demo")
    (tmp_path / "words.txt").write_text("words, not sound\n" * 50)
    (tmp_path / "big.wav").write_bytes(bytes(MAX_MIB * 2**20 + 1))
    browser.choose("input", tmp_path / "words.txt")
    browser.click("#start")
    wait_for(lambda: "'words.txt' is not audio" in card(browser), "the sentence")
    browser.choose("input", tmp_path / "big.wav")
    browser.click("#start")
    wait_for(lambda: "'big.wav' has more than 3 MiB" in card(browser), "the other sentence")
    assert "Failed to load resource" in browser.console()[0]  # Chromium's own note of the refusal


@needs_chromium
@pytest.mark.slow
def test_a_server_that_stopped_is_said_and_noticed_when_it_is_back(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "song.flac").write_bytes(song(15, format="FLAC"))
    (tmp_path / "work").mkdir()
    server = Process(tmp_path / "work")
    chromium.open(server.url)
    select(chromium, recipe="demo")
    chromium.choose("input", tmp_path / "song.flac")
    chromium.click("#start")
    wait_for(lambda: "%" in card(chromium), "the beginning of its separation")
    assert server.stop(signal.SIGINT) == (0, "")
    wait_for(lambda: chromium.run("return !document.querySelector('#lost').hidden"), "the page's notice", seconds=20)
    assert "does not answer" in chromium.run("return document.querySelector('#lost').textContent")
    with Server(
        "127.0.0.1", int(server.host.split(":")[1]), Songs(tmp_path / "work", ModelPool(EngineOptions(device="cpu")))
    ) as again:
        threading.Thread(target=again.serve_forever, args=(0.02,)).start()
        try:
            wait_for(lambda: "no longer on the server" in card(chromium), "the notice that it is gone", seconds=20)
            assert chromium.run("return document.querySelector('#lost').hidden")
        finally:
            again.shutdown()
    chromium.console()


@needs_chromium
@pytest.mark.slow
def test_the_first_page_has_names_for_all_controls_and_says_what_is_downloaded(browser: Browser) -> None:
    names = [browser.label(selector) for selector in ("input", "#stems", "#recipe", "#format", "#start")]
    assert names == ["Drop songs here, or choose files", "Stems", "Recipe", "Format", "Separate"]
    select(browser, recipe="standard", stems="all_4")
    hint = "return document.querySelector('#hint').textContent"
    assert "weights are downloaded" in browser.run(hint) or all(
        browser.run(f"return options.recipes.standard.{choice}.download") == 0 for choice in STEMS
    )
    select(browser, recipe="demo")
    assert browser.run(hint) == "demo: quick and rough, for trying the program."
    assert f"{KEEP_SECONDS // 60} minutes" in browser.run("return document.querySelector('#limits').textContent")
    for selector in ("input", "#stems", "#recipe", "#format"):
        browser.press("\ue004")
        assert browser.run("return document.activeElement === document.querySelector(arguments[0])", selector)


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 768])
def test_the_first_page_fits_a_phone(browser: Browser, width: int, tmp_path: Path) -> None:
    browser.developer(
        "Emulation.setDeviceMetricsOverride", width=width, height=740, deviceScaleFactor=2, mobile=width < 768
    )
    try:
        browser.run("location.reload()")
        (tmp_path / f"{'a' * 120}.txt").write_text("words")
        select(browser, recipe="demo")
        browser.choose("input", tmp_path / f"{'a' * 120}.txt")
        browser.click("#start")
        wait_for(lambda: "is not audio" in card(browser), "the sentence")
        assert browser.run("return document.documentElement.scrollWidth") <= width
    finally:
        browser.developer("Emulation.clearDeviceMetricsOverride")
