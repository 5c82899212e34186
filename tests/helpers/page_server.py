"""The local page's server: in a process of its own, or in this one without separating, and a client of it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.common import PROJECT
from helpers.served_process import wait_for
from separation.engine.options import EngineOptions
from separation.engine.pool import ModelPool
from separation.web.connections import Limits
from separation.web.queue import SongQueue
from separation.web.serve import Server

MAX_MIB = 3
QUICK = {"recipe": "demo", "stems": "vocals_instrumental", "format": "flac"}


class Client:
    """Sends requests to the page's server as the page itself does, unless told otherwise."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host = url.split("/")[2]

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """The status and the body: parsed JSON, a str for text, or bytes. A header whose value is `-` is left out."""
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
        """A connection on which `sent` has been sent. `HOST` in it stands for the Host header."""
        host, port = self.host.split(":")
        connection = socket.create_connection((host, int(port)), timeout=30)
        content = sent.encode() if isinstance(sent, str) else sent
        connection.sendall(content.replace(b"HOST", f"Host: {self.host}".encode()))
        return connection

    def answers(self, sent: str | bytes) -> list[int]:
        """The statuses of all responses on a connection on which `sent` was sent, until the server closes it."""
        with self.connect(sent) as connection:
            return [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d+) ", rest(connection), re.MULTILINE)]

    def announce(self, content: bytes, name: str = "song.wav", **choice: Any) -> str:
        status, answer = self.ask("POST", "/songs", {"name": name, "bytes": len(content)} | QUICK | choice)
        assert status == 201
        return str(answer["id"])

    def send(self, content: bytes, name: str = "song.wav", **choice: Any) -> str:
        id = self.announce(content, name, **choice)
        assert self.ask("PUT", f"/songs/{id}", content) == (200, {})
        return id

    def status(self, id: str) -> dict[str, Any]:
        status, answer = self.ask("GET", f"/songs/{id}")
        assert status == 200
        return answer

    def wait_until_over(self, id: str) -> dict[str, Any]:
        wait_for(lambda: self.status(id)["state"] in ("done", "failed"), "the end of the song")
        return self.status(id)


def rest(connection: socket.socket) -> bytes:
    """All that arrives until the server closes the connection."""
    with connection.makefile("rb") as file:
        return file.read()


class Process(Client):
    """`python -m separation serve`, with its temporary files in `folder` and its songs in `songs` below it."""

    def __init__(self, folder: Path, *, port: int = 0, **environment: str) -> None:
        self.temporary, self.songs = folder, folder / "songs"
        limits = {"SEPARATION_MAX_MIB": str(MAX_MIB), "SEPARATION_MAX_SECONDS": "30"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "separation", "serve", "--port", str(port), "--no-browser", "--device", "cpu"],
            cwd=PROJECT,
            env=os.environ
            | limits
            | {"TMPDIR": str(folder), "SEPARATION_SONGS": str(self.songs), "OMP_NUM_THREADS": "1"}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Background jobs of a shell ignore SIGINT and would pass that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert self.process.stdout is not None
        super().__init__(self.process.stdout.readline().split()[0])

    def stop(self, signal_number: int) -> tuple[int, str]:
        """Send a signal and wait. Returns the exit code and stderr."""
        self.process.send_signal(signal_number)
        said = self.process.communicate(timeout=60)[1]
        return self.process.returncode, said

    def leftovers(self) -> list[str]:
        """Temporary files."""
        kept = (self.songs.name, "torchinductor")
        return [path.name for path in self.temporary.iterdir() if not path.name.startswith(kept)]


def song_queue(folder: Path, **options: Any) -> SongQueue:
    return SongQueue(folder, ModelPool(EngineOptions(device="cpu")), **options)


@contextmanager
def idle_server(folder: Path, limits: Limits = Limits(), **options: Any) -> Iterator[tuple[Client, SongQueue, Server]]:
    """A server in this process that accepts songs but does not separate them."""
    songs = song_queue(folder, **options)
    with Server("127.0.0.1", 0, songs, limits) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield Client(running.url), songs, running
        finally:
            songs.close()
            running.shutdown()
            thread.join()
