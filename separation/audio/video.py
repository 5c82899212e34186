"""Writes a video again with stems as its sound. Picture and subtitles are copied, so they stay as they are."""

from collections.abc import Mapping
from pathlib import Path

from separation.audio.beside import MUXERS, suffix_of
from separation.audio.ffmpeg import probe
from separation.audio.ffmpeg_writer import check_installed, run_ffmpeg
from separation.errors import InputError
from separation.system.os_errors import output_errors

KBPS = 256


def check_picture(path: Path) -> None:
    """Raise InputError if ffmpeg is missing or a file has no picture, AudioError if ffmpeg cannot read it."""
    check_installed("a video")
    if not is_video(path):
        raise InputError(f"{path.name!r} has no picture: leave the video out")


def is_video(path: Path) -> bool:
    """Whether a file that ffmpeg can read has a picture, other than a cover. Raises AudioError if it cannot."""
    answer = probe(path, repr(path.name), "-show_entries", "stream=codec_type:stream_disposition=attached_pic")
    streams = (stream for stream in answer["streams"] if stream.get("codec_type") == "video")
    return not all(stream.get("disposition", {}).get("attached_pic") for stream in streams)


def write_video(source: Path, sounds: Mapping[str, Path], target: Path) -> None:
    """Write `target` with the picture of `source` and the sum of the sounds, which begin with the picture.

    Subtitles go over too if the container stays the same: others may have no place for them.

    Raises OutputError if the folder is full or cannot be written to.
    """
    suffix = suffix_of(source)
    inputs = [part for path in (source, *sounds.values()) for part in ("-i", f"file:{path.absolute()}")]
    labels = "".join(f"[{number}:a:0]" for number in range(1, len(sounds) + 1))
    # Matroska, and so WebM, has no place for AAC's delay.
    codec = "libopus" if suffix in ("mkv", "webm") else "aac"
    subtitles = ["-map", "0:s?", "-c:s", "copy"] if source.suffix.lower() == f".{suffix}" else []
    with output_errors(target):
        run_ffmpeg(
            [
                *inputs,
                *("-filter_complex", f"{labels}amix=inputs={len(sounds)}:normalize=0[sound]"),
                *("-map", "0:V:0", "-map", "[sound]", "-c:v", "copy", "-c:a", codec, "-b:a", f"{KBPS}k", *subtitles),
                *("-map_metadata", "0", "-map_chapters", "0", "-fflags", "+bitexact", "-flags:a", "+bitexact"),
                *("-f", MUXERS[suffix], f"file:{target.absolute()}"),
            ],
            what="a video",
        )
