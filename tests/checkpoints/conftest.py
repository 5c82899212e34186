"""Fixtures of the tests of checkpoints."""

from pathlib import Path

import pytest
from torch import Tensor

from helpers.small_model import small_model


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder of models, which is empty."""
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.setenv("SEPARATION_MODELS", str(folder))
    return folder


@pytest.fixture
def state() -> dict[str, Tensor]:
    """The weights of a small model."""
    return small_model().state_dict()
