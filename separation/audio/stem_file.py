"""Native Instruments' `.stem.mp4`: the mixture and four stems as the tracks of one file, for DJ programs.

It is an MP4 file with five stereo tracks, of which only the first, the mixture, is enabled for ordinary players, and an
atom `moov/udta/stem` whose content is JSON: the names and colours of the stems, and the settings of a compressor and a
limiter for their sum, which are off here (https://www.native-instruments.com/en/specials/stems/for-developers/).
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from separation.audio.ffmpeg_writer import run_ffmpeg
from separation.audio.mp4 import atom, atoms, find_atom, inserted
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
    first = next(iter(tracks.values()))
    with output_errors(target):
        run_ffmpeg(
            [
                *inputs,
                *maps,
                *("-map_metadata", "-1", "-c", "copy", "-disposition:a:0", "default", *dispositions),
                *("-fflags", "+bitexact", "-movie_timescale", _time_scale(first)),
                *("-f", "ipod", f"file:{target.absolute()}"),
            ],
            what=f"format {STEM_FILE}",
        )
        with target.open("r+b") as file:
            _replace_user_data(file, inserted(_user_data(first), (b"udta",), atom(b"stem", manifest([*tracks][1:]))))
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


def _time_scale(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(find_atom(file, b"moov", b"mvhd").content + 12)
        return str(int.from_bytes(file.read(4), "big"))


def _user_data(path: Path) -> bytes:
    """The atom `moov/udta` of a file, which holds its tags and its cover."""
    with path.open("rb") as file:
        found = find_atom(file, b"moov", b"udta")
        file.seek(found.start)
        return file.read(found.end - found.start)


def _replace_user_data(file: BinaryIO, udta: bytes) -> None:
    """Replace the atom `moov/udta`. `moov` is the last atom, so nothing that it points to moves."""
    moov = find_atom(file, b"moov")
    if moov.end != file.seek(0, os.SEEK_END):
        raise OutputError("ffmpeg wrote an MP4 file whose index is not at its end: install another version")
    kept = [one for one in atoms(file, moov.content, moov.end) if one.kind != b"udta"]
    parts = []
    for one in kept:
        file.seek(one.start)
        parts.append(file.read(one.end - one.start))
    file.seek(moov.start)
    file.write(atom(b"moov", b"".join([*parts, udta])))
    file.truncate()
