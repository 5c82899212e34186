"""What the local page offers: a few things that most people want, in words, and behind them every recipe and model."""

from collections.abc import Sequence
from typing import Any

from separation.checkpoints import files
from separation.checkpoints.catalogue import files_for, missing, read_config
from separation.checkpoints.description import Checkpoint, WeightFile
from separation.checkpoints.facts import NO_LICENCE, TASKS
from separation.checkpoints.listing import Filter, listed
from separation.engine.recipes import Recipe, choices, load_recipe, names

# Recipe, its choice of stems, and what it is for in the words of musicians. The first one is chosen at first.
PRESETS = (
    ("standard", "vocals_instrumental", "Vocals and instrumental", "the voice, and everything else"),
    ("karaoke", "all", "Karaoke", "lead voice, backing voices and the band"),
    ("standard", "all_4", "Four stems", "vocals, drums, bass and other"),
    ("standard", "all_6", "Six stems", "the same, and guitar and piano"),
    ("standard", "drum_kit", "Drum kit", "kick, snare, toms, hi-hat and cymbals"),
)
# What the other recipes are for. A recipe that is not here has its name as its title.
RECIPES = {
    "best": "Best: the mean of several models, slow",
    "clean_vocals": "Clean vocals: without reverb and noise",
    "demo": "Demo: quick but rough, to try the program",
    "drum_kit_6": "Drum kit with ride and crash",
    "fast": "Fast: one small model",
    "instrumental_clean": "Instrumental with the least voice left in it",
    "instrumental_full": "Instrumental that loses the least",
    "strings": "Strings",
    "sw": "BS-RoFormer-SW",
}
UNKNOWN = "none stated"
WITHOUT_FIGURES = ("not stated", "no figures published")


def offers() -> dict[str, Any]:
    """The offers as JSON: `presets` and `recipes`, then `tasks` with `models` for each, and facts about all models.

    An offer has `order`, the keys with which a song is announced; `title`; `stems`; `models`, their names; and of its
    weights `bytes` and `missing`, those that must be downloaded; null if that is not known.
    """
    entries, _ = listed(Filter())
    models = {entry.model.name: entry.model for entry in entries}
    preset = {(recipe, stems) for recipe, stems, *_ in PRESETS}
    others = [(name, choice) for name in names() for choice in choices(name) if (name, choice) not in preset]
    recipes = [_of_recipe(load_recipe(*pair), RECIPES.get(pair[0], pair[0])) for pair in others]
    by_task = {
        task: sorted((model for model in models.values() if task in model.facts.tasks[:1]), key=_rank) for task in TASKS
    }
    by_task[""] = sorted((model for model in models.values() if not model.facts.tasks), key=_rank)
    return {
        "presets": [
            _of_recipe(load_recipe(recipe, stems), title) | {"hint": hint} for recipe, stems, title, hint in PRESETS
        ],
        "recipes": recipes,
        "tasks": {
            task: {"title": TASKS.get(task, "your own models"), "models": [_of_model(model) for model in found]}
            for task, found in by_task.items()
            if found
        },
        "facts": {model.name: _facts(model) for model in models.values()},
    }


def _of_recipe(recipe: Recipe, title: str) -> dict[str, Any]:
    weights = [file for name, stems in recipe.models.items() for file in files_for(read_config(name), stems)]
    left = [file for name, stems in recipe.models.items() for file in missing(name, stems)]
    return {
        "order": {"recipe": recipe.name, "stems": recipe.choice},
        "title": title,
        "stems": list(recipe.stems),
        "models": list(recipe.models),
        **_sizes(weights, left),
    }


def _of_model(model: Checkpoint) -> dict[str, Any]:
    return {
        "order": {"model": model.name},
        "title": model.facts.title or model.name,
        "stems": [*model.stems, *([model.residual] if model.residual else [])],
        "models": [model.name],
        **_sizes(model.files, missing(model.name)),
    }


def _sizes(weights: Sequence[WeightFile], left: Sequence[WeightFile]) -> dict[str, Any]:
    return {
        "bytes": files.known_bytes(weights),
        "missing": 0 if weights and not left else files.known_bytes(left),
        "by_hand": not weights or any(file.url is None for file in left),
    }


def _facts(model: Checkpoint) -> dict[str, str]:
    facts = model.facts
    return {
        "title": facts.title or model.name,
        "author": facts.author,
        "quality": UNKNOWN if facts.quality in WITHOUT_FIGURES else facts.quality,
        "licence": UNKNOWN if facts.licence == NO_LICENCE else facts.licence,
        "licence_class": facts.licence_class,
        "licence_source": facts.licence_source,
        "warning": facts.warning,
    }


def _rank(model: Checkpoint) -> tuple[float, str]:
    """A key to sort by: the highest published figure of the first stem comes first."""
    return -(model.facts.ranking_sdr(model.stems[0]) or 0.0), model.name
