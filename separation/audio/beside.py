"""The files that options ask for beside the stems: a REAPER project, a video. Importing it is cheap."""

from collections.abc import Sequence
from pathlib import Path

from separation.audio.options import OutputOptions
from separation.errors import InputError
from separation.system.names import Place

PROJECT, VIDEO = "project", "video"  # their names beside those of stems
MUXERS = {"mp4": "mp4", "m4v": "mp4", "mov": "mov", "webm": "webm", "mkv": "matroska"}  # of videos, by suffix


def suffix_of(video: Path) -> str:
    """The suffix of the new file, without a dot: that of the video, or `mkv`, which takes every kind of picture."""
    suffix = video.suffix.lower().removeprefix(".")
    return suffix if suffix in MUXERS else "mkv"


def names_beside(song: Path, place: Place, options: OutputOptions) -> dict[str, str]:
    """The names of the files that options ask for beside the stems: a REAPER project, a video."""
    names = {PROJECT: place.beside("rpp")} if options.reaper else {}
    return names | ({VIDEO: place.beside(suffix_of(song), VIDEO)} if options.video else {})


def stems_in(mix: str, stems: Sequence[str]) -> list[str]:
    """The stems in a mix such as `drums+bass`. Raises InputError if one is not among `stems`."""
    chosen = mix.split("+")
    for stem in chosen:
        if stem not in stems:
            raise InputError(
                f"video {mix!r} needs the stem {stem!r}: choose from {', '.join(stems)}, with + between them"
            )
    return chosen
