"""The names of scores stand for the fields of `Scores`."""

from dataclasses import fields

from separation.evaluation.choice import DEFAULT_SCORES, SCORES, columns
from separation.evaluation.metrics import Scores


def test_each_field_has_a_name_and_a_heading() -> None:
    assert list(columns(SCORES)) == [field.name for field in fields(Scores)]
    assert len(set(columns(SCORES).values())) == len(fields(Scores))


def test_columns_have_the_same_order_however_they_are_asked_for() -> None:
    assert columns(["fullness", "sdr", "sdr"]) == {
        "sdr_musdb_db": "SDR MUSDB",
        "sdr_mdx23_db": "SDR MDX23",
        "fullness": "fullness",
    }
    assert list(columns(DEFAULT_SCORES).values()) == ["SDR MUSDB", "SDR MDX23", "SI-SDR", "SIR", "SAR"]
