"""Lookups in the shapes of weights."""

import pytest

from separation.models.shapes import Shapes, quotient

SHAPES = Shapes(
    {"layers.0.weight": (8, 4), "layers.0.bias": (8,), "layers.10.weight": (6, 8), "head.weight": (2, 6, 3)}
)


def test_sizes_are_looked_up_by_name_and_axis() -> None:
    assert SHAPES.size("layers.0.weight", 1) == 4
    assert SHAPES.sizes(["layers.0.weight", "layers.10.weight"], 0) == (8, 6)
    assert "head.weight" in SHAPES and "tail.weight" not in SHAPES


def test_a_missing_name_or_axis_has_no_size() -> None:
    assert SHAPES.size("tail.weight", 0) is None and SHAPES.size("layers.0.bias", 1) is None
    assert SHAPES.sizes(["layers.0.weight", "layers.1.weight"], 0) is None


def test_the_values_of_a_group_are_counted_once_however_many_names_have_them() -> None:
    assert SHAPES.count(r"layers\.(\d+)\..*") == 2
    assert SHAPES.count(r"tails\.(\d+)\..*") == 0


def test_a_pattern_must_match_a_whole_name() -> None:
    assert SHAPES.has(r"head\.w.*") and not SHAPES.has("head")


@pytest.mark.parametrize(
    "size, divisor, expected", [(12, 4, 3), (12, 5, None), (None, 4, None), (12, None, None), (12, 0, None)]
)
def test_only_a_whole_quotient_is_one(size: int | None, divisor: int | None, expected: int | None) -> None:
    assert quotient(size, divisor) == expected
