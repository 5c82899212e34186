"""The local page: drop a song in the browser, listen to its stems and download them.

    GET     /                   the page, serve.html
    POST    /songs              announces a song (JSON: name, recipe and stems or model, format, bytes; or again, the
                                id of a song whose file is here) and returns its id
    PUT     /songs/ID           uploads its file
    GET     /songs/ID           returns its state and progress
    GET     /songs/ID/NAME      returns a stem or a byte range of it, stems.html to listen, or stems.zip
    GET     /songs/ID/mix.wav   returns a mix of the stems; its query has their levels: ?vocals=0.5&drums=1
    GET     /songs/ID/video     returns the video that the song came from, with such a mix as its sound
    DELETE  /songs/ID           cancels the song or deletes its results

HEAD is answered like GET, without the body. OPTIONS lists the methods of a path. A connection carries one request, so
nothing that follows can be mistaken for another.

Songs are announced before the upload, so that an oversized file gets a readable error; browsers ignore responses that
arrive mid-upload.

Anybody who knows a song's id can download the song, so ids are random. Pages of other sites in the same browser can
change nothing: browsers do not let them send the header MARK, nor read a response. DNS rebinding does not help them
either, because Host must be an address or this machine's own name.
"""

import json
import logging
import mimetypes
import re
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

from separation.engine.cache import chosen_cache
from separation.engine.options import EngineOptions
from separation.engine.pool import ModelPool
from separation.errors import InputError, SeparationError
from separation.web.connections import LimitedServer, Limits
from separation.web.errors import CancelledError, RefusedError, errors_without_paths
from separation.web.mixing import MIX, VIDEO, Mix
from separation.web.page import page
from separation.web.queue import SongQueue, read_some
from separation.web.queued import LISTEN, ZIP, locked_folder
from separation.web.responses import Responder, attachment

MAX_JSON_BYTES = 1 << 16
MARK = "X-Separation"
SAFE = ("GET", "HEAD", "OPTIONS")  # methods that change nothing

logger: logging.Logger = logging.getLogger("separation")

Send = Callable[[], None]  # sends a response


def serve(host: str, port: int, *, options: EngineOptions = EngineOptions(), ready: Callable[[str], None]) -> NoReturn:
    """Serve the page on `host:port` until an exception such as KeyboardInterrupt ends it. Port 0 takes any free port.

    Songs are separated in the calling thread, which receives Ctrl-C. `ready` is called with the page's URL. Songs and
    their stems stay on disk, and the next server goes on with them.

    Raises InputError if there is no such address, the port is in use or another server has the songs, and OutputError
    if the folder for songs cannot be used.
    """
    pool = ModelPool(options)
    logger.info(pool.choice.reason)
    with locked_folder() as folder:
        songs = SongQueue(folder, pool, cache=chosen_cache(default=True))
        with Server(host, port, songs) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                ready(server.url)
                songs.run()
            finally:
                songs.close()
                server.shutdown()


class Server(LimitedServer):
    """Serves the page and its songs. Raises InputError if there is no such address or the port is in use."""

    def __init__(self, host: str, port: int, songs: SongQueue, limits: Limits = Limits()) -> None:
        self.songs = songs
        try:
            super().__init__(host, port, Handler, limits)
        except (OSError, OverflowError) as e:
            reason = e.strerror if isinstance(e, OSError) else e
            raise InputError(f"cannot serve on {host} port {port} ({reason}): choose another --port or --host") from e
        here = socket.gethostname().lower()
        name = here if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        self.url: str = f"http://{name}:{self.server_address[1]}/"
        self._names = {"localhost", host.lower(), here, f"{here}.local"}

    def knows(self, host: str) -> bool:
        """Whether a Host header is an IP address or a name of this machine."""
        name = re.sub(r":\d+$", "", host).lower()
        with suppress(ValueError):
            return bool(ip_address(name.removeprefix("[").removesuffix("]")))
        return name in self._names

    def service_actions(self) -> None:
        self.songs.sweep()


class Handler(Responder):
    """Checks a request, finds what its path and method ask for, and sends the response."""

    server: Server

    def _answer(self) -> None:
        if self.command != "POST":  # its body is still to come
            self.server.connections.mark_busy(self.connection)
        try:
            self._check_sender()
            with errors_without_paths():
                send = self._respond()
        except RefusedError as e:
            self.send_text(str(e), e.status, e.headers)
        except InputError as e:
            self.send_text(str(e), HTTPStatus.BAD_REQUEST)
        except SeparationError as e:
            self.send_text(str(e), HTTPStatus.INTERNAL_SERVER_ERROR)
        except CancelledError:
            return
        else:
            send()

    do_GET = _answer  # noqa: N815
    do_HEAD = _answer  # noqa: N815
    do_OPTIONS = _answer  # noqa: N815
    do_POST = _answer  # noqa: N815
    do_PUT = _answer  # noqa: N815
    do_DELETE = _answer  # noqa: N815

    def _check_sender(self) -> None:
        """Refuse ambiguous requests, and requests from other sites' pages."""
        single = [self.headers.get_all(name, []) for name in ("Host", "Content-Length", "Transfer-Encoding", "Origin")]
        if self.headers.defects or self.headers.get_payload() or any(len(values) > 1 for values in single):
            raise InputError("the request's headers are ambiguous: send each header once, one per line")
        host = self.headers.get("Host", "")
        if not self.server.knows(host):
            wrong_host = f"{host!r:.100} is not an address of the page: use the one that the terminal shows"
            raise RefusedError(HTTPStatus.MISDIRECTED_REQUEST, wrong_host)
        origin = self.headers.get("Origin", f"http://{host}")
        if self.command not in SAFE and (MARK not in self.headers or origin.partition("://")[2] != host):
            raise RefusedError(HTTPStatus.FORBIDDEN, "only the page itself may send this: open it in a browser")

    def _respond(self) -> Send:
        """Do what the request asks for. Raises SeparationError if that fails."""
        actions = self._actions([unquote(part) for part in self.path.split("?")[0].split("/")[1:]])
        if not actions:
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such page: start at the first one")
        if "GET" in actions:
            actions["HEAD"] = actions["GET"]
        allowed = {"Allow": ", ".join(sorted([*actions, "OPTIONS"]))}
        if self.command == "OPTIONS":
            return partial(self.send_head, allowed, HTTPStatus.NO_CONTENT)
        if self.command not in actions:
            not_allowed = f"{self.command} is not possible here: use {allowed['Allow']}"
            raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, not_allowed, allowed)
        return actions[self.command]()

    def _actions(self, parts: list[str]) -> dict[str, Callable[[], Send]]:
        """The actions of a path by method; none for an unknown path."""
        songs = self.server.songs
        match parts:
            case [""]:
                return {"GET": lambda: partial(self.send_bytes, page(), "text/html; charset=utf-8")}
            case ["songs"]:
                return {"POST": self._announce}
            case ["songs", id]:
                return {
                    "GET": lambda: partial(self.send_json, songs.status(id)),
                    "PUT": partial(self._receive, id),
                    "DELETE": partial(self._remove, id),
                }
            case ["songs", id, name] if name == ZIP:
                return {"GET": lambda: partial(self.send_zip, *songs.archive(id))}
            case ["songs", id, name] if name in (MIX, VIDEO):
                return {"GET": partial(self._mix, id, in_video=name == VIDEO)}
            case ["songs", id, name]:
                return {"GET": partial(self._file, id, name)}
        return {}

    def _announce(self) -> Send:
        body, length = b"", self._content_length(MAX_JSON_BYTES)
        while len(body) < length:
            body += read_some(self.rfile, length - len(body), "the request")
        self.server.connections.mark_busy(self.connection)
        try:
            order = json.loads(body)
        except (ValueError, RecursionError) as e:
            raise InputError("the request body is not valid JSON: send an object") from e
        return partial(self.send_json, {"id": self.server.songs.announce(order)}, status=HTTPStatus.CREATED)

    def _receive(self, id: str) -> Send:
        limits, songs = self.server.limits, self.server.songs
        length = self._content_length(songs.max_bytes)
        self.incoming.allow(limits.pause_seconds, limits.bytes_per_second)
        songs.receive(id, length, self.rfile)
        return partial(self.send_json, {})

    def _remove(self, id: str) -> Send:
        self.server.songs.remove(id)
        return partial(self.send_json, {})

    def _file(self, id: str, name: str) -> Send:
        path, download_name = self.server.songs.file(id, name)
        if name == LISTEN:
            return partial(self.send_file, path.open("rb"), {"Content-Type": "text/html; charset=utf-8"})
        return partial(self.send_file, path.open("rb"), _media_type(path) | attachment(download_name))

    def _mix(self, id: str, *, in_video: bool) -> Send:
        with ExitStack() as on_error:
            wanted = Mix.read(self.path.partition("?")[2])
            path, download_name = on_error.enter_context(self.server.songs.mixed(id, wanted, in_video=in_video))
            mixed = on_error.pop_all()
        media_type = _media_type(path) if in_video else {"Content-Type": "audio/wav"}

        def send() -> None:
            with mixed:
                self.send_file(path.open("rb"), media_type | attachment(download_name))

        return send

    def _content_length(self, max_bytes: float) -> int:
        text = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,15}", text) or "Transfer-Encoding" in self.headers:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "the request has no length: send Content-Length")
        if int(text) > max_bytes:
            limit = f"the request has more than {max_bytes:,.0f} bytes, the limit here: send less"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, limit)
        return int(text)


def _media_type(path: Path) -> dict[str, str]:
    return {"Content-Type": mimetypes.guess_type(path.name)[0] or "application/octet-stream"}
