"""Environment variables: what they may hold, and the message if they hold anything else."""

import pytest

from separation.errors import InputError
from separation.settings import positive, switch


@pytest.mark.parametrize("text, expected", [("0.5", 0.5), ("1e3", 1000.0), ("", 8.0)])
def test_a_number_is_read_and_an_empty_variable_means_the_default(
    text: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SETTING", text)
    assert positive("SETTING", 8.0) == expected


def test_a_variable_that_is_not_set_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SETTING", raising=False)
    assert positive("SETTING", 8.0) == 8.0
    assert switch("SETTING", default=True) and not switch("SETTING", default=False)


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "many", "1,5"])
def test_anything_but_a_finite_number_above_0_is_an_error_with_the_value(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SETTING", text)
    with pytest.raises(InputError, match=rf"^SETTING is '{text}': set it to a number above 0, or leave it out$"):
        positive("SETTING", 8.0)
    with pytest.raises(InputError, match=r"above 0, or set OTHER=off$"):
        positive("SETTING", 8.0, otherwise="set OTHER=off")


@pytest.mark.parametrize("text, expected", [("on", True), ("off", False), ("", True)])
def test_a_switch_is_on_or_off(text: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETTING", text)
    assert switch("SETTING", default=True) == expected


@pytest.mark.parametrize("text", ["yes", "1", "ON", "true"])
def test_a_switch_with_another_value_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETTING", text)
    with pytest.raises(InputError, match=rf"^SETTING is '{text}': set it to on or off, or leave it out$"):
        switch("SETTING", default=False)
