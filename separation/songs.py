"""Many songs: which there are in files, folders and globs, which of them are done already, and doing the others.

A song's stems go to a folder of their own, and `.separation.json` beside them is their record: for each run whose stems
are there, the song's file (name, size, time), the settings and the stems' sizes. It is written last: stems that no
record names are not finished. So a run that was stopped, here or on another machine, goes on where it was.
"""

import glob
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from separation.errors import InputError, SeparationError

# What imports PyTorch is imported where a song is separated: to see that all are done takes a moment without it.
if TYPE_CHECKING:
    from separation.separator import Progress, Separator

# Of the files that are taken from folders. To try every file would start ffmpeg for each picture and each text, and
# call them failures. A file that is named itself is tried, whatever its name.
_LOSSLESS = (".wav", ".wave", ".w64", ".rf64", ".flac", ".aif", ".aiff", ".aifc", ".caf", ".au", ".ape", ".wv", ".alac")
_LOSSY = (".mp3", ".ogg", ".oga", ".opus", ".m4a", ".m4b", ".aac", ".wma", ".ac3", ".mp2", ".mka")
_VIDEO = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
SUFFIXES = {*_LOSSLESS, *_LOSSY, *_VIDEO}
RECORD = ".separation.json"
PAGE = "stems.html"
SEPARATED = 0.7  # the share of a song's job, in the progress, that is done by then if a page is wanted too

_VERSION = 1  # of the record
_KEYS = {"source", "settings", "stems", "duration_seconds", "elapsed_seconds", "gain"}


@dataclass(frozen=True)
class Song:
    """A song's file and the folder that its stems go to."""

    path: Path
    folder: Path


@dataclass(frozen=True)
class Job:
    """What is wanted of every song."""

    settings: dict[str, Any]  # all that decides what the stems' files hold, as JSON has it
    writing: dict[str, Any]  # the arguments of `Separator.separate_file`: format, sample rate, …
    report: bool  # whether a page to listen to them is wanted beside the stems


@dataclass(frozen=True)
class Outcome:
    """What became of a song: `done`, `skipped` as it was done before, or `failed` with a sentence."""

    path: Path
    status: str
    error: str = ""
    stems: dict[str, Path] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # duration_seconds, elapsed_seconds, gain; like stems, if known
    page: Path | None = None


def find(given: Sequence[str], output: Path) -> tuple[list[Song], list[Outcome]]:
    """The songs that are meant by paths of files and folders and by globs, and what cannot be one.

    A song's folder is `output/<its name without suffix>`; that of one within a folder, or below the part of a glob that
    has no wildcard, is at the same place below `output`. Of folders and globs only files with a suffix of audio are
    taken, and none that are hidden, below `output`, or stems of a record beside them. Raises InputError if `output` is
    itself a folder that songs are taken from.
    """
    songs: dict[str, Song] = {}
    failed: list[Outcome] = []

    def add(path: Path, below: Path) -> None:
        relative = path.relative_to(below)
        relative = Path(relative.name) if ".." in relative.parts else relative
        name = relative.name if relative.stem == ".." else relative.stem
        songs.setdefault(os.path.abspath(path), Song(path, output / relative.parent / name))

    for text in given:
        path = below = Path(text)
        if os.path.isdir(path):
            if os.path.realpath(path) == os.path.realpath(output):
                raise InputError(
                    f"the stems would go among the songs of {text!r}: choose another folder, such as {path / 'stems'}"
                )
            places = [path]
        elif os.path.exists(path):
            add(path, path.parent)
            continue
        elif _is_glob(text):
            below = Path(*itertools.takewhile(lambda part: not _is_glob(part), path.parts))
            places = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        else:
            failed.append(Outcome(path, "failed", f"{path.name!r} does not exist: check the path"))
            continue
        above = output.resolve() in (below.resolve(), *below.resolve().parents)  # then all songs are below it
        skipped = None if above else output.resolve()
        sources = [source for place in places for source in _audio_files(place, skipped, failed)]
        for source in sources:
            add(source, below)
        if not sources and path not in (outcome.path for outcome in failed):
            failed.append(Outcome(path, "failed", f"there is no audio file in {text!r}: check the path"))
    return _without_clashes(list(songs.values()), failed), failed


def _is_glob(text: str) -> bool:
    return any(wildcard in text for wildcard in "*?[")


def _audio_files(place: Path, skipped: Path | None, failed: list[Outcome]) -> Iterator[Path]:
    """Those in a folder and all below it, or the file itself if it is one, but none below the folder that is skipped.

    Folders that cannot be read have failed.
    """
    if skipped in (place.resolve(), *place.resolve().parents):
        return
    if not place.is_dir():
        if _is_song(place.name) and place.name not in _stems_in(place.parent):
            yield place
        return

    def refuse(error: OSError) -> None:
        failed.append(Outcome(Path(error.filename), "failed", f"cannot read this folder: {error.strerror}"))

    for where, folders, files in os.walk(place, onerror=refuse):
        folder = Path(where)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (folder / name).resolve() != skipped
        )
        stems = _stems_in(folder)
        yield from (folder / name for name in sorted(files) if _is_song(name) and name not in stems)


def _is_song(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _without_clashes(songs: list[Song], failed: list[Outcome]) -> list[Song]:
    """The songs that have their folder for themselves; the others have failed."""
    owners: dict[Path, list[Song]] = {}
    for song in songs:
        owners.setdefault(song.folder, []).append(song)
    for folder, rivals in owners.items():
        if len(rivals) > 1:
            names = " and ".join(repr(str(song.path)) for song in rivals)
            error = f"more than one song would be written to {str(folder)!r}, {names}: separate them one by one"
            failed += (Outcome(song.path, "failed", error) for song in rivals)
    return [song for song in songs if len(owners[song.folder]) == 1]


# ---------------------------------------------------------------------------------------------------------------------
# The record


def unfinished(songs: Sequence[Song], job: Job, *, force: bool = False) -> tuple[list[Song], list[Outcome]]:
    """The songs that something is to be done for, and what is known of the others; with `force`, there are none."""
    left, done = [], []
    for song in songs:
        try:
            if force:  # in the record, so that a run that is stopped and started without goes on
                forget(song, settings=job.settings)
        except SeparationError as e:
            done.append(Outcome(song.path, "failed", str(e)))
            continue
        if outcome := finished(song, job):
            done.append(outcome)
        else:
            left.append(song)
    return left, done


def finished(song: Song, job: Job) -> Outcome | None:
    """A song that needs nothing any more: its stems are whole and were made of this very file with these settings."""
    entry = _entry(song, job)
    return (
        None
        if entry is None or (job.report and not _has_page(song.folder, entry))
        else _outcome(song, "skipped", entry)
    )


def forget(song: Song, names: Sequence[str] | None = None, *, settings: dict[str, Any] | None = None) -> None:
    """Take the runs with these settings, or whose stems have any of these files' names, out of a song's record."""
    entries = _entries(song.folder)
    kept = [
        entry
        for entry in entries
        if entry["settings"] != settings and not {file for file, _ in entry["stems"].values()} & set(names or ())
    ]
    if len(kept) < len(entries):
        _write(song.folder, kept)


def _entry(song: Song, job: Job) -> dict[str, Any] | None:
    source = _source(song.path)
    for entry in _entries(song.folder):
        if entry["source"] == source and entry["settings"] == job.settings:
            sizes = {song.folder / file: n_bytes for file, n_bytes in entry["stems"].values()}
            if all(path.is_file() and path.stat().st_size == n_bytes for path, n_bytes in sizes.items()):
                return entry
    return None


def _has_page(folder: Path, entry: dict[str, Any]) -> bool:
    page = folder / PAGE
    return page.is_file() and page.stat().st_size == entry.get("page_bytes")


def _outcome(song: Song, status: str, entry: dict[str, Any], error: str = "") -> Outcome:
    stems = {stem: song.folder / file for stem, (file, _) in entry["stems"].items()}
    facts = {key: entry[key] for key in ("duration_seconds", "elapsed_seconds", "gain")}
    return Outcome(song.path, status, error, stems, facts, song.folder / PAGE if "page_bytes" in entry else None)


def _source(path: Path) -> dict[str, Any]:
    try:
        facts = path.stat()
    except OSError:  # decoding says it better
        return {}
    return {"name": path.name, "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The runs that a record names; none if there is no record, or one that is damaged or of another version."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        entries = [entry for entry in record["runs"] if record["version"] == _VERSION and entry.keys() >= _KEYS]
        for entry in entries:
            entry["stems"] = {str(stem): (str(file), int(n_bytes)) for stem, (file, n_bytes) in entry["stems"].items()}
        return entries
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _stems_in(folder: Path) -> set[str]:
    return {file for entry in _entries(folder) for file, _ in entry["stems"].values()}


def _write(folder: Path, entries: list[dict[str, Any]]) -> None:
    from separation.output import OutputFolder

    with OutputFolder(folder) as output:
        part = output.work / RECORD
        part.write_text(json.dumps({"version": _VERSION, "runs": entries}, indent=1), encoding="utf-8")
        output.publish({"record": part})


def _add(folder: Path, entry: dict[str, Any]) -> None:
    _write(folder, [*(old for old in _entries(folder) if old["settings"] != entry["settings"]), entry])


# ---------------------------------------------------------------------------------------------------------------------
# Doing them


def run(
    songs: Sequence[Song],
    job: Job,
    separators: Sequence["Separator"],
    *,
    workers: int,
    bar: Callable[[str], AbstractContextManager["Progress"]],
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

    pool = ThreadPoolExecutor(max_workers=workers * len(separators))
    try:
        for future in as_completed([pool.submit(work, song) for song in songs]):
            yield future.result()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


class _StoppedError(Exception):
    """Raised in a worker when the run is over."""


def until(stopped: threading.Event, progress: "Progress") -> "Progress":
    """A progress that cancels its song once the run is over."""

    def checked(share: float, stage: str) -> None:
        if stopped.is_set():
            raise _StoppedError
        progress(share, stage)

    return checked


def separate_song(song: Song, job: Job, separator: "Separator", progress: "Progress") -> Outcome:
    """Do what a song needs: its stems unless they are finished by now, then its page."""
    from separation.report import write_report
    from separation.separator import part_of

    entry, status = _entry(song, job), "skipped"
    try:
        if entry is None:
            source = _source(song.path)
            # Whatever happens from here on, no record vouches for stems that are about to be replaced.
            forget(song, [f"{stem}.{job.writing['format']}" for stem in separator.stems])
            separating = part_of(progress, 0, SEPARATED) if job.report else progress
            files = separator.separate_file(song.path, song.folder, **job.writing, progress=separating)
            status = "done"
            entry = {
                "source": source,
                "settings": job.settings,
                "stems": {stem: (path.name, path.stat().st_size) for stem, path in files.items()},
                "duration_seconds": files.duration_seconds,
                "elapsed_seconds": files.elapsed_seconds,
                "gain": files.gain,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            _add(song.folder, entry)
        if job.report and not _has_page(song.folder, entry):
            page, stems = song.folder / PAGE, _outcome(song, status, entry).stems
            share = part_of(progress, SEPARATED if status == "done" else 0, 1)
            write_report(song.path.name, song.path, stems, page, progress=share)
            status, entry = "done", {**entry, "page_bytes": page.stat().st_size}
            _add(song.folder, entry)
    except SeparationError as e:
        return Outcome(song.path, "failed", str(e)) if entry is None else _outcome(song, "failed", entry, str(e))
    return _outcome(song, status, entry)
