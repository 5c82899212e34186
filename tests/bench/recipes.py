"""The SDR of each stem by each kind of recipe source: one model, one after another, an average, the residual.

    PYTHONPATH=. python tests/bench/recipes.py SONGS --htdemucs FILE

SONGS and FILE are as for knobs.py. If the package stempeg is installed, its clip of real music is measured too.
"""

import argparse
from pathlib import Path

import torch
import yaml
from torch import Tensor

from knobs import SAMPLE_RATE, Song, read_songs, real_clip
from separation import ModelPool, Separator, load_model
from separation.engine.recipes import Recipe, resolve
from separation.evaluation.metrics import sdr

STEMS = ("vocals", "drums", "bass", "other")
THREE = STEMS[:3]
# Sources, as a recipe writes them, and the stems they are measured for. All other stems come from `htdemucs`.
SOURCES: dict[str, tuple[str, ...]] = {
    "htdemucs": STEMS,
    "residual": ("other",),
    "[htdemucs, residual]": ("other",),
    "htdemucs after vocals": STEMS[1:],
    "[htdemucs, htdemucs after vocals]": STEMS[1:],
    "htdemucs after drums and bass": ("vocals",),
    "[htdemucs, htdemucs after drums and bass]": ("vocals",),
    "demo": THREE,
    "[htdemucs, demo]": THREE,
    "{htdemucs: 3, demo: 1}": THREE,
    "{htdemucs: 9, demo: 1}": THREE,
    **{
        f"{model} with {views}": stems
        for model, stems in (("htdemucs", STEMS), ("demo", THREE))
        for views in ("polarity", "channels", "tta", "2 shifts", "4 shifts", "8 shifts")
    },
}


def measure(sources: dict[str, tuple[str, ...]], songs: list[Song], pool: ModelPool) -> dict[tuple[str, str], float]:
    """The mean SDR over the songs, in dB, of each stem by each source.

    One recipe holds all of them, so that a run that several share happens once.
    """
    alone = dict.fromkeys(STEMS, "htdemucs")
    recipes = {
        (source, stem): resolve("bench", "all_4", alone | {stem: yaml.safe_load(source)})
        for source, stems in sources.items()
        for stem in stems
    }
    merged = Recipe("bench", "all", {repr(key): recipe.outputs[key[1]] for key, recipe in recipes.items()})
    separator = Separator(merged, pool=pool)
    means = dict.fromkeys(recipes, 0.0)
    for _, mixture, true_stems in songs:
        for (source, stem), estimate in zip(recipes, separator.separate(mixture).values(), strict=True):
            means[source, stem] += stem_score(true_stems, stem, estimate) / len(songs)
    return means


def stem_score(true_stems: dict[str, Tensor], stem: str, estimate: Tensor) -> float:
    """The SDR in dB of one of four stems; guitar and piano count as other."""
    parts = ("other", "guitar", "piano") if stem == "other" else (stem,)
    return sdr(torch.stack([true_stems[part] for part in parts if part in true_stems]).sum(dim=0), estimate)


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="What recipes give, as Markdown.")
    parser.add_argument("songs", type=Path, help="folder with a folder a song: mixture.wav and its stems")
    parser.add_argument("--htdemucs", type=Path, metavar="FILE", required=True, help="the genuine weights")
    options = parser.parse_args()
    pool = ModelPool()
    chosen = {"device": pool.choice.device, "precision": pool.choice.precision}
    pool._models = {
        "htdemucs": load_model("htdemucs", checkpoint=options.htdemucs, **chosen),
        "demo": load_model("demo", **chosen),
    }
    for title, songs in {"synthetic songs": read_songs(options.songs), "real clip": real_clip()}.items():
        if songs:
            seconds = sum(mixture.shape[1] for _, mixture, _ in songs) / SAMPLE_RATE
            means = measure(SOURCES, songs, pool)
            print(f"\n{len(songs)} {title}, {seconds:.0f} s\n")
            print(row("SDR in dB", *STEMS) + "\n" + "|---" * 5 + "|")
            for source in SOURCES:
                scores = [f"{means[source, stem]:.2f}" if (source, stem) in means else "" for stem in STEMS]
                print(row(f"`{source}`", *scores))


if __name__ == "__main__":
    main()
