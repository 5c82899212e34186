"""The record in a folder, `.separation.json`: which files this program wrote there, and of which song.

`files` has the name, size and time of change of each file as it was written: a file that still is as the record says
may be replaced, any other belongs to somebody else. `runs` has, for each run whose stems are there, the song's file,
the settings and the stems. A run is added last: stems that none names are not finished.
"""

import json
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from separation.errors import InputError, OutputError

RECORD = ".separation.json"
PAGE = "stems.html"
SAME_TIME_NS = 2 * 10**9  # two times of change: FAT, and many a network drive and sync service, keep 2 seconds at best

_VERSION = 1
_MOST_BYTES = 2**24  # of a record: thousands of runs
_SOURCE = {"name": str, "path": str, "bytes": int, "mtime_ns": int, "sha256": str}


@dataclass(frozen=True)
class Written:
    """A file as this program wrote it."""

    name: str
    n_bytes: int
    mtime_ns: int | None  # None: in records of an earlier version, which did not keep it

    @classmethod
    def of(cls, path: Path) -> "Written":
        facts = path.stat()
        return cls(path.name, facts.st_size, facts.st_mtime_ns)

    def is_still_in(self, folder: Path) -> bool:
        """Whether the file has not been changed, replaced or removed since."""
        try:
            facts = (folder / self.name).lstat()
        except OSError:
            return False
        same_time = self.mtime_ns is None or abs(facts.st_mtime_ns - self.mtime_ns) <= SAME_TIME_NS
        return stat.S_ISREG(facts.st_mode) and facts.st_size == self.n_bytes and same_time


@dataclass(frozen=True)
class Record:
    """What a record says. Runs are as JSON has them, but for the name and size of a stem's file, which are a pair."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    files: list[Written] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Empty if the folder has none, or one that is damaged or of a later version."""
        content = _content(folder / RECORD)
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
        """With this run in place of one with the same settings."""
        return Record([*self.without_run(run["settings"]).runs, run], self.files)

    def with_files(self, folder: Path, parts: Iterable[Path]) -> "Record":
        """Before these files take their places in the folder: with them, and without the runs whose stems they replace.

        What was written there before is still vouched for, in case that the move does not come about.
        """
        new = [Written.of(part) for part in parts]
        names = {file.name for file in new}
        runs = [run for run in self.runs if not names & stem_files(run)]
        if PAGE in names:
            runs = [{key: value for key, value in run.items() if key != "page_bytes"} for run in runs]
        return Record(runs, [*(file for file in self.files if file.is_still_in(folder)), *new])

    def vouches_for(self, path: Path) -> bool:
        """Whether a file is there just as this program wrote it."""
        return any(file.name == path.name and file.is_still_in(path.parent) for file in self.files)


def _checked(run: dict[str, Any]) -> dict[str, Any]:
    """A run out of a record, with values of the right kinds; raises one of several exceptions for anything else."""
    numbers = {key: float(run[key]) for key in ("duration_seconds", "elapsed_seconds", "gain")}
    if min(numbers.values()) <= 0:
        raise ValueError("a duration or a gain of nothing")
    return {
        **run,
        **numbers,
        "source": {key: _SOURCE[key](value) for key, value in run["source"].items() if key in _SOURCE},
        "settings": run["settings"],
        "stems": {str(stem): (str(file), int(n_bytes)) for stem, (file, n_bytes) in run["stems"].items()},
        "warnings": [str(warning) for warning in run.get("warnings", [])],
    }


def stem_files(run: dict[str, Any]) -> set[str]:
    """The names of a run's stems' files."""
    return {name for name, _ in run["stems"].values()}


def check_targets(folder: Path, names: Sequence[str], *, overwrite: bool = False, song: Path | None = None) -> None:
    """Raise OutputError if a name cannot be given to a file in the folder, InputError if that is the song.

    It cannot where a folder is, or, unless `overwrite`, a file or a link that this program did not write.
    """
    record = Record.read(folder)
    for target in (folder / name for name in names):
        if os.path.isdir(target):
            raise OutputError(f"cannot write {str(target)!r}: a folder of that name is there: choose another place")
        if song is not None and os.path.exists(target) and os.path.exists(song) and target.samefile(song):
            raise InputError(f"a stem would take the place of the song {song.name!r}: choose another output folder")
        if os.path.lexists(target) and not (overwrite or record.vouches_for(target) or is_record(target)):
            raise OutputError(
                f"{str(target)!r} already exists, and no record says that this program wrote it: choose another place, "
                "or replace it with --overwrite (overwrite=True in Python)"
            )


def is_record(path: Path) -> bool:
    """Whether a file is a record, of whatever version."""
    return path.name == RECORD and bool(_content(path))


def _content(path: Path) -> dict[str, Any]:
    """What a record holds; nothing if it is none, or damaged."""
    try:
        facts = path.stat()
        is_plausible = stat.S_ISREG(facts.st_mode) and facts.st_size <= _MOST_BYTES
        content = json.loads(path.read_text(encoding="utf-8")) if is_plausible else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and {"version", "runs"} <= content.keys() else {}
