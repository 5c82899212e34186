"""The record in an output folder, `.separation.json`: the files that this program wrote there, and from which song.

If songs share a folder because of the names that were chosen for their stems, each has a record of its own there,
`.separation-*.json`. Names of files are relative to the folder.

`files` lists the name, size and modification time of each file as written. A file that still matches may be replaced;
any other file belongs to somebody else. `runs` lists the runs whose stems are in the folder, each with its song,
settings and stems. A run is added last, so stems without a run are unfinished.
"""

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from separation.errors import InputError, OutputError

RECORD = ".separation.json"
PAGE = "stems.html"
SAME_TIME_NS = 2 * 10**9  # FAT, many network drives and sync services keep times to 2 seconds at best

_VERSION = 1
_MAX_BYTES = 2**24  # enough for thousands of runs
_SOURCE = {"name": str, "path": str, "bytes": int, "mtime_ns": int, "tag": str, "sha256": str}


@dataclass(frozen=True)
class Written:
    """A file as this program wrote it."""

    name: str
    n_bytes: int
    mtime_ns: int | None  # None in records of earlier versions, which do not have it

    @classmethod
    def of(cls, name: str, path: Path) -> "Written":
        facts = path.stat()
        return cls(name, facts.st_size, facts.st_mtime_ns)

    def is_still_in(self, folder: Path) -> bool:
        """Whether the file is unchanged: neither edited, replaced nor removed."""
        try:
            facts = (folder / self.name).lstat()
        except OSError:
            return False
        same_time = self.mtime_ns is None or abs(facts.st_mtime_ns - self.mtime_ns) <= SAME_TIME_NS
        return stat.S_ISREG(facts.st_mode) and facts.st_size == self.n_bytes and same_time


@dataclass(frozen=True)
class Record:
    """The content of a record. A run is a JSON object, except that a stem's file is a tuple of name and size."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    files: list[Written] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, name: str = RECORD) -> "Record":
        """The folder's record of that name; empty if it has none, or one that is damaged or from a later version."""
        return cls._of(_content(folder / name))

    @classmethod
    def parse(cls, text: bytes) -> "Record":
        """The record in a text; empty if it is damaged or from a later version."""
        return cls._of(_object(text))

    @classmethod
    def _of(cls, content: dict[str, Any]) -> "Record":
        if content.get("version") != _VERSION:
            return cls()
        try:
            runs = [_checked(run) for run in content["runs"]]
            if "files" in content:
                files = [Written(str(name), int(size), time and int(time)) for name, size, time in content["files"]]
                return cls(runs, files)
            pages = [(PAGE, int(run["page_bytes"])) for run in runs if "page_bytes" in run]
            named = {(name, n_bytes) for run in runs for name, n_bytes in (*run["stems"].values(), *pages)}
            return cls(runs, [Written(name, n_bytes, None) for name, n_bytes in sorted(named)])
        except (ValueError, TypeError, LookupError, AttributeError):
            return cls()

    def text(self) -> str:
        files = [(file.name, file.n_bytes, file.mtime_ns) for file in self.files]
        return json.dumps({"version": _VERSION, "runs": self.runs, "files": files}, indent=1)

    def without_run(self, settings: dict[str, Any]) -> "Record":
        return Record([run for run in self.runs if run["settings"] != settings], self.files)

    def with_run(self, run: dict[str, Any]) -> "Record":
        """This record with a run added; it replaces the run with the same settings."""
        return Record([*self.without_run(run["settings"]).runs, run], self.files)

    def with_files(self, folder: Path, parts: Mapping[str, Path]) -> "Record":
        """This record with files that are about to be moved into the folder, without the runs whose stems they replace.

        `parts` are the files by their names in the folder.

        It still vouches for the files that are there now, in case the move fails.
        """
        new = [Written.of(name, part) for name, part in parts.items()]
        names = parts.keys()
        runs = [run for run in self.runs if not names & stem_files(run)]
        without_page = ({key: value for key, value in run.items() if key != "page_bytes"} for run in runs)
        runs = [bare if page_of(run) in names else run for run, bare in zip(runs, without_page, strict=True)]
        return Record(runs, [*(file for file in self.files if file.is_still_in(folder)), *new])

    def vouches_for(self, folder: Path, name: str) -> bool:
        """Whether the file of that name exists exactly as this program wrote it."""
        return any(file.name == name and file.is_still_in(folder) for file in self.files)


def _checked(run: dict[str, Any]) -> dict[str, Any]:
    """A run of a record with its values converted; raises ValueError, TypeError, LookupError or AttributeError."""
    numbers = {key: float(run[key]) for key in ("duration_seconds", "elapsed_seconds", "gain")}
    if min(numbers.values()) <= 0:
        raise ValueError("a duration or gain is not positive")
    return {
        **run,
        **numbers,
        "source": {key: _SOURCE[key](value) for key, value in run["source"].items() if key in _SOURCE},
        "settings": run["settings"],
        "stems": {str(stem): (str(file), int(n_bytes)) for stem, (file, n_bytes) in run["stems"].items()},
        "warnings": [str(warning) for warning in run.get("warnings", [])],
    }


def stem_files(run: dict[str, Any]) -> set[str]:
    """The file names of a run's stems."""
    return {name for name, _ in run["stems"].values()}


def page_of(run: dict[str, Any]) -> str:
    """The name of a run's listening page, if it has one."""
    return str(run.get("page", PAGE))


def recorded_files(folder: Path) -> set[str]:
    """The names of all files that records in a folder list, relative to it."""
    records = [Record.read(folder, path.name) for path in folder.glob(".separation*.json")]
    listed = {file.name for record in records for file in record.files}
    return listed.union(*(stem_files(run) for record in records for run in record.runs))


def check_targets(
    folder: Path,
    names: Sequence[str],
    *,
    overwrite: bool = False,
    song: Path | None = None,
    record_name: str = RECORD,
) -> None:
    """Check that files with these names, and the record, may be written to the folder.

    Raises:
        OutputError: a name belongs to a folder or, unless `overwrite`, to a file or link that this program did not
            write.
        InputError: a name belongs to the song itself.
    """
    record = Record.read(folder, record_name)
    for name in names:
        target = folder / name
        if os.path.isdir(target):
            raise OutputError(f"{str(target)!r} is a folder: remove it, or choose another place")
        if song is not None and os.path.exists(target) and os.path.exists(song) and target.samefile(song):
            raise InputError(f"a stem would overwrite the song {song.name!r}: choose another output folder")
        if os.path.lexists(target) and not (overwrite or record.vouches_for(folder, name) or is_record(target)):
            raise OutputError(
                f"{str(target)!r} already exists and is not a file that this program wrote: choose another place, or "
                "replace it with --overwrite (overwrite=True in Python)"
            )


def is_record(path: Path) -> bool:
    """Whether a file is a record, of any version."""
    return fnmatch(path.name, ".separation*.json") and bool(_content(path))


def _content(path: Path) -> dict[str, Any]:
    """The JSON object in a record; empty if the file is damaged or not a record."""
    try:
        facts = path.stat()
        is_plausible = stat.S_ISREG(facts.st_mode) and facts.st_size <= _MAX_BYTES
        return _object(path.read_bytes()) if is_plausible else {}
    except OSError:
        return {}


def _object(text: bytes) -> dict[str, Any]:
    """The JSON object in a record's text; empty if the text is damaged or not a record."""
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and {"version", "runs"} <= content.keys() else {}
