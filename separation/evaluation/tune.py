"""Runs several models on the same seconds of a song: how long each takes, how much memory, and how far they agree."""

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from separation.audio.decode import decode
from separation.audio.waveform import SAMPLE_RATE
from separation.engine.options import EngineOptions
from separation.engine.pool import ModelPool
from separation.engine.separator import Separator
from separation.errors import InputError, SeparationError
from separation.evaluation.bench import memory_bytes, reset_peak_memory
from separation.evaluation.candidates import Candidate, Candidates, size_bytes
from separation.evaluation.metrics import median, sdr
from separation.evaluation.precision import loudest_part
from separation.progress import Progress
from separation.system.memory import release_memory

MOST_SECONDS = 60
DECODED = 0.1  # share of the progress bar for decoding the song
MEANING = (
    "agreement is the SDR against the median of all candidates, sample by sample: a high one means that a candidate "
    "does what most do, not that it is good"
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a candidate made of the excerpt, and what that cost."""

    name: str
    stem: Tensor  # [2, T]
    seconds: float  # of separating the excerpt with a loaded model
    song_seconds: float  # of the whole song, estimated by the number of chunks
    peak_bytes: int | None  # of memory during the run; None where the system does not tell


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The candidates on one excerpt of a song."""

    song: str
    start_seconds: float
    mixture: Tensor  # the excerpt, [2, T]
    candidates: Candidates
    reason: str  # the device and precision, and why they were chosen
    results: tuple[Result, ...]
    failed: Mapping[str, str]  # candidate -> error

    @property
    def stem(self) -> str:
        """The stem that is compared."""
        return self.candidates.stem

    @property
    def audio_seconds(self) -> float:
        """The length of the excerpt."""
        return self.mixture.shape[1] / SAMPLE_RATE

    def agreement_db(self) -> dict[str, float]:
        """By candidate, the SDR of its stem against the median of all; NaN if it is alone or the median is silent."""
        if len(self.results) == 1:
            return {self.results[0].name: math.nan}
        parts = zip(*(result.stem.split(SAMPLE_RATE, dim=1) for result in self.results), strict=True)
        middle = torch.cat([median(torch.stack(part)) for part in parts], dim=1)  # a second at a time, to save memory
        return {result.name: _sdr(middle, result.stem) for result in self.results}

    def pairs_db(self) -> dict[str, dict[str, float]]:
        """The SDR of each candidate, as the reference, against each other one."""
        pairs: dict[str, dict[str, float]] = {result.name: {} for result in self.results}
        for one, other in permutations(self.results, 2):
            pairs[one.name][other.name] = _sdr(one.stem, other.stem)
        return pairs

    def about(self) -> str:
        """Which part of the song this is."""
        stop = self.start_seconds + self.audio_seconds
        return f"{self.start_seconds:.0f} to {stop:.0f} s, the loudest part · {len(self.results)} candidates"

    def facts(self) -> dict[str, list[str]]:
        """By candidate, what its run took and how far it agrees with the others, in words."""
        agreement = self.agreement_db()
        return {
            result.name: [
                f"{result.seconds:.2f} s, {self.audio_seconds / result.seconds:.2f}x real-time",
                f"whole song {_duration(result.song_seconds)}",
                *([] if result.peak_bytes is None else [f"{result.peak_bytes >> 20} MiB"]),
                f"agreement {_agreement_text(agreement[result.name])}".replace("-", "−"),
            ]
            for result in self.results
        }

    def as_json(self, page: Path) -> str:
        """One JSON object. Unknown values are null; the agreement of equal stems is the string "inf"."""
        agreement, pairs = self.agreement_db(), self.pairs_db()
        return json.dumps(
            {
                "song": self.song,
                "stem": self.stem,
                "start_seconds": round(self.start_seconds, 3),
                "audio_seconds": round(self.audio_seconds, 3),
                "device": self.reason,
                "page": str(page),
                "candidates": [
                    {
                        "name": result.name,
                        "seconds": round(result.seconds, 3),
                        "times_realtime": round(self.audio_seconds / result.seconds, 3),
                        "song_seconds": round(result.song_seconds, 1),
                        "peak_memory_mib": None if result.peak_bytes is None else result.peak_bytes >> 20,
                        "agreement_db": _plain(agreement[result.name]),
                        "pairs_db": {other: _plain(value) for other, value in pairs[result.name].items()},
                    }
                    for result in self.results
                ],
                "failed": dict(self.failed),
                "missing": [
                    {"name": each.name, "models": each.missing, "bytes": size_bytes(each)}
                    for each in self.candidates.missing
                ],
                "unreadable": self.candidates.unreadable,
            }
        )

    def __str__(self) -> str:
        agreement = self.agreement_db()
        rows = [["candidate", "seconds", "real-time", "whole song", "memory", "agreement"]]
        for result in self.results:
            memory = "n/a" if result.peak_bytes is None else f"{result.peak_bytes >> 20} MiB"
            speed = f"{self.audio_seconds / result.seconds:.2f}x"
            agrees = _agreement_text(agreement[result.name])
            rows.append([result.name, f"{result.seconds:.2f}", speed, _duration(result.song_seconds), memory, agrees])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        stop = self.start_seconds + self.audio_seconds
        lines = [f"{self.stem} of {self.song} from {self.start_seconds:.0f} to {stop:.0f} s; {self.reason}"]
        for first, *others in rows:
            cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
            lines.append("  ".join([f"{first:{widths[0]}}", *cells]))
        return "\n".join([*lines, MEANING])


def tune(
    song: Path,
    candidates: Candidates,
    options: EngineOptions = EngineOptions(),
    *,
    seconds: int = 10,
    progress: Progress = Progress(),
) -> Tuning:
    """Separate the loudest `seconds` of a song with each candidate that is here, one after another.

    A candidate that fails does not stop the others.

    Raises:
        InputError: `seconds` is out of range, or no candidate is here.
        SeparationError: as `decode`; or every candidate failed, and this is the last one's error.
    """
    if not 1 <= seconds <= MOST_SECONDS:
        raise InputError(f"seconds is {seconds}: choose a whole number from 1 to {MOST_SECONDS}")
    if not candidates.here:
        raise InputError(
            f"no model that gives {candidates.stem} is downloaded: run `separation models download NAME`, such as "
            f"{candidates.missing[0].missing[0]}"
        )
    decoding = progress.part(0, DECODED, "decoding")
    with TemporaryDirectory() as folder, decode(song, Path(folder), progress=decoding) as wave:
        start, mixture = loudest_part(wave, seconds)
        n_samples = wave.n_samples
    results: list[Result] = []
    failed: dict[str, str] = {}
    reason = ModelPool(options).choice.reason
    for number, candidate in enumerate(candidates.here):
        share = (1 - DECODED) / len(candidates.here)
        part = progress.part(DECODED + share * number, DECODED + share * (number + 1), candidate.name)
        try:
            results.append(_run(candidate, mixture, n_samples, options, part))
        except SeparationError as e:
            failed[candidate.name] = str(e)
            if len(failed) == len(candidates.here):
                raise
    progress(1.0, "done")
    return Tuning(
        song=song.name,
        start_seconds=start / SAMPLE_RATE,
        mixture=mixture,
        candidates=candidates,
        reason=reason,
        results=tuple(results),
        failed=failed,
    )


def _run(candidate: Candidate, mixture: Tensor, n_samples: int, options: EngineOptions, progress: Progress) -> Result:
    """Load a candidate, run it once to warm up, and measure it. `n_samples` is the length of the whole song."""
    release_memory()  # of the candidate before this one
    separator = Separator(candidate.selection.load(), options=options)
    separator.warm_up()
    reset_peak_memory(separator.device)
    started = time.monotonic()
    stems = separator.separate(mixture, progress=progress)
    seconds = time.monotonic() - started
    is_told = separator.device.type == "cuda" or sys.platform == "linux"  # elsewhere, a peak cannot be reset
    lengths = (mixture.shape[1], n_samples)
    chunks, song_chunks = (
        sum(separator.runner.n_chunks(run.model, n) for run in separator.recipe.runs) for n in lengths
    )
    assert candidate.selection.two_stems is not None
    return Result(
        name=candidate.name,
        stem=stems[candidate.selection.two_stems],
        seconds=seconds,
        song_seconds=seconds * song_chunks / chunks,
        peak_bytes=memory_bytes(separator.device)[1] if is_told else None,
    )


def _agreement_text(decibels: float) -> str:
    return "n/a" if math.isnan(decibels) else "equal" if math.isinf(decibels) else f"{decibels:.1f} dB"


def _sdr(reference: Tensor, estimate: Tensor) -> float:
    return sdr(reference, estimate) if reference.any() else math.nan


def _plain(value: float) -> float | str | None:
    return None if math.isnan(value) else str(value) if math.isinf(value) else round(value, 2)


def _duration(seconds: float) -> str:
    """Such as `4.2 s` or `3:07 min`."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f}:{seconds % 60:02.0f} min"
