"""The demo: separates the shipped song with the shipped weights and scores it against its true stems."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from separation.audio.decode import decode
from separation.audio.options import OutputOptions
from separation.audio.waveform import SAMPLE_RATE
from separation.engine.options import EngineOptions
from separation.engine.pool import ModelPool
from separation.engine.recipes import load_recipe
from separation.engine.separator import Separator, StemFiles
from separation.evaluation.metrics import level_dbfs, sdr
from separation.progress import Progress
from separation.report.page import Report, write_report
from separation.report.picture import Row, draw
from separation.system.places import shipped
from separation.system.record import RECORD, check_targets

SONG = shipped("weights") / "demo" / "song.flac"
TRUE_STEMS = shipped("weights") / "demo" / "stems"
CHOICES = ("vocals_instrumental", "all_6")
SEPARATED = 0.7  # share of the progress bar for the separation; the rest is for the page


def run_demo(
    folder: Path,
    *,
    options: EngineOptions = EngineOptions(),
    overwrite: bool = False,
    progress: Progress = Progress(),
) -> str:
    """Separate the demo song into two folders, `vocals_instrumental` and `all_6`; draw `stems.svg` and `stems.html`.

    Returns text to print: a table with the SDR in dB, the level in dBFS and the file of each stem, and the speed.

    Raises OutputError before any work if it would replace a file that this program did not write, unless `overwrite`.
    """
    started = time.monotonic()
    picture, page = folder / "stems.svg", folder / "stems.html"
    check_targets(folder, [picture.name, page.name, RECORD], overwrite=overwrite)
    for choice in CHOICES:
        stems = [f"{stem}.wav" for stem in load_recipe("demo", choice).stems]
        check_targets(folder / choice, [*stems, RECORD], overwrite=overwrite)
    pool = ModelPool(options)
    separated: dict[str, StemFiles] = {}
    for index, choice in enumerate(CHOICES):
        part = progress.part(SEPARATED * index / len(CHOICES), SEPARATED * (index + 1) / len(CHOICES))
        output = OutputOptions(overwrite=overwrite)
        separated[choice] = Separator("demo", choice, pool=pool).separate_file(
            SONG, folder / choice, output, progress=part
        )
    scores = {choice: {stem: _score(stem, path) for stem, path in files.items()} for choice, files in separated.items()}
    drawn, drawn_scores = separated[CHOICES[-1]], {stem: sdr_db for stem, (sdr_db, _) in scores[CHOICES[-1]].items()}
    rows = [Row(stem, _read(path), SAMPLE_RATE, f"SDR {drawn_scores[stem]:.1f} dB") for stem, path in drawn.items()]
    draw(picture, [Row("mixture", _read(SONG), SAMPLE_RATE), *rows], title="The demo song", overwrite=overwrite)
    report = Report("The demo song", SONG, drawn, drawn_scores)
    write_report(report, page, overwrite=overwrite, progress=progress.part(SEPARATED, 1))
    table = [f"{'stems':20} {'stem':13} {'SDR dB':>7} {'level dBFS':>11}  file"]
    for choice, files in separated.items():
        for stem, path in files.items():
            sdr_db, level = scores[choice][stem]
            table.append(f"{choice:20} {stem:13} {sdr_db:7.2f} {level:11.1f}  {path}")
    duration = sum(files.duration_seconds for files in separated.values())
    elapsed = sum(files.elapsed_seconds for files in separated.values())
    total = time.monotonic() - started
    return "\n".join(
        [
            *table,
            "",
            f"picture: {picture}",
            f"page to listen: {page}",
            f"{duration:.1f} s of audio separated in {elapsed:.1f} s: {duration / elapsed:.1f} times real-time "
            f"({total:.1f} s with loading and drawing; {pool.choice.reason})",
        ]
    )


def _score(stem: str, path: Path) -> tuple[float, float]:
    """A stem's SDR in dB, and its level in dBFS."""
    estimate = _read(path)
    return sdr(_true_stem(stem), estimate), level_dbfs(estimate)


def _read(path: Path) -> torch.Tensor:
    """The samples of a file, `[2, T]`."""
    with TemporaryDirectory() as folder, decode(path, Path(folder)) as wave:
        return wave.read(0, wave.n_samples)


def _true_stem(stem: str) -> torch.Tensor:
    """The true stem, `[2, T]`; `instrumental` is the sum of all stems except the vocals."""
    if stem != "instrumental":
        return _read(TRUE_STEMS / f"{stem}.ogg")
    return torch.stack([_read(path) for path in sorted(TRUE_STEMS.glob("*.ogg")) if path.stem != "vocals"]).sum(dim=0)
