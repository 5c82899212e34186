"""Which models there are for a task: all that have names here, filtered and sorted."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from separation.checkpoints import catalogue
from separation.checkpoints.description import Checkpoint
from separation.checkpoints.facts import LICENCES, TASKS
from separation.documents import quoted
from separation.errors import InputError, SeparationError
from separation.system.places import program
from separation.system.text import close_matches

SORTS = ("name", "quality")
MOST_NAMED = 30  # choices in an error


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which models to list, and how to sort them.

    Args:
        task: a key of TASKS.
        stem: a stem that they give, or a kind of it: `vocals` also finds `lead_vocals`.
        licence: one of LICENCES, the classes of licences.
        here: only models that are downloaded.
        sort: `name`, or `quality`: by the SDR of `stem` on its `ranking_test`, models without that figure last.
    """

    task: str | None = None
    stem: str | None = None
    licence: str | None = None
    here: bool = False
    sort: str = "name"

    @property
    def is_empty(self) -> bool:
        """Whether it lets every model through."""
        return self == Filter(sort=self.sort)

    @property
    def ranked_stem(self) -> str | None:
        """The stem whose SDR decides the order; None if the order is that of the names."""
        return None if self.sort != "quality" else self.stem or self.task


@dataclass(frozen=True)
class Entry:
    """A model in the list."""

    model: Checkpoint
    is_here: bool


def listed(wanted: Filter) -> tuple[list[Entry], dict[str, str]]:
    """The models that pass the filter, in its order; and the errors of models that cannot be read, by name.

    Raises InputError for a task, a stem or an order that there is not.
    """
    models, errors = _read(catalogue.available())
    _check(wanted, models)
    entries = [Entry(model, catalogue.has_all_files(model)) for model in models if _passes(model, wanted)]
    if (stem := wanted.ranked_stem) is not None:
        entries.sort(key=lambda entry: _rank(entry.model.facts.ranking_sdr(stem)))
    return entries, errors


def without_one(wanted: Filter) -> dict[str, int]:
    """How many models pass if one part of the filter is left out, by the name of that part; only where some do."""
    models, _ = _read(catalogue.available())
    parts = [name for name in ("task", "stem", "licence", "here") if getattr(wanted, name)]
    rests = {name: replace(wanted, **{name: getattr(Filter(), name)}) for name in parts}
    counts = {name: sum(_passes(model, rest) for model in models) for name, rest in rests.items()}
    return {name: count for name, count in counts.items() if count}


def _passes(model: Checkpoint, wanted: Filter) -> bool:
    return (
        wanted.task in (None, *model.facts.tasks)
        and (wanted.stem is None or gives(model, wanted.stem))
        and wanted.licence in (None, model.facts.licence_class)
        and (not wanted.here or catalogue.has_all_files(model))
    )


def _rank(sdr: float | None) -> tuple[bool, float]:
    """A key to sort by: high figures first, missing ones last."""
    return sdr is None, -(sdr or 0.0)


def gives(model: Checkpoint, stem: str) -> bool:
    """Whether a stem or the residual of the model is `stem` or a kind of it, as `lead_vocals` is of `vocals`."""
    return any(_is_kind(given, stem) for given in _outputs([model]))


def _is_kind(given: str, stem: str) -> bool:
    return given == stem or (given.endswith(f"_{stem}") and not given.startswith("no_"))


def _outputs(models: Iterable[Checkpoint]) -> dict[str, None]:
    """The stems and residuals that models give."""
    return dict.fromkeys(stem for model in models for stem in (*model.stems, model.residual) if stem is not None)


def _read(names: Sequence[str]) -> tuple[list[Checkpoint], dict[str, str]]:
    models, errors = [], {}
    for name in names:
        try:
            models.append(catalogue.read_config(name))
        except SeparationError as e:
            errors[name] = str(e)
    return models, errors


def _check(wanted: Filter, models: Sequence[Checkpoint]) -> None:
    if wanted.task not in (None, *TASKS) and wanted.task in _outputs(models):
        raise InputError(f"{wanted.task} is a stem, not a task: use --stem {wanted.task}")
    for value, choices, kind in (
        (wanted.task, TASKS, "task"),
        (wanted.licence, LICENCES, "licence"),
        (wanted.sort, SORTS, "order"),
    ):
        if value is not None and value not in choices:
            raise InputError(f"unknown {kind} {quoted(value)}: use {_instead(value, choices)}")
    if wanted.sort == "quality" and wanted.stem is None and (wanted.task is None or _no_stem_of_its_own(wanted.task)):
        raise InputError(
            "quality compares models by the SDR of one stem on one test set: add --stem, such as --stem "
            + _most_measured(model for model in models if wanted.task in (None, *model.facts.tasks))
        )
    if wanted.stem is not None:
        _check_stem(wanted.stem, wanted.task, [model for model in models if wanted.task in (None, *model.facts.tasks)])


def _no_stem_of_its_own(task: str) -> bool:
    return task not in ("vocals", "instrumental", "drums", "bass", "guitar", "piano", "other")


def _most_measured(models: Iterable[Checkpoint]) -> str:
    """The stem for which most of the models have a figure to rank them by; of none, which most of them give."""
    counts = Counter[str]()
    for model in models:
        for stem in model.stems:
            counts[stem] += 1 if model.facts.ranking_sdr(stem) is None else 1000
    return counts.most_common(1)[0][0]


def _check_stem(stem: str, task: str | None, models: Sequence[Checkpoint]) -> None:
    outputs = _outputs(models)
    if not any(_is_kind(given, stem) for given in outputs):
        named = [output for output in outputs if not output.startswith("no_")]
        for_this = "" if task is None else f" for {task}"
        raise InputError(f"no model{for_this} gives the stem {quoted(stem)}: use {_instead(stem, named)}")


def _instead(word: str, choices: Iterable[str]) -> str:
    """What to use instead of a word that is none of the choices, likely ones first; not a whole page of them."""
    close = close_matches(word, choices)
    others = [choice for choice in choices if choice not in close]
    if len(others) > MOST_NAMED:
        return " or ".join([*close, f"one that `{program()} models list` prints"])
    rest = ", ".join(others)
    if not close or not rest:
        return " or ".join(close) or f"one of {rest}"
    return f"{' or '.join(close)}, or another of {rest}"
