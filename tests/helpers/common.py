"""Shared by many tests: marks for optional programs, the demo song, and names of the contract."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from separation.checkpoints import catalogue

# Makes glibc return freed memory at once. Otherwise it keeps some 100 MiB, more or less, which would hide a leak.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
PROJECT = Path(__file__).parents[2]
SHARED = PROJECT.parent / "shared"
SONG = PROJECT / "weights" / "demo" / "song.flac"

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
needs_shared = pytest.mark.skipif(not (SHARED / "audio").is_dir(), reason="needs the shared folder beside the checkout")
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
)

STEMS = {
    "vocals_instrumental": ["vocals", "instrumental"],
    "all_4": ["vocals", "drums", "bass", "other"],
    "all_6": ["vocals", "drums", "bass", "guitar", "piano", "other"],
}
QUICK: dict[str, Any] = {"stems": "vocals_instrumental", "output_format": "wav", "chunk_size": 4, "overlap": 1}
QUICK |= {"sample_rate": 44100, "mp3_bitrate": 320, "two_stems": "none", "recipe": "default"}
QUICK |= {"start": 0.0, "end": 0.0, "preview": False, "analyse": False}
# The line that `parseProgressFromLogs` of npm `replicate` parses: percent, anything between bars, done/total.
PROGRESS_LINE = re.compile(r"\s*(\d+)%\s*\|.+?\|\s*(\d+)/(\d+)")
METRICS = ["audio_seconds", "times_realtime", "model_load_seconds", "device", "peak_memory_mib"]


def song(seconds: float, *, gain: float = 1.0, format: str = "WAV") -> bytes:
    """The demo song, cut or repeated to this length, as a float WAV file or a FLAC file."""
    audio, rate = soundfile.read(SONG, dtype="float32")
    audio = np.resize(audio, (int(seconds * rate), 2)) * np.float32(gain)
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=format, subtype="FLOAT" if format == "WAV" else None)
    return file.getvalue()


def quick_first(values: Iterable[Any], n_quick: int) -> list[Any]:
    """Values for `parametrize`; all but the first `n_quick` are slow tests."""
    return [value if i < n_quick else slow(value) for i, value in enumerate(values)]


def slow(value: Any) -> Any:
    """A value for `parametrize`, or a tuple of values, that is a slow test."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


IN_RECIPES = ("bs_roformer_viperx_1297", "bs_roformer_sw", "mel_band_roformer_kim")


def quick_models() -> list[Any]:
    """The names of all checkpoints for `parametrize`. Quick are those of the recipes and one of each kind.

    Names of one kind begin with the same two words. The bags of four networks are slow tests.
    """
    names = catalogue.available()
    kinds = {tuple(name.split("_")[:2]): name for name in reversed([*IN_RECIPES, *names])}
    quick = {*kinds.values(), *IN_RECIPES} - {"mdx_extra"}
    return [name if name in quick else slow(name) for name in names]


def below(folder: Path, pattern: str) -> list[Path]:
    """The paths below a folder whose name matches the pattern. The folder may change meanwhile."""
    found = ((where, name) for where, folders, files in os.walk(folder) for name in (*folders, *files))
    return [Path(where, name) for where, name in found if fnmatch(name, pattern)]


def read(file: Path | bytes) -> NDArray[np.float32]:
    return soundfile.read(io.BytesIO(file) if isinstance(file, bytes) else file, dtype="float32", always_2d=True)[0]


@contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process that Ctrl-C interrupts; a shell's background jobs ignore it."""
    with subprocess.Popen(
        [sys.executable, "-m", "separation", *map(str, arguments)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        try:
            yield run
        finally:
            run.kill()
