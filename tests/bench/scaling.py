"""How time and memory grow with a song's length, and how two songs at once slow each other, as Markdown. Linux only.

    python tests/bench/scaling.py [--seconds 30 240 1200 10800] [--stems vocals_instrumental] [--folder DIR]
    python tests/bench/scaling.py --tiny --rate 48000 --format wav --pairs 0 --seconds 180 11520    # over 4 GB a file

The song is the demo song repeated, in the stems' format. Every figure comes from a fresh process with the demo weights,
or with a small random network (`--tiny`). Memory is the resident set size (RSS), without the page cache of temporary
files. For two stems the folder needs 32 bytes a sample: 15 GB for three hours at 44100 Hz.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import soundfile

PROJECT = Path(__file__).parents[2]
SONG = PROJECT / "weights" / "demo" / "song.flac"
PAIR_SECONDS = 240  # the length of the songs for two processes

WORKER = """
import json, os, sys
from pathlib import Path
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line
sys.path.insert(0, "tests")
from separation import OutputOptions, Separator
from helpers.small_model import quick_model

song, folder, stems, format, tiny = sys.argv[1:]

def resident_mib(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024

separator = Separator.from_model(quick_model(), two_stems="vocals") if tiny else Separator("demo", stems)
loaded = resident_mib("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
files = separator.separate_file(song, folder, OutputOptions(format=format, sample_rate="source"))
print(json.dumps({"seconds": files.elapsed_seconds, "loaded": loaded, "peak": resident_mib("VmHWM:")}))
"""


def write_song(path: Path, seconds: float, rate: int = 44100) -> Path:
    """Write the demo song, repeated to that length: as FLAC or, for `.wav`, as RF64 with 32-bit floats."""
    audio, _ = soundfile.read(SONG, dtype="int16")
    format, subtype = ("RF64", "FLOAT") if path.suffix == ".wav" else ("FLAC", "PCM_16")
    with soundfile.SoundFile(path, "w", rate, audio.shape[1], format=format, subtype=subtype) as file:
        left = round(seconds * rate)
        while left:
            file.write(audio[:left])
            left -= min(left, len(audio))
    return path


def start(
    song: Path, stems: str, *, tiny: bool = False, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a process that separates the song into files of its format and rate, and reports on it."""
    run = [sys.executable, "-c", WORKER, song, song.with_suffix(""), stems, song.suffix[1:], "tiny" if tiny else ""]
    return subprocess.Popen(run, cwd=PROJECT, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True)


def command(song: Path, stems: str) -> subprocess.Popen[str]:
    """The command line as users run it."""
    run = [sys.executable, "-m", "separation", "separate", song, "-o", song.parent, "--recipe", "demo"]
    run += ["--stems", stems, "--format", "flac"]
    environment = os.environ | {"SEPARATION_CACHE": "off"}
    return subprocess.Popen(run, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the process; returns its output."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the separation failed with exit code {process.returncode}: see its message above")
    return output


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Seconds, memory in MiB once the models are loaded, and the peak after that, of a process from `start`."""
    return json.loads(finish(process))


def main() -> None:
    parser = argparse.ArgumentParser(description="How time and memory grow with a song, as Markdown.")
    parser.add_argument("--seconds", nargs="*", type=float, default=[30, 240, 1200, 10800], help="the songs' lengths")
    parser.add_argument("--stems", default="vocals_instrumental")
    parser.add_argument("--tiny", action="store_true", help="a random network in place of the demo weights: two stems")
    parser.add_argument("--rate", type=int, default=44100, help="of the song and the stems, in hertz")
    parser.add_argument("--format", default="flac", choices=["flac", "wav"], help="of the song and the stems")
    parser.add_argument("--pairs", type=int, default=2, help="how often two songs are measured, one by one and at once")
    parser.add_argument("--folder", type=Path, help="where the songs and stems go meanwhile (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.seconds:
            print("\n| song | time | times real-time | loaded MiB | peak MiB | above loaded |\n" + "|---" * 6 + "|")
        for seconds in options.seconds:
            song = write_song(folder / f"{seconds:.0f}.{options.format}", seconds, options.rate)
            run = result(start(song, options.stems, tiny=options.tiny))
            speed = f"{run['seconds']:.1f} s | {seconds / run['seconds']:.1f}"
            memory = f"{run['loaded']:.0f} | {run['peak']:.0f} | {run['peak'] - run['loaded']:.0f}"
            print(f"| {seconds:.0f} s | {speed} | {memory} |", flush=True)
            song.unlink()
            shutil.rmtree(song.with_suffix(""))
        if not options.pairs:
            return
        songs = [write_song(folder / f"{name}.flac", PAIR_SECONDS) for name in ("first", "second")]
        print(f"\n| two songs of {PAIR_SECONDS} s, two commands | time |\n|---|---|")
        for _ in range(options.pairs):
            started = time.perf_counter()
            for song in songs:
                finish(command(song, options.stems))
            print(f"| one after the other | {time.perf_counter() - started:.1f} s |", flush=True)
            started = time.perf_counter()
            for process in [command(song, options.stems) for song in songs]:
                finish(process)
            print(f"| at once | {time.perf_counter() - started:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
