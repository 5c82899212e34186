"""Recipes: which models give which stems. Each choice of stems is a file, configs/recipes/<recipe>/<stems>.yaml. A
recipe with only one choice, `all`, is the file configs/recipes/<recipe>.yaml; users' own recipes are such files too.

A file has one line per stem, in the order of the output: its name and its source.

    vocals: MODEL                   a model in configs/models, run on the mixture
    drums: MODEL after vocals       run on the mixture minus that stem, or minus `vocals and bass`
    kick: MODEL of drums            run on that stem, or on the sum `drums and bass`
    instrumental: other by MODEL    a stem that the model calls by another name
    instrumental: residual          the mixture minus the other stems of the output
    backing: residual after lead    the mixture minus that stem, or minus `lead and drums`
    bass: [SOURCE, SOURCE]          the mean of several sources
    bass: {SOURCE: 2, SOURCE: 1}    their weighted mean
    bass: {median: [SOURCE, …]}     their median, or another of `recipe_lines.RULES`
    bass: MODEL with tta            the mean over several views of the input; see `recipe_lines`
    (drums): SOURCE                 in brackets: used by other lines, but not part of the output

Every stem, and every input of a model, is a weighted sum of the mixture, of models' estimates and of ensembles, which
combine such sums by another rule than the mean. A recipe is resolved into these sums, which are all that the engine
needs.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from separation.audio.options import STEM_FILE
from separation.audio.stem_file import tracks_of
from separation.checkpoints.catalogue import files_for, read_config
from separation.checkpoints.description import YAML_SUFFIXES
from separation.documents import DocumentError, escaped, quoted, read_yaml
from separation.engine.recipe_lines import PLAIN, RESIDUAL, Line, Source, View, read_line
from separation.errors import RecipeError
from separation.system.places import shipped

FOLDER = shipped("configs") / "recipes"
DEFAULT_CHOICE, ALL = "vocals_instrumental", "all"
MOST_LINES = 64
MOST_STEPS = 6  # models in a chain
MOST_TERMS = 2000  # runs that a stem depends on, one that two others share counted twice; comparing stems visits all

_KEY = re.compile(r"(?P<bracket>\()?(?P<stem>[\w-]{1,64})(?(bracket)\))")

# A weighted sum of estimates and ensembles; None stands for the mixture.
Combination = tuple[tuple["Estimate | Ensemble | None", float], ...]


@dataclass(frozen=True)
class Run:
    """One run of a model over a view of an input."""

    model: str
    input: Combination
    view: View = PLAIN


class Estimate(NamedTuple):
    """A model's output for a stem in one run, as of the input itself, not of the view."""

    run: Run
    stem: str


@dataclass(frozen=True)
class Ensemble:
    """Several sums, combined by a rule that is not a sum."""

    rule: str  # one of recipe_lines.RULES
    parts: tuple[Combination, ...]


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
        return {run for each in self.runs for run in runs_in(each.input)}

    @property
    def models(self) -> dict[str, tuple[str, ...]]:
        """The models that are needed, each with the stems to take from it."""
        models: dict[str, tuple[str, ...]] = {}
        for run, stems in self.runs.items():
            models[run.model] = tuple(dict.fromkeys((*models.get(run.model, ()), *stems)))
        return models

    def only(self, stem: str) -> "Recipe":
        """The recipe for this stem alone. Raises RecipeError if the recipe does not have it."""
        if stem not in self.outputs:
            raise _no_stem(self.name, stem, self.stems)
        return replace(self, outputs={stem: self.outputs[stem]})

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
        asked: set[Estimate | Ensemble | None] = {None}

        def add(combination: Combination) -> None:
            for part, _ in combination:
                if part in asked:
                    continue
                asked.add(part)
                if isinstance(part, Ensemble):
                    for each in part.parts:
                        add(each)
                elif part is not None and not is_known(part):
                    add(part.run.input)
                    needed.append(part)

        for combination in self.outputs.values():
            add(combination)
        return needed


def names() -> list[str]:
    """The names of all recipes."""
    return sorted(path.stem for path in FOLDER.iterdir() if path.is_dir() or path.suffix == ".yaml")


def choices(name: str) -> list[str]:
    """The choices of stems in a recipe."""
    return sorted(path.stem for path in (FOLDER / name).glob("*.yaml")) or [ALL]


def default_choice(name: str) -> str:
    """The choice of stems that a recipe stands for if none is given: DEFAULT_CHOICE or, without it, the first."""
    return DEFAULT_CHOICE if DEFAULT_CHOICE in (offered := choices(name)) else offered[0]


def find_recipe(
    name_or_path: str, choice: str | None = None, *, two_stems: str | None = None, only: str | None = None
) -> Recipe:
    """As `load_recipe`, or the recipe in a YAML file of the user's.

    Raises RecipeError as `load_recipe` does, and for a choice of stems beside a file, which has only one.
    """
    path = Path(name_or_path)
    if path.suffix not in YAML_SUFFIXES:
        if name_or_path not in names():
            raise _unknown_recipe(name_or_path, ", or the path of a .yaml file")
        return load_recipe(name_or_path, choice, two_stems=two_stems, only=only)
    if choice not in (None, ALL):
        raise RecipeError(f"recipe {name_or_path} has one choice of stems and not {choice!r}: leave the stems out")
    recipe = _read(path, name_or_path, ALL)
    if only is not None:
        return recipe.only(only)
    return recipe if two_stems is None else recipe.two_stems(two_stems)


def load_recipe(
    name: str, choice: str | None = None, *, two_stems: str | None = None, only: str | None = None
) -> Recipe:
    """Read a recipe of configs/recipes.

    With `two_stems`, the result is the recipe for only that stem and the mixture minus it. The stem is taken from this
    choice or, if that has no such stem, from the recipe's first choice that does. `only` gives the stem alone.

    Args:
        choice: None stands for `default_choice`.

    Raises RecipeError if there is no such recipe, choice or stem, or if a file is wrong.
    """
    if name not in names():
        raise _unknown_recipe(name)
    choice = choice or default_choice(name)
    if choice not in choices(name):
        raise RecipeError(f"recipe {name!r} has no stems {choice!r}: choose one of {', '.join(choices(name))}")
    wanted = only or two_stems
    if wanted is None:
        return _read_choice(name, choice)
    found: list[str] = []
    for each in sorted(choices(name), key=lambda each: each != choice):
        recipe = _read_choice(name, each)
        if wanted in recipe.stems:
            return recipe.two_stems(wanted) if only is None else recipe.only(wanted)
        found += recipe.stems
    raise _no_stem(name, wanted, dict.fromkeys(found))


def _unknown_recipe(name: str, otherwise: str = "") -> RecipeError:
    return RecipeError(f"unknown recipe {name!r}: choose one of {', '.join(names())}{otherwise}")


def models_of_stems(recipe: Recipe) -> dict[str, str]:
    """The names of the models that each stem needs, joined by `+`, by stem."""
    return {stem: "+".join(recipe.only(stem).models) for stem in recipe.stems}


def models_of_files(recipe: Recipe, format: str) -> dict[str, str]:
    """As `models_of_stems`, by the name of what each file holds: a stem, or `stems` if one file holds all.

    Raises InputError if such a file cannot hold these stems.
    """
    if format != STEM_FILE:
        return models_of_stems(recipe)
    tracks_of(recipe.stems)
    return {"stems": "+".join(recipe.models)}


def one_model(name: str, stems: tuple[str, ...], residual: str | None = None) -> Recipe:
    """The recipe for these stems of one model, run on the mixture; and, if `residual` names it, what they leave."""
    outputs: dict[str, Combination] = {stem: ((Estimate(Run(name, MIXTURE), stem), 1.0),) for stem in stems}
    if residual is not None:
        outputs[residual] = _sum((MIXTURE, 1.0), *((estimate, -1.0) for estimate in outputs.values()))
    return Recipe(name, ALL, outputs)


def resolve(name: str, choice: str, lines: Mapping[Any, Any]) -> Recipe:
    """The recipe that these lines of YAML describe; it does not check that the models exist.

    Raises RecipeError if the lines do not make sense.
    """
    where = _where(name, choice)
    if len(lines) > MOST_LINES:
        raise RecipeError(f"{where} has {len(lines):,} lines: write at most {MOST_LINES}")
    read: dict[str, Line] = {}
    given: list[str] = []
    for key, value in lines.items():
        match = _KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise RecipeError(
                f"{where}: {quoted(key)} is not a stem: write its name, or (NAME) if it is not part of the output"
            )
        stem = match["stem"]
        if stem in read:
            raise RecipeError(f"{where}: {stem} has two lines: remove one")
        read[stem] = read_line(value, stem, f"{where}: {stem}")
        given += [] if match["bracket"] else [stem]
    if not given:
        raise RecipeError(f"{where} gives no stem: write at least one without brackets")
    resolver = _Resolver(where, read, given)
    return Recipe(name, choice, {stem: resolver.stem(stem) for stem in given})


class _Resolver:
    """Resolves the lines of a recipe into sums of estimates.

    Args:
        where: the start of error messages.
        lines: by stem.
        given: the stems of the output.
    """

    def __init__(self, where: str, lines: Mapping[str, Line], given: list[str]) -> None:
        self._where, self._lines, self._given = where, lines, given
        self._resolved: dict[str, Combination] = {}
        self._steps: dict[str, int] = {}  # models in the chain to a stem
        self._terms: dict[str, int] = {}

    def stem(self, stem: str, above: tuple[str, ...] = ()) -> Combination:
        """The sum for a stem; `above` are the stems that need it, outermost first."""
        if stem in above:
            circle = " needs ".join((*above[above.index(stem) :], stem))
            raise RecipeError(f"{self._where}: {circle}: give one of them a source that does not need the others")
        if stem not in self._resolved:
            sources, rule = self._lines[stem]
            parts = [self._source(source, stem, above) for source in sources]
            if rule is None or len(parts) == 1:
                self._resolved[stem] = _sum(*zip(parts, (source.share for source in sources), strict=True))
            else:
                self._resolved[stem] = ((Ensemble(rule, tuple(parts)), 1.0),)
        return self._resolved[stem]

    def _source(self, source: Source, stem: str, above: tuple[str, ...]) -> Combination:
        needed = self._needed(source, stem)
        others = [(self.stem(other, (*above, stem)), 1.0) for other in needed]
        self._count(source, stem, needed)
        rest = _sum((MIXTURE, 1.0), *((other, -1.0) for other, _ in others))
        if source.model == RESIDUAL:
            return rest
        input = _sum(*others) if source.word == "of" else rest
        share = 1 / len(source.views)
        runs = [Run(source.model, input, view) for view in source.views]
        return tuple((Estimate(run, source.stem), share) for run in runs)

    def _needed(self, source: Source, stem: str) -> list[str]:
        """The stems that a source needs, in the order of the lines, so that equal inputs are recognised as equal."""
        named: Iterable[str] = source.stems
        for other in source.stems:
            if other not in self._lines:
                raise RecipeError(
                    f"{self._where}: {stem}: {quoted(source.text)} needs {escaped(other)}, which has no line: write "
                    f"one, in brackets as `({escaped(other)}): MODEL` if it is not part of the output"
                )
        if source.model == RESIDUAL and not source.stems:
            named = [other for other in self._given if other != stem]
            if not named:
                raise RecipeError(
                    f"{self._where}: {stem}: there is no other stem to subtract from the mixture: write a model"
                )
        return [other for other in self._lines if other in named]

    def _count(self, source: Source, stem: str, needed: list[str]) -> None:
        steps = 1 + max((self._steps[other] for other in needed), default=0)
        self._steps[stem] = max(self._steps.get(stem, 0), steps)
        if self._steps[stem] > MOST_STEPS:
            raise RecipeError(
                f"{self._where}: {stem} needs a chain of more than {MOST_STEPS - 1} other stems: leave some out"
            )
        terms = len(source.views) * (1 + sum(self._terms[other] for other in needed))
        self._terms[stem] = self._terms.get(stem, 0) + terms
        if self._terms[stem] > MOST_TERMS:
            raise RecipeError(f"{self._where}: {stem} needs more than {MOST_TERMS:,} runs of models: leave some out")


def _read_choice(name: str, choice: str) -> Recipe:
    folder = FOLDER / name
    return _read(folder / f"{choice}.yaml" if folder.is_dir() else FOLDER / f"{name}.yaml", name, choice)


def _read(path: Path, name: str, choice: str) -> Recipe:
    where = _where(name, choice)
    try:
        lines = read_yaml(path)
    except FileNotFoundError as e:
        raise RecipeError(f"there is no recipe {path}: give the path of a .yaml file") from e
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


def _sum(*parts: tuple[Combination, float]) -> Combination:
    """The sum of combinations, each multiplied by a factor, without parts that cancel out."""
    weights: dict[Estimate | Ensemble | None, float] = {}
    for combination, factor in parts:
        for part, weight in combination:
            weights[part] = weights.get(part, 0.0) + factor * weight
    return tuple((part, weight) for part, weight in weights.items() if weight)


def runs_in(combination: Combination) -> set[Run]:
    """The runs of whose estimates a sum is made, not those that these depend on."""
    runs: set[Run] = set()
    for part, _ in combination:
        if isinstance(part, Ensemble):
            runs = runs.union(*map(runs_in, part.parts))
        elif part is not None:
            runs.add(part.run)
    return runs


def _where(name: str, choice: str) -> str:
    """The start of error messages."""
    return f"recipe {name!r}" if choice == ALL else f"{choice}.yaml of recipe {name!r}"


def _no_stem(recipe: str, stem: str, stems: Iterable[str]) -> RecipeError:
    return RecipeError(f"recipe {recipe!r} has no stem {stem!r}: choose one of {', '.join(stems)}")
