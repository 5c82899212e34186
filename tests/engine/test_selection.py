"""A selection names the models to run, by recipe or one by one."""

from pathlib import Path

import pytest

from helpers.common import PROJECT
from helpers.small_model import write_yaml
from separation.engine.options import EngineOptions
from separation.engine.recipes import load_recipe
from separation.engine.selection import Selection
from separation.errors import InputError, RecipeError


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


def test_a_named_model_gives_what_it_leaves_too_if_that_has_a_name(tmp_path: Path) -> None:
    path = str(write_yaml(tmp_path, residual="rest"))
    assert Selection(model_name=path).load().stems == ("vocals", "drums", "rest")
    rest = Selection(model_name=path, two_stems="rest")
    assert rest.models() == {path: None} and rest.load().stems == ("rest", "no_rest")
    assert Selection(model_name="mel_band_roformer_kim").load().stems == ("vocals", "instrumental")


def test_an_unknown_recipe_choice_or_stem_is_refused() -> None:
    for selection in (Selection("nonsense"), Selection(stems="nonsense"), Selection(two_stems="nonsense")):
        with pytest.raises(RecipeError, match="'nonsense'"):
            selection.load()


def test_a_model_is_named_alone_in_a_folder_or_by_its_weights(tmp_path: Path) -> None:
    assert Selection().model is None
    assert Selection(model_name="demo").model == "demo"
    assert Selection(model_name="demo", model_dir=tmp_path).model == str(tmp_path / "demo")
    assert Selection(model_name="demo", model_path=tmp_path / "x.ckpt").model == "demo"
    assert Selection(model_path=tmp_path / "x.ckpt").model == str(tmp_path / "x.ckpt")


def test_an_absolute_selection_works_in_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    selection = Selection(model_name="demo", model_dir=Path("configs/models")).absolute()
    monkeypatch.chdir("/")
    assert selection == Selection(model_name="demo", model_dir=PROJECT / "configs" / "models")
    assert selection.load().stems == Selection(model_name="demo").load().stems
    assert Selection().absolute() == Selection()


def test_a_recipe_can_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("vocals: demo with 2 shifts\nrest: residual")
    monkeypatch.chdir(tmp_path)
    selection = Selection("mine.yaml").absolute()
    monkeypatch.chdir("/")
    assert selection == Selection(str(tmp_path / "mine.yaml"))
    assert selection.load().stems == ("vocals", "rest")
    assert selection.models() == {"demo": ("vocals",)}
    with pytest.raises(RecipeError, match="leave the stems out"):
        Selection(str(tmp_path / "mine.yaml"), "all_4").load()


@pytest.mark.parametrize(
    "model, options, error",
    [
        ("hdemucs_mmi", EngineOptions(attention="sdpa"), "attention sdpa has no effect on hdemucs_mmi: leave it out"),
        ("htdemucs", EngineOptions(precision="int8"), "precision int8 has no effect on htdemucs: leave it out"),
        ("demo", EngineOptions(precision="int8", attention="sdpa"), "int8 needs attention fused or auto, not sdpa"),
        ("vr_denoise_foxjoy", EngineOptions(overlap_seconds=2), "chunk size and overlap have no effect on vr_denoise"),
        ("htdemucs", EngineOptions(chunk_seconds=9), "chunk size 9 s alone has no effect on htdemucs"),
    ],
)
def test_an_option_without_effect_is_refused(model: str, options: EngineOptions, error: str) -> None:
    with pytest.raises(InputError, match=error):
        Selection(model_name=model).check(options)


@pytest.mark.parametrize(
    "selection, options",
    [
        (Selection("demo"), EngineOptions(attention="sdpa", chunk_seconds=9)),
        (Selection("demo"), EngineOptions(precision="int8", attention="fused")),
        (Selection(model_name="htdemucs"), EngineOptions(attention="sdpa", chunk_seconds=9, overlap_seconds=3)),
        (Selection("standard", "all_4"), EngineOptions(precision="int8", chunk_seconds=9)),  # for one of its models
    ],
)
def test_an_option_with_an_effect_on_any_model_is_accepted(selection: Selection, options: EngineOptions) -> None:
    selection.check(options)
