"""Which models to run. Importing it is cheap: PyTorch is not needed."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from separation.checkpoints.catalogue import read_config
from separation.checkpoints.description import FIXED_CHUNKS, SIDE_BY_SIDE, WITH_ATTENTION, WITH_INT8, YAML_SUFFIXES
from separation.engine.options import EngineOptions
from separation.engine.recipes import Recipe, find_recipe, one_model
from separation.errors import InputError


@dataclass(frozen=True)
class Selection:
    """A recipe's choice of stems or, with `model_name` or `model_path`, all stems of one model and its residual.

    Args:
        recipe: a recipe in configs/recipes, or the path of a YAML file.
        stems: one of the recipe's choices, such as `all_4`; None for its default, `vocals_instrumental` if it has that.
        two_stems: give only this stem and `no_<stem>`, the mixture minus it.
        only: give only this stem.
        model_name: a model's name or path, to run instead of a recipe.
        model_dir: the folder that holds the model of that name.
        model_path: weights for that model, instead of its own. Without `model_name`, the YAML file beside them counts.
    """

    recipe: str = "standard"
    stems: str | None = None
    two_stems: str | None = None
    only: str | None = None
    model_name: str | None = None
    model_dir: Path | None = None
    model_path: Path | None = None

    @property
    def model(self) -> str | None:
        """The name or path of the model to run instead of a recipe; None for a recipe."""
        if self.model_name is None:
            return None if self.model_path is None else str(self.model_path)
        return self.model_name if self.model_dir is None else os.path.join(self.model_dir, self.model_name)

    def load(self) -> Recipe:
        """The recipe to run. Raises RecipeError if there is no such recipe, choice, stem or model."""
        if self.model is None:
            return find_recipe(self.recipe, self.stems, two_stems=self.two_stems, only=self.only)
        model = read_config(self.model)
        recipe = one_model(self.model, model.stems, model.residual)
        if self.only is not None:
            return recipe.only(self.only)
        return recipe if self.two_stems is None else recipe.two_stems(self.two_stems)

    def models(self) -> dict[str, tuple[str, ...] | None]:
        """The models to load and the stems that each has to give; None stands for all of them. Raises as `load`."""
        if self.model is not None:
            wanted = self.only or self.two_stems
            is_residual = wanted == read_config(self.model).residual
            return {self.model: None if wanted is None or is_residual else (wanted,)}
        return dict(self.load().models)

    def check(self, options: EngineOptions) -> None:
        """Raise InputError if an option has no effect on any of the models. Raises as `load`, too."""
        if options.precision == "int8" and options.attention not in ("auto", "fused"):
            raise InputError(
                f"precision int8 needs attention fused or auto, not {options.attention}: leave one of them out"
            )
        models = [read_config(name) for name in self.models()]
        kinds, names = {model.architecture for model in models}, ", ".join(model.name for model in models)
        if None in kinds:
            return  # only the weights tell the architecture
        if options.attention != "auto" and not kinds & WITH_ATTENTION:
            raise InputError(f"attention {options.attention} has no effect on {names}: leave it out")
        if options.precision == "int8" and not kinds & WITH_INT8:
            raise InputError(f"precision int8 has no effect on {names}: leave it out")
        if (options.chunk_seconds, options.overlap_seconds) != ("auto", "auto") and kinds <= SIDE_BY_SIDE:
            raise InputError(f"chunk size and overlap have no effect on {names}: leave them out")
        if options.chunk_seconds != "auto" and options.overlap_seconds == "auto" and kinds <= FIXED_CHUNKS:
            raise InputError(
                f"chunk size {options.chunk_seconds} s alone has no effect on {names}, whose chunks have one length: "
                "leave it out, or give an overlap too"
            )

    def absolute(self) -> Self:
        """The same selection for a process with another working directory."""
        folder, weights = self.model_dir, self.model_path
        recipe = str(path.absolute()) if (path := Path(self.recipe)).suffix in YAML_SUFFIXES else self.recipe
        return replace(
            self, recipe=recipe, model_dir=folder and folder.absolute(), model_path=weights and weights.absolute()
        )
