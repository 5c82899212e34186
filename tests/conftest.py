"""What the tests share: where the optional things are, the demo song, and the contract's words."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# Beside another process of tests, each computes on one thread: read as PyTorch is imported, also by what it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

from separation import catalogue, device
from weights_server import Server

# glibc gives back at once what is freed: slow, but else it holds back some 100 MiB more or less, and no leak is seen.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
os.environ["SEPARATION_CACHE"] = "off"  # a test of something else must not find what another one kept

PROJECT = Path(__file__).parents[1]
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
# What `parseProgressFromLogs` of npm `replicate` reads: percent, something between bars, done/total.
PROGRESS_LINE = re.compile(r"\s*(\d+)%\s*\|.+?\|\s*(\d+)/(\d+)")
METRICS = ["audio_seconds", "times_realtime", "model_load_seconds", "device", "peak_memory_mib"]


def song(seconds: float, *, gain: float = 1.0, format: str = "WAV") -> bytes:
    """The demo song, cut or repeated to that length, as a float WAV file or a FLAC file."""
    audio, rate = soundfile.read(SONG, dtype="float32")
    audio = np.resize(audio, (int(seconds * rate), 2)) * np.float32(gain)
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=format, subtype="FLOAT" if format == "WAV" else None)
    return file.getvalue()


def quick_first(values: Iterable[Any], n_quick: int) -> list[Any]:
    """Values for parametrize, of which those behind the first few are for the slow tests."""
    return [value if i < n_quick else slow(value) for i, value in enumerate(values)]


def slow(value: Any) -> Any:
    """A value, or a row of them, that is for the slow tests."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def quick_models() -> list[Any]:
    """The names of all checkpoints, of which the bags of four networks are for the slow tests."""
    return [slow(name) if name.startswith("mdx_extra") else name for name in catalogue.available()]


def below(folder: Path, pattern: str) -> list[Path]:
    """What has such a name below a folder, which others may be changing."""
    found = ((where, name) for where, folders, files in os.walk(folder) for name in (*folders, *files))
    return [Path(where, name) for where, name in found if fnmatch(name, pattern)]


def read(file: Path | bytes) -> NDArray[np.float32]:
    return soundfile.read(io.BytesIO(file) if isinstance(file, bytes) else file, dtype="float32", always_2d=True)[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite; none beside this one for some files, which they would only delay."""
    return 2 if config.args == config.getini("testpaths") else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file, which share servers and songs, run in one process; those of a served container in one too."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder == "served" else item.path.stem))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-gpu-counts", action="store_true", help="write what test_pretended_gpu.py counts to its table"
    )


@pytest.fixture
def gpu_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch says of a GPU: 300 bytes are in use, the most were 5000, and 1000 since that was reset."""
    peaks = [5000, 1000]
    monkeypatch.setattr(device, "_earlier_peaks", {})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: 300)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: peaks[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: peaks.pop(0))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights"
    monkeypatch.setenv("SEPARATION_WEIGHTS", str(folder))
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(catalogue, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small only lose time to more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def started(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process that Ctrl-C, which a shell's background job ignores, reaches."""
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
