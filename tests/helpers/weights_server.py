"""A web server on 127.0.0.1 that serves weights, with the faults that a test asks for."""

import hashlib
import http.server
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from helpers.common import PROJECT
from separation.checkpoints.description import WeightFile

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path, with the faults that a test asks for; `ranges` logs the Range headers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.knows_ranges = True
        self.break_after: list[int] = []  # for each response in turn, the bytes after which the connection closes
        self.statuses: list[int] = []  # for each response in turn, an error to send instead
        self.redirects: list[str] = []  # for each response in turn, a redirect to send instead
        self.content_ranges: list[str] = []  # for each response in turn, the range that it announces
        self.announces_length = True
        self.delay_seconds = 0.0
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/weights.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        time.sleep(server.delay_seconds)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        if server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.knows_ranges else 0
        if asked and start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if asked and server.knows_ranges else 200)
        if server.announces_length:
            self.send_header("Content-Length", str(len(body)))
        if server.content_ranges:
            self.send_header("Content-Range", server.content_ranges.pop(0))
        self.end_headers()
        if server.break_after:
            body = body[: server.break_after.pop(0)]
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def weight_file(url: str | None, content: bytes = CONTENT, **other: Any) -> WeightFile:
    known = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "stem": None}
    return WeightFile(**{"name": "sub/weights.bin", "url": url, "checkpoint": "some_model", **known, **other})


def unstated(url: str, name: str = "sub/weights.bin", **known: Any) -> WeightFile:
    return weight_file(url, name=name, **{"bytes": None, "sha256": None} | known)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def run_at_once(weights: Path, codes: list[str]) -> list[str]:
    """Run each code in a process of its own, all at the same moment. Returns what each printed."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "SEPARATION_WEIGHTS": str(weights)}
    start = """
from separation.checkpoints.description import WeightFile
from separation.checkpoints.download import fetch
print("ready", flush=True)
input()
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", start + code],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for code in codes
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(codes), answers
    return [printed for printed, _ in answers]
