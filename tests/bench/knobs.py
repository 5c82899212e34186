"""What the settings cost and bring: SDR and speed by overlap, chunk size, precision and time shifts, as Markdown.

    PYTHONPATH=. python tests/bench/knobs.py SONGS [--htdemucs FILE] [--tables chunks precision shifts]

SONGS holds one folder per song with mixture.wav and the true stems, as weights/demo/make_song.py writes them. The songs
are separated as one long mixture, to get the speed on a long song, and scored one by one. --htdemucs also measures the
genuine htdemucs (docs/evaluation.md). If the package stempeg is installed, its clip of real music is measured too.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from separation import ModelPool, Separator, load_model
from separation.audio.decode import decode
from separation.audio.waveform import SAMPLE_RATE
from separation.engine.options import EngineOptions
from separation.evaluation.metrics import sdr
from separation.models.base import SeparationModel

Song = tuple[str, Tensor, dict[str, Tensor]]  # name, mixture [2, T], true stems [2, T]
DEFAULT = (8, 4)  # seconds of chunk and of overlap
DEMO_CHUNKS = ((4, 1), (4, 2), (8, 1), (8, 2), (8, 4), (8, 6), (15, 1), (15, 4), (15, 8), (30, 1), (30, 4), (30, 8))
HTDEMUCS_CHUNKS = ((8, 1), (8, 2), (8, 4), (8, 6))  # its chunks are 7.8 s: only the ratio of overlap to chunk counts
SHIFT_SECONDS = 0.5  # the range of the shifts, as in demucs
SHIFTS = (1, 2, 4)


def read_songs(folder: Path) -> list[Song]:
    songs = []
    for path in sorted(path.parent for path in folder.glob("*/mixture.wav")):
        stems = {file.stem: _read(file) for file in sorted(path.glob("*.wav")) if file.stem != "mixture"}
        songs.append((path.name, _read(path / "mixture.wav"), stems))
    return songs


def real_clip() -> list[Song]:
    """Six seconds of real music with four true stems, if stempeg and ffmpeg are installed."""
    try:
        import stempeg
    except ImportError:
        return []
    audio, rate = stempeg.read_stems(stempeg.example_stem_path())
    assert rate == SAMPLE_RATE
    mixture, *stems = torch.from_numpy(audio.transpose(0, 2, 1).copy()).float()
    return [("clip", mixture, dict(zip(("drums", "bass", "other", "vocals"), stems, strict=True)))]


def _read(path: Path) -> Tensor:
    with decode(path, path.parent) as wave:
        return wave.read(0, wave.n_samples)


def scores(songs: list[Song], estimates: dict[str, Tensor]) -> dict[str, float]:
    """The mean SDR over the stems of each song, in dB."""
    means, start = {}, 0
    for name, mixture, true_stems in songs:
        stop = start + mixture.shape[1]
        true = dict(true_stems)
        if "guitar" in true and "guitar" not in estimates:
            true["other"] = true["other"] + true.pop("guitar") + true.pop("piano")
        values = [sdr(stem, estimates[key][:, start:stop]) for key, stem in true.items()]
        means[name] = sum(values) / len(values)
        start = stop
    return means


def separate_shifted(separator: Separator, mixture: Tensor, shifts: int) -> dict[str, Tensor]:
    """The mean of the stems over several delays of the mixture, evenly spaced."""
    total: dict[str, Tensor] = {}
    for index in range(shifts):
        delay = round(index * SHIFT_SECONDS / shifts * SAMPLE_RATE)
        for stem, estimate in separator.separate(torch.nn.functional.pad(mixture, (delay, 0))).items():
            total[stem] = total.get(stem, 0) + estimate[:, delay:] / shifts
    return total


class Table:
    """Prints each row once it is measured; SDR is for the synthetic songs and, if there is one, the clip."""

    def __init__(self, title: str, knobs: str, songs: list[Song]) -> None:
        self.songs = songs
        self.mixture = torch.cat([mixture for _, mixture, _ in songs], dim=-1)
        self.has_clip = songs[-1][0] == "clip"
        columns = [*knobs.split(", "), "SDR dB", *(["SDR dB of the clip"] if self.has_clip else []), "times real-time"]
        print(f"\n{title}, {self.mixture.shape[1] / SAMPLE_RATE:.0f} s of music\n")
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)

    def row(self, knobs: str, separator: Separator, shifts: int = 1) -> None:
        separator.separate(self.mixture[:, : 10 * SAMPLE_RATE])  # a warm-up
        started = time.perf_counter()
        estimates = separate_shifted(separator, self.mixture, shifts)
        elapsed = time.perf_counter() - started
        means = scores(self.songs, estimates)
        clip = means.pop("clip") if self.has_clip else None
        cells = [*knobs.split(", "), f"{sum(means.values()) / len(means):.3f}"]
        cells += [f"{clip:.3f}"] if clip is not None else []
        print("| " + " | ".join([*cells, f"{self.mixture.shape[1] / SAMPLE_RATE / elapsed:.1f}"]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the knobs give and cost, as Markdown.")
    parser.add_argument("songs", type=Path, help="folder with a folder a song: mixture.wav and its stems")
    parser.add_argument("--htdemucs", type=Path, metavar="FILE", help="the genuine weights; without, the demo's alone")
    tables = ("chunks", "precision", "shifts")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables, help="default: all")
    options = parser.parse_args()
    songs = read_songs(options.songs)

    def models(precision: str) -> list[tuple[SeparationModel, list[Song], tuple[tuple[int, int], ...]]]:
        pool = ModelPool(EngineOptions(precision=precision))
        chosen = {"device": pool.choice.device, "precision": pool.choice.precision}
        found = [(load_model("demo", **chosen), songs, DEMO_CHUNKS)]
        if options.htdemucs:
            htdemucs = load_model("htdemucs", checkpoint=options.htdemucs, **chosen)
            found.append((htdemucs, [*songs, *real_clip()], HTDEMUCS_CHUNKS))
        return found

    def separator(model: SeparationModel, chunk_seconds: int, overlap_seconds: int) -> Separator:
        return Separator.from_model(
            model, options=EngineOptions(chunk_seconds=chunk_seconds, overlap_seconds=overlap_seconds)
        )

    if "chunks" in options.tables:
        for model, measured, chunks in models("auto"):
            table = Table(f"{model.name}: chunk and overlap", "chunk s, overlap s", measured)
            for chunk_seconds, overlap_seconds in chunks:
                knobs = f"{chunk_seconds}, {overlap_seconds}"
                table.row(knobs, separator(model, chunk_seconds, overlap_seconds))
    if "precision" in options.tables:
        precisions = {name: models(name) for name in ("fp32", "bf16", "int8")}
        for index, (model, measured, _) in enumerate(precisions["fp32"]):
            table = Table(
                f"{model.name}: precision, chunk {DEFAULT[0]} s, overlap {DEFAULT[1]} s", "precision", measured
            )
            for name, loaded in precisions.items():
                if name != "int8" or model.has_int8:
                    table.row(name, separator(loaded[index][0], *DEFAULT))
    if "shifts" in options.tables:
        for model, measured, _ in models("auto")[-1:]:
            table = Table(f"{model.name}: shifts, chunk 8 s, overlap 2 s", "shifts", measured)
            for shifts in SHIFTS:
                table.row(str(shifts), separator(model, 8, 2), shifts)


if __name__ == "__main__":
    main()
