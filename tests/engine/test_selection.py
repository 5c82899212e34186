"""A selection names the models to run, by recipe or one by one."""

from pathlib import Path

import pytest

from helpers.small_model import write_yaml
from separation.engine.recipes import load_recipe
from separation.engine.selection import Selection
from separation.errors import RecipeError


def test_the_default_is_the_standard_recipe() -> None:
    assert Selection().load() == load_recipe("standard", "vocals_instrumental")


def test_a_recipes_models_are_loaded_for_the_stems_that_are_used() -> None:
    selection = Selection("standard", "all_4")
    assert selection.models() == load_recipe("standard", "all_4").models
    assert Selection("standard", "all_4", two_stems="drums").models() == {"htdemucs_ft": ("drums",)}


def test_a_named_model_gives_all_its_stems_and_replaces_the_recipe(tmp_path: Path) -> None:
    path = str(write_yaml(tmp_path))
    selection = Selection("nonsense", "nonsense", model_name=path)
    assert selection.models() == {path: None}
    assert selection.load().stems == ("vocals", "drums")


def test_two_stems_of_a_named_model_are_the_stem_and_the_rest(tmp_path: Path) -> None:
    path = str(write_yaml(tmp_path))
    selection = Selection(model_name=path, two_stems="vocals")
    assert selection.models() == {path: ("vocals",)}
    assert selection.load().stems == ("vocals", "no_vocals")


def test_an_unknown_recipe_choice_or_stem_is_refused() -> None:
    for selection in (Selection("nonsense"), Selection(stems="nonsense"), Selection(two_stems="nonsense")):
        with pytest.raises(RecipeError, match="'nonsense'"):
            selection.load()
