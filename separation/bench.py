"""How long the program takes: the cold start, split from a fresh process's start to the first stem's file.

The fresh process calls what the container calls when it starts and for its first song: `load_model` for each model,
`Separator.separate` on a little noise, `Separator.separate_file`. Cog's own server is not in it.
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

import soundfile
import torch

from separation.catalogue import PROJECT, fetch, files_for, read_config
from separation.checkpoints import load_model
from separation.device import choose
from separation.errors import CheckpointError, SeparationError
from separation.models import SeparationModel
from separation.recipes import load_recipe
from separation.separator import SAMPLE_RATE, ModelPool, Separator

SONG = PROJECT / "weights" / "demo" / "song.flac"
SONG_SECONDS = 4  # what of it is separated: one chunk of 8 s with its borders
READS = 5  # of the files of weights; their median counts

# What the fresh process runs: its first act is to look at the clock, which has the same zero in every process.
_CODE = "import time; here = time.monotonic(); from separation.bench import _fresh_process; _fresh_process(here)"


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """A cold start, in seconds."""

    stages: dict[str, float]  # seconds from one stage's end to the next one's, in order; none is left out
    weight_bytes: int  # of the files of weights
    plain_read: float  # seconds that reading these bytes takes, as they lie in the page cache
    reason: str  # the device and the precision, and why

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
                f"{self.weight_bytes / 1e6:.1f} MB of weights, in the page cache: just reading the files takes "
                f"{self.plain_read:.3f} s, read weights {self.stages['read weights'] / self.plain_read:.2f} times that",
                self.reason,
            ]
        )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the fresh process is to do; all of it can be written as JSON."""

    started: float  # the clock just before the process was started
    song: str
    folder: str
    recipe: str
    stems: str
    model_name: str | None
    model_path: str | None
    device: str
    precision: str


def cold_start(
    recipe: str = "standard",
    stems: str = "vocals_instrumental",
    *,
    model_name: str | None = None,
    model_path: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> ColdStart:
    """Start a fresh process that separates four seconds of the demo song, and say where its time goes.

    With `model_name` all stems of that one model, its weights from `model_path` if given, in place of the recipe. The
    weights are downloaded and read once before, so that they are in the page cache. Raises what `Separator` raises.
    """
    if model_path is not None and not model_path.is_file():
        raise CheckpointError(f"there is no file {model_path}: give a checkpoint's path")
    wanted = {model_name: None} if model_name else load_recipe(recipe, stems).models
    paths = (
        [model_path]
        if model_path
        else [fetch(file) for name, model_stems in wanted.items() for file in files_for(read_config(name), model_stems)]
    )
    reads = [_read(paths) for _ in range(READS)]
    with TemporaryDirectory() as folder:
        song = Path(folder) / "song.wav"
        samples, rate = soundfile.read(SONG, dtype="float32", frames=SONG_SECONDS * SAMPLE_RATE)
        soundfile.write(song, samples, rate, subtype="FLOAT")
        job = _Job(
            started=time.monotonic(),
            song=str(song),
            folder=folder,
            recipe=recipe,
            stems=stems,
            model_name=model_name,
            model_path=None if model_path is None else str(model_path),
            device=device,
            precision=precision,
        )
        path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
        ran = subprocess.run(
            [sys.executable, "-c", _CODE, json.dumps(asdict(job))],
            env=os.environ | {"PYTHONPATH": path},
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


def _read(paths: list[Path]) -> float:
    """How long it takes to read all bytes of these files, in seconds."""
    started = time.monotonic()
    for path in paths:
        path.read_bytes()
    return time.monotonic() - started


class _LoadedPool(ModelPool):
    """Models that were loaded one by one, to be timed."""

    def __init__(self, models: dict[str, SeparationModel], device: str, precision: str) -> None:
        super().__init__(device, precision)
        self._models = models


def _fresh_process(here: float) -> None:
    """What the process that `cold_start` starts does; `here` is the clock at its first statement. Prints JSON."""
    stages: dict[str, float] = {}
    job = _Job(**json.loads(sys.argv[1]))
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
        lap("to device")  # a GPU is initialised when it is first asked for
        wanted = {job.model_name: None} if job.model_name else load_recipe(job.recipe, job.stems).models
        models = {
            name: load_model(name, checkpoint=job.model_path, stems=stems, device="cpu", precision=choice.precision)
            for name, stems in wanted.items()
        }
        lap("read weights")
        for model in models.values():
            model.to(choice.device)
        lap("to device")
        if job.model_name:
            (model,) = models.values()
            separator = Separator.from_model(model, overlap_seconds=1)
        else:
            pool = _LoadedPool(models, job.device, job.precision)
            separator = Separator(job.recipe, job.stems, overlap_seconds=1, pool=pool)
        separator.separate(torch.randn(2, SAMPLE_RATE, generator=torch.Generator().manual_seed(0)) * 0.1)
        lap("warm-up")
        separator.separate_file(job.song, job.folder)
        lap("first stem")
    except SeparationError as e:
        print(json.dumps({"error": str(e)}))
        return
    order = ["interpreter", "imports", "read weights", "to device", "warm-up", "first stem"]
    print(json.dumps({"stages": {stage: stages[stage] for stage in order}, "reason": choice.reason}))
