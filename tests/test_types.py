"""Type checkers infer nothing: pyright knows every type of the package."""

from pathlib import Path
from typing import Any

import pytest

import separation
from helpers.common import PROJECT
from helpers.pyright import needs_pyright, pyright

pytestmark = [pytest.mark.slow, needs_pyright]

UNTYPED = {"separation.models.kernels.precompiled.PrecompiledCache"}  # its base is Triton's, which has no types


@pytest.fixture(scope="module")
def symbols() -> dict[str, Any]:
    """What pyright says about each public name of every module."""
    found = pyright(PROJECT, "--verifytypes", "separation", "--ignoreexternal")["typeCompleteness"]
    assert found["packageRootDirectory"] == str(PROJECT / "separation")
    return {symbol["name"]: symbol for symbol in found["symbols"]}


def messages(symbol: dict[str, Any]) -> list[str]:
    return [diagnostic["message"] for diagnostic in symbol["diagnostics"]]


def test_no_type_is_inferred(symbols: dict[str, Any]) -> None:
    inferred = {
        name: messages(symbol)
        for name, symbol in symbols.items()
        if name not in UNTYPED and (symbol["isTypeAmbiguous"] or not symbol["isTypeKnown"])
    }
    assert inferred == {}


def test_a_misspelt_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text("from separation import Separator, Seperator\n", encoding="utf-8")
    (error,) = pyright(tmp_path)["generalDiagnostics"]
    assert '"Seperator" is unknown import symbol' in error["message"]


def test_everything_public_has_a_docstring(symbols: dict[str, Any]) -> None:
    objects = [getattr(separation, name) for name in separation.__all__]
    public = {f"{each.__module__}.{each.__qualname__}" for each in objects}
    assert public <= symbols.keys()
    own = [name for name in symbols if {name, name.rpartition(".")[0]} & public]
    assert [name for name in own if any("No docstring" in message for message in messages(symbols[name]))] == []
