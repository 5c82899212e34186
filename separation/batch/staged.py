"""Separates songs of object stores: copies a song to a temporary folder, separates it there, and uploads the stems."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir

from separation.batch.job import AnySong, Job, Origin, Outcome, Song
from separation.batch.separate import separate_song
from separation.batch.stored import StoredFolder, Upload, located
from separation.batch.stores import ChangedError, StoredObject, UnreachableError, store
from separation.batch.urls import Url
from separation.engine.separator import Separator
from separation.errors import InputError, SeparationError
from separation.progress import Progress
from separation.system.os_errors import staging
from separation.system.output import OutputFolder
from separation.system.record import Record

FETCHED = 0.1  # share of a song's progress bar for the download
SEPARATED = 0.9  # where the upload begins


def separate_anywhere(song: AnySong, job: Job, separator: Separator, progress: Progress) -> Outcome:
    """Separate a song, wherever its file and its stems are. See `separate_song`."""
    if isinstance(song, Song):
        return separate_song(song, job, separator, progress)
    try:
        # A hidden folder in the temporary one. If this process is killed, the next one removes it.
        with OutputFolder(Path(gettempdir()), record=None) as output, staging(output.work):
            return _Staged(song, job, output.work).separate(separator, progress)
    except (SeparationError, OSError) as e:
        error = str(e) if isinstance(e, SeparationError) else f"{song.path.name!r} cannot be separated: {e}"
        return Outcome(song.path, "failed", error, may_pass=isinstance(e, UnreachableError | ChangedError))


class _Staged:
    """A song that is separated in a temporary folder."""

    def __init__(self, song: AnySong, job: Job, work: Path) -> None:
        self._job = job
        self._in, self._out = work / "song", work / "stems"
        self._song, self._found = _at_origin(song)

    def separate(self, separator: Separator, progress: Progress) -> Outcome:
        self._in.mkdir()
        self._out.mkdir()
        fetching = progress.part(0, FETCHED)
        if not isinstance(self._song.folder, Url):
            song = self._fetched(self._song.folder, fetching)
            outcome = separate_song(song, self._job, separator, progress.part(FETCHED, 1))
            return located(outcome, self._song, self._out)
        folder = StoredFolder(self._song, self._job)
        run = folder.run()
        if run and folder.is_complete(run):
            return folder.outcome("skipped", run)
        folder.check(run)
        if run:
            folder.fetch(run, self._out, fetching)
        fetched = _states(self._out)
        song = self._fetched(self._out, fetching)
        outcome = separate_song(song, self._job, separator, progress.part(FETCHED, SEPARATED))
        if not outcome.stems:
            return located(outcome, self._song, self._out)
        folder = StoredFolder(self._song, self._job)  # as it is now
        again = None if run else folder.run()
        if again:  # another worker has finished it meanwhile
            return folder.outcome("skipped", again)
        names = [name for name, state in _states(self._out).items() if fetched.get(name) != state]
        folder.check_names(names)
        recorded = Record.read(self._out, self._song.place.record).runs
        made = next(recorded_run for recorded_run in recorded if recorded_run["settings"] == self._job.settings)
        Upload(self._song, self._job, self._out, names).publish(made, progress.part(SEPARATED, 1))
        return located(outcome, self._song, self._out)

    def _fetched(self, folder: Path, progress: Progress) -> Song:
        """The song with a local file."""
        path = self._song.path
        if self._found is not None:
            path = self._in / path.name
            store(self._found.url.scheme).download(self._found, path, progress)
        assert isinstance(path, Path)
        return Song(path, folder, self._song.place, self._song.origin)


def _at_origin(song: AnySong) -> tuple[AnySong, StoredObject | None]:
    """The song as it is now, and the object in the store that it is, if it is in one."""
    if not isinstance(song.path, Url):
        return replace(song, origin=Origin(song.path.absolute().as_posix())), None
    found = store(song.path.scheme).head(song.path)
    if found is None:
        raise InputError(f"{str(song.path)!r} does not exist: check the address")
    return replace(song, origin=Origin(str(found.url), found.n_bytes, found.tag)), found


def _states(folder: Path) -> Mapping[str, tuple[int, int]]:
    """The size and time of each visible file below a folder, by its name in it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder): path.stat() for path in files}
    return {
        name.as_posix(): (facts.st_size, facts.st_mtime_ns)
        for name, facts in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }
