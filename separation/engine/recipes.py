"""configs/recipes/<recipe>/<stems>.yaml -> Recipe: which model gives which stem.

A recipe has a line a stem, in the order of the output: its name and its source.

    vocals: MODEL                   a model in configs/models, run on the mixture
    drums: MODEL after vocals       run on the mixture minus that stem, or minus `vocals and bass`
    kick: MODEL of drums            run on that stem, or on the sum `drums and bass`
    instrumental: residual          the mixture minus the other stems that are given
    bass: [SOURCE, SOURCE]          the mean of several
    bass: {SOURCE: 2, SOURCE: 1}    their weighted mean
    (drums): SOURCE                 in brackets: needed on the way, not given

All of this is linear: a stem is a weighted sum of the mixture and of what models estimate, and so is what a model is
run on. A recipe is resolved into these sums, and they are all that the engine needs.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from separation.checkpoints.catalogue import files_for, read_config
from separation.documents import DocumentError, escaped, quoted, read_yaml
from separation.errors import RecipeError
from separation.system.places import shipped

FOLDER = shipped("configs") / "recipes"
RESIDUAL = "residual"
MOST_LINES = 64
MOST_STEPS = 6  # models on the way to a stem; what it takes to compare two estimates grows with their power

_KEY = re.compile(r"(?P<bracket>\()?(?P<stem>[\w-]{1,64})(?(bracket)\))")
_SOURCE = re.compile(rf"(?!{RESIDUAL} )(?P<model>\S+)(?: (?P<word>of|after) (?P<stems>\S+(?: and \S+)*))?")

Combination = tuple[tuple["Estimate | None", float], ...]  # a sum of estimates, each with its weight; None: the mixture


@dataclass(frozen=True)
class Run:
    """A model that is run over an input, once."""

    model: str
    input: Combination


class Estimate(NamedTuple):
    """What a run gives for a stem."""

    run: Run
    stem: str


MIXTURE: Combination = ((None, 1.0),)


@dataclass(frozen=True)
class Recipe:
    """A recipe for one choice of stems, e.g. `standard`, `all_4`."""

    name: str
    choice: str
    outputs: dict[str, Combination]  # stem -> what it is, in the order of the output

    @property
    def stems(self) -> tuple[str, ...]:
        """The stems that come out, in order."""
        return tuple(self.outputs)

    @property
    def runs(self) -> dict[Run, tuple[str, ...]]:
        """What the stems need, each run once and after those that it needs, with the stems that are taken from it."""
        return self.runs_without(lambda estimate: False)

    def runs_without(self, is_known: Callable[[Estimate], bool]) -> dict[Run, tuple[str, ...]]:
        """As `runs`, less those estimates that are known and what only they need.

        `is_known` is asked once for each that is needed.
        """
        needed = self._estimates(is_known)
        runs = dict.fromkeys(estimate.run for estimate in needed)
        return {run: tuple(estimate.stem for estimate in needed if estimate.run == run) for run in runs}

    @property
    def models(self) -> dict[str, tuple[str, ...]]:
        """The models that are needed, each once, with the stems that are taken from it."""
        models: dict[str, tuple[str, ...]] = {}
        for run, stems in self.runs.items():
            models[run.model] = tuple(dict.fromkeys((*models.get(run.model, ()), *stems)))
        return models

    def two_stems(self, stem: str) -> "Recipe":
        """The recipe that gives this stem and `no_<stem>`, the mixture minus it, and needs only what this stem needs.

        Raises RecipeError for a stem that is none of the recipe's.
        """
        if stem not in self.outputs:
            raise _no_stem(self.name, stem, self.stems)
        rest = _sum((MIXTURE, 1.0), (self.outputs[stem], -1.0))
        return replace(self, outputs={stem: self.outputs[stem], f"no_{stem}": rest})

    def _estimates(self, is_known: Callable[[Estimate], bool]) -> list[Estimate]:
        """Those that the stems need and that are not known, each once and after those that its run needs."""
        needed: list[Estimate] = []
        asked: set[Estimate] = set()

        def add(combination: Combination) -> None:
            for estimate, _ in combination:
                if estimate is not None and estimate not in asked:
                    asked.add(estimate)
                    if not is_known(estimate):
                        add(estimate.run.input)
                        needed.append(estimate)

        for combination in self.outputs.values():
            add(combination)
        return needed


def names() -> list[str]:
    """The recipes that there are."""
    return sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())


def choices(name: str) -> list[str]:
    """The choices of stems that a recipe offers."""
    return sorted(path.stem for path in (FOLDER / name).glob("*.yaml"))


def load_recipe(name: str, choice: str, *, two_stems: str | None = None) -> Recipe:
    """Read `configs/recipes/<name>/<choice>.yaml`.

    With `two_stems`, what gives that stem and the mixture minus it: by this choice or, where it has no such stem, by
    the recipe's first one that has.

    Raises RecipeError for an unknown recipe, choice or stem, or a file that does not make sense.
    """
    if name not in names():
        raise RecipeError(f"unknown recipe {name!r}: choose one of {', '.join(names())}")
    if choice not in choices(name):
        raise RecipeError(f"recipe {name!r} has no stems {choice!r}: choose one of {', '.join(choices(name))}")
    if two_stems is None:
        return _read(name, choice)
    found: list[str] = []
    for each in sorted(choices(name), key=lambda each: each != choice):
        recipe = _read(name, each)
        if two_stems in recipe.stems:
            return recipe.two_stems(two_stems)
        found += recipe.stems
    raise _no_stem(name, two_stems, dict.fromkeys(found))


def one_model(name: str, stems: tuple[str, ...]) -> Recipe:
    """The recipe that gives these stems of one model, run on the mixture."""
    return Recipe(name, "all", {stem: _estimate(name, MIXTURE, stem) for stem in stems})


def resolve(name: str, choice: str, lines: Mapping[Any, Any]) -> Recipe:
    """The recipe that these lines of YAML describe; whether there are such models is not looked at.

    Raises RecipeError for lines that do not make sense.
    """
    where = f"{choice}.yaml of recipe {name!r}"
    if len(lines) > MOST_LINES:
        raise RecipeError(f"{where} has {len(lines):,} lines: leave it at {MOST_LINES} stems")
    sources: dict[str, list[tuple[re.Match[str], float]]] = {}
    given: list[str] = []
    for key, value in lines.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise RecipeError(
                f"{where}: {quoted(key)} is not a stem: write its name, or (NAME) if it is not to be given"
            )
        stem = match["stem"]
        if stem in sources:
            raise RecipeError(f"{where}: {stem} has two lines: remove one")
        sources[stem] = _sources(value, f"{where}: {stem}")
        given += [] if match["bracket"] else [stem]
    if not given:
        raise RecipeError(f"{where} gives no stem: write at least one without brackets")
    resolved: dict[str, Combination] = {}
    steps: dict[str, int] = {}

    def stem_sum(stem: str, above: tuple[str, ...]) -> Combination:
        if stem in above:
            circle = " needs ".join((*above[above.index(stem) :], stem))
            raise RecipeError(f"{where}: {circle}: give one of them a source that does without the others")
        if stem not in resolved:
            parts = ((source_sum(source, stem, (*above, stem)), weight) for source, weight in sources[stem])
            resolved[stem] = _sum(*parts)
        return resolved[stem]

    def source_sum(source: re.Match[str], stem: str, above: tuple[str, ...]) -> Combination:
        model, word = source["model"], source["word"]
        named = source["stems"].split(" and ") if word else []
        for other in named:
            if other not in sources:
                raise RecipeError(
                    f"{where}: {stem}: {quoted(source[0])} needs {escaped(other)}, which has no line: write one, in "
                    f"brackets as `({escaped(other)}): MODEL` if it is not to be given"
                )
        if model == RESIDUAL:
            named = [other for other in given if other != stem]
            if not named:
                raise RecipeError(
                    f"{where}: {stem}: no other stem is given that could be taken from the mixture: write a model"
                )
        # In the order of the lines, so that the same input is seen to be the same, however it is written.
        needed = [other for other in sources if other in named]
        others = [stem_sum(other, above) for other in needed]
        steps[stem] = max(steps.get(stem, 0), 1 + max((steps[other] for other in needed), default=0))
        if steps[stem] > MOST_STEPS:
            raise RecipeError(f"{where}: {stem} needs more than {MOST_STEPS - 1} others in turn: leave some out")
        if word == "of":
            return _estimate(model, _sum(*((other, 1.0) for other in others)), stem)
        rest = _sum((MIXTURE, 1.0), *((other, -1.0) for other in others))
        return rest if model == RESIDUAL else _estimate(model, rest, stem)

    return Recipe(name, choice, {stem: stem_sum(stem, ()) for stem in given})


def _read(name: str, choice: str) -> Recipe:
    path = FOLDER / name / f"{choice}.yaml"
    where = f"{path.name} of recipe {name!r}"
    try:
        lines = read_yaml(path)
    except DocumentError as e:
        raise RecipeError(f"{where} {e}") from e
    if not isinstance(lines, dict):
        raise RecipeError(f"{where} must map each stem to its source, such as `vocals: htdemucs`")
    recipe = resolve(name, choice, lines)
    for model, stems in recipe.models.items():
        try:
            files_for(read_config(model), stems)
        except RecipeError as e:
            raise RecipeError(f"{where}, {' and '.join(stems)}: {e}") from e
    return recipe


def _sources(value: object, where: str) -> list[tuple[re.Match[str], float]]:
    """The sources on a line, taken apart, each with its share of the mean."""
    if isinstance(value, dict):
        pairs: list[tuple[Any, Any]] = list(value.items())
    else:
        pairs = [(source, 1.0) for source in (value if isinstance(value, list) else [value])]
    sources: list[tuple[re.Match[str], float]] = []
    for source, weight in pairs or [(value, 1.0)]:
        match = _SOURCE.fullmatch(source) if isinstance(source, str) else None
        if match is None:
            raise RecipeError(
                f"{where}: {quoted(source)} is not a source: write a model, `MODEL of STEM`, `MODEL after STEM` "
                f"or {RESIDUAL!r}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
            raise RecipeError(
                f"{where}: the weight of {quoted(source)} is {quoted(weight)}: write a number above 0 and below 1e9"
            )
        sources.append((match, weight))
    total = sum(weight for _, weight in sources)
    return [(source, weight / total) for source, weight in sources]


def _estimate(model: str, input: Combination, stem: str) -> Combination:
    return ((Estimate(Run(model, input), stem), 1.0),)


def _sum(*parts: tuple[Combination, float]) -> Combination:
    """The sum of combinations, each times a factor; what cancels out is left out."""
    weights: dict[Estimate | None, float] = {}
    for combination, factor in parts:
        for estimate, weight in combination:
            weights[estimate] = weights.get(estimate, 0.0) + factor * weight
    return tuple((estimate, weight) for estimate, weight in weights.items() if weight)


def _no_stem(recipe: str, stem: str, there: Iterable[str]) -> RecipeError:
    return RecipeError(f"recipe {recipe!r} has no stem {stem!r}: choose one of {', '.join(there)}")
