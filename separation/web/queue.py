"""The songs that were sent to the local page, and the thread that separates them one after another."""

import io
import math
import re
import secrets
import shutil
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

from separation.audio.options import OutputOptions
from separation.engine.pool import ModelPool
from separation.engine.recipes import load_recipe
from separation.engine.separator import Separator
from separation.engine.song_context import song_context
from separation.errors import AudioError, InputError, SeparationError
from separation.progress import Progress
from separation.report.page import Report, write_report
from separation.system.places import size_bytes
from separation.web.errors import CancelledError, RefusedError, errors_without_paths
from separation.web.limits import max_mib, max_seconds

LISTEN, ZIP = "stems.html", "stems.zip"
KEEP_SECONDS = 60 * 60  # after the last download of a finished song
ANNOUNCED_SECONDS = 60  # until the upload of an announced song must start
MAX_SONGS = 20  # songs that may be uploading; the same number may be waiting
SLOW_SECONDS, SLOW_BYTES_PER_SECOND = 5.0, 1 << 16  # a slower upload is dropped if others have to wait for it
BLOCK_BYTES = 1 << 16
SEPARATED = 0.8  # share of the progress bar for the separation; the rest is for the listening page


@dataclass(eq=False)
class QueuedSong:
    """A song on its way through the queue."""

    id: str
    name: str  # of the file
    recipe: str
    stems: str
    format: str
    n_bytes: int
    folder: Path  # holds all files of this song; the upload is `song/<name>`
    state: str = "announced"  # -> receiving -> waiting -> separating -> done or failed
    share: float = 0.0  # share of the current state that is complete, 0 to 1
    stage: str = ""
    problem: str = ""  # why the song failed, or why a finished song has no listening page
    files: dict[str, Path] = field(default_factory=dict)  # name in the URL -> file
    announced: float = field(default_factory=time.monotonic)
    touched: float = field(default_factory=time.monotonic)  # when it last changed or was downloaded

    @property
    def path(self) -> Path:
        """The uploaded file."""
        return self.folder / "song" / self.name

    @property
    def bytes_per_second(self) -> float:
        """The speed of the upload so far; infinite during the first SLOW_SECONDS."""
        seconds = time.monotonic() - self.announced
        return self.share * self.n_bytes / seconds if seconds > SLOW_SECONDS else math.inf


class SongQueue:
    """Songs in the order in which their uploads ended. Each has a folder of its own inside `folder`.

    Finished songs are removed `keep_seconds` after their last download. `pool` holds the loaded models.
    """

    def __init__(self, folder: Path, pool: ModelPool, *, keep_seconds: float = KEEP_SECONDS) -> None:
        self._folder = folder
        self._pool = pool
        self._keep_seconds = keep_seconds
        self._max_seconds, self.max_bytes = max_seconds(), max_mib() * 2**20
        self._songs: dict[str, QueuedSong] = {}
        self._waiting: list[QueuedSong] = []  # the first one may be separating
        self._changed = threading.Condition()  # every change of a song's state holds its lock
        self._closed = False

    def announce(self, order: object) -> str:
        """Register a song before its upload and return its id.

        `order` is a dict with the keys name, recipe, stems, format and bytes.

        Raises:
            InputError: `order` is not such a dict, or has an unknown recipe, choice of stems or format.
            RefusedError: the file is too large, or there is no room for it.
        """
        match order:
            case {
                "name": str(name),
                "recipe": str(recipe),
                "stems": str(stems),
                "format": str(format),
                "bytes": int(n_bytes),
            }:
                name = _safe_name(name)
            case _:
                raise InputError("the announcement of the song is incomplete: give name, recipe, stems, format, bytes")
        load_recipe(recipe, stems)
        OutputOptions(format)
        self._check_size(name, n_bytes)
        id = secrets.token_urlsafe(16)
        with self._changed:
            self._make_room(name)
            self._songs[id] = QueuedSong(id, name, recipe, stems, format, n_bytes, self._folder / id)
        return id

    def receive(self, id: str, n_bytes: int, stream: io.BufferedIOBase) -> None:
        """Write a song's file to disk as it arrives, then add the song to the queue.

        Raises:
            RefusedError: the song is unknown or `n_bytes` is not the announced size.
            SeparationError: the upload breaks off or the file cannot be written.
            CancelledError: the song was cancelled.
        """
        song = self._get(id)
        with self._changed:
            if song.state != "announced" or n_bytes != song.n_bytes or self._closed:
                raise RefusedError(HTTPStatus.CONFLICT, f"{song.name!r} differs from the announced file: start again")
            song.state = "receiving"
        try:
            with errors_without_paths():
                self._write(song, stream)
        except SeparationError as e:
            self._finish(song, "failed", str(e))
            raise
        except BaseException:
            self._finish(song, "failed", song.problem)
            raise
        self._finish(song, "waiting")

    def run(self) -> NoReturn:
        """Separate one song after another, forever."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                song = self._waiting[0]
                song.state, song.share = "separating", 0.0
            try:
                with errors_without_paths(), song_context(song.name):
                    self._separate(song)
            except SeparationError as e:
                self._finish(song, "failed", str(e))
            except CancelledError:
                self._finish(song, "failed")
            else:
                self._finish(song, "done", song.problem)

    def status(self, id: str) -> dict[str, Any]:
        """A song's state and progress as JSON. `ahead` is the number of songs before it in the queue."""
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
        """One of a song's results, and the file name for its download. Raises RefusedError if there is none."""
        song = self._get(id)
        song.touched = time.monotonic()
        if name not in song.files:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"{song.name!r} has no file {name!r:.100}: go back to the page")
        return song.files[name], f"{Path(song.name).stem} - {name}"

    def archive(self, id: str) -> tuple[dict[str, Path], str]:
        """The stems by their names in a zip archive, and its file name. Raises RefusedError if there are none."""
        song = self._get(id)
        song.touched = time.monotonic()
        title = Path(song.name).stem
        files = {f"{title}/{name}": path for name, path in song.files.items() if name != LISTEN}
        if not files:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"{song.name!r} has no stems yet: go back to the page")
        return files, f"{title} - {ZIP}"

    def remove(self, id: str) -> None:
        """Cancel a song or delete its results. If a thread is busy with it, that thread deletes its files."""
        song = self._get(id)
        with self._changed:
            self._songs.pop(id, None)
            if song.state in ("receiving", "separating"):
                return
            if song in self._waiting:
                self._waiting.remove(song)
            shutil.rmtree(song.folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove expired results and songs that were announced but never sent."""
        now = time.monotonic()
        keep = {"announced": ANNOUNCED_SECONDS, "done": self._keep_seconds, "failed": self._keep_seconds}
        with self._changed:
            expired = [song.id for song in self._songs.values() if now - song.touched > keep.get(song.state, math.inf)]
            for id in expired:
                self.remove(id)

    def close(self) -> None:
        """Accept no more uploads and cancel every song, so that the folder can be deleted."""
        with self._changed:
            self._closed = True
            self._songs.clear()

    def _check_size(self, name: str, n_bytes: int) -> None:
        if not 0 <= n_bytes <= self.max_bytes:
            limit = f"{name!r} has more than {self.max_bytes / 2**20:,g} MiB, the limit here: choose a smaller file"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, limit)
        if n_bytes > shutil.disk_usage(self._folder).free:
            full = f"the server's disk has no room for {name!r} ({n_bytes / 2**20:,.0f} MiB): free some space there"
            raise RefusedError(HTTPStatus.INSUFFICIENT_STORAGE, full)

    def _make_room(self, name: str) -> None:
        """Drop the slowest upload if there are too many and it is slow. Raises RefusedError if there is no room."""
        if len(self._waiting) >= MAX_SONGS:
            busy = f"{MAX_SONGS} songs are waiting, the limit here: send {name!r} when some of them are done"
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, busy)
        uploads = [song for song in self._songs.values() if song.state in ("announced", "receiving")]
        if len(uploads) >= MAX_SONGS:
            slowest = min(uploads, key=lambda song: song.bytes_per_second)
            if slowest.bytes_per_second > SLOW_BYTES_PER_SECOND:
                busy = f"{MAX_SONGS} songs are being sent, the limit here: send {name!r} when some of them have arrived"
                raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, busy)
            self._finish(slowest, "failed", f"{slowest.name!r} was sent too slowly while others waited: send it again")

    def _write(self, song: QueuedSong, stream: io.BufferedIOBase) -> None:
        with self._changed:
            self._check_wanted(song)  # after `close`, the folder must not be created again
            song.path.parent.mkdir(parents=True)
            file = song.path.open("xb")
        with file:
            while file.tell() < song.n_bytes:
                file.write(read_some(stream, song.n_bytes - file.tell(), repr(song.name)))
                song.share, song.touched = file.tell() / song.n_bytes, time.monotonic()
                self._check_wanted(song)

    def _separate(self, song: QueuedSong) -> None:
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
        except AudioError as e:  # too long for a page
            song.problem = str(e)
        song.path.unlink()

    def _get(self, id: str) -> QueuedSong:
        song = self._songs.get(id)
        if song is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, "this song is no longer on the server: send it again")
        return song

    def _check_wanted(self, song: QueuedSong) -> None:
        if song.id not in self._songs or song.state == "failed":
            raise CancelledError

    def _finish(self, song: QueuedSong, state: str, problem: str = "") -> None:
        """Move a song to its next state. Deletes its files if it failed or was removed meanwhile."""
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


def read_some(stream: io.BufferedIOBase, n_bytes: int, what: str) -> bytes:
    """The next bytes of a request's body: at least one, at most `n_bytes`.

    Raises InputError if the client stops sending. `what` names the body in the message.
    """
    try:
        block = stream.read1(min(n_bytes, BLOCK_BYTES))
    except OSError as e:
        raise InputError(f"{what} did not arrive completely: send it again") from e
    if not block:
        raise InputError(f"{what} did not arrive completely: send it again")
    return block


def _safe_name(name: str) -> str:
    """The last part of a path, at most 200 bytes, without characters that a file system or a header forbids."""
    name = re.split(r"[/\\]", name)[-1]
    name = "".join("_" if letter in '<>:"|?*' or not letter.isprintable() else letter for letter in name)
    return name.encode()[:200].decode(errors="ignore").strip(" .") or "song"
