"""Finds the songs in files, folders and globs."""

import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from separation.audio.suffixes import AUDIO_OR_VIDEO
from separation.batch.job import AnySong, Outcome, Song
from separation.batch.urls import Location
from separation.errors import InputError
from separation.system.names import Place
from separation.system.record import PAGE, recorded_files

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass
class Found:
    """The songs, what cannot be separated, and what was skipped in folders."""

    songs: list[AnySong] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)
    skipped_files: set[Location] = field(default_factory=set)  # files without a suffix of audio or video
    skipped_links: set[Path] = field(default_factory=set)  # symbolic links to folders

    def note(self) -> str:
        """A sentence about what was skipped; empty if nothing was."""
        parts = []
        if self.skipped_files:
            suffixes = sorted(path.suffix.lower() or "no suffix" for path in self.skipped_files)
            counts = Counter(suffixes).most_common()
            more = ", …" if len(counts) > 5 else ""
            listed = ", ".join(f"{suffix} {number}" for suffix, number in counts[:5]) + more
            parts.append(f"{_count(self.skipped_files, 'file')} without a suffix of audio or video ({listed})")
        if self.skipped_links:
            more = ", …" if len(self.skipped_links) > 1 else ""
            parts.append(f"{_count(self.skipped_links, 'linked folder')} ({str(min(self.skipped_links))!r}{more})")
        return f"skipped {' and '.join(parts)}: name a file or folder to include it" if parts else ""


def find(given: Sequence[str], output: Path, placed: Callable[[AnySong], AnySong] = lambda song: song) -> Found:
    """Find the songs in files, folders and globs.

    The stems of a file go to `output/<name without suffix>`. The structure of a folder, or of a glob below its first
    wildcard, is kept below `output`. In folders and globs, only files with a suffix of audio or video count. Hidden
    files, files below `output` and stems that a record lists do not count, and linked folders are not entered. A path
    that exists is taken literally, even if it has wildcards. `placed` may give a song another place.

    Raises InputError if `output` is one of the folders to search.
    """
    search = _Search(output, placed)
    for text in given:
        search.add(text)
    return search.finish()


class _Search:
    """Collects songs, and what cannot be separated."""

    def __init__(self, output: Path, placed: Callable[[AnySong], AnySong]) -> None:
        self._output = output
        self._placed = placed
        self._found = Found()
        self._songs: dict[str, Song] = {}
        self._stems_in: Callable[[Path], set[str]] = cache(recorded_files)

    def finish(self) -> Found:
        """What was found; songs that would share a folder fail."""
        self._found.songs = without_clashes([self._placed(song) for song in self._songs.values()], self._found.failed)
        return self._found

    def add(self, text: str) -> None:
        """Add the songs in a file, folder or glob."""
        path = Path(text)
        if os.path.isdir(path):
            if os.path.realpath(path) == os.path.realpath(self._output):
                raise InputError(
                    f"{text!r} is both the output folder and a folder of songs: choose another output folder, such as "
                    f"{str(path / 'stems')!r}"
                )
            self._add_below(path, [], text)
        elif os.path.exists(path):
            self._add_song(path, path.parent)
        elif _URL.match(text):
            self._fail(path, f"{text!r} is a URL: download the song and give its file, or pipe it into `-`")
        elif is_pattern(text):
            below, rest = _literal_prefix(path)
            rest += ["**"] if text.endswith(("/", os.sep)) else []  # only folders, as in a shell
            if os.path.isdir(below):
                self._add_below(below, rest, text)
            else:
                self._fail(path, f"{str(below)!r} in {text!r} {_why_missing(below)}: check the path")
        else:
            self._fail(path, f"{text!r} {_why_missing(path)}: check the path")

    def _add_below(self, below: Path, pattern: Sequence[str], text: str) -> None:
        """Add the songs below a folder that match a pattern."""
        output = _resolved(self._output)
        skipped = None if _is_below(_resolved(below), output) else output  # unless the songs are inside the output
        n_failed, has_stems = len(self._found.failed), False
        sources = []
        for place in self._matches(below, pattern):
            for path in self._files(place, skipped):
                if self._is_stem(path, below):
                    has_stems |= path.suffix != Path(PAGE).suffix
                elif path.suffix.lower() in AUDIO_OR_VIDEO:
                    sources.append(path)
                else:
                    self._found.skipped_files.add(path)
        for source in sources:
            self._add_song(source, below)
        if has_stems and not sources:
            self._fail(Path(text), f"{text!r} has only stems that this program made: give the songs they came from")
        elif not sources and n_failed == len(self._found.failed):
            self._fail(Path(text), f"{text!r} has no audio file: check the path")

    def _is_stem(self, path: Path, below: Path) -> bool:
        """Whether a record in the file's folder, or in one of those above it up to `below`, lists the file."""
        above = [folder for folder in path.parents if _is_below(folder, below)]
        return any(path.relative_to(folder).as_posix() in self._stems_in(folder) for folder in above)

    def _add_song(self, path: Path, below: Path) -> None:
        relative = path.relative_to(below)
        relative = Path(relative.name) if ".." in relative.parts else relative
        name = relative.name if relative.stem == ".." else relative.stem
        self._songs.setdefault(os.path.abspath(path), Song(path, self._output / relative.parent / name))

    def _fail(self, path: Path, error: str) -> None:
        self._found.failed.append(Outcome(path, "failed", error))

    def _fail_folder(self, error: OSError) -> None:
        path = error.filename
        self._fail(Path(path), f"cannot read the folder {path!r} ({error.strerror}): check its permissions")

    def _files(self, place: Path, skipped: Path | None) -> Iterator[Path]:
        """The file `place`, or all files below the folder `place`, except hidden ones and those below `skipped`."""
        if skipped and _is_below(_resolved(place), skipped):
            return
        if not os.path.isdir(place):
            yield place
            return
        for folder, files in self._walk(place, skipped):
            yield from (folder / name for name in files)

    def _walk(self, place: Path, skipped: Path | None) -> Iterator[tuple[Path, list[str]]]:
        """The folder `place` and all folders below it, each with the names of its files."""
        for where, folders, files in os.walk(place, onerror=self._fail_folder):
            folder = Path(where)
            visible = [name for name in sorted(folders) if not name.startswith(".")]
            links = [name for name in visible if (folder / name).is_symlink()]
            self._found.skipped_links.update(folder / name for name in links)
            folders[:] = [name for name in visible if name not in links and _resolved(folder / name) != skipped]
            yield folder, [name for name in sorted(files) if not name.startswith(".")]

    def _matches(self, below: Path, parts: Sequence[str]) -> list[Path]:
        """The files and folders that a pattern matches, given its parts; `**` matches any number of folders."""
        places = [below]
        for index, part in enumerate(parts):
            if part != "**":
                places = [match for place in places for match in self._entries(place, part)]
                continue
            places = [place for place in places if os.path.isdir(place)]
            if index < len(parts) - 1:  # at the end, everything below a folder counts anyway
                folders = (folder for place in places for folder, _ in self._walk(place, None))
                places = list(dict.fromkeys(folders))
        return places

    def _entries(self, folder: Path, part: str) -> list[Path]:
        """The folder's entries that a part of a pattern matches."""
        if os.path.lexists(folder / part):
            return [folder / part]
        if not is_pattern(part) or not os.path.isdir(folder):
            return []
        try:
            names = sorted(os.listdir(folder))
        except OSError as e:
            self._fail_folder(e)
            return []
        return [folder / name for name in names if fnmatch(name, part) and (part[0] == "." or name[0] != ".")]


def _literal_prefix(path: Path) -> tuple[Path, list[str]]:
    """Splits a pattern before its first wildcard; a wildcard in a name that exists does not count."""
    below, rest = Path(path.anchor), list(path.parts[bool(path.anchor) :])
    while rest and (not is_pattern(rest[0]) or os.path.lexists(below / rest[0])):
        below /= rest.pop(0)
    return below, rest


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))  # `Path.resolve` raises for a link to itself


def _is_below(path: Path, folder: Path) -> bool:
    return folder in (path, *path.parents)


def is_pattern(text: str) -> bool:
    """Whether a text has a wildcard."""
    return any(wildcard in text for wildcard in "*?[")


def _why_missing(path: Path) -> str:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            return f"is a link to {os.readlink(path)!r}, which does not exist"
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    except ValueError:  # a NUL
        pass
    return "does not exist"


def without_clashes(songs: Sequence[AnySong], failed: list[Outcome]) -> list[AnySong]:
    """The songs with a place for stems of their own; all others are added to `failed`."""
    owners: dict[str, list[AnySong]] = {}
    for song in songs:
        owners.setdefault(_comparable(song.folder / song.place.template), []).append(song)
    for rivals in owners.values():
        if len(rivals) > 1:
            names = " and ".join(repr(str(song.path)) for song in rivals)
            shared, remedy = f"folder {str(rivals[0].folder)!r}", ""
            if rivals[0].place != Place():
                shared = f"file {str(rivals[0].folder / rivals[0].place.template)!r}"
                is_named_alike = len({os.path.splitext(str(song.path))[0] for song in rivals}) == 1
                remedy = "" if is_named_alike else "add a field to the name, such as {song} or {folder}, or "
            error = f"{names} would share the {shared}: {remedy}separate each with its own -o"
            failed += (Outcome(song.path, "failed", error) for song in rivals)
    return [rivals[0] for rivals in owners.values() if len(rivals) == 1]


def _comparable(path: Location) -> str:
    """The path in a form that is equal for equal files: macOS and Windows ignore case and how accents are composed."""
    text = str(path)
    return unicodedata.normalize("NFC", text).casefold() if sys.platform in ("darwin", "win32") else text


def _count(items: Sized, word: str) -> str:
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"
