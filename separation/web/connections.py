"""Limits on a server's connections: how many there are, and how long each may take to say what it wants.

A server that gives each connection a thread can be brought to a halt by clients that say nothing, or that say it a
byte at a time. So the oldest of those makes way for the next client, and time runs out for a client that is slow.
"""

import io
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    connections: int = 100  # in all: below the 256 descriptors that macOS gives a process
    per_address: int = 50  # a browser opens 6
    head_seconds: float = 10.0  # for a request without its file
    pause_seconds: float = 30.0  # without a byte, while a file is sent or fetched
    bytes_per_second: float = 1024.0  # the least that a file may take, on average: a modem is faster
    linger_seconds: float = 2.0  # for the client to take the answer


class Connections:
    """The open connections: those that are waited for, and those with a request that is being answered.

    Where there is no room for another, the one that has been waited for the longest is closed.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._awaited: dict[socket.socket, str] = {}  # with the client's address, the oldest first
        self._answered: dict[socket.socket, str] = {}
        self._lock = threading.Lock()

    def enter(self, connection: socket.socket, address: str) -> bool:
        """Whether there is room for a new connection."""
        with self._lock:
            everyone = [*self._awaited.values(), *self._answered.values()]
            if everyone.count(address) >= self._limits.per_address:
                room = self._close_oldest(address)
            else:
                room = len(everyone) < self._limits.connections or self._close_oldest()
            if room:
                self._awaited[connection] = address
            return room

    def answer(self, connection: socket.socket) -> None:
        """The connection's request is here: it is not closed for another any more."""
        with self._lock:
            if connection in self._awaited:
                self._answered[connection] = self._awaited.pop(connection)

    def wait(self, connection: socket.socket) -> None:
        """The connection's request is answered."""
        with self._lock:
            if connection in self._answered:
                self._awaited[connection] = self._answered.pop(connection)

    def leave(self, connection: socket.socket) -> None:
        with self._lock:
            self._awaited.pop(connection, None)
            self._answered.pop(connection, None)

    def count(self) -> int:
        with self._lock:
            return len(self._awaited) + len(self._answered)

    def make_room(self) -> None:
        """Close the one that has been waited for the longest, if there is any."""
        with self._lock:
            self._close_oldest()

    def _close_oldest(self, address: str | None = None) -> bool:
        """Whether there was one, of this address if one is given."""
        for connection, its_address in self._awaited.items():
            if address in (None, its_address):
                del self._awaited[connection]
                with suppress(OSError):  # the client has closed it already
                    connection.shutdown(socket.SHUT_RDWR)  # its thread wakes up and closes it
                return True
        return False


class Incoming(io.RawIOBase):
    """What a client sends. TimeoutError is raised if it comes too slowly.

    Nothing has to come before `seconds` are over. With a rate, in bytes per second, that time is extended as bytes
    come, up to `seconds` from then.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self.allow(seconds)

    def allow(self, seconds: float, rate: float | None = None) -> None:
        self._seconds, self._rate = seconds, rate
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the client is too slow")
        self._connection.settimeout(left)
        n = self._connection.recv_into(buffer)
        if self._rate:
            self._deadline = min(self._deadline + n / self._rate, time.monotonic() + self._seconds)
        return n


def linger(connection: socket.socket, seconds: float) -> None:
    """Let the client take the answer: closed while something of the request is unread, a connection drops both."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        rest = Incoming(connection, seconds)
        while rest.read(1 << 16):
            pass
