"""Limits come from the environment."""

import pytest

from separation.errors import InputError
from separation.web.limits import max_mib, max_seconds


def test_the_defaults_are_three_hours_and_four_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEPARATION_MAX_SECONDS", raising=False)
    monkeypatch.delenv("SEPARATION_MAX_MIB", raising=False)
    assert (max_seconds(), max_mib()) == (3 * 3600, 4096)


def test_the_environment_sets_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPARATION_MAX_SECONDS", "90.5")
    monkeypatch.setenv("SEPARATION_MAX_MIB", "7")
    assert (max_seconds(), max_mib()) == (90.5, 7)


def test_a_limit_that_is_not_a_positive_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPARATION_MAX_SECONDS", "0")
    with pytest.raises(InputError, match=r"^SEPARATION_MAX_SECONDS is '0': set it to a number above 0"):
        max_seconds()
