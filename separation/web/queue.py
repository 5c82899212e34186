"""The songs of the local page: they are received, wait, and are separated one after another.

Their state is on disk, so that a server that starts again goes on where the last one was stopped.
"""

import io
import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from separation.audio.damage import DamagedError
from separation.audio.options import STEM_FILE
from separation.engine.cache import Cache
from separation.engine.pool import ModelPool
from separation.engine.song_context import song_context
from separation.errors import AudioError, InputError, SeparationError
from separation.system.places import size_bytes
from separation.web.errors import CancelledError, RefusedError, errors_without_paths
from separation.web.limits import max_mib, max_seconds
from separation.web.mixing import Mix
from separation.web.order import Order
from separation.web.queued import ID_BYTES, WORK_PREFIX, ZIP, QueuedSong, restored
from separation.web.work import Worker

KEEP_SECONDS = 24 * 60 * 60  # after the last download of a finished song
ANNOUNCED_SECONDS = 60  # until the upload of an announced song must start
MAX_SONGS = 20  # songs that may be uploading; the same number may be waiting
SLOW_SECONDS, SLOW_BYTES_PER_SECOND = 5.0, 1 << 16  # a slower upload is dropped if others have to wait for it
BLOCK_BYTES = 1 << 16
BUSY = ("waiting", "separating")  # states whose end can be told

logger: logging.Logger = logging.getLogger("separation")


class SongQueue:
    """Songs in the order in which their uploads ended. Each has a folder of its own inside `folder`.

    Finished songs are removed `keep_seconds` after their last download.

    Args:
        folder: of all songs. Those that an earlier server left there go on; see `queued.restored`.
        pool: holds the loaded models.
        cache: holds estimates; None for none.
    """

    def __init__(
        self, folder: Path, pool: ModelPool, *, cache: Cache | None = None, keep_seconds: float = KEEP_SECONDS
    ) -> None:
        self._folder = folder
        self._worker = Worker(pool, cache, max_seconds())
        self._keep_seconds = keep_seconds
        self.max_bytes: float = max_mib() * 2**20
        found = restored(folder)
        self._songs = {song.id: song for song in found}
        self._waiting = [song for song in found if song.state == "waiting"]  # the first one may be separating
        self._changed = threading.Condition()  # every change of a song's state holds its lock
        self._closed = False

    def announce(self, order: object) -> str:
        """Register a song and return its id.

        `order` is a dict as `Order.read` takes it, with `bytes`, the size of the file that will be sent; or with
        `again`, the id of another song whose file is still here; see `QueuedSong.again`.

        Raises:
            InputError: `order` is not such a dict, or has an unknown recipe, choice of stems, model or format.
            RefusedError: the file is too large, or there is no room for it; or the other song is not here.
        """
        if not isinstance(order, dict):
            raise InputError("the order must be an object: give name, recipe and stems or model, format, and bytes")
        wanted, id = Order.read(order), secrets.token_urlsafe(ID_BYTES)
        match order:
            case {"again": str(other)}:
                self._announce_again(wanted, id, self._get(other))
            case {"bytes": int(n_bytes)}:
                self._check_size(wanted.name, n_bytes)
                with self._changed:
                    self._make_room(wanted.name)
                    self._songs[id] = QueuedSong(id, wanted, n_bytes, self._folder / id)
            case _:
                raise InputError("the order has no file: give name, recipe and stems or model, format, and bytes")
        return id

    def _announce_again(self, wanted: Order, id: str, other: QueuedSong) -> None:
        """Queue a song whose file was sent for another one."""
        wanted = replace(wanted, name=other.name, song_seconds=other.order.song_seconds)
        song = QueuedSong(id, wanted, other.n_bytes, self._folder / id)
        with self._changed:
            if other.again is None or not other.has_file:
                raise RefusedError(HTTPStatus.CONFLICT, f"{other.name!r} is not on the server any more: send it again")
            self._check_line(other.name)
            with errors_without_paths():
                song.path.parent.mkdir(mode=0o700, parents=True)
                try:
                    os.link(other.path, song.path)
                except OSError:  # a file system without links
                    shutil.copyfile(other.path, song.path)
            self._songs[id] = song
        self._finish(song, "waiting")

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
                with errors_without_paths(), song_context(song.name) as warnings:
                    self._separate(song)
            except SeparationError as e:
                self._finish(song, "failed", str(e))
            except CancelledError:
                self._finish(song, "failed")
            else:
                self._finish(song, "done", "\n".join([*_about_the_song(warnings, song.name), song.problem]).strip())
                if song.order.part is None and not song.is_video:
                    song.path.unlink(missing_ok=True)  # it may have been removed meanwhile

    def status(self, id: str) -> dict[str, Any]:
        """A song's state and progress as JSON.

        `ahead` is the number of songs before it in the queue, and `left` the seconds until it is done or, if it waits,
        until its turn: an estimate, or null. `again` is `whole` or `rest` if its file can be separated again; see
        `QueuedSong.again`. `video` lists the stems that can be the sound of a video. `analysis` is null until it is
        done.
        """
        song = self._get(id)
        with self._changed:
            ahead = self._waiting[: self._waiting.index(song)] if song in self._waiting else []
            times = [self._left(other) for other in ahead or [song]]
            known = [seconds for seconds in times if seconds is not None]
            return {
                **song.order.as_json(),
                "state": song.state,
                "share": round(song.share, 3),
                "stage": song.stage,
                "left": round(sum(known), 1) if song.state in BUSY and len(known) == len(times) else None,
                "problem": song.problem,
                "ahead": len(ahead),
                "files": {name: size_bytes(path) for name, path in song.files.items()},
                "again": song.again,
                "video": song.stem_names if song.is_video and song.state == "done" else [],
                "analysis": song.analysis and song.analysis.as_json(),
            }

    def _left(self, song: QueuedSong) -> float | None:
        return song.seconds_left if song.state == "separating" else self._worker.expected_seconds(song)

    def file(self, id: str, name: str) -> tuple[Path, str]:
        """One of a song's results, and the file name for its download. Raises RefusedError if there is none."""
        song = self._get(id)
        song.touch()
        if name not in song.files:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"{song.name!r} has no file {name!r:.100}: go back to the page")
        own_name = f"{song.title}.{STEM_FILE}" if name.endswith(f".{STEM_FILE}") else f"{song.title} - {name}"
        return song.files[name], own_name

    def archive(self, id: str) -> tuple[dict[str, Path], str]:
        """The stems by their names in a zip archive, and its file name. Raises RefusedError if there are none."""
        song = self._get(id)
        song.touch()
        files = {f"{song.title}/{name}": path for name, path in song.downloads.items()}
        if not files:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"{song.name!r} has no stems yet: go back to the page")
        return files, f"{song.title} - {ZIP}"

    @contextmanager
    def mixed(self, id: str, mix: Mix, *, in_video: bool = False) -> Iterator[tuple[Path, str]]:
        """A mix of a song's stems, in a file that is deleted afterwards, and the file name for its download.

        Args:
            in_video: the mix is the sound of the song's video.

        Raises:
            RefusedError: the song is unknown or no video, or its files are not here.
            SeparationError: the mix cannot be made.
        """
        song = self._get(id)
        song.touch()
        if in_video and not song.is_video:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"{song.name!r} is no video that was separated whole: save a mix")
        if not song.downloads:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"{song.name!r} has no stems yet: go back to the page")
        if not all(path.is_file() for path in [*song.downloads.values(), *([song.path] if in_video else [])]):
            raise RefusedError(HTTPStatus.GONE, f"the files of {song.name!r} are not here any more: send it again")
        try:
            with TemporaryDirectory(prefix=WORK_PREFIX, dir=song.folder, ignore_cleanup_errors=True) as folder:
                made = mix.write_video(song, Path(folder)) if in_video else mix.write(song, Path(folder))
                yield made, f"{song.title} - {made.name}"
        finally:
            if id not in self._songs:  # removed meanwhile
                shutil.rmtree(song.folder, ignore_errors=True)

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
        now = time.time()
        keep = {"announced": ANNOUNCED_SECONDS, "done": self._keep_seconds, "failed": self._keep_seconds}
        with self._changed:
            expired = [song.id for song in self._songs.values() if now - song.touched > keep.get(song.state, math.inf)]
            for id in expired:
                self.remove(id)

    def close(self) -> None:
        """Accept no more uploads and cancel what is being done. The songs stay on disk for the next server."""
        with self._changed:
            self._closed = True

    def _check_size(self, name: str, n_bytes: int) -> None:
        if not 0 <= n_bytes <= self.max_bytes:
            limit = f"{name!r} has more than {self.max_bytes / 2**20:,g} MiB, the limit here: choose a smaller file"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, limit)
        if n_bytes > shutil.disk_usage(self._folder).free:
            full = f"the server's disk has no room for {name!r} ({n_bytes / 2**20:,.0f} MiB): free some space there"
            raise RefusedError(HTTPStatus.INSUFFICIENT_STORAGE, full)

    def _check_line(self, name: str) -> None:
        if len(self._waiting) >= MAX_SONGS:
            busy = f"{MAX_SONGS} songs are waiting, the limit here: send {name!r} when some of them are done"
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, busy)

    def _make_room(self, name: str) -> None:
        """Drop the slowest upload if there are too many and it is slow. Raises RefusedError if there is no room."""
        self._check_line(name)
        uploads = [song for song in self._songs.values() if song.state in ("announced", "receiving")]
        if len(uploads) >= MAX_SONGS:
            slowest = min(uploads, key=_bytes_per_second)
            if _bytes_per_second(slowest) > SLOW_BYTES_PER_SECOND:
                busy = f"{MAX_SONGS} songs are being sent, the limit here: send {name!r} when some of them have arrived"
                raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, busy)
            self._finish(slowest, "failed", f"{slowest.name!r} was sent too slowly while others waited: send it again")

    def _write(self, song: QueuedSong, stream: io.BufferedIOBase) -> None:
        with self._changed:
            self._check_wanted(song)
            song.save()
            song.path.parent.mkdir(mode=0o700)
            file = song.path.open("xb")
        with file:
            while file.tell() < song.n_bytes:
                file.write(read_some(stream, song.n_bytes - file.tell(), repr(song.name)))
                song.share, song.touched = file.tell() / song.n_bytes, time.time()
                self._check_wanted(song)

    def _separate(self, song: QueuedSong) -> None:
        def tell(share: float, stage: str, seconds_left: float | None) -> None:
            song.share, song.stage, song.seconds_left = share, stage, seconds_left
            self._check_wanted(song)

        try:
            self._worker.work(song, tell)
        except DamagedError as e:
            song.is_damaged = True
            raise AudioError(f"{e.args[0]}: get the file again, or use what is there") from e

    def _get(self, id: str) -> QueuedSong:
        song = self._songs.get(id)
        if song is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, "this song is no longer on the server: send it again")
        return song

    def _check_wanted(self, song: QueuedSong) -> None:
        if song.id not in self._songs or song.state == "failed" or self._closed:
            raise CancelledError

    def _finish(self, song: QueuedSong, state: str, problem: str = "") -> None:
        """Move a song to its next state. Deletes its files if it failed or was removed meanwhile."""
        with self._changed:
            if self._closed:
                return  # the next server goes on with what is on disk
            song.touched = time.time()
            if song in self._waiting:
                self._waiting.remove(song)
            if song.id not in self._songs:
                shutil.rmtree(song.folder, ignore_errors=True)
                return
            song.state, song.problem = state, problem
            if state == "waiting":
                song.queued = song.touched
                self._waiting.append(song)
                self._changed.notify()
            self._save(song)

    def _save(self, song: QueuedSong) -> None:
        try:
            song.fail(song.problem) if song.state == "failed" else song.save()
        except OSError as e:
            logger.warning(f"the state of {song.name!r} cannot be kept ({e.strerror}): do not stop the server")


def _about_the_song(warnings: list[str], name: str) -> list[str]:
    """The warnings that say nothing about the server's own files; those stay in its log."""
    return [warning for warning in warnings if os.sep not in warning.replace(repr(name), "")]


def _bytes_per_second(song: QueuedSong) -> float:
    """The speed of an upload so far; infinite during the first SLOW_SECONDS."""
    seconds = time.monotonic() - song.announced
    return song.share * song.n_bytes / seconds if seconds > SLOW_SECONDS else math.inf


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
