"""recipes: a file with one line per stem chooses the models."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.common import STEMS
from separation.engine import recipes
from separation.engine.recipe_lines import View
from separation.engine.recipes import (
    MIXTURE,
    Combination,
    Ensemble,
    Estimate,
    Recipe,
    Run,
    find_recipe,
    load_recipe,
    resolve,
)
from separation.errors import RecipeError

ORDER = {choice: tuple(stems) for choice, stems in STEMS.items()} | {
    "drum_kit": ("kick", "snare", "toms", "hihat", "cymbals")
}
CONTRACT = ("demo", "standard", "sw")  # the recipes that offer the contract's stems; test_presets.py has the others
ALL = [(name, choice) for name in CONTRACT for choice in recipes.choices(name)]


def recipe(text: str) -> Recipe:
    return resolve("mine", "test", yaml.safe_load(text))


def over_mixture(stem: str, model: str = "m") -> Estimate:
    return Estimate(Run(model, MIXTURE), stem)


def one(stem: str, model: str = "m") -> Combination:
    return ((over_mixture(stem, model), 1.0),)


INVERTED = Estimate(Run("m", MIXTURE, View(is_inverted=True)), "a")
LARGEST = Ensemble("max", (one("a"), one("a", "n")))

# The recipes of the project


@pytest.mark.parametrize("name, choice", ALL)
def test_a_recipe_gives_the_stems_of_the_contract_in_order_from_existing_models(name: str, choice: str) -> None:
    assert load_recipe(name, choice).stems == ORDER[choice]


def test_the_shipped_recipes_have_the_designed_choices() -> None:
    four = ["all_4", "all_6", "drum_kit", "vocals_instrumental"]
    expected = {"demo": [choice for choice in four if choice != "drum_kit"], "standard": four, "sw": four}
    assert {name: recipes.choices(name) for name in CONTRACT} == expected


def test_the_standard_recipe_uses_the_designed_models() -> None:
    vocals, full = load_recipe("standard", "vocals_instrumental"), load_recipe("standard", "all_4")
    assert vocals.models == {"bs_roformer_viperx_1297": ("vocals",)}
    sung = over_mixture("vocals", "bs_roformer_viperx_1297")
    assert vocals.outputs == {"vocals": ((sung, 1.0),), "instrumental": ((None, 1.0), (sung, -1.0))}
    assert full.models == {"bs_roformer_viperx_1297": ("vocals",), "htdemucs_ft": ("drums", "bass", "other")}
    assert load_recipe("standard", "all_6").models["htdemucs_6s"] == ("drums", "bass", "guitar", "piano", "other")


def test_the_drum_kit_is_separated_from_the_drums_alone() -> None:
    drums, kit = load_recipe("standard", "drum_kit").runs.items()
    assert drums == (Run("htdemucs_ft", MIXTURE), ("drums",))
    assert kit == (Run("drumsep", ((over_mixture("drums", "htdemucs_ft"), 1.0),)), ORDER["drum_kit"])


def test_sw_takes_every_stem_from_one_model_in_one_run() -> None:
    for choice in ("vocals_instrumental", "all_4", "all_6"):
        assert list(load_recipe("sw", choice).runs) == [Run("bs_roformer_sw", MIXTURE)]


# What a line means


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: m", {"a": {over_mixture("a"): 1}}),
        ("a: [m, n]", {"a": {over_mixture("a"): 0.5, over_mixture("a", "n"): 0.5}}),
        ("a: [m, m, n, n]", {"a": {over_mixture("a"): 0.5, over_mixture("a", "n"): 0.5}}),
        ("a: {m: 3, n: 1.0}", {"a": {over_mixture("a"): 0.75, over_mixture("a", "n"): 0.25}}),
        ("a: {m: 0.1}", {"a": {over_mixture("a"): 1}}),
        ("a: residual\nb: m", {"a": {None: 1, over_mixture("b"): -1}, "b": {over_mixture("b"): 1}}),
        ("a: m\nb: [m, residual]", {"b": {over_mixture("b"): 0.5, None: 0.5, over_mixture("a"): -0.5}}),
        ("a: m\n(c): m\nb: residual", {"b": {None: 1, over_mixture("a"): -1}}),
        ("(c): m\na: m of c", {"a": {Estimate(Run("m", ((over_mixture("c"), 1.0),)), "a"): 1}}),
        ("a: b by m", {"a": {over_mixture("b"): 1}}),
        ("c: m\na: residual after c", {"a": {None: 1, over_mixture("c"): -1}}),
        ("a: m with polarity", {"a": {over_mixture("a"): 0.5, INVERTED: 0.5}}),
        ("a: {m with polarity: 1, m: 1}", {"a": {over_mixture("a"): 0.75, INVERTED: 0.25}}),
        ("a: {max: [m, n]}", {"a": {LARGEST: 1}}),
        ("a: {max: [m]}", {"a": {over_mixture("a"): 1}}),
        ("a: {max: [m, n]}\nb: residual", {"b": {None: 1, LARGEST: -1}}),
        ("(a): {max: [m, n]}\nb: m of a", {"b": {Estimate(Run("m", ((LARGEST, 1.0),)), "b"): 1}}),
        ("a: m after c\nc: n", {"a": {Estimate(Run("m", ((None, 1.0), (over_mixture("c", "n"), -1.0))), "a"): 1}}),
    ],
)
def test_a_line_resolves_to_a_sum_of_the_mixture_and_estimates(
    text: str, expected: dict[str, dict[Any, float]]
) -> None:
    outputs = recipe(text).outputs
    assert {stem: dict(outputs[stem]) for stem in expected} == expected
    assert "c" not in outputs or "(c)" not in text


def test_a_model_runs_once_on_the_same_input_however_it_is_written() -> None:
    mine = recipe("a: m\nb: m\nc: n after a and b\nd: n after b and a\n(e): n of a and b\nf: n after e")
    assert [run.model for run in mine.runs] == ["m", "n", "n", "n"]
    assert list(mine.runs.values()) == [("a", "b"), ("c", "d"), ("e",), ("f",)]
    assert mine.models == {"m": ("a", "b"), "n": ("c", "d", "e", "f")}


def test_the_runs_of_an_ensemble_and_of_views_are_those_of_its_parts_once_each() -> None:
    mine = recipe("a: {max: [m, n with tta, m]}\nb: m\nc: n of a\n(d): {min: [a by m, k]}")
    assert [(run.model, run.view) for run in mine.runs] == [
        ("m", View()), ("n", View()), ("n", View(is_swapped=True)), ("n", View(is_inverted=True)), ("n", View())
    ]  # fmt: skip
    assert list(mine.runs.values()) == [("a", "b"), *[("a",)] * 3, ("c",)]


def test_a_run_comes_after_the_runs_it_depends_on_and_unneeded_runs_are_left_out() -> None:
    mine = recipe("c: m after b and a\nb: m after a\na: n\n(x): unused\nd: residual")
    assert [(run.model, stems) for run, stems in mine.runs.items()] == [("n", ("a",)), ("m", ("b",)), ("m", ("c",))]


# Two stems


def test_two_stems_need_only_the_runs_of_that_stem() -> None:
    mine = recipe("a: m\nb: m\nc: n of b\nd: residual")
    two = mine.two_stems("c")
    assert two.stems == ("c", "no_c")
    assert two.models == {"m": ("b",), "n": ("c",)}
    assert dict(two.outputs["no_c"]) == {None: 1, two.outputs["c"][0][0]: -1}
    assert mine.two_stems("d").models == mine.models
    with pytest.raises(RecipeError, match=r"recipe 'mine' has no stem 'e': choose one of a, b, c, d"):
        mine.two_stems("e")


def test_the_mixture_minus_the_residual_is_the_sum_of_the_other_stems() -> None:
    two = recipe("a: m\nb: n\nrest: residual").two_stems("rest")
    assert dict(two.outputs["no_rest"]) == {over_mixture("a"): 1, over_mixture("b", "n"): 1}


@pytest.mark.parametrize(
    "choice, stem, models",
    [
        ("vocals_instrumental", "vocals", ["bs_roformer_viperx_1297"]),
        ("vocals_instrumental", "instrumental", ["bs_roformer_viperx_1297"]),
        ("vocals_instrumental", "drums", ["htdemucs_ft"]),
        ("vocals_instrumental", "guitar", ["htdemucs_6s"]),
        ("all_6", "drums", ["htdemucs_6s"]),
        ("drum_kit", "vocals", ["bs_roformer_viperx_1297"]),
        ("all_4", "snare", ["htdemucs_ft", "drumsep"]),
    ],
)
def test_two_stems_come_from_the_choice_or_else_from_the_first_choice_that_has_the_stem(
    choice: str, stem: str, models: list[str]
) -> None:
    two = load_recipe("standard", choice, two_stems=stem)
    assert two.stems == (stem, f"no_{stem}")
    assert list(two.models) == models


def test_an_unknown_stem_is_an_error_that_lists_the_stems() -> None:
    words = "'demo' has no stem 'kick': choose one of vocals, drums, bass, other, guitar, piano, instrumental"
    with pytest.raises(RecipeError, match=words):
        load_recipe("demo", "all_4", two_stems="kick")


# Errors


@pytest.mark.parametrize(
    "text, words",
    [
        ("vocals: [", "^all_4.yaml of recipe 'mine' line 1 is not safe and valid YAML"),
        ("- vocals", "^all_4.yaml of recipe 'mine' must map each stem to its source, such as `vocals: htdemucs`"),
        ("{}", "^all_4.yaml of recipe 'mine' gives no stem"),
        ("(vocals): htdemucs", "gives no stem: write at least one without brackets"),
        ("../vocals: htdemucs", "'../vocals' is not a stem: write its name"),
        ("(vocals: htdemucs", r"'\(vocals' is not a stem"),
        ("1: htdemucs", "1 is not a stem"),
        ("vocals: htdemucs\n(vocals): demo", "vocals has two lines: remove one"),
        ("vocals: 3", "vocals: 3 is not a source: write a model, `STEM by MODEL`, `MODEL of STEM`, "),
        ("vocals: []", r"vocals: \[\] is not a source"),
        ("vocals: {}", "vocals: {} is not a source"),
        ("vocals: [demo, [demo]]", r"vocals: \['demo'\] is not a source"),
        ("vocals: demo without drums", "'demo without drums' is not a source"),
        ("vocals: demo after", "'demo after' is not a source"),
        ("vocals: demo after drums, bass", "'demo after drums, bass' is not a source"),
        ("drums: demo\nvocals: residual of drums", "'residual of drums' is not a source"),
        ("vocals: {demo: 0}", "vocals: the weight of 'demo' is 0: write a number above 0"),
        ("vocals: {demo: -1, htdemucs: 2}", "the weight of 'demo' is -1"),
        ("vocals: {demo: true}", "the weight of 'demo' is True"),
        ("vocals: {demo: .nan}", "the weight of 'demo' is nan"),
        ("vocals: {demo: .inf}", "the weight of 'demo' is inf"),
        ("vocals: {demo: much}", "the weight of 'demo' is 'much'"),
        (
            "vocals: demo after drums",
            r"vocals: 'demo after drums' needs drums, which has no line: write one, in brackets as `\(drums\)",
        ),
        ("vocals: demo of vocals", "vocals needs vocals: give one of them a source that does not need the others"),
        ("vocals: demo after bass\nbass: demo of vocals", "vocals needs bass needs vocals: give one"),
        ("vocals: residual\nother: residual", "vocals needs other needs vocals: give one"),
        ("bass: demo\nvocals: demo after other\nother: residual", "vocals needs other needs vocals"),
        (
            "a0: m\n" + "\n".join(f"a{n}: m of a{n - 1}" for n in range(1, 60)),
            "a6 needs a chain of more than 5 other stems: leave some out",
        ),
        (
            "a0: m\n" + "\n".join(f"a{n}: m of a{n - 1} with 20 shifts" for n in range(1, 6)),
            "a3 needs more than 2,000 runs of models: leave some out",
        ),
        ("vocals: demo with reverb", "vocals: 'reverb' is not a view of the song: write polarity, channels, tta or"),
        ("vocals: {mean: [demo, demo]}", "vocals: 'mean' is not a rule: write one of median, min, max, median_fft"),
        ("vocals: karaoke by demo", ", karaoke: demo does not give 'karaoke': choose from vocals"),
        ("\n".join(f"a{n}: m" for n in range(65)), "has 65 lines: write at most 64"),
        ("v: m\n" + "x" * 65 + ": m", r"'x{65}' is not a stem"),
        ("v: m of " + "x" * 10_000, r"'m of x{73}… needs x{79}…, which has no line"),
        ("v: {m: 1e308, n: 1e308}", "the weight of 'm' is 1e\\+308: write a number above 0 and below 1e9"),
        ("vocals: residual", "vocals: there is no other stem to subtract from the mixture: write a model"),
        ("vocals: residual\n(drums): demo", "vocals: there is no other stem"),
        (
            "vocals: unheard_of",
            ", vocals: unknown model 'unheard_of': use a name that",
        ),
        (
            "vocals: demo\nkick: htdemucs\nsnare: htdemucs",
            ", kick and snare: htdemucs does not give 'kick', 'snare': choose from drums, bass, other, vocals",
        ),
    ],
)
def test_a_wrong_recipe_is_an_error_that_says_where_and_what_to_write(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "all_4.yaml").write_text(text)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe("mine", "all_4")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("all_4.yaml of recipe 'mine'")


def test_an_unknown_recipe_or_choice_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"'worst'.*demo, .*standard"):
        load_recipe("worst", "all_4")
    for two_stems in (None, "vocals"):
        with pytest.raises(RecipeError, match=r"'all_5'.*all_4, all_6, vocals_instrumental"):
            load_recipe("demo", "all_5", two_stems=two_stems)


# Recipes of one file


def test_a_file_is_a_recipe_whose_one_choice_needs_no_name(tmp_path: Path) -> None:
    path = tmp_path / "my recipe.yaml"
    path.write_text("vocals: demo\nrest: residual")
    mine = find_recipe(str(path))
    assert (mine.name, mine.choice, mine.stems) == (str(path), "all", ("vocals", "rest"))
    assert find_recipe(str(path), "all") == mine
    assert find_recipe(str(path), two_stems="rest").stems == ("rest", "no_rest")
    assert find_recipe("demo", "all_4") == load_recipe("demo", "all_4")


def test_a_shipped_recipe_of_one_file_is_read_without_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sing.yaml").write_text("vocals: demo\nbass: demo")
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    assert recipes.names() == ["sing"] and recipes.choices("sing") == ["all"]
    assert load_recipe("sing").stems == load_recipe("sing", "all").stems == ("vocals", "bass")
    assert load_recipe("sing", two_stems="bass").stems == ("bass", "no_bass")
    with pytest.raises(RecipeError, match=r"^recipe 'sing' has no stems 'all_4': choose one of all$"):
        load_recipe("sing", "all_4")
    (tmp_path / "sing.yaml").write_text("vocals: 3")
    with pytest.raises(RecipeError, match=r"^recipe 'sing': vocals: 3 is not a source"):
        load_recipe("sing")


def test_without_a_choice_a_recipe_gives_vocals_and_instrumental_if_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_recipe("demo") == load_recipe("demo", "vocals_instrumental")
    (tmp_path / "kit").mkdir()
    for choice in ("five", "four"):
        (tmp_path / "kit" / f"{choice}.yaml").write_text("vocals: demo")
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    assert load_recipe("kit").choice == "five"


@pytest.mark.parametrize(
    "text, choice, words",
    [
        (None, None, "there is no recipe .*mine.yaml: give the path of a .yaml file"),
        ("vocals: 3", None, "recipe '.*mine.yaml': vocals: 3 is not a source"),
        ("vocals: [", None, "recipe '.*mine.yaml' line 1 is not safe and valid YAML"),
        ("vocals: demo", "all_4", "recipe .*mine.yaml has one choice of stems and not 'all_4': leave the stems out"),
        ("kick: demo", None, "recipe '.*mine.yaml', kick: demo does not give 'kick': choose from vocals"),
    ],
)
def test_a_file_that_is_no_recipe_is_an_error_in_one_sentence(
    text: str | None, choice: str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=f"^{words}") as caught:
        find_recipe(str(path), choice)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_recipe_for_those_who_may_only_name_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("vocals: demo")
    with pytest.raises(RecipeError, match="unknown recipe"):
        load_recipe(str(tmp_path / "mine.yaml"))
