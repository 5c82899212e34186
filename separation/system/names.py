"""Names of stems' files from a template such as `{artist}/{album}/{song} ({stem}).{ext}`."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Formatter

from separation.errors import InputError
from separation.system.record import RECORD

OF_THE_SONG = ("folder", "song", "artist", "album", "track", "recipe")
FROM_ANALYSIS = ("bpm", "key")  # known when the song is separated
OF_THE_STEM = ("stem", "model", "ext")
FIELDS = (*OF_THE_SONG, *FROM_ANALYSIS, *OF_THE_STEM)
FROM_TAGS = ("artist", "album", "track")
MAX_VALUE_BYTES = 120  # of a field; file systems allow 255 for a name

_REFUSED = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f]')  # by some file system
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows
_FORMATTER = Formatter()


def fields_in(template: str) -> set[str]:
    """The names of a template's fields. Raises InputError if the template cannot be used."""
    try:
        parts = list(_FORMATTER.parse(template))
    except ValueError as e:
        raise InputError(f"name {template!r} is no template ({e}): write fields as {{song}}") from e
    for _, name, form, conversion in parts:
        if name in FIELDS and (form or conversion):
            raise InputError(f"name {template!r} has a format for {{{name}}}, which takes none: write {{{name}}}")
        if name is not None and name not in FIELDS:
            fields = ", ".join(f"{{{field}}}" for field in FIELDS)
            raise InputError(f"name {template!r} has no field {{{name}}}: choose from {fields}")
    if template.startswith("/") or "\\" in template or ".." in template.split("/"):
        raise InputError(f"name {template!r} could lead out of the output folder: write FOLDER/FILE.{{ext}}")
    if not template.endswith(".{ext}"):
        raise InputError(f"name {template!r} does not end in .{{ext}}: add it")
    return {name for _, name, _, _ in parts if name is not None}


@dataclass(frozen=True)
class Place:
    """Where a song's files go, below the output folder.

    Args:
        folder: the folder of all the song's files, with `/` between its parts; empty for the output folder itself.
        template: the rest of their names, with the fields `OF_THE_STEM` and, until they are known, `FROM_ANALYSIS`.
        record: the name of the song's record in that folder.
    """

    folder: str = ""
    template: str = "{stem}.{ext}"
    record: str = RECORD

    @classmethod
    def of(cls, template: str | None, song: Mapping[str, str]) -> "Place":
        """The place of a song, given its values of the fields `OF_THE_SONG`. None is the usual template.

        A value can neither add a folder nor leave one, except `folder`.
        """
        if template is None:
            return cls()
        fields_in(template)
        folders: list[str] = []
        parts = template.split("/")
        while len(parts) > 1 and not _fields(parts[0]) & {*FROM_ANALYSIS, *OF_THE_STEM}:
            folders += _filled(parts.pop(0), song).split("/")
        rest = "/".join(_filled(part, song, keep=(*FROM_ANALYSIS, *OF_THE_STEM)) for part in parts)
        # Songs may share a folder, so each has a record of its own. Its name only depends on its files' names.
        key = hashlib.sha256(rest.encode()).hexdigest()[:12]
        return cls("/".join(_clean(part) for part in folders if part), rest, f".separation-{key}.json")

    @property
    def needs_analysis(self) -> bool:
        """Whether tempo or key are in the names, and not known yet."""
        return bool(_fields(self.template) & set(FROM_ANALYSIS))

    def analysed(self, tempo_bpm: float | None, key: str | None) -> "Place":
        """The place of a song with this tempo and key, such as "Bb minor"; None is for what cannot be told."""
        values = {
            "bpm": "0" if tempo_bpm is None else f"{round(tempo_bpm, 1):.0f}",  # records hold one decimal place
            "key": "Unknown key" if key is None else key.replace(" major", "").replace(" minor", "m"),
        }
        template = "/".join(_filled(part, values, keep=OF_THE_STEM) for part in self.template.split("/"))
        return replace(self, template=template)

    def name(self, stem: str, ext: str, model: str = "") -> str:
        """The name of a file, relative to `folder`. Fields from the analysis stay in it until they are known."""
        parts = self.template.split("/")
        values = {field: f"{{{field}}}" for field in FROM_ANALYSIS}
        values |= {"stem": value(stem), "model": value(model), "ext": ext}
        return "/".join(_clean(part.format_map(values)) for part in parts)

    def beside(self, ext: str, stem: str = "stems") -> str:
        """The name of a file beside the stems, in `folder` itself: usually `stems.<ext>`."""
        return self.name(stem, ext).rpartition("/")[2]

    def names(self, models: Mapping[str, str], ext: str) -> dict[str, str]:
        """The names of the stems' files by stem, given the models by stem. Raises InputError if two are equal."""
        names = {stem: self.name(stem, ext, model) for stem, model in models.items()}
        for stem, name in names.items():
            others = [other for other in names if other != stem and names[other].casefold() == name.casefold()]
            if others:
                raise InputError(
                    f"{stem} and {others[0]} would both be written to {name!r}: put {{stem}} into the name"
                )
        return names


def song_fields(song: str, tags: Mapping[str, str], recipe: str, folder: str = "") -> dict[str, str]:
    """The values of the fields `OF_THE_SONG`. `song` is the file's name without suffix."""
    number = re.match(r"\d+", tags.get("track", ""))
    return {
        "folder": "/".join(value(part) for part in folder.split("/") if part != "."),
        "song": value(song),
        "artist": value(tags.get("artist") or "Unknown artist"),
        "album": value(tags.get("album") or "Unknown album"),
        "track": f"{int(number[0]):02d}" if number else "00",
        "recipe": value(recipe),
    }


def value(text: str) -> str:
    """Text that can be a part of a file's name."""
    cut = text.replace("/", "_").encode(errors="replace")[:MAX_VALUE_BYTES].decode(errors="ignore")
    return _REFUSED.sub("_", cut)


def _fields(part: str) -> set[str]:
    return {name for _, name, _, _ in _FORMATTER.parse(part) if name is not None}


def _filled(part: str, song: Mapping[str, str], keep: tuple[str, ...] = ()) -> str:
    """A part of a template with the song's values. With fields to keep, braces stay escaped."""
    escape = (lambda text: text.replace("{", "{{").replace("}", "}}")) if keep else str
    texts = []
    for literal, name, _, _ in _FORMATTER.parse(part):
        texts.append(escape(literal))
        if name is not None:
            texts.append(f"{{{name}}}" if name in keep else escape(song[name]))
    return "".join(texts)


def _clean(part: str) -> str:
    """A name that every file system takes, and that is not hidden."""
    name = _REFUSED.sub("_", part).rstrip(". ").lstrip(" ")
    if not name or name.startswith(".") or _RESERVED.fullmatch(name):
        name = f"_{name.lstrip('.')}"
    return name
