"""recipe_lines: the words of a line."""

from typing import Any

import pytest

from separation.engine.recipe_lines import PLAIN, RULES, View, read_line, read_views
from separation.errors import RecipeError

SWAPPED, INVERTED = View(is_swapped=True), View(is_inverted=True)


def words(text: str) -> tuple[Any, ...]:
    (source,), rule = read_line(text, "vocals", "here")
    assert rule is None and source.share == 1 and source.text == text
    return source.stem, source.model, source.word, source.stems, len(source.views)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("m", ("vocals", "m", None, (), 1)),
        ("other by m", ("other", "m", None, (), 1)),
        ("m of drums", ("vocals", "m", "of", ("drums",), 1)),
        ("m after drums and bass", ("vocals", "m", "after", ("drums", "bass"), 1)),
        ("m with tta", ("vocals", "m", None, (), 3)),
        ("lead-1 by a/m.yaml of b and c with tta and 2 shifts", ("lead-1", "a/m.yaml", "of", ("b", "c"), 6)),
        ("residual", ("vocals", "residual", None, (), 1)),
        ("residual after drums and bass", ("vocals", "residual", "after", ("drums", "bass"), 1)),
        ("residual by m", ("residual", "m", None, (), 1)),
        ("residual_model", ("vocals", "residual_model", None, (), 1)),
    ],
)
def test_a_source_names_stem_model_input_and_views(text: str, expected: tuple[Any, ...]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("polarity", [PLAIN, INVERTED]),
        ("channels", [PLAIN, SWAPPED]),
        ("tta", [PLAIN, SWAPPED, INVERTED]),
        ("channels and polarity", [PLAIN, SWAPPED, INVERTED]),
        ("tta and tta", [PLAIN, SWAPPED, INVERTED]),
        ("2 shifts", [PLAIN, View(delay_samples=11025)]),
        ("3 shifts and polarity", [View(inverted, False, at) for inverted in (False, True) for at in (0, 7350, 14700)]),
    ],
)
def test_views_begin_with_the_plain_input(text: str, expected: list[View]) -> None:
    assert list(read_views(text, "here")) == expected


def test_twice_as_many_shifts_contain_the_first_ones() -> None:
    assert set(read_views("4 shifts", "here")) < set(read_views("8 shifts", "here"))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_has_a_list_of_sources(rule: str) -> None:
    sources, found = read_line({rule: ["a", "other by b", "residual"]}, "vocals", "here")
    assert found == rule
    assert [(source.stem, source.model) for source in sources] == [
        ("vocals", "a"), ("other", "b"), ("vocals", "residual")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value, error",
    [
        (
            {"mode": ["m", "n"]},
            "here: 'mode' is not a rule: write one of median, min, .*, or .SOURCE, ….* for the mean",
        ),
        ({"avg_wave": ["m"]}, "'avg_wave' is not a rule"),
        ({"median": []}, r"here: \[\] is not a source: write a model, `STEM by MODEL`"),
        ({"median": [["m"]]}, r"\['m'\] is not a source"),
        ({"median": ["m"], "max": ["m"]}, "median is a rule for one list of sources: write {median: .SOURCE, SOURCE.}"),
        ({"median": "m"}, "median is a rule for one list of sources"),
        ({"max_fft": {"m": 1}}, "max_fft is a rule for one list of sources"),
        ({"median": "m", "n": 1}, "median is a rule for one list of sources"),
        ("by m", "'by m' is not a source"),
        ("a/b by m", "'a/b by m' is not a source"),
        ("vocals by residual", "'vocals by residual' is not a source"),
        ("residual with tta", "'residual with tta' is not a source"),
        ("residual of drums", "'residual of drums' is not a source"),
        ("m with", "'m with' is not a source"),
        ("m with drums", "'drums' is not a view of the song: write polarity, channels, tta or `2 shifts`, at most 20"),
        ("m with 1 shifts", "'1 shifts' is not a view"),
        ("m with 21 shifts", "'21 shifts' is not a view"),
        ("m with tta, polarity", "'tta, polarity' is not a view"),
        ("m with tta of drums", "'tta of drums' is not a view"),
    ],
)
def test_what_is_not_a_source_is_an_error_in_one_sentence(value: object, error: str) -> None:
    with pytest.raises(RecipeError, match=f"^here: .*{error.removeprefix('here: ')}") as caught:
        read_line(value, "vocals", "here")
    assert "\n" not in str(caught.value)
