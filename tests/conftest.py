"""What the tests share: where the optional things are, and the demo recipe's parts."""

import shutil
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
SHARED = PROJECT.parent / "shared"

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
needs_shared = pytest.mark.skipif(not (SHARED / "audio").is_dir(), reason="needs the shared folder beside the checkout")
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights"
    monkeypatch.setenv("SEPARATION_WEIGHTS", str(folder))
    return folder
