"""Which songs are done.

The record beside a song's stems says from which file and with which settings they were made. So a run that was stopped
resumes, on this machine or another.
"""

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from separation.analysis.facts import SongAnalysis
from separation.batch.job import AnySong, Job, Outcome, Song
from separation.batch.urls import is_url
from separation.errors import OutputError, SeparationError
from separation.system.output import OutputFolder
from separation.system.record import Record, check_targets, stem_files


def unfinished(songs: Sequence[Song], job: Job, *, force: bool = False) -> tuple[list[Song], list[Outcome]]:
    """The songs still to separate, and the outcomes of all others.

    A song is skipped if its stems are complete and were made from this file with these settings, unless `force`. It
    fails if its stems would replace files that do not belong to it.
    """
    remaining, outcomes = [], []
    for song in songs:
        run = None if force else find_run(song, job)
        named = song.analysed(analysis_of(run or {}))
        if run is not None and not (needs_page(named, job, run) or needs_analysis(job, run)):
            outcomes.append(outcome_of(named, "skipped", run))
            continue
        try:
            check_folder(named, job, run)
            if force:  # so that this run, if stopped, resumes without `force`
                _forget(song, job.settings)
            remaining.append(song)
        except SeparationError as e:
            outcomes.append(Outcome(song.path, "failed", str(e)))
    return remaining, outcomes


def find_run(song: Song, job: Job) -> dict[str, Any] | None:
    """The recorded run that made the song's stems with the job's settings, if they are all complete."""
    file = SongFile(song)
    for run in Record.read(song.folder, song.place.record).runs:
        is_named = not song.place.needs_analysis or analysis_of(run) is not None
        if run["settings"] == job.settings and is_named and file.is_source(run["source"]):
            sizes = {song.folder / name: n_bytes for name, n_bytes in run["stems"].values()}
            if all(os.path.isfile(path) and path.stat().st_size == n_bytes for path, n_bytes in sizes.items()):
                return run
    return None


def check_folder(song: Song, job: Job, run: dict[str, Any] | None) -> None:
    """Check that the files still missing from the song's `run` may be written.

    Raises:
        OutputError: one would replace another song's stem, or a file that this program did not write.
        InputError: one would replace the song.
    """
    record = song.place.record
    names: list[str] = []  # those that are known before the song is analysed
    if not song.place.needs_analysis:
        names += [] if run else song.stem_names(job).values()
        names += [song.page.name] if needs_page(song, job, run or {}) else []
    check_targets(song.folder, [*names, record], overwrite=job.output.overwrite, song=song.path, record_name=record)
    if job.output.overwrite:
        return
    file = SongFile(song)
    for other in Record.read(song.folder, record).runs:
        source = other["source"]
        if file.is_other_song(source) and any(os.path.exists(song.folder / name) for name in stem_files(other)):
            path = source.get("path", source["name"])
            path = path if is_url(path) else os.path.normpath(song.folder / path)
            raise OutputError(
                f"{str(song.folder)!r} has the stems of another song, {path!r}: choose another output folder, or "
                "replace them with --overwrite"
            )


def needs_page(song: Song, job: Job, run: dict[str, Any]) -> bool:
    """Whether the listening page is wanted, but missing or not the recorded one."""
    return job.report and not (os.path.isfile(song.page) and song.page.stat().st_size == run.get("page_bytes"))


def needs_analysis(job: Job, run: dict[str, Any]) -> bool:
    """Whether tempo, key and loudness are wanted, but not recorded."""
    return job.analyse and analysis_of(run) is None


def analysis_of(run: dict[str, Any]) -> SongAnalysis | None:
    """The recorded analysis of a song; None if there is none, or one that cannot be understood."""
    try:
        return SongAnalysis.from_json(run["analysis"])
    except (LookupError, TypeError, AttributeError):
        return None


def outcome_of(song: Song, status: str, run: dict[str, Any], error: str = "") -> Outcome:
    """The outcome of a song whose stems are complete."""
    stems = stem_paths(song, run)
    facts = {key: run[key] for key in ("duration_seconds", "elapsed_seconds", "gain")}
    page = song.page if "page_bytes" in run else None
    warnings = list(run.get("warnings", []))
    return Outcome(song.path, status, error, stems, facts, analysis_of(run), page, warnings, run["source"])


def stem_paths(song: Song, run: dict[str, Any]) -> dict[str, Path]:
    """The paths of the stems' files, by stem."""
    return {stem: song.folder / name for stem, (name, _) in run["stems"].items()}


def add_run(song: Song, run: dict[str, Any]) -> None:
    """Add a run to the song's record."""
    _write(song, Record.read(song.folder, song.place.record).with_run(run))


def _forget(song: Song, settings: dict[str, Any]) -> None:
    """Remove the run with these settings from the song's record."""
    record = Record.read(song.folder, song.place.record)
    if any(run["settings"] == settings for run in record.runs):
        _write(song, record.without_run(settings))


def _write(song: Song, record: Record) -> None:
    with OutputFolder(song.folder, record=song.place.record) as output:
        output.write(record)


class SongFile:
    """A song's file, to compare with the sources in records.

    A file is the same if its path relative to the stems, its size and its modification time are the same, or else if
    its content is. A file in a store is the same if its size and its checksum in the store are.
    """

    def __init__(self, song: AnySong) -> None:
        self._song = song
        self._tag = song.origin.tag if song.origin else ""
        self._sha256 = ""

    def source(self) -> dict[str, Any]:
        """The source to record; empty if the file cannot be read: decoding reports a better error."""
        if not isinstance(self._song.path, Path):
            return {}
        try:
            facts = self._song.path.stat()
            if not stat.S_ISREG(facts.st_mode):
                return {}
            return {
                "name": self._song.path.name,
                "path": self._recorded_path(),
                "bytes": facts.st_size,
                **({"tag": self._tag} if self._tag else {"mtime_ns": facts.st_mtime_ns}),
                "sha256": self._checksum(),
            }
        except OSError:
            return {}

    def is_source(self, source: dict[str, Any]) -> bool:
        """Whether a recorded source is this file with this content."""
        try:
            if self._song.origin and self._tag:
                if source.get("bytes") != self._song.origin.n_bytes:
                    return False
                if source.get("tag") == self._tag:
                    return True
            elif isinstance(self._song.path, Path):
                facts = self._song.path.stat()
                if source.get("bytes") != facts.st_size:
                    return False
                if self._has_path_of(source) and source.get("mtime_ns") == facts.st_mtime_ns:
                    return True
            return "sha256" in source and source["sha256"] == self._checksum()
        except OSError:
            return False

    def is_other_song(self, source: dict[str, Any]) -> bool:
        """Whether a recorded source is another song, rather than this file or an earlier version of it."""
        return "name" in source and not self._has_path_of(source) and not self.is_source(source)

    def _has_path_of(self, source: dict[str, Any]) -> bool:
        if "path" not in source:  # an earlier version wrote the record
            return bool(source.get("name") == self._song.path.name)
        return bool(source["path"] == self._recorded_path())

    def _recorded_path(self) -> str:
        if self._song.origin:
            return self._song.origin.path
        try:
            return Path(os.path.relpath(str(self._song.path), str(self._song.folder))).as_posix()
        except ValueError:  # on another drive of Windows
            return Path(os.path.abspath(str(self._song.path))).as_posix()

    def _checksum(self) -> str:
        """The file's checksum; empty for one in a store, which is not read for it."""
        if not self._sha256 and isinstance(self._song.path, Path):
            with self._song.path.open("rb") as file:
                self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return self._sha256
