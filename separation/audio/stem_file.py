"""Native Instruments' `.stem.mp4`: the mixture and four stems as the tracks of one file, for DJ programs.

It is an MP4 file with five stereo tracks, of which only the first, the mixture, is enabled for ordinary players, and an
atom `moov/udta/stem` whose content is JSON: the names and colours of the stems, and the settings of a compressor and a
limiter for their sum, which are off here (https://www.native-instruments.com/en/specials/stems/for-developers/).
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from separation.audio.ffmpeg_writer import run_ffmpeg
from separation.audio.options import STEM_FILE
from separation.errors import InputError, OutputError
from separation.system.os_errors import output_errors

MIXTURE_TRACK = "mixture"
N_STEMS = 4
ORDER = ("drums", "bass", "other", "vocals")  # that DJ programs expect
COLOURS = (
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)  # by place; colour-blind people tell them apart

_MASTERING = {
    "compressor": {
        "enabled": False,
        "input_gain": 0.0,
        "output_gain": 0.0,
        "threshold": 0.0,
        "dry_wet": 50,
        "attack": 0.003,
        "release": 0.3,
        "ratio": 3.0,
        "hp_cutoff": 300,
    },
    "limiter": {"enabled": False, "release": 0.05, "threshold": 0.0, "ceiling": -0.35},
}


def tracks_of(stems: Sequence[str]) -> tuple[str, ...]:
    """The names of the tracks, in order. Raises InputError unless there are four stems."""
    if len(stems) != N_STEMS:
        raise InputError(f"{STEM_FILE} holds four stems, not {len(stems)} ({', '.join(stems)}): choose stems all_4")
    return (MIXTURE_TRACK, *(ORDER if set(stems) == set(ORDER) else stems))


def manifest(stems: Sequence[str]) -> bytes:
    """The content of the atom `stem`."""
    described = [{"name": stem.capitalize(), "color": colour} for stem, colour in zip(stems, COLOURS, strict=True)]
    return json.dumps({"mastering_dsp": _MASTERING, "version": 1, "stems": described}).encode()


def write_stem_file(tracks: Mapping[str, Path], target: Path) -> None:
    """Write the file from M4A files, the mixture first. Their sound is copied; tags and cover are the first one's.

    Raises OutputError if the folder is full or cannot be written to.
    """
    inputs = [part for path in tracks.values() for part in ("-i", f"file:{path.absolute()}")]
    maps = [part for number in range(len(tracks)) for part in ("-map", f"{number}:a:0")]
    # A track is enabled if it has the disposition "default".
    dispositions = [part for number in range(1, len(tracks)) for part in (f"-disposition:a:{number}", "0")]
    with output_errors(target):
        run_ffmpeg(
            [
                *inputs,
                *maps,
                *("-map", "0:v:0?", "-disposition:v:0", "attached_pic"),
                *("-map_metadata", "0", "-c", "copy", "-disposition:a:0", "default", *dispositions),
                *("-fflags", "+bitexact", "-movie_timescale", _time_scale(next(iter(tracks.values())))),
                *("-f", "ipod", f"file:{target.absolute()}"),
            ],
            what=f"format {STEM_FILE}",
        )
        with target.open("r+b") as file:
            _add_atom(file, manifest([*tracks][1:]))
            file.flush()
            os.fsync(file.fileno())


def split_stem_file(path: Path, tracks: Sequence[str], folder: Path) -> dict[str, Path]:
    """Copy the tracks of a file that `write_stem_file` wrote into M4A files in `folder`; returns them by track.

    Raises OutputError if the folder is full or cannot be written to.
    """
    files = {track: folder / f"{track}.m4a" for track in tracks}
    with output_errors(folder):
        scale = _time_scale(path)
        outputs = [
            part
            for number, file in enumerate(files.values())
            for part in (
                *("-map", f"0:a:{number}", "-map_metadata", "-1", "-c", "copy", "-fflags", "+bitexact"),
                *("-movie_timescale", scale, "-f", "ipod", f"file:{file.absolute()}"),
            )
        ]
        run_ffmpeg(["-i", f"file:{path.absolute()}", *outputs], what=f"format {STEM_FILE}")
    return files


class Atom(NamedTuple):
    """An atom of an MP4 file: its kind, and where it and its content start and end."""

    kind: bytes
    start: int
    content: int
    end: int


def atoms(file: BinaryIO, start: int, end: int) -> Iterator[Atom]:
    """The atoms in a part of a file. Raises OutputError if it is not made of whole atoms."""
    while start < end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        content = start + 8
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))
            content += 8
        if size < content - start or start + size > end:
            raise OutputError(f"ffmpeg wrote a broken MP4 file at byte {start}: install another version")
        yield Atom(kind, start, content, start + size)
        start += size


def find_atom(file: BinaryIO, *path: bytes) -> Atom:
    """The first atom with a path such as `moov`, `udta`. Raises OutputError if there is none."""
    found = Atom(b"", 0, 0, file.seek(0, os.SEEK_END))
    for kind in path:
        inside = [atom for atom in atoms(file, found.content, found.end) if atom.kind == kind]
        if not inside:
            raise OutputError(f"ffmpeg wrote an MP4 file without {b'/'.join(path).decode()}: install another version")
        found = inside[0]
    return found


def _time_scale(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(find_atom(file, b"moov", b"mvhd").content + 12)
        return str(int.from_bytes(file.read(4), "big"))


def _add_atom(file: BinaryIO, content: bytes) -> None:
    """Append the atom `stem` to `moov/udta`. `moov` is the last atom, so nothing that it points to moves."""
    moov, udta = find_atom(file, b"moov"), find_atom(file, b"moov", b"udta")
    if moov.end != file.seek(0, os.SEEK_END):
        raise OutputError("ffmpeg wrote an MP4 file whose index is not at its end: install another version")
    file.seek(udta.end)
    rest = file.read()
    atom = struct.pack(">I4s", 8 + len(content), b"stem") + content
    file.seek(udta.end)
    file.write(atom + rest)
    for parent in (moov, udta):
        file.seek(parent.start)
        file.write(struct.pack(">I", parent.end - parent.start + len(atom)))
