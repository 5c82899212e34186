"""The tables of models in docs/checkpoints.md, made from configs/models.

`PYTHONPATH=.:tests python tests/helpers/models_table.py` writes them anew.
"""

import re
from pathlib import Path

from separation.checkpoints import catalogue
from separation.checkpoints.description import Checkpoint
from separation.checkpoints.facts import METRICS, TASKS, UNNAMED_TEST, Scores

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- models: written by tests/helpers/models_table.py -->", "<!-- end of models -->"
MOST_STEMS = 8  # named in a row


def shipped() -> list[str]:
    """The names of the models in configs/models."""
    return sorted(path.stem for path in catalogue.CONFIGS.glob("*.yaml"))


def tables() -> str:
    """A table for each task; a model is in that of its first task."""
    models = [catalogue.read_config(name) for name in shipped()]
    parts = []
    for task, meaning in TASKS.items():
        rows = [_row(model) for model in models if model.facts.tasks[:1] == (task,)]
        if rows:
            head = "| name | stems | MB | licence | quality, SDR in dB |\n|---|---|---|---|---|"
            parts.append("\n".join([f"`{task}`: {meaning}", "", head, *rows]))
    return "\n\n".join(parts)


def _row(model: Checkpoint) -> str:
    stems = ", ".join(model.stems) if len(model.stems) <= MOST_STEMS else f"{len(model.stems)} stems"
    sizes = [file.bytes for file in model.files]
    total = f"{sum(size for size in sizes if size) / 1e6:.0f}" if all(sizes) else "not stated"
    cells = [f"`{model.name}`", stems, total, model.facts.licence, _quality(model)]
    return f"| {' | '.join(cells)} |"


def _quality(model: Checkpoint) -> str:
    return "; ".join(map(_scores, model.facts.scores)) or model.facts.quality


def _scores(scores: Scores) -> str:
    """The SDR, else the other figures."""
    figures = {"sdr": scores.figures["sdr"]} if "sdr" in scores.figures else scores.figures
    texts = [
        ", ".join(f"{stem} {figure:.2f}" for stem, figure in by_stem.items())
        + ("" if metric == "sdr" else f" {METRICS[metric]}")
        for metric, by_stem in figures.items()
    ]
    return f"{'; '.join(texts)} ({scores.test or UNNAMED_TEST})"


def written(text: str) -> str:
    """The document with these tables."""
    return re.sub(rf"(?<={re.escape(BEGIN)}\n).*(?=\n{END})", lambda _: f"\n{tables()}\n", text, flags=re.DOTALL)


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
