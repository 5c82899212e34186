"""configs/recipes/<recipe>/<stems>.yaml -> Recipe: which model gives which stem.

A recipe is a mapping from each stem, in the order of the output, to the name of a model in configs/models, or to the
word `residual`: the mixture minus every other stem of the recipe.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from separation.errors import RecipeError

FOLDER = Path(__file__).parents[1] / "configs" / "recipes"
RESIDUAL = "residual"


@dataclass(frozen=True)
class Recipe:
    """A recipe for one choice of stems, e.g. `standard`, `all_4`."""

    name: str
    choice: str
    sources: dict[str, str]  # stem -> model name or RESIDUAL, in the order of the output

    @property
    def stems(self) -> tuple[str, ...]:
        """The stems that come out, in order."""
        return tuple(self.sources)

    @property
    def models(self) -> dict[str, tuple[str, ...]]:
        """The models that are needed, each once, with the stems that are taken from it."""
        needed: dict[str, tuple[str, ...]] = {}
        for stem, source in self.sources.items():
            if source != RESIDUAL:
                needed[source] = (*needed.get(source, ()), stem)
        return needed

    @property
    def residual(self) -> str | None:
        """The stem that is the mixture minus the others, if any."""
        return next((stem for stem, source in self.sources.items() if source == RESIDUAL), None)

    def only(self, stem: str) -> "Recipe":
        """The recipe of what this stem alone needs: its model or, if it is the residual, the models of the others too.

        Raises RecipeError for a stem that is none of the recipe's.
        """
        if stem not in self.sources:
            raise RecipeError(
                f"{self.choice} of recipe {self.name!r} has no stem {stem!r}: choose one of {', '.join(self.stems)}"
            )
        return self if stem == self.residual else Recipe(self.name, self.choice, {stem: self.sources[stem]})


def names() -> list[str]:
    """The recipes that there are.

    Raises RecipeError where configs/ is not beside the package: it runs from a checkout.
    """
    if not FOLDER.is_dir():
        raise RecipeError("configs/recipes is not beside the package: install with `pip install -e .` from a checkout")
    return sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())


def choices(name: str) -> list[str]:
    """The choices of stems that a recipe offers."""
    return sorted(path.stem for path in (FOLDER / name).glob("*.yaml"))


def load_recipe(name: str, choice: str) -> Recipe:
    """Read `configs/recipes/<name>/<choice>.yaml`.

    Raises RecipeError for an unknown recipe or choice, or a file that does not map stems to models.
    """
    if name not in names():
        raise RecipeError(f"unknown recipe {name!r}: choose one of {', '.join(names())}")
    if choice not in choices(name):
        raise RecipeError(f"recipe {name!r} has no stems {choice!r}: choose one of {', '.join(choices(name))}")
    path = FOLDER / name / f"{choice}.yaml"
    try:
        sources = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise RecipeError(f"{path.name} of recipe {name!r} is not YAML: {str(e).splitlines()[0]}") from e
    if (
        not isinstance(sources, dict)
        or not sources
        or not all(isinstance(v, str) for pair in sources.items() for v in pair)
    ):
        raise RecipeError(f"{path.name} of recipe {name!r} must map each stem to a model's name or to {RESIDUAL!r}")
    if list(sources.values()).count(RESIDUAL) > 1:
        raise RecipeError(f"{path.name} of recipe {name!r} has more than one {RESIDUAL!r}: only one stem can be that")
    return Recipe(name, choice, sources)
