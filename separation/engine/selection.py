"""Which models to run. Importing it is cheap: PyTorch is not needed."""

from dataclasses import dataclass
from pathlib import Path

from separation.checkpoints.catalogue import read_config
from separation.engine.recipes import Recipe, load_recipe, one_model


@dataclass(frozen=True)
class Selection:
    """A recipe's choice of stems or, with `model_name`, all stems of one model.

    Args:
        recipe: a recipe in configs/recipes.
        stems: one of the recipe's choices, such as `all_4`.
        two_stems: give only this stem and `no_<stem>`, the mixture minus it.
        model_name: a model's name or path, to run instead of a recipe.
        model_path: weights for that model, instead of its own.
    """

    recipe: str = "standard"
    stems: str = "vocals_instrumental"
    two_stems: str | None = None
    model_name: str | None = None
    model_path: Path | None = None

    def load(self) -> Recipe:
        """The recipe to run. Raises RecipeError if there is no such recipe, choice, stem or model."""
        if self.model_name is None:
            return load_recipe(self.recipe, self.stems, two_stems=self.two_stems)
        recipe = one_model(self.model_name, read_config(self.model_name).stems)
        return recipe if self.two_stems is None else recipe.two_stems(self.two_stems)

    def models(self) -> dict[str, tuple[str, ...] | None]:
        """The models to load and the stems that each has to give; None stands for all of them. Raises as `load`."""
        if self.model_name is not None:
            return {self.model_name: None if self.two_stems is None else (self.two_stems,)}
        return dict(self.load().models)
