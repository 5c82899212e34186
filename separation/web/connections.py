"""A TCP server that slow or silent clients cannot block.

Each connection has a thread, so a client that opens many connections, or sends a byte at a time, could use up all of
them. The server therefore limits the number of connections, closes the oldest one that has not finished its request to
make room for a new one, and times out slow clients.
"""

import errno
import io
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # accept() fails with these


@dataclass(frozen=True)
class Limits:
    """Limits on connections."""

    connections: int = 100  # macOS gives a process 256 file descriptors
    per_address: int = 50  # a browser opens 6
    head_seconds: float = 10.0  # to send a request's line, headers and JSON
    pause_seconds: float = 30.0  # without a byte during an upload or download
    bytes_per_second: float = 1024.0  # the slowest upload, on average
    linger_seconds: float = 2.0  # to read the response before the connection is closed


class Connections:
    """The open connections: idle ones, whose request is incomplete, and busy ones, whose request is being answered.

    If there is no room for a new connection, the oldest idle one is closed.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._idle: dict[socket.socket, str] = {}  # -> the client's address; oldest first
        self._busy: dict[socket.socket, str] = {}
        self._lock = threading.Lock()

    def enter(self, connection: socket.socket, address: str) -> bool:
        """Add a new connection. Returns False if there is no room for it."""
        with self._lock:
            addresses = [*self._idle.values(), *self._busy.values()]
            if addresses.count(address) >= self._limits.per_address:
                room = self._close_oldest(address)
            else:
                room = len(addresses) < self._limits.connections or self._close_oldest()
            if room:
                self._idle[connection] = address
            return room

    def mark_busy(self, connection: socket.socket) -> None:
        """The request has arrived: keep this connection open until it is answered."""
        with self._lock:
            if connection in self._idle:
                self._busy[connection] = self._idle.pop(connection)

    def mark_idle(self, connection: socket.socket) -> None:
        """The request has been answered: this connection may be closed to make room."""
        with self._lock:
            if connection in self._busy:
                self._idle[connection] = self._busy.pop(connection)

    def leave(self, connection: socket.socket) -> None:
        """Remove a connection that is being closed."""
        with self._lock:
            self._idle.pop(connection, None)
            self._busy.pop(connection, None)

    def count(self) -> int:
        with self._lock:
            return len(self._idle) + len(self._busy)

    def make_room(self) -> None:
        """Close the oldest idle connection, if there is one."""
        with self._lock:
            self._close_oldest()

    def _close_oldest(self, address: str | None = None) -> bool:
        """Close the oldest idle connection, of this address if given. Returns False if there is none."""
        for connection, client in self._idle.items():
            if address in (None, client):
                del self._idle[connection]
                with suppress(OSError):  # the client has closed it already
                    connection.shutdown(socket.SHUT_RDWR)  # wakes up its thread, which closes it
                return True
        return False


class LimitedServer(ThreadingTCPServer):
    """A TCP server with a thread for each connection and limits on connections."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, handler: type[BaseRequestHandler], limits: Limits) -> None:
        self.limits = limits
        self.connections: Connections = Connections(limits)
        self.address_family: int = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as e:
            if e.errno in OUT_OF_RESOURCES:
                self.connections.make_room()
                time.sleep(0.1)  # the server tries again at once, which would keep a core busy
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self.connections.enter(request, client_address[0])

    def shutdown_request(self, request: Any) -> None:
        self.connections.leave(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):  # the client has gone
            super().handle_error(request, client_address)


class Incoming(io.RawIOBase):
    """The bytes that a client sends. Reading raises TimeoutError if they arrive too slowly.

    All must arrive within `seconds`. With a rate in bytes per second, each byte extends the deadline, to at most
    `seconds` from now.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self.allow(seconds)

    def allow(self, seconds: float, rate: float | None = None) -> None:
        """Start a new deadline."""
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
    """Give the client time to read the response.

    If a connection is closed before the whole request is read, TCP resets it and the client may lose the response. So
    this reads the rest of the request and drops it, until the client closes the connection.
    """
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        rest = Incoming(connection, seconds)
        while rest.read(1 << 16):
            pass
