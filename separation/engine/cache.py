"""A cache of estimates on disk, so that a song is not computed twice.

The key of an estimate is a hash of everything that its samples depend on: the decoded song, the weights, the settings,
and the code that computes it. An entry is two files: KEY.f32 holds the samples as a Waveform's file does, and KEY.json
holds facts about them, the settings, and a checksum of both files. Files are written under another name and renamed, so
that killing the process leaves whole entries or none. A wrong checksum is a cache miss. Nothing is fsynced: the
checksum detects what a power failure damages.

The folder is locked only while files are renamed or removed. This module does not import PyTorch, so that
`separation cache list` is fast.
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

LIMIT_GIB = 8.0  # the default of SEPARATION_CACHE_GIB: 25 songs of four minutes in four stems
# The packages that compute an estimate from a decoded song. A change to any of their files, or to a module beside them,
# makes all older entries stale.
ENGINE = ("audio", "checkpoints", "engine", "models")

DAMAGED = (ValueError, LookupError, AttributeError, TypeError, RecursionError)  # what reading a damaged KEY.json raises

# Names that no other program uses: the folder may hold other files, which stay.
PREFIX, LOCK = "estimate-", "estimates-lock"

logger: logging.Logger = logging.getLogger("separation")


class Hit(NamedTuple):
    """An estimate from the cache; its checksum is right."""

    file: io.FileIO  # float32 samples, open for reading
    facts: dict[str, Any]  # as given to `put`


@dataclass(frozen=True)
class Entry:
    """An estimate as `separation cache list` shows it."""

    key: str
    bytes: int  # of both files
    last_used: datetime
    made: datetime
    facts: dict[str, Any]  # song, seconds, model, …
    settings: dict[str, Any]  # everything that the samples depend on

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
        """The entry as a line of JSON."""
        times = {"made": self.made.isoformat(), "last_used": self.last_used.isoformat(timespec="seconds")}
        return json.dumps({"key": self.key, "bytes": self.bytes, **times, **self.facts, "settings": self.settings})


class Cache:
    """A folder of estimates that evicts the least recently used ones. Threads and processes may share a folder.

    The cache never makes a separation fail: if the folder cannot be used, it logs one warning and goes on without.

    Args:
        folder: created when the first estimate is stored; None means the user's cache folder.
        limit_bytes: the most that the folder may hold; None means SEPARATION_CACHE_GIB, or 8 GiB without it.
        refresh: use nothing that is stored, and store everything again.

    Attributes:
        folder, limit_bytes, refresh: as given, with the defaults filled in.

    Raises:
        InputError: SEPARATION_CACHE_GIB is not a number above 0.
    """

    def __init__(
        self, folder: Path | str | None = None, *, limit_bytes: int | None = None, refresh: bool = False
    ) -> None:
        self.folder: Path = default_folder() if folder is None else Path(folder)
        if limit_bytes is None:
            limit_bytes = int(positive("SEPARATION_CACHE_GIB", LIMIT_GIB, otherwise="set SEPARATION_CACHE=off") * 2**30)
        self.limit_bytes: int = limit_bytes
        self.refresh: bool = refresh
        self._has_warned = False

    def get(self, settings: Mapping[str, Any]) -> Hit | None:
        """Look up an estimate by its settings; None on a cache miss. The caller closes the file.

        A damaged entry is removed, and a warning is logged.
        """
        if self.refresh:
            return None
        key = _key(settings)
        data, description = self._paths(key)
        try:
            if (hit := self._read(key)) is not None:
                return hit
            with self._locked():  # again: another process may have replaced one of the two files in between
                if (hit := self._read(key)) is not None:
                    return hit
                _remove(data, description)
            logger.warning(f"{data} was damaged: removed, the estimate is computed again")
        except FileNotFoundError:  # a cache miss; the next `put` removes half an entry
            return None
        except OSError as e:
            self._warn(e)
        return None

    def _read(self, key: str) -> Hit | None:
        """The entry of a key; None if its checksum is wrong. Raises FileNotFoundError if there is none."""
        data, description = self._paths(key)
        text = description.read_bytes()
        with ExitStack() as stack:
            file = stack.enter_context(io.FileIO(data))
            if (facts := _checked(key, text, file)) is None:
                return None
            stack.pop_all()
        with contextlib.suppress(OSError):  # a read-only folder keeps its order of use
            os.utime(description)
        return Hit(file, facts)

    def put(self, settings: Mapping[str, Any], blocks: Iterable[bytes], n_bytes: int, facts: Mapping[str, Any]) -> None:
        """Store an estimate under its settings.

        Args:
            blocks: the float32 samples, `n_bytes` in total.
            facts: what to store with them, as JSON.
        """
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
        with self._temporary_file(n_bytes) as part:
            digest = hashlib.sha256()
            for block in blocks:
                part.write(block)
                digest.update(block)
            part.close()  # Windows renames no open file
            body = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "facts": facts, "settings": settings}
            digest.update(_json(body))
            with self._temporary_file() as json_part:
                json_part.write(_json({"sha256": digest.hexdigest(), **body}))
                json_part.close()
                with self._locked():
                    description.unlink(missing_ok=True)  # must never lie beside another estimate's samples
                    os.replace(part.name, data)
                    os.replace(json_part.name, description)

    @contextlib.contextmanager
    def _temporary_file(self, n_bytes: int = 0) -> Iterator["tempfile._TemporaryFileWrapper[bytes]"]:
        """A temporary file, after making room for it; removed at the end unless it was renamed.

        A lock beside it is held meanwhile. If nobody holds the lock, a killed process left the file behind.
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
                part.truncate(n_bytes)  # reserves the size, which other processes count
            yield part

    def _make_room(self, n_bytes: int) -> None:
        """Evict the least recently used entries until `n_bytes` more fit."""
        self._sweep()
        total = n_bytes + sum(map(size_bytes, self.folder.glob(f"{PREFIX}*.part")))
        entries: list[tuple[int, int, tuple[Path, Path]]] = []
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
        """All entries, the most recently used first. Raises OutputError if the folder cannot be read."""
        found = []
        with self._output_errors("read the cache in"):
            for description in self.folder.glob(f"{'[0-9a-f]' * 64}.json"):
                with contextlib.suppress(FileNotFoundError, *DAMAGED):  # removed by another process, or damaged
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
        """Remove all entries, and no other files in the folder. Raises OutputError if they cannot be removed."""
        with self._output_errors("clear the cache in"), contextlib.suppress(FileNotFoundError), self._locked():
            self._sweep()
            for suffix in ("json", "f32"):
                for path in self.folder.glob(f"{'[0-9a-f]' * 64}.{suffix}"):
                    path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove the temporary files of killed processes."""
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
            logger.warning(
                f"the cache in {self.folder} cannot be used ({error.strerror or error}): continuing without it"
            )
        self._has_warned = True

    def _output_errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return output_errors(self.folder, doing=doing, elsewhere="set SEPARATION_CACHE to another folder")


def default_folder() -> Path:
    """The folder `stems` in this program's part of the user's cache folder."""
    return cache_folder() / "stems"


def chosen_cache(*, default: bool, refresh: bool = False) -> Cache | None:
    """The cache that the environment variable SEPARATION_CACHE chooses: `off` (None), `on`, or a folder.

    Raises InputError if SEPARATION_CACHE_GIB is not a number above 0.

    Args:
        default: whether to cache if the variable is not set.
        refresh: as in `Cache`.
    """
    chosen = os.environ.get("SEPARATION_CACHE") or ("on" if default else "off")
    if chosen.lower() in ("off", "no", "false", "0"):
        return None
    return Cache(None if chosen.lower() in ("on", "yes", "true", "1") else chosen, refresh=refresh)


@cache
def engine_version() -> str:
    """A hash of the code that computes estimates, and the versions of the packages that it uses."""
    package = Path(__file__).parents[1]
    files = [*package.glob("*.py"), *(path for folder in ENGINE for path in package.joinpath(folder).rglob("*"))]
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.read_bytes())
    return ", ".join([digest.hexdigest()[:16], *(f"{package} {version(package)}" for package in ("torch", "demucs"))])


def _key(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(settings)).hexdigest()


def _json(value: Mapping[str, Any]) -> bytes:
    """JSON, which stores floats exactly; the order of keys does not matter."""
    return json.dumps(value, sort_keys=True, default=str).encode()


def _checked(key: str, text: bytes, file: io.FileIO) -> dict[str, Any] | None:
    """The facts in the text of a KEY.json; None if its key or the checksum of both files is wrong."""
    try:
        body = json.loads(text)
        checksum = body.pop("sha256")
        facts: dict[str, Any] = body["facts"]
        if _key(body["settings"]) != key:
            return None
    except DAMAGED:
        return None
    digest = hashlib.file_digest(file, "sha256")
    digest.update(_json(body))
    file.seek(0)
    return facts if digest.hexdigest() == checksum else None


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _lock_of(part: Path) -> Path:
    return part.with_name(part.name + ".lock")
