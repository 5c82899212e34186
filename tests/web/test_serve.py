"""The local page's server: its command, its paths and methods, and what it refuses."""

import signal
import socket
from pathlib import Path

import pytest

from helpers.common import quick_first, song
from helpers.page_server import QUICK, Client, Process, song_queue
from helpers.served_process import wait_for
from separation.cli.main import main
from separation.errors import InputError
from separation.web.serve import Server

PATHS = ["/", "/songs", "/songs/x", "/songs/x/vocals.wav", "/songs/x/stems.zip"]
HIDDEN = "GET / HTTP/1.1\r\nHOST\r\n\r\n"
ANNOUNCE = "POST /songs HTTP/1.1\r\nHOST\r\nX-Separation: 1\r\n"


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_a_signal_during_a_song_stops_the_server_which_leaves_only_the_songs(
    tmp_path: Path, number: int, code: int
) -> None:
    server = Process(tmp_path)
    working, _ = server.send(song(15, format="FLAC")), server.send(song(2))
    receiving = server.announce(bytes(10**6))
    with socket.create_connection((server.host.split(":")[0], int(server.host.split(":")[1]))) as sender:
        head = f"PUT /songs/{receiving} HTTP/1.1\r\nHost: {server.host}\r\nX-Separation: 1\r\nContent-Length: 1000000"
        sender.sendall(f"{head}\r\n\r\n".encode() + bytes(1000))
        wait_for(lambda: server.status(receiving)["state"] == "receiving", "the third song")
        wait_for(lambda: server.status(working)["state"] == "separating", "the first song")
        assert server.stop(number) == (code, "")
    assert server.leftovers() == []
    assert {path.name for path in server.songs.rglob("*") if path.is_file()} <= {"lock", "song.json", "song.wav"}


def test_a_port_in_use_is_a_one_line_error(
    idle: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEPARATION_SONGS", str(tmp_path / "songs"))
    port = idle.host.split(":")[1]
    assert main(["serve", "--port", port, "--no-browser"]) == 2
    assert capsys.readouterr().err == (
        f"error: cannot serve on 127.0.0.1 port {port} (Address already in use): choose another --port or --host\n"
    )
    with pytest.raises(InputError, match="port 70000"):
        Server("127.0.0.1", 70000, song_queue(tmp_path))


# Strangers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil", ""])
@pytest.mark.parametrize("method, path", [("GET", "/"), ("POST", "/songs"), ("GET", "/songs/x")])
def test_a_host_that_is_not_this_machine_is_refused(idle: Client, host: str, method: str, path: str) -> None:
    status, message = idle.ask(method, path, Host=host)
    assert status == 421
    assert message == f"{host!r} is not an address of the page: use the one that the terminal shows"


@pytest.mark.parametrize(
    "host", quick_first(["localhost", "LOCALHOST:1", "127.0.0.1:8765", "[::1]:8765", "192.168.1.2"], 1)
)
def test_an_address_or_this_machines_name_is_a_valid_host(idle: Client, host: str) -> None:
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
def test_pages_of_other_sites_cannot_announce_send_or_remove(idle: Client, headers: dict[str, str]) -> None:
    id = idle.announce(b"1")
    order = {"name": "song.wav", "bytes": 1} | QUICK
    assert idle.ask("POST", "/songs", order, **headers)[0] == 403
    assert idle.ask("PUT", f"/songs/{id}", b"1", **headers)[0] == 403
    assert idle.ask("DELETE", f"/songs/{id}", **headers)[0] == 403
    assert idle.ask("OPTIONS", "/songs", **headers)[0] == 204  # a browser's preflight request
    assert not [name for name in idle.headers if name.lower().startswith("access-control-")]  # so it refuses
    assert idle.status(id)["state"] == "announced"
    assert idle.ask("DELETE", f"/songs/{id}", Origin=f"http://{idle.host}")[0] == 200


@pytest.mark.parametrize("path", ["../../{id}/song/song.wav", "..%2Fsong%2Fsong.wav", "song/song.wav", "song.wav", "."])
def test_no_path_reaches_another_file(idle: Client, short: bytes, path: str) -> None:
    id = idle.send(short)
    status, message = idle.ask("GET", f"/songs/{id}/{path.format(id=id)}")
    assert status == 404
    assert isinstance(message, str)
    assert idle.ask("GET", f"/songs/{id}/stems.zip")[0] == 404
    assert idle.ask("GET", "/../serve.py")[0] == idle.ask("GET", "/serve.html")[0] == 404


# Paths, methods and lengths


@pytest.mark.parametrize("path", PATHS)
def test_options_lists_the_methods_of_a_path_and_others_are_refused(idle: Client, path: str) -> None:
    taken = {"/songs": {"POST"}, "/songs/x": {"DELETE", "GET", "HEAD", "PUT"}}.get(path, {"GET", "HEAD"})
    assert idle.ask("OPTIONS", path)[0] == 204
    assert idle.headers["Allow"] == ", ".join(sorted({"OPTIONS"} | taken))
    for method in {"GET", "HEAD", "POST", "PUT", "DELETE"} - taken:
        assert idle.ask(method, path)[0] == 405
        assert idle.headers["Allow"] == ", ".join(sorted({"OPTIONS"} | taken))
    assert idle.ask("PATCH", path)[0] == 501


def test_a_request_without_a_length_or_with_too_large_a_length_is_refused(idle: Client) -> None:
    assert idle.ask("POST", "/songs", b"1", Content_Length="x")[0] == 411
    assert idle.ask("POST", "/songs", b"1", Content_Length="70000")[0] == 413


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
def test_a_connection_gets_exactly_one_response(idle: Client, sent: str | bytes, status: int) -> None:
    assert idle.answers(sent) == [status]


def test_a_refused_upload_gets_its_error_although_the_body_is_not_read(idle: Client) -> None:
    status, message = idle.ask("PUT", "/songs/x", bytes(3 * 2**20))
    assert (status, message) == (404, "this song is no longer on the server: send it again")
