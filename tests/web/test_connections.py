"""Who gets a connection, and how long a client may take."""

import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from separation.web import connections
from separation.web.connections import Connections, Incoming, Limits


class Peers:
    """Pairs of connected sockets: the server's end, by which a client is known here, and the client's."""

    def __init__(self) -> None:
        self.pairs: list[tuple[socket.socket, socket.socket]] = []

    def new(self) -> socket.socket:
        self.pairs.append(socket.socketpair())
        return self.pairs[-1][0]

    def closed(self) -> list[int]:
        """The numbers of those that the server has closed, in the order in which they came."""
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


def test_the_one_that_was_waited_for_the_longest_makes_way(peers: Peers) -> None:
    room = Connections(Limits(connections=3, per_address=3))
    for number in range(5):
        assert room.enter(peers.new(), f"10.0.0.{number}")
    assert peers.closed() == [0, 1]
    room.make_room()
    assert peers.closed() == [0, 1, 2]


def test_an_address_with_its_share_makes_way_for_itself_alone(peers: Peers) -> None:
    room = Connections(Limits(connections=10, per_address=2))
    for address in ("other", "greedy", "greedy", "greedy", "greedy"):
        assert room.enter(peers.new(), address)
    assert peers.closed() == [1, 2]


def test_one_that_is_being_answered_stays_and_where_all_are_the_next_is_refused(peers: Peers) -> None:
    room = Connections(Limits(connections=3, per_address=2))
    first, second, third = peers.new(), peers.new(), peers.new()
    for connection, address in ((first, "a"), (second, "a"), (third, "b")):
        assert room.enter(connection, address)
        room.answer(connection)
    assert not room.enter(peers.new(), "a")
    assert not room.enter(peers.new(), "c")
    assert peers.closed() == []
    room.wait(second)  # it has its answer and does not go away
    assert room.enter(peers.new(), "a")
    assert peers.closed() == [1]
    room.leave(third)
    assert room.enter(peers.new(), "c")
    assert peers.closed() == [1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, which stands still unless a test changes it."""
    now = [1000.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])
    return now


def test_what_drips_has_no_more_time_than_what_says_nothing(peers: Peers, clock: list[float]) -> None:
    incoming = Incoming(peers.new(), 10)
    peers.pairs[0][1].sendall(b"x" * 20)
    for _ in range(5):
        clock[0] += 1.9
        assert incoming.read(1) == b"x"
    clock[0] += 1
    with pytest.raises(TimeoutError):
        incoming.read(1)


@pytest.mark.parametrize("bytes_a_second, kept", [(90, False), (110, True)])
def test_a_slow_song_is_taken_as_long_as_it_keeps_the_least_rate(
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


def test_a_fast_beginning_buys_no_pause(peers: Peers, clock: list[float]) -> None:
    incoming = Incoming(peers.new(), 10)
    incoming.allow(5, rate=100)
    peers.pairs[0][1].sendall(bytes(10_001))
    assert len(incoming.read(10_000)) == 10_000  # the least rate's 100 seconds
    clock[0] += 5
    with pytest.raises(TimeoutError):
        incoming.read(1)
