"""What a YAML says about a checkpoint to people who choose one: its tasks, author, licence, quality and warning."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from separation.checkpoints.keys import refuse_unknown, take
from separation.documents import quoted
from separation.errors import CheckpointError

FACTS = {"title", "author", "task", "licence", "licence_source", "quality", "source", "warning"}

# What models are for, in the order in which they are listed. `task` in a YAML is one of these words, or a list of them.
TASKS = {
    "vocals": "the voice",
    "instrumental": "the song without the voice",
    "karaoke": "the lead vocals, and the song without them",
    "four_stems": "vocals, drums, bass and other",
    "six_stems": "the same, and guitar and piano",
    "all_stems": "dozens of instruments",
    "drums": "the drums",
    "percussion": "single drums and other percussion",
    "bass": "the bass",
    "guitar": "the guitar and other plucked strings",
    "piano": "the piano and other keys",
    "strings": "the strings",
    "winds": "the winds",
    "synth": "the synthesizer",
    "other": "another part of a song",
    "drum_kit": "the parts of a drums stem",
    "de-reverb": "less reverb",
    "de-echo": "less echo",
    "denoise": "less noise",
    "de-bleed": "less of the other instruments in a stem",
    "aspiration": "breaths in a vocals stem",
    "gender": "male and female singers of a vocals stem",
    "crowd": "the audience of a concert",
    "phantom_centre": "what both channels have in common",
    "cinematic": "speech, music and effects of a film",
    "restoration": "what lossy compression has removed",
}
# Metrics by their keys in a YAML, as they are printed.
METRICS = {"sdr": "dB SDR", "bleedless": "bleedless", "fullness": "fullness", "l1_freq": "L1 frequency"}
# Models are ranked by the SDR of a stem on one test set. Figures of different test sets cannot be compared.
RANKING_TEST = "MVSEP Multisong"
OTHER_RANKING_TESTS = {  # of stems that Multisong does not have
    "guitar": "MVSEP guitar leaderboard",
    "piano": "MVSEP piano leaderboard",
    "wind": "MVSEP wind leaderboard",
    "bowed_strings": "MVSEP strings leaderboard",
    **dict.fromkeys(("kick", "snare", "toms", "hihat", "cymbals"), "DrumSep test"),
}
UNNAMED_TEST = "test set not named"
NO_LICENCE = "not stated"
# The class of a licence is the first whose pattern occurs in it.
LICENCE_CLASSES = {
    "none stated": r"none stated|not stated|unknown",
    "non-commercial": r"\bnc\b|non-commercial",
    "copyleft": r"gpl|\bsa\b|mpl",
    "permissive": r"\bmit\b|apache|bsd|isc|unlicense|\bcc0\b|cc.by|public domain",
}
LICENCES = (*LICENCE_CLASSES, "other")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Published figures of a checkpoint on one test set."""

    test: str | None  # None: their source does not name it
    source: str
    figures: Mapping[str, Mapping[str, float]]  # [metric][stem]; the metrics are keys of METRICS

    def __str__(self) -> str:
        texts = [
            f"{', '.join(f'{stem} {figure:.2f}' for stem, figure in by_stem.items())} {METRICS[metric]}"
            for metric, by_stem in self.figures.items()
        ]
        return f"{', '.join(texts)} ({self.test or UNNAMED_TEST}{f', {self.source}' if self.source else ''})"

    def as_json(self) -> dict[str, Any]:
        """The scores as a JSON object."""
        return {"test": self.test, "source": self.source or None, **self.figures}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a YAML says about a checkpoint, beyond what loads it."""

    title: str
    author: str
    tasks: tuple[str, ...]  # keys of TASKS, the main one first
    licence: str  # as its author states it
    licence_source: str  # where, or who reports it
    quality: str  # all figures as one text
    scores: tuple[Scores, ...]
    source: str  # of the hyper-parameters
    warning: str  # what a user must know before using it; one sentence

    @property
    def licence_class(self) -> str:
        """A key of LICENCE_CLASSES, or `other`."""
        return licence_class(self.licence)

    def as_json(self) -> dict[str, Any]:
        """The facts as a JSON object; null for what is not stated."""
        texts = {key: getattr(self, key) or None for key in ("title", "author", "licence_source", "source", "warning")}
        return texts | {
            "tasks": list(self.tasks),
            "licence": self.licence,
            "licence_class": self.licence_class,
            "quality": self.quality,
            "scores": [scores.as_json() for scores in self.scores],
        }

    def ranking_sdr(self, stem: str) -> float | None:
        """The SDR of this stem in dB on its `ranking_test`, if one is published."""
        test = ranking_test(stem)
        found = [each.figures.get("sdr", {}).get(stem) for each in self.scores if each.test == test]
        return next((figure for figure in found if figure is not None), None)


def ranking_test(stem: str) -> str:
    """The test set on which models are compared for this stem."""
    return OTHER_RANKING_TESTS.get(stem, RANKING_TEST)


def licence_class(licence: str) -> str:
    """What a licence allows, roughly: `permissive`, `copyleft`, `non-commercial`, `none stated`, or `other`."""
    found = (name for name, pattern in LICENCE_CLASSES.items() if re.search(pattern, licence.replace("_", " "), re.I))
    return next(found, "other")


def facts_in(document: Mapping[str, Any], path: Path) -> Facts:
    """The facts in the content of the YAML file `path`. Raises CheckpointError for a wrong value."""
    quality, scores = _quality(document.get("quality"), path)
    texts = {key: take(document, key, str, path, default="") for key in FACTS - {"task", "quality", "licence"}}
    licence = take(document, "licence", str, path, default=NO_LICENCE)
    return Facts(tasks=_tasks(document, path), licence=licence, quality=quality, scores=scores, **texts)


def _tasks(document: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    task = document.get("task", [])
    words = take({"task": [task] if isinstance(task, str) else task}, "task", list, path)
    if unknown := [word for word in words if word not in list(TASKS)]:
        raise CheckpointError(f"{path}: unknown task {quoted(unknown[0])}: use one of {', '.join(TASKS)}")
    return tuple(words)


def _quality(value: Any, path: Path) -> tuple[str, tuple[Scores, ...]]:
    """The figures as a text, and those that name their stems."""
    if not isinstance(value, list):
        return take({} if value is None else {"quality": value}, "quality", str, path, default="not stated"), ()
    scores = tuple(_scores(entry, path) for entry in value)
    return "; ".join(map(str, scores)) or "not stated", scores


def _scores(entry: Any, path: Path) -> Scores:
    if not isinstance(entry, dict):
        raise CheckpointError(
            f"{path}: each entry of quality must be a section with test, source and figures such as "
            f"`sdr: {{vocals: 9.5}}`, not {quoted(entry)}"
        )
    refuse_unknown(set(entry) - METRICS.keys() - {"test", "source"}, path)
    figures = {metric: take(entry, metric, dict, path) for metric in METRICS if metric in entry}
    for by_stem in figures.values():
        for figure in by_stem.values():
            if isinstance(figure, bool) or not isinstance(figure, int | float):
                raise CheckpointError(f"{path}: a figure of quality must be a number, not {quoted(figure)}")
    if not figures:
        raise CheckpointError(f"{path}: an entry of quality has no figures: add one of {', '.join(METRICS)}")
    test = None if entry.get("test") is None else take(entry, "test", str, path)
    return Scores(test=test, source=take(entry, "source", str, path, default=""), figures=figures)
