"""Benchmark of a cold start: the time from the start of a process to its first stem.

The process makes the same calls as the container for its first song: `load_model` for each model, `Separator.warm_up`,
`Separator.separate_file`. Cog's own server is not included.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import soundfile

from separation.audio.waveform import SAMPLE_RATE
from separation.checkpoints.catalogue import files_for, read_config
from separation.checkpoints.download import fetch
from separation.checkpoints.load import load_model
from separation.device import choose
from separation.engine.selection import Selection
from separation.errors import CheckpointError, SeparationError
from separation.evaluation.bench import SONG, separator_of
from separation.system.places import PACKAGE

SONG_SECONDS = 4  # of the demo song; with its borders, one chunk of 8 s
READS = 5  # of the weight files; the median counts

# Run by the fresh process. It reads the clock first. time.monotonic() has the same zero in all processes.
_CODE = (
    "import time; here = time.monotonic(); "
    "from separation.evaluation.cold_start import _fresh_process; _fresh_process(here)"
)


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """How long a cold start takes."""

    stages: dict[str, float]  # seconds of each stage, in order and without gaps
    weight_bytes: int
    plain_read: float  # seconds to read the weight files from the page cache
    reason: str  # the device and precision, and why they were chosen

    def as_json(self) -> str:
        """One JSON object."""
        return json.dumps(
            {
                "stages_seconds": {stage: round(seconds, 4) for stage, seconds in self.stages.items()},
                "total_seconds": round(sum(self.stages.values()), 4),
                "weight_bytes": self.weight_bytes,
                "plain_read_seconds": round(self.plain_read, 4),
                "read_weights_per_plain_read": round(self.stages["read weights"] / self.plain_read, 3),
                "device": self.reason,
            }
        )

    def __str__(self) -> str:
        total = sum(self.stages.values())
        lines = [f"{'stage':14} {'seconds':>8} {'share':>6}"]
        lines += [f"{stage:14} {seconds:8.2f} {seconds / total:6.0%}" for stage, seconds in self.stages.items()]
        return "\n".join(
            [
                *lines,
                f"{'first stem by':14} {total:8.2f}",
                "",
                f"{self.weight_bytes / 1e6:.1f} MB of weights in the page cache: a plain read takes "
                f"{self.plain_read:.3f} s, read weights {self.stages['read weights'] / self.plain_read:.2f} times that",
                self.reason,
            ]
        )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the fresh process has to do."""

    started: float  # the clock just before the process starts
    song: Path
    folder: Path
    selection: Selection
    device: str
    precision: str

    def as_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        selection = fields["selection"]
        for name in ("model_dir", "model_path"):
            selection[name] = None if selection[name] is None else Path(selection[name])
        paths = {name: Path(fields[name]) for name in ("song", "folder")}
        return cls(**fields | paths | {"selection": Selection(**selection)})


def cold_start(selection: Selection = Selection(), *, device: str = "auto", precision: str = "auto") -> ColdStart:
    """Start a fresh process that separates four seconds of the demo song, and measure each of its stages.

    The weights are downloaded and read beforehand, so that they are in the page cache.

    Raises:
        CheckpointError: the file `selection.model_path` is missing.
        SeparationError: as `Separator`.
    """
    weights = selection.model_path
    if weights is not None and not weights.is_file():
        raise CheckpointError(f"there is no file {str(weights)!r}: give a checkpoint's path")
    paths = (
        [weights]
        if weights
        else [fetch(file) for name, stems in selection.models().items() for file in files_for(read_config(name), stems)]
    )
    reads = [_read_seconds(paths) for _ in range(READS)]
    with TemporaryDirectory() as folder:
        song = Path(folder, "song.wav")
        samples, rate = soundfile.read(SONG, dtype="float32", frames=SONG_SECONDS * SAMPLE_RATE)
        soundfile.write(song, samples, rate, subtype="FLOAT")
        search_path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
        job = _Job(
            started=time.monotonic(),
            song=song,
            folder=Path(folder),
            selection=selection,
            device=device,
            precision=precision,
        )
        ran = subprocess.run(
            [sys.executable, "-c", _CODE, job.as_json()],
            env=os.environ | {"PYTHONPATH": search_path},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    answer = json.loads(ran.stdout)
    if "error" in answer:
        raise SeparationError(answer["error"])
    return ColdStart(
        stages=answer["stages"],
        weight_bytes=sum(path.stat().st_size for path in paths),
        plain_read=statistics.median(reads),
        reason=answer["reason"],
    )


def _read_seconds(paths: list[Path]) -> float:
    """How many seconds it takes to read these files."""
    started = time.monotonic()
    for path in paths:
        path.read_bytes()
    return time.monotonic() - started


def _fresh_process(here: float) -> None:
    """Run a cold start's process and print its stages as JSON. `here` is the clock at its first statement."""
    stages: dict[str, float] = {}
    job = _Job.from_json(sys.argv[1])
    last = job.started

    def lap(stage: str, now: float | None = None) -> None:
        nonlocal last
        now = time.monotonic() if now is None else now
        stages[stage] = stages.get(stage, 0.0) + now - last
        last = now

    lap("interpreter", here)
    lap("imports")
    try:
        choice = choose(job.device, job.precision)
        lap("to device")  # a GPU is initialised on first use
        attention = "auto" if choice.device.type == "cpu" else "sdpa"  # fused layers cannot move
        models = {
            name: load_model(
                name,
                checkpoint=job.selection.model_path,
                stems=stems,
                device="cpu",
                precision=choice.precision,
                attention=attention,
            )
            for name, stems in job.selection.models().items()
        }
        lap("read weights")
        for model in models.values():
            model.to(choice.device)
        lap("to device")
        separator = separator_of(models, job.selection)
        separator.warm_up()
        lap("warm-up")
        separator.separate_file(job.song, job.folder)
        lap("first stem")
    except SeparationError as e:
        print(json.dumps({"error": str(e)}))
        return
    order = ["interpreter", "imports", "read weights", "to device", "warm-up", "first stem"]
    print(json.dumps({"stages": {stage: stages[stage] for stage in order}, "reason": choice.reason}))
