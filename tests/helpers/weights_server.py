"""A web server on 127.0.0.1 that gives weights, with the faults that a test asks for."""

import http.server
import time
from typing import Any

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path, with the faults that a test asks for; `ranges` logs the Range headers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.knows_ranges = True
        self.break_after: list[int] = []  # of each answer in turn, the bytes after which the connection closes
        self.statuses: list[int] = []  # of each answer in turn, an error to give instead
        self.redirects: list[str] = []  # of each answer in turn, where it leads to instead
        self.content_ranges: list[str] = []  # of each answer in turn, which part it says that it is
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
