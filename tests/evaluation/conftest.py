"""True stems of the demo song, and museval only for the tests that ask for it."""

import sys
from types import ModuleType

import numpy as np
import pytest
import soundfile

from helpers.common import PROJECT

TRUE_STEMS = PROJECT / "weights" / "demo" / "stems"
PARTS = {"vocals": ["vocals"], "drums": ["drums"], "bass": ["bass"], "other": ["guitar", "piano", "other"]}


@pytest.fixture(scope="module")
def stems() -> dict[str, np.ndarray]:
    """Four true stems of the demo song, [T, 2] float32."""
    read = {path.stem: soundfile.read(path, dtype="float32")[0] for path in TRUE_STEMS.glob("*.ogg")}
    return {stem: np.sum([read[part] for part in parts], axis=0) for stem, parts in PARTS.items()}


@pytest.fixture
def museval() -> ModuleType:
    return pytest.importorskip("museval", reason="needs museval (pip install museval)")


@pytest.fixture(autouse=True)
def without_museval(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide museval, which takes seconds, from all tests that do not ask for it."""
    if "museval" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "museval", None)
