"""Fixtures for tests of the engine."""

import pytest
import soundfile
import torch
from torch import Tensor

from helpers.common import SONG
from separation import ModelPool
from separation.engine.options import EngineOptions


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool(EngineOptions(device="cpu", precision="fp32"))


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """Six seconds of the demo song, [2, T]."""
    audio, _ = soundfile.read(SONG, dtype="float32", frames=264_600)
    return torch.from_numpy(audio.T.copy())
