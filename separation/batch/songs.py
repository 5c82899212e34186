"""Many songs: which of them are done already, and doing the others.

A song's stems go to a folder of their own, whose record says of which song and with which settings they were made. So a
run that was stopped, here or on another machine, goes on where it was.
"""

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from separation.audio.options import OutputOptions
from separation.engine.about_song import about_song
from separation.errors import OutputError, SeparationError
from separation.progress import Progress
from separation.system.output import OutputFolder
from separation.system.record import PAGE, RECORD, Record, check_targets, stem_files
from separation.system.signals import uninterrupted
from separation.system.threads import Threads

# What imports PyTorch is imported where a song is separated: to see that all are done takes a moment without it.
if TYPE_CHECKING:
    from separation.engine.separator import Separator

SEPARATED = 0.7  # the share of a song's job, in the progress, that is done by then if a page is wanted too


@dataclass(frozen=True)
class Song:
    """A song's file and the folder that its stems go to."""

    path: Path
    folder: Path


@dataclass(frozen=True)
class Job:
    """What is wanted of every song."""

    settings: dict[str, Any]  # all that decides what the stems' files hold, as JSON has it
    output: OutputOptions = OutputOptions()
    accept_damaged: bool = False
    report: bool = False  # whether to write a listening page beside the stems
    stems: tuple[str, ...] = ()  # that will be written, as far as is known before a model is loaded


@dataclass(frozen=True)
class Outcome:
    """What became of a song: `done`, `skipped` as it was done before, or `failed` with a sentence."""

    path: Path
    status: str
    error: str = ""
    stems: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # duration_seconds, elapsed_seconds, gain; like stems, if known
    page: Path | None = None
    warnings: list[str] = field(default_factory=list)  # about it; of stems that were there, about their making


# ---------------------------------------------------------------------------------------------------------------------
# Which are done


def unfinished(songs: Sequence[Song], job: Job, *, force: bool = False) -> tuple[list[Song], list[Outcome]]:
    """The songs that something is to be done for, and what is known of the others.

    Unless `force`, a song is done if its stems are whole and were made of this very file with these settings.
    Songs whose stems would replace what is not theirs have failed.
    """
    left, done = [], []
    for song in songs:
        entry = None if force else _entry(song, job)
        if entry is not None and not _needs_page(song, job, entry):
            done.append(_outcome(song, "skipped", entry))
            continue
        try:
            _check(song, job, entry)
            if force:  # in the record, so that a run that is stopped and started without goes on
                _forget(song.folder, job.settings)
            left.append(song)
        except SeparationError as e:
            done.append(Outcome(song.path, "failed", str(e)))
    return left, done


def _forget(folder: Path, settings: dict[str, Any]) -> None:
    """Take the run with these settings out of a record."""
    record = Record.read(folder)
    if any(run["settings"] == settings for run in record.runs):
        _write(folder, record.without_run(settings))


def _entry(song: Song, job: Job) -> dict[str, Any] | None:
    file = _File(song)
    for entry in Record.read(song.folder).runs:
        if entry["settings"] == job.settings and file.made(entry["source"]):
            sizes = {song.folder / name: n_bytes for name, n_bytes in entry["stems"].values()}
            if all(os.path.isfile(path) and path.stat().st_size == n_bytes for path, n_bytes in sizes.items()):
                return entry
    return None


def _check(song: Song, job: Job, entry: dict[str, Any] | None) -> None:
    """Raise if what is to be written would replace another song's stems, or what this program did not write."""
    names = [] if entry else [f"{stem}.{job.output.format}" for stem in job.stems]
    names += [PAGE] if _needs_page(song, job, entry or {}) else []
    check_targets(song.folder, [*names, RECORD], overwrite=job.output.overwrite, song=song.path)
    if job.output.overwrite:
        return
    file = _File(song)
    for run in Record.read(song.folder).runs:
        if file.is_another(run["source"]) and any(os.path.exists(song.folder / name) for name in stem_files(run)):
            other = os.path.normpath(song.folder / run["source"].get("path", run["source"]["name"]))
            raise OutputError(
                f"{str(song.folder)!r} has the stems of another song, {other!r}: choose another output folder, or "
                "replace them with --overwrite"
            )


def _needs_page(song: Song, job: Job, entry: dict[str, Any]) -> bool:
    page = song.folder / PAGE
    return job.report and not (os.path.isfile(page) and page.stat().st_size == entry.get("page_bytes"))


def _outcome(song: Song, status: str, entry: dict[str, Any], error: str = "") -> Outcome:
    stems = {stem: song.folder / file for stem, (file, _) in entry["stems"].items()}
    facts = {key: entry[key] for key in ("duration_seconds", "elapsed_seconds", "gain")}
    page = song.folder / PAGE if "page_bytes" in entry else None
    return Outcome(song.path, status, error, stems, facts, page, list(entry.get("warnings", [])))


class _File:
    """A song's file, to compare with what records say of the files that stems were made of.

    Its place, as seen from the stems, its size and its time of change tell it; where they do not, its content does.
    """

    def __init__(self, song: Song) -> None:
        self._song = song
        self._sha256 = ""

    def source(self) -> dict[str, Any]:
        """What a record keeps of it; nothing if it cannot be read, which decoding says better."""
        try:
            facts = self._song.path.stat()
            if not stat.S_ISREG(facts.st_mode):
                return {}
            return {
                "name": self._song.path.name,
                "path": self._place(),
                "bytes": facts.st_size,
                "mtime_ns": facts.st_mtime_ns,
                "sha256": self._content(),
            }
        except OSError:
            return {}

    def made(self, source: dict[str, Any]) -> bool:
        """Whether the stems of such a source were made of this very file."""
        try:
            facts = self._song.path.stat()
            if source.get("bytes") != facts.st_size:
                return False
            if self._is_there(source) and source.get("mtime_ns") == facts.st_mtime_ns:
                return True
            return "sha256" in source and source["sha256"] == self._content()
        except OSError:
            return False

    def is_another(self, source: dict[str, Any]) -> bool:
        """Whether such a source is neither this file nor what was in its place before."""
        return "name" in source and not self._is_there(source) and not self.made(source)

    def _is_there(self, source: dict[str, Any]) -> bool:
        """An earlier version's record has no path: then the name must do."""
        return source["path"] == self._place() if "path" in source else source.get("name") == self._song.path.name

    def _place(self) -> str:
        try:
            return Path(os.path.relpath(self._song.path, self._song.folder)).as_posix()
        except ValueError:  # on Windows, on another drive
            return Path(os.path.abspath(self._song.path)).as_posix()

    def _content(self) -> str:
        if not self._sha256:
            with self._song.path.open("rb") as file:
                self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return self._sha256


def _write(folder: Path, record: Record) -> None:
    with OutputFolder(folder) as output:
        output.write(record)


def _add(folder: Path, run: dict[str, Any]) -> None:
    _write(folder, Record.read(folder).with_run(run))


# ---------------------------------------------------------------------------------------------------------------------
# Doing them


def run(
    songs: Sequence[Song],
    job: Job,
    separators: Sequence["Separator"],
    *,
    workers: int,
    bar: Callable[[str], AbstractContextManager[Progress]],
) -> Iterator[Outcome]:
    """Do the songs, in so many threads for each separator; yields each when it is over.

    A separator is for each GPU. On a CPU its model works on one song at a time; with more than one worker, others are
    decoded and encoded beside it. `bar` shows the progress of a song of that name. On an exception in this thread
    (Ctrl-C), and when the iterator is closed, the songs at hand are cancelled, and no file of them stays.
    """
    if workers == len(separators) == 1:  # in this thread, where an exception is seen at once
        for song in songs:
            with bar(song.path.name) as progress:
                outcome = separate_song(song, job, separators[0], progress)
            yield outcome
        return
    stopped = threading.Event()
    free: SimpleQueue[Separator] = SimpleQueue()
    for separator in [*separators] * workers:
        free.put(separator)

    def work(song: Song) -> Outcome:
        separator = free.get()
        try:
            with bar(song.path.name) as progress:
                return separate_song(song, job, separator, until(stopped, progress))
        finally:
            free.put(separator)

    pool = Threads(max_workers=workers * len(separators))
    try:
        for future in as_completed([pool.submit(work, song) for song in songs]):
            yield future.result()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    """Raised in a worker when the run is over."""


def until(stopped: threading.Event, progress: Progress) -> Progress:
    """A progress that cancels its song once the run is over."""

    def checked(share: float, stage: str) -> None:
        if stopped.is_set():
            raise _StoppedError
        progress(share, stage)

    return Progress(checked)


def separate_song(song: Song, job: Job, separator: "Separator", progress: Progress) -> Outcome:
    """Do what a song needs: its stems unless they are finished by now, then its page."""
    entry, status = _entry(song, job), "skipped"
    warnings: list[str] = []
    try:
        with about_song(song.path.name) as warnings:
            _check(song, job, entry)
            if entry is None:
                entry, status = _separated(song, job, separator, progress, warnings), "done"
            if _needs_page(song, job, entry):
                entry = _with_page(song, job, entry, progress, SEPARATED if status == "done" else 0)
                status = "done"
    except (SeparationError, OSError) as e:  # OSError: a disk that gives up, or is taken away
        error = str(e) if isinstance(e, SeparationError) else f"{song.path.name!r} is not done: {e}"
        if entry is None:
            return Outcome(song.path, "failed", error, warnings=warnings)
        return _outcome(song, "failed", entry, error)
    return _outcome(song, status, entry)


def _separated(song: Song, job: Job, separator: "Separator", progress: Progress, warnings: list[str]) -> dict[str, Any]:
    """Separate a song; returns its run in the record."""
    source = _File(song).source()
    share_of_job = SEPARATED if job.report else 1.0
    with ExitStack() as finishing:

        def separating(share: float, stage: str) -> None:
            progress(share * share_of_job, stage)
            if share == 1.0:  # the stems' files take their place next: none shall be there without a run in the record
                finishing.enter_context(uninterrupted())

        files = separator.separate_file(
            song.path, song.folder, job.output, accept_damaged=job.accept_damaged, progress=separating
        )
        entry = {
            "source": source,
            "settings": job.settings,
            "stems": {stem: (path.name, path.stat().st_size) for stem, path in files.items()},
            "duration_seconds": files.duration_seconds,
            "elapsed_seconds": files.elapsed_seconds,
            "gain": files.gain,
            "warnings": warnings,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _add(song.folder, entry)
    return entry


def _with_page(song: Song, job: Job, entry: dict[str, Any], progress: Progress, done: float) -> dict[str, Any]:
    """Write a song's page, of whose job that share is done before; returns its run in the record."""
    from separation.report.page import Report, write_report

    page, stems = song.folder / PAGE, _outcome(song, "done", entry).stems
    report = Report(song.path.name, song.path, stems)
    write_report(report, page, overwrite=job.output.overwrite, progress=progress.part(done, 1))
    entry = {**entry, "page_bytes": page.stat().st_size}
    _add(song.folder, entry)
    return entry
