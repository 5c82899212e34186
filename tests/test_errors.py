"""The exception tree, as its docstring draws it."""

import inspect
import re

import pytest

import separation
from helpers.house import modules
from separation import errors

TREE = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}


def drawn() -> dict[str, str]:
    """Each error of the docstring's tree and its parent there."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│├└─ ]*)(\w+Error) ", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            parents[match[2]] = path[depth - 1] if depth else "Exception"
    return parents


def test_the_docstring_draws_the_classes() -> None:
    assert drawn() == {name: cls.__base__.__name__ for name, cls in TREE.items()}


@pytest.mark.parametrize("name", TREE)
def test_every_error_is_public_and_raised_somewhere(name: str) -> None:
    assert name in separation.__all__
    if name != "SeparationError":
        users = [module for module, path in modules().items() if f"{name}(" in path.read_text(encoding="utf-8")]
        assert set(users) - {"separation.errors"}
