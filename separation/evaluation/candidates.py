"""Which models and recipes can give a stem, and which of them are here. Importing it is cheap: it needs no PyTorch."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from separation.checkpoints import catalogue, files
from separation.checkpoints.description import Checkpoint
from separation.checkpoints.listing import Filter, listed
from separation.documents import quoted
from separation.engine.selection import Selection
from separation.errors import InputError
from separation.system.text import close_matches


@dataclass(frozen=True)
class Candidate:
    """A model or a recipe that gives the stem in question."""

    name: str
    selection: Selection

    @property
    def missing(self) -> list[str]:
        """The names of its models that are not downloaded."""
        return [name for name, stems in self.selection.models().items() if not catalogue.is_here(name, stems)]


@dataclass(frozen=True)
class Candidates:
    """What to compare: which stem, by which candidates."""

    stem: str
    here: tuple[Candidate, ...]
    missing: tuple[Candidate, ...]  # not downloaded; recipes first, those with a warning last
    unreadable: dict[str, str]  # model -> why its description cannot be read


def find_candidates(task: str | None, stem: str | None, recipes: Sequence[str] = ()) -> Candidates:
    """The models for a task that give the stem, and these recipes.

    Without a task, all models that give the stem; a user's own models, which state no task, always count if they give
    it. Without a stem, it is the one that the task is named after, or else the one that most models for it name first,
    if they give two at most.

    Raises InputError if there is neither a task nor a stem, if nothing gives the stem, or if the task has several; and
    RecipeError for an unknown recipe or a recipe without that stem.
    """
    if task is None and stem is None:
        raise InputError("there is no task and no stem to compare models for: add --task vocals, or --stem drums")
    entries, unreadable = listed(Filter())
    readable = {entry.model.name: entry.model for entry in entries}
    for_task = {entry.model.name: entry.model for entry in listed(Filter(task=task))[0]}
    stem = stem or _main_stem(str(task), for_task)
    wanted = for_task | {name: model for name, model in readable.items() if not model.facts.tasks}
    found = [
        Candidate(name, Selection(model_name=name, two_stems=stem))
        for name, model in sorted(wanted.items())
        if stem in _stems(model)
    ]
    found += [Candidate(f"recipe {name}", Selection(recipe=name, two_stems=stem)) for name in dict.fromkeys(recipes)]
    missing = [candidate for candidate in found if candidate.missing]
    missing.sort(key=lambda candidate: _advised(readable.get(candidate.name), stem), reverse=True)
    if not found:
        stems = dict.fromkeys(each for model in wanted.values() for each in _stems(model))
        close = " or ".join(close_matches(stem, stems)) or "one that `separation models list` names"
        for_this = "" if task is None else f" for {task}"
        raise InputError(f"no model{for_this} gives the stem {quoted(stem)}: use {close}")
    return Candidates(stem, tuple(each for each in found if each not in missing), tuple(missing), unreadable)


def size_bytes(candidate: Candidate) -> int | None:
    """The size of the files that a candidate lacks; None if it is not known."""
    wanted = candidate.selection.models()
    return files.known_bytes([file for name, stems in wanted.items() for file in catalogue.missing(name, stems)])


def _stems(model: Checkpoint) -> tuple[str, ...]:
    """The stems that a model gives, with what they leave of the mixture, if that has a name."""
    return (*model.stems, *([model.residual] if model.residual else []))


def _advised(model: Checkpoint | None, stem: str) -> tuple[bool, float]:
    """A key to sort by: recipes (None) highest, then by the published SDR; models with a warning lowest."""
    if model is None:
        return True, math.inf
    sdr = model.facts.ranking_sdr(stem)
    return not model.facts.warning, -math.inf if sdr is None else sdr


def _main_stem(task: str, models: Mapping[str, Checkpoint]) -> str:
    if any(task in _stems(model) for model in models.values()):
        return task
    if any(len(_stems(model)) > 2 for model in models.values()):
        stems = dict.fromkeys(stem for model in models.values() for stem in _stems(model))
        raise InputError(f"models for {task} give several stems: add --stem, one of {', '.join(stems)}")
    (stem, count), *others = Counter(model.stems[0] for model in models.values()).most_common()
    if others and count == 1:
        raise InputError(f"models for {task} give several stems: add --stem, one of {', '.join([stem, *dict(others)])}")
    return stem
