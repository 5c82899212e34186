"""Recipes: which models give which stems. Each choice of stems is a file, configs/recipes/<recipe>/<stems>.yaml.

The file has one line per stem, in the order of the output: its name and its source.

    vocals: MODEL                   a model in configs/models, run on the mixture
    drums: MODEL after vocals       run on the mixture minus that stem, or minus `vocals and bass`
    kick: MODEL of drums            run on that stem, or on the sum `drums and bass`
    instrumental: residual          the mixture minus the other stems of the output
    bass: [SOURCE, SOURCE]          the mean of several sources
    bass: {SOURCE: 2, SOURCE: 1}    their weighted mean
    (drums): SOURCE                 in brackets: used by other lines, but not part of the output

All of this is linear: every stem, and every input of a model, is a weighted sum of the mixture and of models'
estimates. A recipe is resolved into these sums, which are all that the engine needs.
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
MOST_STEPS = 6  # models in a chain; the time to compare two estimates grows exponentially with it

_KEY = re.compile(r"(?P<bracket>\()?(?P<stem>[\w-]{1,64})(?(bracket)\))")
_SOURCE = re.compile(rf"(?!{RESIDUAL} )(?P<model>\S+)(?: (?P<word>of|after) (?P<stems>\S+(?: and \S+)*))?")

Combination = tuple[tuple["Estimate | None", float], ...]  # a weighted sum of estimates; None stands for the mixture


@dataclass(frozen=True)
class Run:
    """One run of a model over an input."""

    model: str
    input: Combination


class Estimate(NamedTuple):
    """A model's output for a stem in one run."""

    run: Run
    stem: str


MIXTURE: Combination = ((None, 1.0),)


@dataclass(frozen=True)
class Recipe:
    """A recipe for one choice of stems, such as `standard`, `all_4`."""

    name: str
    choice: str
    outputs: dict[str, Combination]  # by stem, in the order of the output

    @property
    def stems(self) -> tuple[str, ...]:
        """The names of the stems, in order."""
        return tuple(self.outputs)

    @property
    def runs(self) -> dict[Run, tuple[str, ...]]:
        """The runs that are needed, each with the stems to take from it. A run comes after the runs it depends on."""
        return self.runs_without(lambda estimate: False)

    def runs_without(self, is_known: Callable[[Estimate], bool]) -> dict[Run, tuple[str, ...]]:
        """As `runs`, without estimates that are known already and without what only they need.

        `is_known` is called once for each estimate that is needed.
        """
        needed = self._estimates(is_known)
        runs = dict.fromkeys(estimate.run for estimate in needed)
        return {run: tuple(estimate.stem for estimate in needed if estimate.run == run) for run in runs}

    @property
    def inputs(self) -> set[Run]:
        """The runs of whose estimates the input of another run is made."""
        return {estimate.run for run in self.runs for estimate, _ in run.input if estimate is not None}

    @property
    def models(self) -> dict[str, tuple[str, ...]]:
        """The models that are needed, each with the stems to take from it."""
        models: dict[str, tuple[str, ...]] = {}
        for run, stems in self.runs.items():
            models[run.model] = tuple(dict.fromkeys((*models.get(run.model, ()), *stems)))
        return models

    def two_stems(self, stem: str) -> "Recipe":
        """The recipe for only this stem and `no_<stem>`, the mixture minus it.

        Raises RecipeError if the recipe does not have the stem.
        """
        if stem not in self.outputs:
            raise _no_stem(self.name, stem, self.stems)
        rest = _sum((MIXTURE, 1.0), (self.outputs[stem], -1.0))
        return replace(self, outputs={stem: self.outputs[stem], f"no_{stem}": rest})

    def _estimates(self, is_known: Callable[[Estimate], bool]) -> list[Estimate]:
        """The unknown estimates that the stems need. An estimate comes after the estimates that its run depends on."""
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
    """The names of all recipes."""
    return sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())


def choices(name: str) -> list[str]:
    """The choices of stems in a recipe."""
    return sorted(path.stem for path in (FOLDER / name).glob("*.yaml"))


def load_recipe(name: str, choice: str, *, two_stems: str | None = None) -> Recipe:
    """Read `configs/recipes/<name>/<choice>.yaml`.

    With `two_stems`, the result is the recipe for only that stem and the mixture minus it. The stem is taken from this
    choice or, if that has no such stem, from the recipe's first choice that does.

    Raises RecipeError if there is no such recipe, choice or stem, or if a file is wrong.
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


def one_model(name: str, stems: tuple[str, ...], residual: str | None = None) -> Recipe:
    """The recipe for these stems of one model, run on the mixture; and, if `residual` names it, what they leave."""
    outputs = {stem: _estimate(name, MIXTURE, stem) for stem in stems}
    if residual is not None:
        outputs[residual] = _sum((MIXTURE, 1.0), *((estimate, -1.0) for estimate in outputs.values()))
    return Recipe(name, "all", outputs)


def resolve(name: str, choice: str, lines: Mapping[Any, Any]) -> Recipe:
    """The recipe that these lines of YAML describe; it does not check that the models exist.

    Raises RecipeError if the lines do not make sense.
    """
    where = f"{choice}.yaml of recipe {name!r}"
    if len(lines) > MOST_LINES:
        raise RecipeError(f"{where} has {len(lines):,} lines: write at most {MOST_LINES}")
    sources: dict[str, list[_Source]] = {}
    given: list[str] = []
    for key, value in lines.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise RecipeError(
                f"{where}: {quoted(key)} is not a stem: write its name, or (NAME) if it is not part of the output"
            )
        stem = match["stem"]
        if stem in sources:
            raise RecipeError(f"{where}: {stem} has two lines: remove one")
        sources[stem] = _sources(value, f"{where}: {stem}")
        given += [] if match["bracket"] else [stem]
    if not given:
        raise RecipeError(f"{where} gives no stem: write at least one without brackets")
    resolver = _Resolver(where, sources, given)
    return Recipe(name, choice, {stem: resolver.stem(stem) for stem in given})


class _Source(NamedTuple):
    """One source on a line, with its share of the stem."""

    text: str
    model: str
    word: str | None  # `of` or `after`
    stems: tuple[str, ...]  # after that word
    share: float


class _Resolver:
    """Resolves the lines of a recipe into sums of estimates.

    Args:
        where: the start of error messages.
        sources: the sources of each line, by stem.
        given: the stems of the output.
    """

    def __init__(self, where: str, sources: Mapping[str, list[_Source]], given: list[str]) -> None:
        self._where, self._sources, self._given = where, sources, given
        self._resolved: dict[str, Combination] = {}
        self._steps: dict[str, int] = {}  # models in the chain to a stem

    def stem(self, stem: str, above: tuple[str, ...] = ()) -> Combination:
        """The sum for a stem; `above` are the stems that need it, outermost first."""
        if stem in above:
            circle = " needs ".join((*above[above.index(stem) :], stem))
            raise RecipeError(f"{self._where}: {circle}: give one of them a source that does not need the others")
        if stem not in self._resolved:
            parts = [(self._source(source, stem, above), source.share) for source in self._sources[stem]]
            self._resolved[stem] = _sum(*parts)
        return self._resolved[stem]

    def _source(self, source: _Source, stem: str, above: tuple[str, ...]) -> Combination:
        needed = self._needed(source, stem)
        others = [(self.stem(other, (*above, stem)), 1.0) for other in needed]
        self._count_steps(stem, needed)
        if source.word == "of":
            return _estimate(source.model, _sum(*others), stem)
        rest = _sum((MIXTURE, 1.0), *((other, -1.0) for other, _ in others))
        return rest if source.model == RESIDUAL else _estimate(source.model, rest, stem)

    def _needed(self, source: _Source, stem: str) -> list[str]:
        """The stems that a source needs, in the order of the lines, so that equal inputs are recognised as equal."""
        named: Iterable[str] = source.stems
        for other in source.stems:
            if other not in self._sources:
                raise RecipeError(
                    f"{self._where}: {stem}: {quoted(source.text)} needs {escaped(other)}, which has no line: write "
                    f"one, in brackets as `({escaped(other)}): MODEL` if it is not part of the output"
                )
        if source.model == RESIDUAL:
            named = [other for other in self._given if other != stem]
            if not named:
                raise RecipeError(
                    f"{self._where}: {stem}: there is no other stem to subtract from the mixture: write a model"
                )
        return [other for other in self._sources if other in named]

    def _count_steps(self, stem: str, needed: list[str]) -> None:
        steps = 1 + max((self._steps[other] for other in needed), default=0)
        self._steps[stem] = max(self._steps.get(stem, 0), steps)
        if self._steps[stem] > MOST_STEPS:
            raise RecipeError(
                f"{self._where}: {stem} needs a chain of more than {MOST_STEPS - 1} other stems: leave some out"
            )


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


def _sources(value: object, where: str) -> list[_Source]:
    """The sources on a line. `where` is the start of error messages."""
    if isinstance(value, dict):
        pairs: list[tuple[Any, Any]] = list(value.items())
    else:
        pairs = [(source, 1.0) for source in (value if isinstance(value, list) else [value])]
    sources: list[_Source] = []
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
        stems = tuple(match["stems"].split(" and ")) if match["word"] else ()
        sources.append(_Source(match[0], match["model"], match["word"], stems, weight))
    total = sum(source.share for source in sources)
    return [source._replace(share=source.share / total) for source in sources]


def _estimate(model: str, input: Combination, stem: str) -> Combination:
    return ((Estimate(Run(model, input), stem), 1.0),)


def _sum(*parts: tuple[Combination, float]) -> Combination:
    """The sum of combinations, each multiplied by a factor, without estimates that cancel out."""
    weights: dict[Estimate | None, float] = {}
    for combination, factor in parts:
        for estimate, weight in combination:
            weights[estimate] = weights.get(estimate, 0.0) + factor * weight
    return tuple((estimate, weight) for estimate, weight in weights.items() if weight)


def _no_stem(recipe: str, stem: str, stems: Iterable[str]) -> RecipeError:
    return RecipeError(f"recipe {recipe!r} has no stem {stem!r}: choose one of {', '.join(stems)}")
