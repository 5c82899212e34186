"""A page in the browser for those who would rather not use a terminal: drop a song, listen to its stems, keep them.

    GET     /                   the page, serve.html
    POST    /songs              announces a song, as JSON: name, recipe, stems, format, bytes; answers its id
    PUT     /songs/ID           sends its file
    GET     /songs/ID           says how far it is
    GET     /songs/ID/NAME      a stem's file or a range of it, stems.html to listen to all, or stems.zip
    DELETE  /songs/ID           cancels it, or removes what came of it

HEAD answers as GET does, without the content; OPTIONS says what a path takes. A connection has one request, so nothing
that follows it can be taken for another.

A song is announced before it is sent, so that one that is too large is refused in words: to an answer in the middle of
what it sends, a browser does not listen. Who knows an id can have that song, so no id can be guessed. Another site's
page in the same browser cannot change anything, for it may not send the header MARK, and is not shown any answer; nor
does a name of its own that leads to this machine help it, for Host must be an address or this machine's name.
"""

import errno
import io
import json
import logging
import math
import mimetypes
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import encode_rfc2231
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from ipaddress import ip_address
from pathlib import Path
from socketserver import ThreadingTCPServer
from tempfile import TemporaryDirectory
from typing import Any, NoReturn
from zipfile import ZIP_DEFLATED, ZipFile

from separation.audio.options import FORMATS, OutputOptions
from separation.checkpoints.catalogue import missing
from separation.engine.about_song import about_song
from separation.engine.options import EngineOptions
from separation.engine.pool import ModelPool
from separation.engine.recipes import choices, load_recipe, names
from separation.engine.separator import Separator
from separation.errors import AudioError, InputError, SeparationError
from separation.progress import Progress
from separation.report.page import Report, write_report
from separation.system.places import size_bytes
from separation.web.connections import Connections, Incoming, Limits, linger
from separation.web.public import errors_without_paths, max_mib, max_seconds

PAGE = Path(__file__).with_name("serve.html")
LISTEN, ZIP = "stems.html", "stems.zip"
KEEP_SECONDS = 60 * 60  # of what is over, since it was last fetched
ANNOUNCED_SECONDS = 60  # until a song's file must have begun to come
MAX_SONGS = 20  # that are being sent, and as many again that wait for their turn: more are not taken
SLOW_SECONDS, SLOW_BYTES_PER_SECOND = 5.0, 1 << 16  # a song slower than that makes way where MAX_SONGS are being sent
MAX_JSON_BYTES = 1 << 16
BLOCK_BYTES = 1 << 16
SEPARATED = 0.8  # the share of a song's job, in its progress, that is done by then; the rest is the page to listen
MARK = "X-Separation"
SAFE = ("GET", "HEAD", "OPTIONS")  # change nothing
NO_MORE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # why no connection can be accepted
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

logger = logging.getLogger("separation")


def serve(host: str, port: int, *, options: EngineOptions = EngineOptions(), ready: Callable[[str], None]) -> NoReturn:
    """Serve the page on `host:port`, 0 for any free port, until an exception such as Ctrl-C's ends it.

    Songs are separated in this thread, where Ctrl-C arrives. `ready` is called with the page's address. Nothing stays
    in the temporary folder.

    Raises InputError if there is no such address or the port is taken.
    """
    pool = ModelPool(options)
    logger.info(pool.choice.reason)
    with TemporaryDirectory(prefix="separation-", ignore_cleanup_errors=True) as folder:
        songs = Songs(Path(folder), pool)
        with Server(host, port, songs) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                ready(server.url)
                songs.work()
            finally:
                songs.close()
                server.shutdown()


class _RefusalError(InputError):
    """A request that is answered with this status."""

    def __init__(self, status: HTTPStatus, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = headers or {}


class _CancelledError(BaseException):
    """Raised from the progress callback; not an Exception, so that nothing on its way takes it for a failure."""


@dataclass(eq=False)
class _Song:
    id: str
    name: str
    recipe: str
    stems: str
    format: str
    n_bytes: int
    folder: Path  # of all its files: `song/<name>` is the song itself
    state: str = "announced"  # then receiving, waiting, separating and at last done or failed
    share: float = 0.0  # of what it is in the middle of
    stage: str = ""
    problem: str = ""  # one sentence; of a song that is done, why it has no page to listen
    files: dict[str, Path] = field(default_factory=dict)  # what can be fetched, by the name in the address
    announced: float = field(default_factory=time.monotonic)
    touched: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        return self.folder / "song" / self.name

    @property
    def bytes_per_second(self) -> float:
        """How fast it has come so far; infinite for one that has only begun."""
        seconds = time.monotonic() - self.announced
        return self.share * self.n_bytes / seconds if seconds > SLOW_SECONDS else math.inf


class Songs:
    """The songs that were sent, in the order in which they came; each has a folder of its own in `folder`.

    What is over is removed `keep_seconds` after it was last fetched.
    """

    def __init__(self, folder: Path, pool: ModelPool, *, keep_seconds: float = KEEP_SECONDS) -> None:
        self._folder = folder
        self._pool = pool
        self._keep_seconds = keep_seconds
        self._max_seconds, self.max_mib = max_seconds(), max_mib()
        self._songs: dict[str, _Song] = {}
        self._waiting: list[_Song] = []  # the first may be the one that is being separated
        self._changed = threading.Condition()  # whose lock every change of a song's state holds
        self._closed = False

    def announce(self, order: object) -> str:
        """The id of a song to come."""
        match order:
            case {
                "name": str(name),
                "recipe": str(recipe),
                "stems": str(stems),
                "format": str(format),
                "bytes": int(n),
            }:
                name = _safe_name(name)
            case _:
                raise InputError("a song is announced by its name, recipe, stems, format and bytes: give all five")
        load_recipe(recipe, stems)
        OutputOptions(format)
        if not 0 <= n <= self.max_mib * 2**20:
            limit = f"{name!r} has more than {self.max_mib:,g} MiB, the limit here: choose a smaller file"
            raise _RefusalError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, limit)
        if n > shutil.disk_usage(self._folder).free:
            full = f"the server's disk has no room for the {n / 2**20:,.0f} MiB of {name!r}: free some space there"
            raise _RefusalError(HTTPStatus.INSUFFICIENT_STORAGE, full)
        id = secrets.token_urlsafe(16)
        with self._changed:
            if len(self._waiting) >= MAX_SONGS:
                busy = f"{MAX_SONGS} songs are waiting, the limit here: send {name!r} when some of them are done"
                raise _RefusalError(HTTPStatus.SERVICE_UNAVAILABLE, busy)
            sending = [song for song in self._songs.values() if song.state in ("announced", "receiving")]
            if len(sending) >= MAX_SONGS:
                slowest = min(sending, key=lambda song: song.bytes_per_second)
                if slowest.bytes_per_second > SLOW_BYTES_PER_SECOND:
                    busy = f"{MAX_SONGS} songs are being sent, the limit here: send {name!r} when some of them are here"
                    raise _RefusalError(HTTPStatus.SERVICE_UNAVAILABLE, busy)
                self._leave(slowest, "failed", f"{slowest.name!r} came too slowly while others waited: send it again")
            self._songs[id] = _Song(id, name, recipe, stems, format, n, self._folder / id)
        return id

    def receive(self, id: str, n_bytes: int, stream: io.BufferedIOBase) -> None:
        """Write a song's file as it comes, then let the song wait for its turn."""
        song = self._get(id)
        with self._changed:
            if song.state != "announced" or n_bytes != song.n_bytes or self._closed:
                raise _RefusalError(HTTPStatus.CONFLICT, "this is not the file that was announced: begin again")
            song.state = "receiving"
        try:
            with errors_without_paths():
                with self._changed:
                    self._check_wanted(song)  # or the folder of all songs may be gone, and must not come back
                    song.path.parent.mkdir(parents=True)
                    file = song.path.open("xb")
                with file:
                    while file.tell() < n_bytes:
                        file.write(_read(stream, n_bytes - file.tell(), repr(song.name)))
                        song.share, song.touched = file.tell() / n_bytes, time.monotonic()
                        self._check_wanted(song)
        except SeparationError as e:
            self._leave(song, "failed", str(e))
            raise
        except BaseException:
            self._leave(song, "failed", song.problem)
            raise
        self._leave(song, "waiting")

    def work(self) -> NoReturn:
        """Separate one song after another."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                song = self._waiting[0]
                song.state, song.share = "separating", 0.0
            try:
                with errors_without_paths(), about_song(song.name):
                    self._separate(song)
            except SeparationError as e:
                self._leave(song, "failed", str(e))
            except _CancelledError:
                self._leave(song, "failed")
            else:
                self._leave(song, "done", song.problem)

    def _separate(self, song: _Song) -> None:
        def report(share: float, stage: str) -> None:
            song.share, song.stage = share, stage
            self._check_wanted(song)

        progress = Progress(report)
        progress(0.0, "loading the models")
        separator = Separator(song.recipe, song.stems, pool=self._pool)
        stems = separator.separate_file(
            song.path,
            song.folder / "stems",
            OutputOptions(song.format),
            max_seconds=self._max_seconds,
            progress=progress.part(0, SEPARATED),
        )
        files = {path.name: path for path in stems.values()}
        song.files = files
        page = song.folder / LISTEN
        downloads = {f"↓ {stem}": path.name for stem, path in stems.items()}
        links = {"← all songs": "/", **downloads, "↓ all as zip": ZIP}
        try:
            report_page = Report(song.name, song.path, stems, links=links)
            write_report(report_page, page, progress=progress.part(SEPARATED, 1))
            song.files = {**files, LISTEN: page}
        except AudioError as e:  # it is too long for a page
            song.problem = str(e)
        song.path.unlink()

    def status(self, id: str) -> dict[str, Any]:
        """How far a song is; `ahead` songs are separated before it."""
        song = self._get(id)
        with self._changed:
            return {
                "name": song.name,
                "state": song.state,
                "share": round(song.share, 3),
                "stage": song.stage,
                "problem": song.problem,
                "ahead": self._waiting.index(song) if song in self._waiting else 0,
                "files": {name: size_bytes(path) for name, path in song.files.items()},
            }

    def file(self, id: str, name: str) -> tuple[Path, str]:
        """A file that came of a song and what to call it elsewhere."""
        song = self._get(id)
        song.touched = time.monotonic()
        if name not in song.files:
            raise _RefusalError(HTTPStatus.NOT_FOUND, f"{song.name!r} has no such file: go back to the page")
        return song.files[name], f"{Path(song.name).stem} - {name}"

    def archive(self, id: str) -> tuple[dict[str, Path], str]:
        """The stems' files by their names in an archive, and what to call that."""
        song = self._get(id)
        song.touched = time.monotonic()
        title = Path(song.name).stem
        files = {f"{title}/{name}": path for name, path in song.files.items() if name != LISTEN}
        if not files:
            raise _RefusalError(HTTPStatus.NOT_FOUND, f"{song.name!r} has no stems yet: go back to the page")
        return files, f"{title} - {ZIP}"

    def forget(self, id: str) -> None:
        """Cancel a song or remove what came of it. Who is at work on it removes its files as soon as it knows."""
        song = self._get(id)
        with self._changed:
            self._songs.pop(id, None)
            if song.state in ("receiving", "separating"):
                return
            if song in self._waiting:
                self._waiting.remove(song)
            shutil.rmtree(song.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what has been over for long enough, and what was announced and never sent."""
        now = time.monotonic()
        keep = {"announced": ANNOUNCED_SECONDS, "done": self._keep_seconds, "failed": self._keep_seconds}
        with self._changed:
            old = [song.id for song in self._songs.values() if now - song.touched > keep.get(song.state, float("inf"))]
            for id in old:
                self.forget(id)

    def close(self) -> None:
        """Take nothing more and forget every song, so that the folder can be removed."""
        with self._changed:
            self._closed = True
            self._songs.clear()

    def _get(self, id: str) -> _Song:
        song = self._songs.get(id)
        if song is None:
            raise _RefusalError(HTTPStatus.NOT_FOUND, "this song is no longer here: send it again")
        return song

    def _check_wanted(self, song: _Song) -> None:
        if song.id not in self._songs or song.state == "failed":
            raise _CancelledError

    def _leave(self, song: _Song, state: str, problem: str = "") -> None:
        """Who was at work on a song is done with it."""
        with self._changed:
            song.state, song.problem, song.touched = state, problem, time.monotonic()
            if song in self._waiting:
                self._waiting.remove(song)
            if song.id not in self._songs or state == "failed":
                song.files = {}
                shutil.rmtree(song.folder, ignore_errors=True)
            elif state == "waiting":
                self._waiting.append(song)
                self._changed.notify()


class Server(ThreadingTCPServer):
    """Answers requests, each in a thread of its own."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, songs: Songs, limits: Limits | None = None) -> None:
        self.songs = songs
        self.limits = limits or Limits()
        self.connections = Connections(self.limits)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as e:
            reason = e.strerror if isinstance(e, OSError) else e
            raise InputError(f"cannot serve on {host} port {port} ({reason}): choose another --port or --host") from e
        here = socket.gethostname().lower()
        name = here if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.server_address[1]}/"
        self._names = {"localhost", host.lower(), here, f"{here}.local"}

    def knows(self, host: str) -> bool:
        """Whether a request's Host is this machine by an address or its own name: no other name can be trusted."""
        name = re.sub(r":\d+$", "", host).lower()
        with suppress(ValueError):
            return bool(ip_address(name.removeprefix("[").removesuffix("]")))
        return name in self._names

    def service_actions(self) -> None:
        self.songs.sweep()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as e:
            if e.errno in NO_MORE:  # it is asked for again at once, and would take a core until a descriptor is free
                self.connections.make_room()
                time.sleep(0.1)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self.connections.enter(request, client_address[0])

    def shutdown_request(self, request: Any) -> None:
        self.connections.leave(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):  # who asked went away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # so that a line that is no request is answered with a status
    server_version, sys_version = "separation", ""
    server: Server

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._incoming = Incoming(self.connection, self.server.limits.head_seconds)
        self.rfile = io.BufferedReader(self._incoming)

    def handle(self) -> None:
        self.handle_one_request()
        self.server.connections.wait(self.connection)
        linger(self.connection, self.server.limits.linger_seconds)

    def _answer(self) -> None:
        if self.command != "POST":  # of which the body is still to come
            self.server.connections.answer(self.connection)
        try:
            self._check_sender()
            with errors_without_paths():
                send = self._found()
        except SeparationError as e:
            worst = HTTPStatus.BAD_REQUEST if isinstance(e, InputError) else HTTPStatus.INTERNAL_SERVER_ERROR
            status = e.status if isinstance(e, _RefusalError) else worst
            headers = e.headers if isinstance(e, _RefusalError) else {}
            self._send(str(e).encode(), "text/plain; charset=utf-8", status=status, headers=headers)
        except _CancelledError:
            return
        else:
            send()

    do_GET = do_HEAD = do_OPTIONS = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def _check_sender(self) -> None:
        single = [self.headers.get_all(name, []) for name in ("Host", "Content-Length", "Transfer-Encoding", "Origin")]
        if self.headers.defects or self.headers.get_payload() or any(len(values) > 1 for values in single):
            raise InputError("the request's headers can be read in more than one way")
        host = self.headers.get("Host", "")
        if not self.server.knows(host):
            reason = "this is not an address of the page: take the one that the terminal shows"
            raise _RefusalError(HTTPStatus.MISDIRECTED_REQUEST, reason)
        origin = self.headers.get("Origin", f"http://{host}")
        if self.command not in SAFE and (MARK not in self.headers or origin.partition("://")[2] != host):
            raise _RefusalError(HTTPStatus.FORBIDDEN, "only the page itself may ask for that: open it in a browser")

    def _found(self) -> Callable[[], None]:
        """What sends the answer."""
        actions = self._actions(self.path.split("?")[0].split("/")[1:])
        if not actions:
            raise _RefusalError(HTTPStatus.NOT_FOUND, "there is no such page here: begin at the first one")
        if "GET" in actions:
            actions["HEAD"] = actions["GET"]
        allowed = {"Allow": ", ".join(sorted([*actions, "OPTIONS"]))}
        if self.command == "OPTIONS":
            return partial(self._send_head, allowed, HTTPStatus.NO_CONTENT)
        if self.command not in actions:
            raise _RefusalError(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command} does nothing here", allowed)
        return actions[self.command]()

    def _actions(self, parts: list[str]) -> dict[str, Callable[[], Callable[[], None]]]:
        """What can be done with a path, by method; nothing if there is no such path."""
        match parts:
            case [""]:
                return {"GET": self._first_page}
            case ["songs"]:
                return {"POST": self._announce}
            case ["songs", id]:
                return {
                    "GET": lambda: partial(self._send_json, self._songs.status(id)),
                    "PUT": partial(self._receive, id),
                    "DELETE": partial(self._forget, id),
                }
            case ["songs", id, name] if name == ZIP:
                return {"GET": lambda: partial(self._send_zip, *self._songs.archive(id))}
            case ["songs", id, name]:
                return {"GET": partial(self._file, id, name)}
        return {}

    @property
    def _songs(self) -> Songs:
        return self.server.songs

    def _first_page(self) -> Callable[[], None]:
        return partial(self._send, _page(self._songs.max_mib), "text/html; charset=utf-8")

    def _announce(self) -> Callable[[], None]:
        text, length = b"", self._length(MAX_JSON_BYTES)
        while len(text) < length:
            text += _read(self.rfile, length - len(text), "the request")
        self.server.connections.answer(self.connection)
        try:
            order = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise InputError("the request's body is not valid JSON") from e
        return partial(self._send_json, {"id": self._songs.announce(order)}, status=HTTPStatus.CREATED)

    def _receive(self, id: str) -> Callable[[], None]:
        limits = self.server.limits
        length = self._length(self._songs.max_mib * 2**20)
        self._incoming.allow(limits.pause_seconds, limits.bytes_per_second)
        self._songs.receive(id, length, self.rfile)
        return partial(self._send_json, {})

    def _forget(self, id: str) -> Callable[[], None]:
        self._songs.forget(id)
        return partial(self._send_json, {})

    def _file(self, id: str, name: str) -> Callable[[], None]:
        path, title = self._songs.file(id, name)
        if name == LISTEN:
            return partial(self._send_file, path.open("rb"), {"Content-Type": "text/html; charset=utf-8"})
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return partial(self._send_file, path.open("rb"), {"Content-Type": kind} | _attachment(title))

    def _length(self, limit: float) -> int:
        text = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,15}", text) or "Transfer-Encoding" in self.headers:
            raise _RefusalError(HTTPStatus.LENGTH_REQUIRED, "the request does not say how many bytes it has")
        if int(text) > limit:
            raise _RefusalError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the request has more bytes than are taken here")
        return int(text)

    def _send(
        self,
        content: bytes,
        kind: str,
        *,
        status: HTTPStatus = HTTPStatus.OK,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._send_head({"Content-Type": kind, "Content-Length": str(len(content))} | (headers or {}), status)
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, answer: dict[str, Any], *, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(answer).encode(), "application/json", status=status)

    def _send_file(self, file: io.BufferedReader, headers: dict[str, str]) -> None:
        """All of it, or the range that is asked for: a player seeks so, and a browser resumes a download."""
        with file:
            stat = os.fstat(file.fileno())
            size, tag = stat.st_size, f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
            headers |= {"Accept-Ranges": "bytes", "ETag": tag}
            same = self.headers.get("If-Range", tag) == tag
            part = _range(self.headers.get("Range", ""), size) if same else None
            if self.headers.get("If-None-Match") == tag:
                self._send_head({"ETag": tag}, HTTPStatus.NOT_MODIFIED)
            elif part is None:
                self._send_part(file, range(size), headers)
            elif part:
                place = {"Content-Range": f"bytes {part[0]}-{part[-1]}/{size}"}
                self._send_part(file, part, headers | place, HTTPStatus.PARTIAL_CONTENT)
            else:
                place = {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
                self._send_head(place, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)

    def _send_part(
        self, file: io.BufferedReader, part: range, headers: dict[str, str], status: HTTPStatus = HTTPStatus.OK
    ) -> None:
        self._send_head(headers | {"Content-Length": str(len(part))}, status)
        if self.command != "HEAD":
            file.seek(part.start)
            while block := file.read(min(BLOCK_BYTES, part.stop - file.tell())):
                self.wfile.write(block)

    def _send_zip(self, files: dict[str, Path], download: str) -> None:
        """In pieces as they are made. Not compressed, for sound hardly gets smaller; but as deflate has it, which ends
        by itself: a stored file's size would have to be known before."""
        chunked = {"Transfer-Encoding": "chunked"} if self.request_version != "HTTP/1.0" else {}
        self._send_head({"Content-Type": "application/zip"} | chunked | _attachment(download))
        if self.command == "HEAD":
            return
        sent = io.BufferedWriter(_Chunks(self.wfile), BLOCK_BYTES) if chunked else self.wfile
        with ZipFile(sent, "w", ZIP_DEFLATED, compresslevel=0) as archive:
            for name, path in files.items():
                archive.write(path, name)
        sent.flush()
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _send_head(self, headers: dict[str, str], status: HTTPStatus = HTTPStatus.OK) -> None:
        self.connection.settimeout(self.server.limits.pause_seconds)  # in which a client takes a block
        self.send_response(status)
        for name, value in (HEADERS | headers | {"Connection": "close"}).items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """As http.server calls it for what is no request."""
        self._send((message or HTTPStatus(code).phrase).encode(), "text/plain; charset=utf-8", status=HTTPStatus(code))

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet: the page asks twice a second."""


class _Chunks(io.RawIOBase):
    """HTTP's chunked transfer coding of what is written."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if n := len(data):  # a piece of no bytes would be the end
            self._stream.write(b"%x\r\n%b\r\n" % (n, data))
        return n


def _range(asked: str, size: int) -> range | None:
    """The bytes that a Range header asks for, of a file with `size`.

    None, for all of them, where there is no such header, or one with several ranges or that makes no sense.
    """
    match = re.fullmatch(r"bytes=([0-9]{0,15})-([0-9]{0,15})", asked)
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        return range(max(size - int(match[2]), 0), size)
    if match[2] and int(match[2]) < int(match[1]):
        return None
    return range(int(match[1]), min(int(match[2]) + 1, size) if match[2] else size)


def _attachment(name: str) -> dict[str, str]:
    """The header of a download with that name; without a name none."""
    return {"Content-Disposition": f"attachment; filename*={encode_rfc2231(name, 'utf-8')}"} if name else {}


def _page(max_mib: float) -> bytes:
    """The page with what there is to choose: recipe -> choice -> its stems and the bytes of weights to download."""
    recipes: dict[str, dict[str, Any]] = {}
    for name in names():
        loaded = [load_recipe(name, choice) for choice in choices(name)]
        recipes[name] = {
            recipe.choice: {
                "stems": recipe.stems,
                "download": sum(file.bytes or 0 for item in recipe.models.items() for file in missing(*item)),
            }
            for recipe in sorted(loaded, key=lambda recipe: len(recipe.stems))
        }
    options = {"recipes": recipes, "formats": FORMATS, "mib": max_mib, "seconds": max_seconds(), "keep": KEEP_SECONDS}
    text = json.dumps(options).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("/* options */", text).encode()


def _safe_name(name: str) -> str:
    """The last part of a path, without what a file system, a header or a reader may stumble on; 200 bytes at most."""
    name = re.split(r"[/\\]", name)[-1]
    name = "".join("_" if letter in '<>:"|?*' or not letter.isprintable() else letter for letter in name)
    return name.encode()[:200].decode(errors="ignore").strip(" .") or "song"


def _read(stream: io.BufferedIOBase, n_bytes: int, what: str) -> bytes:
    """Up to so many bytes of what is being sent, as they come, and at least one."""
    try:
        block = stream.read1(min(n_bytes, BLOCK_BYTES))
    except OSError as e:
        raise InputError(f"{what} did not come completely: send it again") from e
    if not block:
        raise InputError(f"{what} did not come completely: send it again")
    return block
