"""Estimates kept on disk, so that a song that was separated before is not computed again.

An estimate is kept under all that its samples depend on: the decoded song, the weights, the settings and the code that
computes it. It is two files: KEY.f32 holds the samples as a Waveform's own file does, and KEY.json says when it was
made, of which song and with which settings, and has the checksum of both. Written under another name and renamed, so
that an entry is complete or not there, also where a process is killed; a checksum that does not fit is a miss. Nothing
is fsynced: what a power failure leaves incomplete, the checksum finds.

The folder is locked for moments only: while files are renamed or removed. Does without PyTorch, for
`python -m separation cache list`.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from separation.settings import positive
from separation.system.locks import lock
from separation.system.os_errors import output_errors
from separation.system.places import cache_folder, size_bytes

if TYPE_CHECKING:
    from filelock import BaseFileLock

LIMIT_GIB = 8.0  # unless SEPARATION_CACHE_GIB says otherwise: 25 songs of four minutes, each in four stems
# The packages that compute an estimate from a decoded song. A change to any file of theirs, or to a module beside them,
# makes all older entries stale.
ENGINE = ("audio", "checkpoints", "engine", "models")

DAMAGED = (ValueError, LookupError, AttributeError, TypeError, RecursionError)  # what a description then raises

PREFIX, LOCK = "estimate-", "estimates-lock"  # names that nobody else's files have, for the folder may hold others

logger = logging.getLogger("separation")


class Kept(NamedTuple):
    """An estimate out of the cache, whole and compared with its checksum."""

    file: io.FileIO  # float32 samples, open for reading
    facts: dict[str, Any]  # what was given with them


@dataclass(frozen=True)
class Entry:
    """What `python -m separation cache list` shows of an estimate."""

    key: str
    bytes: int  # of both files
    last_used: datetime
    made: datetime
    facts: dict[str, Any]  # song, seconds, model, …
    settings: dict[str, Any]  # all that the samples depend on

    def __str__(self) -> str:
        made, used = (f"{time.astimezone():%Y-%m-%d %H:%M}" for time in (self.made, self.last_used))
        facts, settings = self.facts, self.settings
        how = f"{settings['device']} {settings['precision']} {settings['attention'] or ''}".rstrip()
        chunks = f"chunks of {settings['chunk_samples']} samples, {settings['overlap_samples']} of overlap"
        return (
            f"{self.bytes / 1e6:8.1f} MB  {facts['seconds']:6.0f} s  made {made}, used {used}  "
            f"{facts['song']}: {settings['stem']} by {facts['model']} ({how}, {chunks})"
        )

    def as_json(self) -> str:
        times = {"made": self.made.isoformat(), "last_used": self.last_used.isoformat(timespec="seconds")}
        return json.dumps({"key": self.key, "bytes": self.bytes, **times, **self.facts, "settings": self.settings})


class Cache:
    """Estimates in a folder of at most `limit_bytes`; when it is full, those go first that were not used for longest.

    With `refresh` nothing that is there is used, and all is kept anew. Threads and processes may share a folder. One
    that cannot be written to is said once and then left alone: the cache never makes a separation fail.
    """

    def __init__(
        self, folder: Path | str | None = None, *, limit_bytes: int | None = None, refresh: bool = False
    ) -> None:
        self.folder = default_folder() if folder is None else Path(folder)
        if limit_bytes is None:
            limit_bytes = int(positive("SEPARATION_CACHE_GIB", LIMIT_GIB, otherwise="set SEPARATION_CACHE=off") * 2**30)
        self.limit_bytes = limit_bytes
        self.refresh = refresh
        self._has_warned = False

    def get(self, settings: Mapping[str, Any]) -> Kept | None:
        """What was kept under these settings, or None; the caller closes the file. A damaged entry is removed."""
        if self.refresh:
            return None
        key = _key(settings)
        data, description = self._paths(key)
        try:
            if (kept := self._read(key)) is not None:
                return kept
            with self._locked():  # without it, the two files may have been of two makings
                if (kept := self._read(key)) is not None:
                    return kept
                _remove(data, description)
            logger.warning(f"{data} was damaged: it is removed and computed again")
        except FileNotFoundError:  # a miss; half an entry goes when the next one is kept
            return None
        except OSError as e:
            self._warn(e)
        return None

    def _read(self, key: str) -> Kept | None:
        """What is kept under this key; None if its checksum does not fit."""
        data, description = self._paths(key)
        text = description.read_bytes()
        with ExitStack() as stack:
            file = stack.enter_context(io.FileIO(data))
            if (facts := _checked(key, text, file)) is None:
                return None
            stack.pop_all()
        with contextlib.suppress(OSError):  # in a read-only folder the order of use stays as it is
            os.utime(description)
        return Kept(file, facts)

    def put(self, settings: Mapping[str, Any], blocks: Iterable[bytes], n_bytes: int, facts: Mapping[str, Any]) -> None:
        """Keep samples of `n_bytes` in all, and some facts about them, under these settings."""
        if n_bytes > self.limit_bytes:
            return
        try:
            self._put(settings, blocks, n_bytes, facts)
        except OSError as e:
            self._warn(e)

    def _put(
        self, settings: Mapping[str, Any], blocks: Iterable[bytes], n_bytes: int, facts: Mapping[str, Any]
    ) -> None:
        key = _key(settings)
        data, description = self._paths(key)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._part(n_bytes) as part:
            digest = hashlib.sha256()
            for block in blocks:
                part.write(block)
                digest.update(block)
            part.close()  # as Windows wants it of what is renamed
            body = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "facts": facts, "settings": settings}
            digest.update(_plain(body))
            with self._part() as json_part:
                json_part.write(_plain({"sha256": digest.hexdigest(), **body}))
                json_part.close()
                with self._locked():
                    description.unlink(missing_ok=True)  # at no time does it stand beside other samples than its own
                    os.replace(part.name, data)
                    os.replace(json_part.name, description)

    @contextlib.contextmanager
    def _part(self, n_bytes: int = 0) -> Iterator["tempfile._TemporaryFileWrapper[bytes]"]:
        """A new file under another name, for which room is made; if it still has that name in the end, it is removed.

        A lock beside it is held as long: where it is not, a process that was killed has left the file behind.
        """
        with ExitStack() as stack:
            with self._locked():
                self._make_room(n_bytes)
                part = tempfile.NamedTemporaryFile(  # noqa: SIM115
                    prefix=PREFIX, suffix=".part", dir=self.folder, delete=False
                )
                stack.callback(_remove, Path(part.name), _lock_of(Path(part.name)))
                stack.enter_context(lock(_lock_of(Path(part.name))))
                stack.enter_context(part)
                part.truncate(n_bytes)  # what others count
            yield part

    def _make_room(self, n_bytes: int) -> None:
        """Remove what killed processes left behind, and then, as far as need be, the entries not used for longest."""
        total = n_bytes
        entries: list[tuple[int, int, tuple[Path, Path]]] = []
        self._sweep()
        total += sum(map(size_bytes, self.folder.glob(f"{PREFIX}*.part")))
        keys = {path.stem for suffix in ("f32", "json") for path in self.folder.glob(f"{'[0-9a-f]' * 64}.{suffix}")}
        for key in keys:
            data, description = self._paths(key)
            if not (data.exists() and description.exists()):
                _remove(data, description)
                continue
            used, size = description.stat().st_mtime_ns, size_bytes(data) + size_bytes(description)
            entries.append((used, size, (data, description)))
            total += size
        for _, size, paths in sorted(entries):
            if total <= self.limit_bytes:
                break
            _remove(*paths)
            total -= size

    def entries(self) -> list[Entry]:
        """What is there, last used first. Raises OutputError for a folder that cannot be read."""
        found = []
        with self._reporting("read the cache in"):
            for description in self.folder.glob(f"{'[0-9a-f]' * 64}.json"):
                with contextlib.suppress(FileNotFoundError, *DAMAGED):  # removed meanwhile, or damaged
                    text = json.loads(description.read_bytes())
                    status = description.stat()
                    found.append(
                        Entry(
                            key=description.stem,
                            bytes=status.st_size + description.with_suffix(".f32").stat().st_size,
                            last_used=datetime.fromtimestamp(status.st_mtime, UTC),
                            made=datetime.fromisoformat(text["made"]),
                            facts=text["facts"],
                            settings=text["settings"],
                        )
                    )
        return sorted(found, key=lambda entry: entry.last_used, reverse=True)

    def clear(self) -> None:
        """Remove all entries, and nothing else that lies in the folder. Raises OutputError if that cannot be done."""
        with self._reporting("clear the cache in"), contextlib.suppress(FileNotFoundError), self._locked():
            self._sweep()
            for suffix in ("json", "f32"):
                for path in self.folder.glob(f"{'[0-9a-f]' * 64}.{suffix}"):
                    path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what killed processes left behind."""
        for part in self.folder.glob(f"{PREFIX}*.part"):
            with contextlib.suppress(TimeoutError), lock(_lock_of(part), wait=False):
                _remove(part)
        for path in self.folder.glob(f"{PREFIX}*.part.lock"):
            if not path.with_suffix("").exists():
                _remove(path)

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.f32", self.folder / f"{key}.json"

    def _locked(self) -> "BaseFileLock":
        return lock(self.folder / LOCK)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            logger.warning(f"the cache in {self.folder} is not used ({error.strerror or error})")
        self._has_warned = True

    def _reporting(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return output_errors(self.folder, doing=doing, elsewhere="set SEPARATION_CACHE to another folder")


def default_folder() -> Path:
    """stems/ in the program's folder of the user's caches."""
    return cache_folder() / "stems"


def chosen_cache(*, default: bool, refresh: bool = False) -> Cache | None:
    """What the environment variable SEPARATION_CACHE says: `off`, `on`, or a folder; without it as `default` says.

    Raises InputError where SEPARATION_CACHE_GIB is not a number above 0.
    """
    chosen = os.environ.get("SEPARATION_CACHE") or ("on" if default else "off")
    if chosen.lower() in ("off", "no", "false", "0"):
        return None
    return Cache(None if chosen.lower() in ("on", "yes", "true", "1") else chosen, refresh=refresh)


@cache
def engine_version() -> str:
    """The same as long as the code that computes is the same, here and in the packages that it stands on."""
    package = Path(__file__).parents[1]
    files = [*package.glob("*.py"), *(path for folder in ENGINE for path in package.joinpath(folder).rglob("*"))]
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.read_bytes())
    return ", ".join([digest.hexdigest()[:16], *(f"{package} {version(package)}" for package in ("torch", "demucs"))])


def _key(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(_plain(settings)).hexdigest()


def _plain(value: Mapping[str, Any]) -> bytes:
    """As JSON, in which a float is exact and the order of keys does not matter."""
    return json.dumps(value, sort_keys=True, default=str).encode()


def _checked(key: str, text: bytes, file: io.FileIO) -> dict[str, Any] | None:
    """The facts in a description, if it is that of this key and of the samples in the file."""
    try:
        body = json.loads(text)
        checksum = body.pop("sha256")
        facts: dict[str, Any] = body["facts"]
        if _key(body["settings"]) != key:
            return None
    except DAMAGED:
        return None
    digest = hashlib.file_digest(file, "sha256")
    digest.update(_plain(body))
    file.seek(0)
    return facts if digest.hexdigest() == checksum else None


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _lock_of(part: Path) -> Path:
    return part.with_name(part.name + ".lock")
