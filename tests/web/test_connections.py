"""Connections are limited, and slow clients are disconnected."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from helpers.page_server import Client, idle_server, rest, song_queue
from helpers.served_process import wait_for
from separation.web import connections, serve
from separation.web.connections import Connections, Incoming, Limits
from separation.web.serve import Server


class Peers:
    """Pairs of connected sockets: the server's end and the client's."""

    def __init__(self) -> None:
        self.pairs: list[tuple[socket.socket, socket.socket]] = []

    def new(self) -> socket.socket:
        self.pairs.append(socket.socketpair())
        return self.pairs[-1][0]

    def closed(self) -> list[int]:
        """The numbers of the connections that the server has closed, oldest first."""
        return [number for number, (_, client) in enumerate(self.pairs) if self._at_end(client)]

    @staticmethod
    def _at_end(client: socket.socket) -> bool:
        client.setblocking(False)
        try:
            return client.recv(1) == b""
        except BlockingIOError:
            return False


@pytest.fixture
def peers() -> Iterator[Peers]:
    made = Peers()
    yield made
    for pair in made.pairs:
        for end in pair:
            end.close()


def test_the_oldest_idle_connection_is_closed_for_a_new_one(peers: Peers) -> None:
    room = Connections(Limits(connections=3, per_address=3))
    for number in range(5):
        assert room.enter(peers.new(), f"10.0.0.{number}")
    assert peers.closed() == [0, 1]
    room.make_room()
    assert peers.closed() == [0, 1, 2]


def test_an_address_at_its_limit_loses_only_its_own_connections(peers: Peers) -> None:
    room = Connections(Limits(connections=10, per_address=2))
    for address in ("other", "greedy", "greedy", "greedy", "greedy"):
        assert room.enter(peers.new(), address)
    assert peers.closed() == [1, 2]


def test_a_busy_connection_stays_open_and_a_new_one_is_refused_if_all_are_busy(peers: Peers) -> None:
    room = Connections(Limits(connections=3, per_address=2))
    first, second, third = peers.new(), peers.new(), peers.new()
    for connection, address in ((first, "a"), (second, "a"), (third, "b")):
        assert room.enter(connection, address)
        room.mark_busy(connection)
    assert not room.enter(peers.new(), "a")
    assert not room.enter(peers.new(), "c")
    assert peers.closed() == []
    room.mark_idle(second)  # it is answered but stays open
    assert room.enter(peers.new(), "a")
    assert peers.closed() == [1]
    room.leave(third)
    assert room.enter(peers.new(), "c")
    assert peers.closed() == [1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds; it stands still unless a test changes it."""
    now = [1000.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])
    return now


def test_without_a_rate_single_bytes_do_not_extend_the_deadline(peers: Peers, clock: list[float]) -> None:
    incoming = Incoming(peers.new(), 10)
    peers.pairs[0][1].sendall(b"x" * 20)
    for _ in range(5):
        clock[0] += 1.9
        assert incoming.read(1) == b"x"
    clock[0] += 1
    with pytest.raises(TimeoutError):
        incoming.read(1)


@pytest.mark.parametrize("bytes_a_second, kept", [(90, False), (110, True)])
def test_a_slow_upload_continues_while_it_keeps_the_minimum_rate(
    peers: Peers, clock: list[float], bytes_a_second: int, kept: bool
) -> None:
    incoming, seconds = Incoming(peers.new(), 10), 0
    incoming.allow(5, rate=100)
    peers.pairs[0][1].sendall(bytes(11_000))
    with suppress(TimeoutError):
        while seconds < 100:
            clock[0] += 1
            assert len(incoming.read(bytes_a_second)) == bytes_a_second
            seconds += 1
    assert (seconds == 100) == kept
    assert seconds > 40


def test_a_fast_start_does_not_allow_a_longer_pause(peers: Peers, clock: list[float]) -> None:
    incoming = Incoming(peers.new(), 10)
    incoming.allow(5, rate=100)
    peers.pairs[0][1].sendall(bytes(10_001))
    assert len(incoming.read(10_000)) == 10_000  # 100 seconds' worth at the minimum rate
    clock[0] += 5
    with pytest.raises(TimeoutError):
        incoming.read(1)


# On the real server


HALF = "GET / HTTP/1.1\r\nX: half a head"


def test_half_open_connections_lock_nobody_out(tmp_path: Path) -> None:
    with idle_server(tmp_path, Limits(connections=8, per_address=6)) as (client, _, _), ExitStack() as stack:
        half_open = [stack.enter_context(client.connect(HALF)) for _ in range(30)]
        assert client.ask("GET", "/")[0] == 200
        assert all(connection.recv(1) == b"" for connection in half_open[:24])
        assert len([thread for thread in threading.enumerate() if "process_request_thread" in thread.name]) <= 7


def test_a_request_in_progress_is_answered_however_many_connections_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with idle_server(tmp_path, Limits(connections=4, per_address=4)) as (client, _, _), ExitStack() as stack:
        real = serve.page

        def page() -> bytes:
            half_open = [stack.enter_context(client.connect(HALF)) for _ in range(20)]
            assert half_open[0].recv(1) == b""  # it was closed to make room
            return real()

        monkeypatch.setattr(serve, "page", page)
        assert client.ask("GET", "/")[0] == 200


@pytest.mark.parametrize(
    "sent",
    ["", HALF, "POST /songs HTTP/1.1\r\nHOST\r\nX-Separation: 1\r\nContent-Length: 50\r\n\r\n{", "GET / HTTP/1.1\r\n"],
)
def test_a_client_that_never_finishes_its_request_is_disconnected(tmp_path: Path, sent: str) -> None:
    with idle_server(tmp_path, Limits(head_seconds=0.1)) as (client, _, _), client.connect(sent) as connection:
        assert b" 200 " not in rest(connection)


def test_an_upload_that_stalls_fails_and_is_removed(tmp_path: Path) -> None:
    with idle_server(tmp_path, Limits(pause_seconds=0.2)) as (client, _, _):
        id = client.announce(bytes(10**6))
        head = f"PUT /songs/{id} HTTP/1.1\r\nHOST\r\nX-Separation: 1\r\nContent-Length: 1000000\r\n\r\n"
        with client.connect(head) as connection, suppress(ConnectionError):
            while not connection.send(b"x") or client.status(id)["state"] in ("announced", "receiving"):
                time.sleep(0.02)
        assert client.status(id)["problem"] == "'song.wav' did not arrive completely: send it again"
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["song.json"]


def test_a_client_that_does_not_read_the_response_is_disconnected(tmp_path: Path) -> None:
    with idle_server(tmp_path, Limits(pause_seconds=0.2, linger_seconds=0.1)) as (client, songs, server):
        id = client.send(b"1")
        (tmp_path / "large.wav").write_bytes(bytes(16 * 2**20))
        songs._songs[id].files = {"large.wav": tmp_path / "large.wav"}
        with client.connect(f"GET /songs/{id}/large.wav HTTP/1.1\r\nHOST\r\n\r\n") as connection:
            assert connection.recv(9) == b"HTTP/1.1 "
            wait_for(lambda: not server.connections.count(), "the end of the connection")


def test_the_server_pauses_when_file_descriptors_run_out_and_carries_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    waited: list[float] = []
    with Server("127.0.0.1", 0, song_queue(tmp_path)) as server:
        monkeypatch.setattr(connections.time, "sleep", waited.append)
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
