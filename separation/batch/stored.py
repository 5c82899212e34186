"""A song's folder in an object store: its record, whether it is done, and how its stems get there.

The stems are uploaded first and the record last, so that a reader who sees the record finds all stems. Two workers may
have the same song, if one was believed dead: the one that finishes second finds the record of the first and drops its
own stems. If both upload at once, whoever writes the record last looks afterwards whether the stems are its own, and
uploads them again if not. The record has the store's checksum of each stem, so a record that does not describe the
stems is never taken for a finished song.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

from separation.batch.done import SongFile, analysis_of, needs_analysis, outcome_of
from separation.batch.job import AnySong, Job, Outcome, Song
from separation.batch.stores import CLEANING_SECONDS, StoredObject, store
from separation.batch.urls import Url
from separation.errors import InputError, OutputError, SeparationError
from separation.progress import Progress
from separation.system.record import Record, stem_files

ATTEMPTS = 3  # to upload stems that another worker replaces meanwhile


class StoredFolder:
    """A song's folder in a store, with the record and the stems.

    Args:
        song: the song; its `origin` says what its file is.
        job: what to do with it.
        find: the object at an address, if it exists. A listing may answer this at once for many songs.
    """

    def __init__(self, song: AnySong, job: Job, find: Callable[[Url], StoredObject | None] | None = None) -> None:
        assert isinstance(song.folder, Url)
        self._song, self._job, self._url = song, job, song.folder
        self._store = store(song.folder.scheme)
        self._find = find or self._store.head

    @cached_property
    def record(self) -> Record:
        """The record; empty if there is none."""
        url = self._url / self._song.place.record
        return Record.parse(self._store.read(url) or b"") if self._find(url) else Record()

    def run(self) -> dict[str, Any] | None:
        """The recorded run that made the song's stems with the job's settings, if they are all there."""
        file = SongFile(self._song)
        for run in self.record.runs:
            if run["settings"] == self._job.settings and file.is_source(run["source"]) and self._has_stems(run):
                return run
        return None

    def is_complete(self, run: dict[str, Any]) -> bool:
        """Whether the run's page and analysis are there, if the job wants them."""
        return not (self._needs_page(run) or needs_analysis(self._job, run))

    def outcome(self, status: str, run: dict[str, Any]) -> Outcome:
        """The outcome of a song whose stems are in the folder."""
        here = Path()
        local = outcome_of(Song(here, here, self._song.place).analysed(analysis_of(run)), status, run)
        return located(local, self._song, here)

    def check(self, run: dict[str, Any] | None) -> None:
        """Check that the objects still missing from the song's `run` may be written.

        Raises OutputError if one would replace another song's stem, or an object that this program did not write.
        """
        if self._job.output.overwrite:
            return
        names = [] if run else [*self._song.stem_names(self._job).values()]
        names += [self._page(run or {})] if self._needs_page(run or {}) else []
        self.check_names(names)
        file = SongFile(self._song)
        for other in self.record.runs:
            source = other["source"]
            if file.is_other_song(source) and any(self._find(self._url / name) for name in stem_files(other)):
                raise OutputError(
                    f"{str(self._url)!r} has the stems of another song, {source.get('path', source['name'])!r}: choose "
                    "another output folder, or replace them with --overwrite"
                )

    def check_names(self, names: Sequence[str]) -> None:
        """Check that objects with these names may be written.

        Raises OutputError if this program did not write one of them.
        """
        if self._job.output.overwrite:
            return
        for name in names:
            found = self._find(self._url / name)
            if found and not self._is_ours(name, found):
                raise OutputError(
                    f"{str(found.url)!r} already exists and is not an object that this program wrote: choose another "
                    "place, or replace it with --overwrite"
                )

    def forget(self) -> None:
        """Remove the run with the job's settings from the record."""
        if any(run["settings"] == self._job.settings for run in self.record.runs):
            text = self.record.without_run(self._job.settings).text()
            self._store.write(text.encode(), self._url / self._song.place.record, uuid4().hex)

    def fetch(self, run: dict[str, Any], folder: Path, progress: Progress) -> None:
        """Copy the stems of a run, and the record, to a local folder."""
        record = Record(runs=[run])
        (folder / self._song.place.record).write_text(record.text(), encoding="utf-8")
        for path, name in ((folder / name, name) for name in stem_files(run)):
            found = self._find(self._url / name)
            if found is None:
                raise InputError(f"{str(self._url / name)!r} was removed while it was read: run it again")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._store.download(found, path, progress)

    def _page(self, run: dict[str, Any]) -> str:
        return self._song.analysed(analysis_of(run)).place.beside("html")

    def _needs_page(self, run: dict[str, Any]) -> bool:
        found = self._find(self._url / self._page(run)) if self._job.report else None
        return self._job.report and (found is None or found.n_bytes != run.get("page_bytes"))

    def _has_stems(self, run: dict[str, Any]) -> bool:
        tags = run.get("objects", {})
        for name, n_bytes in run["stems"].values():
            found = self._find(self._url / name)
            if found is None or found.n_bytes != n_bytes or tags.get(name, found.tag) != found.tag:
                return False
        return True

    def _is_ours(self, name: str, found: StoredObject) -> bool:
        """Whether this program wrote an object: its record or its metadata says so."""
        if any(run.get("objects", {}).get(name) == found.tag for run in self.record.runs):
            return True
        whole = found if found.run else self._store.head(found.url)  # a listing has no metadata
        return bool(whole and whole.run)


class Upload:
    """Puts the files of a local folder into a song's folder in a store; if that fails, it removes the new objects.

    Args:
        song: the song, whose folder is in a store.
        job: what was done.
        folder: the local folder.
        names: the files in it to upload, by their names in the folder.
    """

    def __init__(self, song: AnySong, job: Job, folder: Path, names: list[str]) -> None:
        assert isinstance(song.folder, Url)
        self._song, self._job, self._folder, self._names = song, job, folder, names
        self._url, self._store = song.folder, store(song.folder.scheme)
        self._run_name = uuid4().hex

    def publish(self, run: dict[str, Any], progress: Progress) -> None:
        """Upload the files and then the record, until the record describes what is there."""
        new = [name for name in self._names if self._store.head(self._url / name) is None]
        try:
            for _ in range(ATTEMPTS):
                tags = self._upload_files(progress)
                if tags is not None:
                    self._write_record({**run, "objects": {**run.get("objects", {}), **tags}}, [*tags])
                    if all(self._tag(name) == tag for name, tag in tags.items()):
                        return
            raise OutputError(f"another run writes to {str(self._url)!r} all the time: run it again")
        except BaseException:
            with suppress(SeparationError):  # the first error counts
                self._remove(new)
            raise

    def _upload_files(self, progress: Progress) -> dict[str, str] | None:
        """Upload all files. Returns their checksums by name; None if another run replaced one at once."""
        tags = {}
        for index, name in enumerate(self._names):
            part = progress.part(index / len(self._names), (index + 1) / len(self._names))
            found = self._store.upload(self._folder / name, self._url / name, self._run_name, part)
            if found.run not in ("", self._run_name):
                return None
            tags[name] = found.tag
        return tags

    def _write_record(self, run: dict[str, Any], names: list[str]) -> None:
        """Add the run to the record, without the runs whose stems it replaced."""
        url = self._url / self._song.place.record
        before = Record.parse(self._store.read(url) or b"")
        others = [other for other in before.runs if not stem_files(other) & set(names)]
        written = Record.read(self._folder, self._song.place.record).files
        files = [*(file for file in before.files if file.name not in names), *written]
        record = Record(others, files).with_run(run)
        self._store.write(record.text().encode(), url, self._run_name)

    def _tag(self, name: str) -> str:
        found = self._store.head(self._url / name)
        return found.tag if found else ""

    def _remove(self, names: list[str]) -> None:
        hurried = store(self._url.scheme, CLEANING_SECONDS)
        for name in names:
            found = hurried.head(self._url / name)
            if found and found.run == self._run_name:
                hurried.remove(found.url)


def located(outcome: Outcome, song: AnySong, local: Path) -> Outcome:
    """An outcome with the addresses of the song and of the files that are, or were, below a local folder."""
    folder = song.folder
    if not isinstance(folder, Url):
        return replace(outcome, path=song.path)
    stems = {stem: folder / path.relative_to(local).as_posix() for stem, path in outcome.stems.items()}
    page = outcome.page and folder / outcome.page.relative_to(local).as_posix()
    return replace(outcome, path=song.path, stems=stems, page=page)
