"""HTTP responses: text, JSON, files and byte ranges of them, and zip archives."""

import io
import json
import os
import re
from email.utils import encode_rfc2231
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from separation.web.connections import Incoming, LimitedServer, linger

BLOCK_BYTES = 1 << 16
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; worker-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Responder(BaseHTTPRequestHandler):
    """Handles one request on a connection and then closes it."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # lets a malformed request line get a response with a status
    server_version: str = "separation"
    sys_version: str = ""
    server: LimitedServer

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.incoming: Incoming = Incoming(self.connection, self.server.limits.head_seconds)
        self.rfile: io.BufferedIOBase = io.BufferedReader(self.incoming)

    def handle(self) -> None:
        self.handle_one_request()
        self.server.connections.mark_idle(self.connection)
        linger(self.connection, self.server.limits.linger_seconds)

    def send_bytes(
        self,
        content: bytes,
        media_type: str,
        *,
        status: HTTPStatus = HTTPStatus.OK,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_head({"Content-Type": media_type, "Content-Length": str(len(content))} | (headers or {}), status)
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_text(self, text: str, status: HTTPStatus, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(text.encode(), "text/plain; charset=utf-8", status=status, headers=headers)

    def send_json(self, answer: dict[str, Any], *, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_bytes(json.dumps(answer).encode(), "application/json", status=status)

    def send_file(self, file: io.BufferedReader, headers: dict[str, str]) -> None:
        """Send a file, or the range that the client asks for: players seek and browsers resume downloads this way."""
        with file:
            stat = os.fstat(file.fileno())
            size, tag = stat.st_size, f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
            headers |= {"Accept-Ranges": "bytes", "ETag": tag}
            unchanged = self.headers.get("If-Range", tag) == tag
            part = byte_range(self.headers.get("Range", ""), size) if unchanged else None
            if self.headers.get("If-None-Match") == tag:
                self.send_head({"ETag": tag}, HTTPStatus.NOT_MODIFIED)
            elif part is None:
                self._send_part(file, range(size), headers)
            elif part:
                content_range = {"Content-Range": f"bytes {part[0]}-{part[-1]}/{size}"}
                self._send_part(file, part, headers | content_range, HTTPStatus.PARTIAL_CONTENT)
            else:
                content_range = {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
                self.send_head(content_range, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)

    def _send_part(
        self, file: io.BufferedReader, part: range, headers: dict[str, str], status: HTTPStatus = HTTPStatus.OK
    ) -> None:
        self.send_head(headers | {"Content-Length": str(len(part))}, status)
        if self.command != "HEAD":
            file.seek(part.start)
            while block := file.read(min(BLOCK_BYTES, part.stop - file.tell())):
                self.wfile.write(block)

    def send_zip(self, files: dict[str, Path], download_name: str) -> None:
        """Send a zip archive while it is being made. `files` maps names in the archive to files.

        Sound hardly compresses, so it is not compressed. The method is still deflate: a stored entry would need its
        size in advance.
        """
        chunked = {"Transfer-Encoding": "chunked"} if self.request_version != "HTTP/1.0" else {}
        self.send_head({"Content-Type": "application/zip"} | chunked | attachment(download_name))
        if self.command == "HEAD":
            return
        body = io.BufferedWriter(_Chunks(self.wfile), BLOCK_BYTES) if chunked else self.wfile
        with ZipFile(body, "w", ZIP_DEFLATED, compresslevel=0) as archive:
            for name, path in files.items():
                archive.write(path, name)
        body.flush()
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def send_head(self, headers: dict[str, str], status: HTTPStatus = HTTPStatus.OK) -> None:
        """Send the status line and the headers."""
        self.connection.settimeout(self.server.limits.pause_seconds)  # for each block of the body, too
        self.send_response(status)
        for name, value in (HEADERS | headers | {"Connection": "close"}).items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by http.server for malformed requests."""
        self.send_text(message or HTTPStatus(code).phrase, HTTPStatus(code))

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the page polls twice a second."""


class _Chunks(io.RawIOBase):
    """Encodes what is written in HTTP's chunked transfer coding."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if n := len(data):  # an empty chunk would end the body
            self._stream.write(b"%x\r\n%b\r\n" % (n, data))
        return n


def byte_range(header: str, size: int) -> range | None:
    """The bytes that a Range header selects in a file of `size` bytes; empty if they lie outside of it.

    None stands for the whole file: there is no such header, it is malformed, or it has several ranges.
    """
    match = re.fullmatch(r"bytes=([0-9]{0,15})-([0-9]{0,15})", header)
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        return range(max(size - int(match[2]), 0), size)
    if match[2] and int(match[2]) < int(match[1]):
        return None
    return range(int(match[1]), min(int(match[2]) + 1, size) if match[2] else size)


def attachment(name: str) -> dict[str, str]:
    """The header that makes a browser save the response under `name`."""
    return {"Content-Disposition": f"attachment; filename*={encode_rfc2231(name, 'utf-8')}"}
