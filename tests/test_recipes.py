"""recipes: a file of a few lines says which model gives which stem."""

from pathlib import Path

import pytest

from separation import catalogue, recipes
from separation.errors import RecipeError
from separation.recipes import RESIDUAL, load_recipe

ORDER = {
    "vocals_instrumental": ("vocals", "instrumental"),
    "all_4": ("vocals", "drums", "bass", "other"),
    "all_6": ("vocals", "drums", "bass", "guitar", "piano", "other"),
}
ALL = [(name, choice) for name in recipes.names() for choice in recipes.choices(name)]


@pytest.mark.parametrize("name, choice", ALL)
def test_a_recipe_gives_the_stems_of_the_contract_in_order(name: str, choice: str) -> None:
    assert load_recipe(name, choice).stems == ORDER[choice]


@pytest.mark.parametrize("name, choice", ALL)
def test_a_recipe_takes_from_models_only_what_they_give(name: str, choice: str) -> None:
    for model, stems in load_recipe(name, choice).models.items():
        assert set(stems) <= set(catalogue.read_config(model).stems)


def test_the_standard_recipe_is_the_designs() -> None:
    vocals, full = load_recipe("standard", "vocals_instrumental"), load_recipe("standard", "all_4")
    assert vocals.sources == {"vocals": "bs_roformer_viperx_1297", "instrumental": RESIDUAL}
    assert full.models == {"bs_roformer_viperx_1297": ("vocals",), "htdemucs_ft": ("drums", "bass", "other")}
    assert load_recipe("standard", "all_6").models["htdemucs_6s"] == ("drums", "bass", "guitar", "piano", "other")


@pytest.mark.parametrize("stem, model", [("vocals", "bs_roformer_viperx_1297"), ("bass", "htdemucs_ft")])
def test_one_stem_alone_needs_one_model_and_of_that_this_stem_alone(stem: str, model: str) -> None:
    alone = load_recipe("standard", "all_4").only(stem)
    assert alone.sources == {stem: model}
    assert alone.models == {model: (stem,)}
    assert alone.residual is None


def test_a_residual_alone_needs_all_the_others() -> None:
    full = load_recipe("demo", "all_4")
    assert full.only("other").models == {"demo": ("vocals", "drums", "bass")}
    assert full.only("other").residual == "other"
    assert full.only("drums").models == {"demo": ("drums",)}


def test_a_stem_that_is_none_of_the_recipes_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"'standard' has no stem 'guitar': choose one of vocals, drums, bass, other"):
        load_recipe("standard", "all_4").only("guitar")


@pytest.mark.parametrize(
    "text, words",
    [
        ("vocals: [", "not YAML"),
        ("- vocals", "must map each stem"),
        ("vocals: 3", "must map each stem"),
        ("{}", "must map each stem"),
        ("vocals: residual\nother: residual", "more than one 'residual'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_an_error(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "all_4.yaml").write_text(text)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    with pytest.raises(RecipeError, match=words):
        load_recipe("mine", "all_4")


def test_an_unknown_recipe_or_choice_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"'best'.*demo, standard"):
        load_recipe("best", "all_4")
    with pytest.raises(RecipeError, match=r"'all_5'.*all_4, all_6, vocals_instrumental"):
        load_recipe("demo", "all_5")
