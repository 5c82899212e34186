"""A song of the local page, and its state on disk, with which it survives the end of the server.

Each song has a folder, named after its id:

    song.json       its state, replaced as a whole with every change
    song/NAME       the file that was sent, until nothing needs it any more
    stems/          the stems
    stems.html      the page to listen to them
    work-*          temporary files

The time of the last change of song.json is that of the song's last use.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from separation.analysis.facts import SongAnalysis
from separation.audio.options import STEM_FILE
from separation.audio.stem_file import split_stem_file, tracks_of
from separation.errors import InputError
from separation.system.locks import lock
from separation.system.os_errors import output_errors
from separation.system.places import size_bytes, songs_folder
from separation.web.order import Order

STATE, LOCK = "song.json", "lock"
LISTEN, ZIP = "stems.html", "stems.zip"
PROJECT_SUFFIX = ".rpp"
WORK_PREFIX = "work-"  # of the names of temporary folders
ID_BYTES = 16
ID = re.compile(r"[\w-]{22}", re.ASCII)  # ID_BYTES as secrets.token_urlsafe writes them
VERSION = 1
ELSEWHERE = "set SEPARATION_SONGS to another folder"

logger: logging.Logger = logging.getLogger("separation")


@dataclass(eq=False)
class QueuedSong:
    """A song on its way through the queue."""

    id: str
    order: Order
    n_bytes: int
    folder: Path  # holds all files of this song
    state: str = "announced"  # -> receiving -> waiting -> separating -> done or failed
    share: float = 0.0  # share of the current state that is complete, 0 to 1
    stage: str = ""
    seconds_left: float | None = None  # of the separation, an estimate
    problem: str = ""  # why the song failed, or what a finished one lacks, in lines
    is_damaged: bool = False  # it failed because its file is damaged, which is kept to use what is there
    is_video: bool = False  # its file is kept for its picture
    files: dict[str, Path] = field(default_factory=dict)  # name in the URL -> file
    analysis: SongAnalysis | None = None
    queued: float = 0.0  # when it came into the queue, in the system's time, which orders the queue
    announced: float = field(default_factory=time.monotonic)
    touched: float = field(default_factory=time.time)  # when it last changed or was downloaded, in the system's time

    @property
    def name(self) -> str:
        """The name of its file."""
        return self.order.name

    @property
    def path(self) -> Path:
        """The file that was sent."""
        return self.folder / "song" / self.name

    @property
    def has_file(self) -> bool:
        """Whether the file is here, complete."""
        return size_bytes(self.path) == self.n_bytes

    @property
    def title(self) -> str:
        """What the names of downloads start with."""
        part = f" {self.order.part}" if self.order.part else ""
        return f"{Path(self.name).stem}{part}"

    @property
    def downloads(self) -> dict[str, Path]:
        """The files but the page to listen, by their names in the URL."""
        return {name: path for name, path in self.files.items() if name != LISTEN}

    @property
    def stem_names(self) -> list[str]:
        """The names of the stems that are here."""
        if self.order.format == STEM_FILE:
            return list(self.order.load().stems) if self.downloads else []
        return [path.stem for path in self.downloads.values() if path.suffix != PROJECT_SUFFIX]

    @property
    def again(self) -> str | None:
        """What its file, which is still here, can be separated again for: the `whole` song, or the `rest` of a damaged
        one; None if for nothing."""
        if self.state == "done" and self.order.part is not None:
            return "whole"
        return "rest" if self.state == "failed" and self.is_damaged else None

    def stems(self, folder: Path) -> dict[str, Path]:
        """The files of the stems by name. If they are in one file, it is split into files in `folder`.

        Raises OutputError if that fails.
        """
        files = [path for path in self.downloads.values() if path.suffix != PROJECT_SUFFIX]
        if self.order.format == STEM_FILE and files:
            return split_stem_file(files[0], tracks_of(self.order.load().stems), folder)
        return {path.stem: path for path in files}

    def touch(self) -> None:
        """Count the time until the song is removed from now on."""
        self.touched = time.time()
        with suppress(FileNotFoundError):  # another thread has removed the song
            os.utime(self.folder / STATE)

    def save(self) -> None:
        """Write the state to disk. Raises OSError if that fails."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        state = {
            "version": VERSION,
            "order": self.order.as_json(),
            "bytes": self.n_bytes,
            "state": self.state,
            "problem": self.problem,
            "damaged": self.is_damaged,
            "video": self.is_video,
            "files": {name: path.relative_to(self.folder).as_posix() for name, path in self.files.items()},
            "queued": self.queued,
            "analysis": self.analysis and self.analysis.as_json(),
        }
        part = self.folder / f"{STATE}.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())  # so that the name never stands for an empty file, even after a power failure
        os.replace(part, self.folder / STATE)

    def fail(self, problem: str) -> None:
        """Remove what was sent, unless it is damaged, and what came of it; the reason stays.

        Raises OSError if it cannot be saved.
        """
        self.state, self.problem, self.files = "failed", problem, {}
        if self.is_damaged:
            self.remove_results()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.save()

    def remove_results(self) -> None:
        """Remove what came of the song's file."""
        for left in (self.folder / "stems", self.folder / LISTEN):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> "QueuedSong":
        """The song in a folder. Raises OSError, InputError, LookupError, TypeError or ValueError if it is damaged."""
        state: Any = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["version"] != VERSION:
            raise ValueError(f"it is of version {state['version']}")
        files = {str(name): folder / path for name, path in state["files"].items()}
        analysis = state.get("analysis")
        return cls(
            folder.name,
            Order.read(state["order"]),
            int(state["bytes"]),
            folder,
            str(state["state"]),
            problem=str(state["problem"]),
            is_damaged=bool(state.get("damaged")),
            is_video=bool(state.get("video")),
            files=files,
            queued=float(state["queued"]),
            analysis=SongAnalysis.from_json(analysis) if analysis else None,
            touched=min(time.time(), (folder / STATE).stat().st_mtime),
        )


@contextmanager
def locked_folder() -> Iterator[Path]:
    """The folder of all songs, which only this process uses.

    Raises:
        InputError: another process uses it.
        OutputError: it cannot be used.
    """
    folder = songs_folder()
    with ExitStack() as stack:
        with output_errors(folder, doing="keep songs in", elsewhere=ELSEWHERE):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                stack.enter_context(lock(folder / LOCK, wait=False))
            except TimeoutError as e:  # an OSError, too
                raise InputError(
                    f"another server has the songs in {str(folder)!r}: use its page, or {ELSEWHERE}"
                ) from e
        yield folder


def restored(folder: Path) -> list[QueuedSong]:
    """The songs that an earlier server left in a folder, in the order of the queue.

    Songs that were being separated wait again. Those that were being sent have failed, and so have those whose state
    cannot be read; a warning names them.
    """
    with output_errors(folder, doing="read the songs in", elsewhere=ELSEWHERE):
        found = [path for path in folder.iterdir() if ID.fullmatch(path.name) and path.is_dir()]
        songs = [_restored(path) for path in found]
    return sorted(songs, key=lambda song: song.queued)


def _restored(folder: Path) -> QueuedSong:
    try:
        song = QueuedSong.load(folder)
    except (OSError, InputError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as e:
        return _unreadable(folder, e)
    for left in folder.glob(f"{WORK_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    if song.state in ("waiting", "separating"):
        song.remove_results()
        song.state = "waiting"
        if not song.has_file:
            song.fail(f"the server was stopped and {song.name!r} is not complete any more: send it again")
    elif song.state == "done":
        if not all(path.is_file() for path in song.files.values()):
            song.fail(f"the stems of {song.name!r} are not here any more: send it again")
    elif song.state == "failed":
        song.is_damaged = song.is_damaged and song.has_file
    else:
        song.fail(f"the server was stopped while {song.name!r} was being sent: send it again")
    return song


def _unreadable(folder: Path, error: Exception) -> QueuedSong:
    """A song whose state cannot be read. Its files stay until the song is removed or expires."""
    sent = [path.name for path in (folder / "song").glob("*")]
    name = sent[0] if sent else "a song"
    reason = (isinstance(error, OSError) and error.strerror) or "it is damaged"
    reason = str(error) if isinstance(error, InputError) else reason
    logger.warning(f"{str(folder / STATE)!r} cannot be used ({reason}): {name!r} must be sent again")
    problem = f"{name!r} lost its place in the queue, because its record cannot be used ({reason}): send it again"
    order = Order(name, "wav", "standard", "vocals_instrumental")
    return QueuedSong(folder.name, order, 0, folder, "failed", problem=problem)
