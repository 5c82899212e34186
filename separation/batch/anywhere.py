"""Finds songs in files, folders and object stores, and those among them that are not done."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path, PurePosixPath

from separation.audio.suffixes import AUDIO_OR_VIDEO
from separation.batch import done
from separation.batch.find import Found, find, is_pattern, without_clashes
from separation.batch.job import AnySong, Job, Origin, Outcome, Song
from separation.batch.stored import StoredFolder
from separation.batch.stores import Store, StoredObject, store
from separation.batch.urls import Location, Url, is_url
from separation.errors import InputError, SeparationError
from separation.system.record import Record, page_of, stem_files
from separation.system.threads import Threads

MANY = 8  # from this many songs on, one listing is quicker than to ask for each object
REQUESTS = 16  # at once

_NOWHERE = Path(os.devnull) / "stems"  # no folder of songs can be below it


def find_anywhere(given: Sequence[str], output: Location, placed: Callable[[AnySong], AnySong]) -> Found:
    """Find the songs in files, folders, globs and addresses of object stores.

    Addresses are read as paths are: see `find`. Raises InputError if `output` is one of the folders to search, or if a
    store cannot be read.
    """
    urls = [text for text in given if is_url(text)]
    paths = [text for text in given if not is_url(text)]
    if not urls and isinstance(output, Path):
        return find(paths, output, placed)
    found = find(paths, output if isinstance(output, Path) else _NOWHERE)
    songs = [_stored(song, output) if isinstance(output, Url) else song for song in found.songs]
    if isinstance(output, Url):
        store(output.scheme).check_bucket(output)
    search = _StoreSearch(output, found)
    for text in urls:
        songs += search.songs(text)
    unique = {song.path: song for song in songs}
    return replace(found, songs=without_clashes([placed(song) for song in unique.values()], found.failed))


def unfinished_anywhere(
    songs: Sequence[AnySong], job: Job, *, force: bool = False
) -> tuple[list[AnySong], list[Outcome]]:
    """The songs still to separate, and the outcomes of all others. See `done.unfinished`.

    Raises SeparationError if the stems' store cannot be read.
    """
    local = [song for song in songs if isinstance(song, Song)]
    others = [song for song in songs if not isinstance(song, Song)]
    left, outcomes = done.unfinished(local, job, force=force)
    remaining: list[AnySong] = list(left)
    find_object = _finder(others)
    with Threads(max_workers=REQUESTS) as pool:
        found = pool.map(lambda song: _finished(song, job, find_object, force), others)
        for song, outcome in zip(others, found, strict=True):
            if outcome is None:
                remaining.append(song)
            else:
                outcomes.append(outcome)
    return remaining, outcomes


def _stored(song: AnySong, output: Url) -> AnySong:
    """A local song whose stems go to a store."""
    assert isinstance(song.path, Path)
    folder = output / song.folder.relative_to(_NOWHERE).as_posix()
    return AnySong(song.path, folder, song.place, Origin(song.path.absolute().as_posix()))


def _finished(song: AnySong, job: Job, find: "Finder", force: bool) -> Outcome | None:
    """The outcome of a song that is done or that fails; None if it is still to separate."""
    try:
        if not isinstance(song.folder, Url):
            local = Song(_NOWHERE / song.path.name, song.folder, song.place, song.origin)
            _, outcomes = done.unfinished([local], job, force=force)
            return replace(outcomes[0], path=song.path) if outcomes else None
        folder = StoredFolder(song, job, find)
        run = None if force else folder.run()
        if run and folder.is_complete(run):
            return folder.outcome("skipped", run)
        folder.check(run)
        if force:  # so that this run, if stopped, resumes without `force`
            folder.forget()
    except SeparationError as e:
        return Outcome(song.path, "failed", str(e))
    return None


Finder = Callable[[Url], StoredObject | None]


def _finder(songs: Sequence[AnySong]) -> Finder:
    """Finds the objects in the songs' folders."""
    folders = [song.folder for song in songs if isinstance(song.folder, Url)]
    if len(folders) < MANY:
        return lambda url: store(url.scheme).head(url)
    first = folders[0]
    columns = zip(*(folder.key.split("/") for folder in folders), strict=False)
    shared = "/".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
    listed = store(first.scheme).objects(replace(first, key=shared))
    return {found.url: found for found in listed}.get


class _StoreSearch:
    """Finds the songs at addresses in stores; what is no song is added to `found`."""

    def __init__(self, output: Location, found: Found) -> None:
        self._output = output
        self._found = found

    def songs(self, text: str) -> list[AnySong]:
        """The songs at an address: an object, everything below a folder, or what a pattern matches there."""
        url = Url.parse(text)
        if url == self._output:
            raise InputError(
                f"{text!r} is both the output folder and a folder of songs: choose another output folder, such as "
                f"{str(url / 'stems')!r}"
            )
        try:
            return [*self._at(url, text)]
        except InputError as e:
            self._fail(url, str(e))
            return []

    def _at(self, url: Url, text: str) -> Iterator[AnySong]:
        at = store(url.scheme)
        if url.key and not text.endswith("/") and (one := at.head(url)):
            yield from self._song(one, PurePosixPath(url.name))
            return
        below, pattern = _literal_prefix(url, at)
        listed = [found for found in at.objects(below) if _matches(found.url.relative_to(below).parts, pattern)]
        stems = self._stems(listed)
        songs = [found for found in self._visible(listed, below) if found.url not in stems]
        for found in songs:
            if found.url.suffix.lower() in AUDIO_OR_VIDEO:
                yield from self._song(found, found.url.relative_to(below))
            else:
                self._found.skipped_files.add(found.url)
        if not any(found.url.suffix.lower() in AUDIO_OR_VIDEO for found in songs):
            why = "has no audio file" if listed or pattern or not url.key else "does not exist"
            advice = "give the songs they came from" if stems else "check the address"
            self._fail(url, f"{text!r} {'has only stems that this program made' if stems else why}: {advice}")

    def _fail(self, url: Url, error: str) -> None:
        self._found.failed.append(Outcome(url, "failed", error))

    def _visible(self, listed: Sequence[StoredObject], below: Url) -> Iterator[StoredObject]:
        """The objects that are neither hidden nor below the output, unless all are below the output."""
        skipped = None if _is_below(below, self._output) else self._output
        for found in listed:
            is_hidden = any(part.startswith(".") for part in found.url.relative_to(below).parts)
            if not is_hidden and not (skipped and _is_below(found.url, skipped)):
                yield found

    def _stems(self, listed: Sequence[StoredObject]) -> set[Url]:
        """The objects that the records among them list."""
        records = [found.url for found in listed if fnmatchcase(found.url.name, ".separation*.json")]
        with Threads(max_workers=REQUESTS) as pool:
            texts = pool.map(lambda url: store(url.scheme).read(url) or b"", records)
            runs = [(url, run) for url, text in zip(records, texts, strict=True) for run in Record.parse(text).runs]
        return {url.parent / name for url, run in runs for name in (*stem_files(run), page_of(run))}

    def _song(self, found: StoredObject, relative: PurePosixPath) -> Iterator[AnySong]:
        if ".." in re.split(r"[/\\]", str(relative)):
            self._fail(found.url, f"{str(found.url)!r} has `..` in its name, which no file can have: rename it")
            return
        folder = self._output / (relative.parent / relative.stem).as_posix()
        yield AnySong(found.url, folder, origin=Origin(str(found.url), found.n_bytes, found.tag))


def _literal_prefix(url: Url, at: Store) -> tuple[Url, list[str]]:
    """Splits an address before its first wildcard; a wildcard in a name that exists does not count."""
    parts = url.key.split("/") if url.key else []
    for index, part in enumerate(parts):
        if is_pattern(part) and not at.exists(replace(url, key="/".join(parts[: index + 1]))):
            return replace(url, key="/".join(parts[:index])), parts[index:]
    return url, []


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a pattern matches a name or a folder above it; `**` matches any number of folders."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _is_below(url: Url, folder: Location) -> bool:
    """Whether an address is that of a folder, or below it."""
    if not isinstance(folder, Url) or (url.scheme, url.bucket) != (folder.scheme, folder.bucket):
        return False
    return not folder.key or url.key == folder.key or url.key.startswith(f"{folder.key}/")
