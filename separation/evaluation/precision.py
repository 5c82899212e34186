"""How far the precisions that a machine offers are from float32, on a user's own song and models."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from separation.audio.decode import decode
from separation.audio.excerpt import loudest
from separation.audio.waveform import SAMPLE_RATE, Waveform
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.description import WITH_INT8
from separation.checkpoints.load import load_model
from separation.device import PRECISIONS, choose_device, choose_precision
from separation.engine.options import EngineOptions
from separation.engine.selection import Selection
from separation.errors import InputError
from separation.evaluation.bench import separator_of
from separation.evaluation.metrics import sdr
from separation.progress import Progress

# Distances in dB between a stem and what rounding adds to it. The best published stem is 17 dB above its own errors
# (the instrumental of BS-RoFormer viperx 1297), so rounding 40 dB below a stem costs at most 0.03 dB of its SDR, and
# rounding 30 dB below it at most 0.2 dB.
INAUDIBLE_DB = 40
SLIGHT_DB = 30
SILENT_DB = 40  # below the song: a quieter stem is only what leaked into it, and does not count


@dataclass(frozen=True, kw_only=True)
class PrecisionResult:
    """How fast and how exact a precision is."""

    name: str
    seconds: float  # of separating the excerpt
    distance_db: dict[str, float]  # by stem: how far the difference to float32 is below it; NaN for a quiet stem

    @property
    def worst_db(self) -> float:
        """Of the stem that is furthest from float32; infinite if none differs."""
        return min((value for value in self.distance_db.values() if not math.isnan(value)), default=math.inf)


@dataclass(frozen=True, kw_only=True)
class PrecisionComparison:
    """The precisions that a machine offers, float32 first."""

    song: str
    start_seconds: float  # of the excerpt
    audio_seconds: float
    models: tuple[str, ...]
    device: str
    results: tuple[PrecisionResult, ...]

    @property
    def recommended(self) -> PrecisionResult:
        """The fastest that is inaudible; failing that, the fastest that is off by little; failing that, float32."""
        float32, *others = self.results
        faster = [result for result in others if result.seconds < float32.seconds]
        for least in (INAUDIBLE_DB, SLIGHT_DB):
            exact = [result for result in faster if result.worst_db >= least]
            if exact:
                return min(exact, key=lambda result: result.seconds)
        return float32

    @property
    def recommendation(self) -> str:
        """What to use and why, in a sentence."""
        best, float32 = self.recommended, self.results[0]
        if best is float32:
            return "use --precision fp32: nothing here is both faster and close to it"
        times = f"{float32.seconds / best.seconds:.1f} times as fast as fp32"
        if best.worst_db == math.inf:
            return f"use --precision {best.name}: {times}, with the same stems"
        effect = "inaudible" if best.worst_db >= INAUDIBLE_DB else "hardly audible: keep fp32 if you have the time"
        return f"use --precision {best.name}: {times}, and {best.worst_db:.0f} dB below the stems its error is {effect}"

    def as_json(self) -> str:
        """One JSON object. The distance of a quiet stem is null; that of an equal one is the string "inf"."""
        return json.dumps(
            {
                "song": self.song,
                "start_seconds": round(self.start_seconds, 3),
                "audio_seconds": round(self.audio_seconds, 3),
                "models": list(self.models),
                "device": self.device,
                "precisions": [
                    {
                        "precision": result.name,
                        "seconds": round(result.seconds, 3),
                        "times_realtime": round(self.audio_seconds / result.seconds, 3),
                        "distance_db": {stem: _plain(value) for stem, value in result.distance_db.items()},
                        "worst_db": _plain(result.worst_db),
                    }
                    for result in self.results
                ],
                "recommended": self.recommended.name,
                "recommendation": self.recommendation,
            }
        )

    def __str__(self) -> str:
        stems = list(self.results[0].distance_db)
        rows = [["precision", "seconds", *stems]]
        for result in self.results:
            distances = [_text(result.distance_db[stem]) for stem in stems]
            rows.append([result.name, f"{result.seconds:.2f}", *distances])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([f"{row[0]:{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        stop = self.start_seconds + self.audio_seconds
        about = f"{', '.join(self.models)} on {self.device}, {self.song} from {self.start_seconds:.0f} to {stop:.0f} s"
        return "\n".join([about, "dB by which the difference to float32 is below each stem:", *lines])


def compare_precisions(
    song: Path,
    selection: Selection = Selection(),
    options: EngineOptions = EngineOptions(),
    *,
    seconds: int = 30,
    progress: Progress = Progress(),
) -> PrecisionComparison:
    """Separate the loudest `seconds` of a song in each precision, and compare the stems with those in float32.

    The precisions are fp32, bf16 on a CPU that has it, fp16 and bf16 on a GPU, and int8 if a model supports it here.

    Args:
        song: a file that libsndfile or ffmpeg can read.
        options: its precision does not matter.
        progress: called with the share that is done and the precision.

    Raises:
        InputError: `seconds` is less than 1.
        SeparationError: as `Separator` and `decode`.
    """
    if seconds < 1:
        raise InputError(f"seconds is {seconds}: choose a whole number from 1 up")
    device = choose_device(options.device)
    names = _offered(selection, device)
    selection.load()  # before a long song is decoded
    with TemporaryDirectory() as folder, decode(song, Path(folder), progress=progress.part(0, 0.1, "decoding")) as wave:
        start, excerpt = loudest_part(wave, seconds)
    results: list[PrecisionResult] = []
    float32: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        part = progress.part(0.1 + 0.9 * number / len(names), 0.1 + 0.9 * (number + 1) / len(names), name)
        separated = _separated(excerpt, selection, replace(options, precision=name), part)
        if separated is None:
            continue  # no model computes in int8 here; a warning has said why
        stems, needed = separated
        float32 = float32 or stems
        results.append(PrecisionResult(name=name, seconds=needed, distance_db=_distances(excerpt, float32, stems)))
    progress(1.0, "done")
    return PrecisionComparison(
        song=song.name,
        start_seconds=start / SAMPLE_RATE,
        audio_seconds=excerpt.shape[1] / SAMPLE_RATE,
        models=tuple(read_config(name).name for name in selection.models()),
        device=str(device),
        results=tuple(results),
    )


def _offered(selection: Selection, device: torch.device) -> list[str]:
    """The precisions worth comparing, float32 first."""
    if device.type != "cpu":
        return ["fp32", "fp16", "bf16"] if device.type == "cuda" else ["fp32", "fp16"]
    names = ["fp32"]
    if choose_precision("auto", device) == torch.bfloat16:
        names.append("bf16")
    kinds = {read_config(name).architecture for name in selection.models()}
    if kinds & WITH_INT8 or None in kinds:  # if None, only the weights tell
        names.append("int8")
    return names


def loudest_part(song: Waveform, seconds: int) -> tuple[int, Tensor]:
    """The start of the loudest `seconds` of a song, a multiple of SAMPLE_RATE, and their samples, `[2, T]`."""
    start = loudest(song, seconds) * SAMPLE_RATE
    return start, song.read(start, min(song.n_samples, start + seconds * SAMPLE_RATE)).clone()


def _separated(
    excerpt: Tensor, selection: Selection, options: EngineOptions, progress: Progress
) -> tuple[dict[str, Tensor], float] | None:
    """The stems in the precision of `options`, and the seconds that this took; None for int8 that no model supports."""
    device, precision = choose_device(options.device), PRECISIONS[options.precision]
    models = {
        name: load_model(
            name,
            checkpoint=selection.model_path,
            stems=stems,
            device=device,
            precision=precision,
            attention=options.attention,
        )
        for name, stems in selection.models().items()
    }
    if precision == torch.int8 and all(model.precision != torch.int8 for model in models.values()):
        return None
    chunked = replace(options, device="auto", precision="auto", attention="auto")  # the models decide these
    separator = separator_of(models, selection, chunked)
    separator.warm_up()
    started = time.monotonic()
    stems = separator.separate(excerpt, progress=progress)
    return stems, time.monotonic() - started


def _distances(song: Tensor, float32: Mapping[str, Tensor], stems: Mapping[str, Tensor]) -> dict[str, float]:
    """By stem, how far in dB the difference to float32 is below it. NaN for a stem SILENT_DB or more below the song."""
    audible = float(song.double().square().sum()) * 10 ** (-SILENT_DB / 10)
    return {
        stem: sdr(exact, stems[stem]) if float(exact.double().square().sum()) > audible else math.nan
        for stem, exact in float32.items()
    }


def _plain(value: float) -> float | str | None:
    return None if math.isnan(value) else "inf" if math.isinf(value) else round(value, 1)


def _text(value: float) -> str:
    return "quiet" if math.isnan(value) else "equal" if math.isinf(value) else f"{value:.1f}"
