"""Small videos, made by ffmpeg."""

import subprocess
from pathlib import Path

PICTURES = {"mp4": ("-c:v", "mpeg4"), "webm": ("-c:v", "libvpx"), "avi": ("-c:v", "mpeg4"), "mov": ("-c:v", "mjpeg")}
SOUNDS = {"webm": ("-c:a", "libopus"), "avi": ("-c:a", "pcm_s16le"), "mov": ("-c:a", "aac"), "mp4": ("-c:a", "aac")}


def video(path: Path, sound: Path, *options: str) -> Path:
    """Write a video of up to two seconds with this sound. `options` are for ffmpeg, before the sound."""
    suffix = path.suffix[1:]
    inputs = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=25:duration=2", *options, "-i", str(sound)]
    codecs = [*PICTURES[suffix], *SOUNDS[suffix], "-metadata", "title=Clip"]
    subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *inputs, "-shortest", *codecs, str(path)], check=True)
    return path


def picture(path: Path) -> bytes:
    """The checksums and times of the picture's frames, as they are encoded."""
    options = ["-i", str(path), "-map", "0:v", "-f", "framecrc", "-"]
    return subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *options], check=True, capture_output=True).stdout
