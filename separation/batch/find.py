"""Which songs are meant by files, folders and globs."""

import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from separation.audio.suffixes import AUDIO_OR_VIDEO
from separation.batch.songs import Outcome, Song
from separation.errors import InputError
from separation.system.record import PAGE, Record, stem_files

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass
class Found:
    """The songs, what cannot be one, and what was passed over in folders."""

    songs: list[Song] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)
    passed_over: set[Path] = field(default_factory=set)  # files by their suffixes
    links: set[Path] = field(default_factory=set)  # to folders, which are not entered

    def note(self) -> str:
        """What was passed over, as a sentence; empty if nothing was."""
        parts = []
        if self.passed_over:
            found = sorted(path.suffix.lower() or "no suffix" for path in self.passed_over)
            suffixes = Counter(found).most_common()
            more = ", …" if len(suffixes) > 5 else ""
            kinds = ", ".join(f"{suffix} {number}" for suffix, number in suffixes[:5]) + more
            parts.append(f"{_count(self.passed_over, 'file')} without a suffix of audio or video ({kinds})")
        if self.links:
            more = ", …" if len(self.links) > 1 else ""
            parts.append(f"{_count(self.links, 'linked folder')} ({str(min(self.links))!r}{more})")
        return f"passed over: {' and '.join(parts)}: name a file or folder itself to have it tried" if parts else ""


def find(given: Sequence[str], output: Path) -> Found:
    """The songs that are meant by paths of files and folders and by globs, and what cannot be one.

    A song's folder is `output/<its name without suffix>`; that of one within a folder, or below the part of a glob that
    has no wildcard, is at the same place below `output`. Of folders and globs only files with a suffix of audio or
    video are taken, and none that are hidden, below `output`, or stems of a record beside them; folders that are
    symbolic links are not entered. A name that is there is itself, also where it has wildcards. Raises InputError if
    `output` is itself a folder that songs are taken from.
    """
    search = _Search(output)
    for text in given:
        search.take(text)
    return search.finish()


class _Search:
    def __init__(self, output: Path) -> None:
        self._output = output
        self._found = Found()
        self._songs: dict[str, Song] = {}
        self._stems_in: Callable[[Path], set[str]] = cache(_stems_in)

    def finish(self) -> Found:
        self._found.songs = _without_clashes(list(self._songs.values()), self._found.failed)
        return self._found

    def take(self, text: str) -> None:
        path = Path(text)
        if os.path.isdir(path):
            if os.path.realpath(path) == os.path.realpath(self._output):
                raise InputError(
                    f"the stems would go among the songs of {text!r}: choose another folder, such as {path / 'stems'}"
                )
            self._take_below(path, [], text)
        elif os.path.exists(path):
            self._add(path, path.parent)
        elif _ADDRESS.match(text):
            self._fail(path, f"{text!r} is a URL: download the song, then give its file")
        elif _is_pattern(text):
            below, rest = _literal_prefix(path)
            rest += ["**"] if text.endswith(("/", os.sep)) else []  # folders alone, as for a shell
            if os.path.isdir(below):
                self._take_below(below, rest, text)
            else:
                self._fail(path, f"{str(below)!r} in {text!r} {_why_missing(below)}: check the path")
        else:
            self._fail(path, f"{text!r} {_why_missing(path)}: check the path")

    def _take_below(self, below: Path, pattern: Sequence[str], text: str) -> None:
        """Add the songs below a folder, or those that a pattern means there, with the same places below the output."""
        output = _resolved(self._output)
        skipped = None if _is_below(_resolved(below), output) else output  # above the songs, it has all of them
        n_failed, stems = len(self._found.failed), False
        sources = []
        for place in self._matches(below, pattern):
            for path in self._files(place, skipped):
                if path.name in self._stems_in(path.parent):
                    stems |= path.name != PAGE
                elif path.suffix.lower() in AUDIO_OR_VIDEO:
                    sources.append(path)
                else:
                    self._found.passed_over.add(path)
        for source in sources:
            self._add(source, below)
        if stems and not sources:
            self._fail(Path(text), f"{text!r} holds only stems that this program made: give the songs they came from")
        elif not sources and n_failed == len(self._found.failed):
            self._fail(Path(text), f"there is no audio file in {text!r}: check the path")

    def _add(self, path: Path, below: Path) -> None:
        relative = path.relative_to(below)
        relative = Path(relative.name) if ".." in relative.parts else relative
        name = relative.name if relative.stem == ".." else relative.stem
        self._songs.setdefault(os.path.abspath(path), Song(path, self._output / relative.parent / name))

    def _fail(self, path: Path, error: str) -> None:
        self._found.failed.append(Outcome(path, "failed", error))

    def _refuse(self, error: OSError) -> None:
        self._fail(Path(error.filename), f"cannot read folder {error.filename!r}: {error.strerror}")

    def _files(self, place: Path, skipped: Path | None) -> Iterator[Path]:
        """Those in a folder and all below it, or the file itself if it is one; none that are hidden or skipped."""
        if skipped and _is_below(_resolved(place), skipped):
            return
        if not os.path.isdir(place):
            yield place
            return
        for folder, files in self._walk(place, skipped):
            yield from (folder / name for name in files)

    def _walk(self, place: Path, skipped: Path | None) -> Iterator[tuple[Path, list[str]]]:
        """A folder and all below it, each with the names of its files."""
        for where, folders, files in os.walk(place, onerror=self._refuse):
            folder = Path(where)
            seen = [name for name in sorted(folders) if not name.startswith(".")]
            links = [name for name in seen if (folder / name).is_symlink()]
            self._found.links.update(folder / name for name in links)
            folders[:] = [name for name in seen if name not in links and _resolved(folder / name) != skipped]
            yield folder, [name for name in sorted(files) if not name.startswith(".")]

    def _matches(self, below: Path, parts: Sequence[str]) -> list[Path]:
        """What is meant by a pattern's parts; `**` is any number of folders."""
        places = [below]
        for index, part in enumerate(parts):
            if part != "**":
                places = [match for place in places for match in self._named(place, part)]
                continue
            places = [place for place in places if os.path.isdir(place)]
            if index < len(parts) - 1:  # else they are taken with all below them anyway
                folders = (folder for place in places for folder, _ in self._walk(place, None))
                places = list(dict.fromkeys(folders))
        return places

    def _named(self, folder: Path, part: str) -> list[Path]:
        if os.path.lexists(folder / part):
            return [folder / part]
        if not _is_pattern(part) or not os.path.isdir(folder):
            return []
        try:
            names = sorted(os.listdir(folder))
        except OSError as e:
            self._refuse(e)
            return []
        return [folder / name for name in names if fnmatch(name, part) and (part[0] == "." or name[0] != ".")]


def _literal_prefix(path: Path) -> tuple[Path, list[str]]:
    """The part of a pattern that is taken as it is, since it has no wildcard or is there by that name; and the rest."""
    below, rest = Path(path.anchor), list(path.parts[bool(path.anchor) :])
    while rest and (not _is_pattern(rest[0]) or os.path.lexists(below / rest[0])):
        below /= rest.pop(0)
    return below, rest


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))  # `Path.resolve` raises for a link that leads to itself


def _is_below(path: Path, folder: Path) -> bool:
    return folder in (path, *path.parents)


def _is_pattern(text: str) -> bool:
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


def _stems_in(folder: Path) -> set[str]:
    """The names of the files in a folder that this program wrote."""
    record = Record.read(folder)
    return {file.name for file in record.files}.union(*map(stem_files, record.runs))


def _without_clashes(songs: list[Song], failed: list[Outcome]) -> list[Song]:
    """The songs that have their folder for themselves; the others have failed."""
    owners: dict[str, list[Song]] = {}
    for song in songs:
        owners.setdefault(_as_one_disk_sees_it(song.folder), []).append(song)
    for rivals in owners.values():
        if len(rivals) > 1:
            names = " and ".join(repr(str(song.path)) for song in rivals)
            folder = str(rivals[0].folder)
            error = f"more than one song would be written to {folder!r}, {names}: separate each with its own -o"
            failed += (Outcome(song.path, "failed", error) for song in rivals)
    return [rivals[0] for rivals in owners.values() if len(rivals) == 1]


def _as_one_disk_sees_it(path: Path) -> str:
    """macOS and Windows take names for one that differ in capitals or in how an accent is put together."""
    text = str(path)
    return unicodedata.normalize("NFC", text).casefold() if sys.platform in ("darwin", "win32") else text


def _count(items: set[Path], word: str) -> str:
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"
