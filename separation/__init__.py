"""Splits songs into stems. README.md and docs/ describe the command line, the container and recipes.

>>> from separation import Separator
>>> stems = Separator(recipe="demo", stems="all_4").separate(mixture)  # [2, T] at 44100 Hz -> {"vocals": [2, T], ...}
"""

import os
import sys

# The command line starts. Handle Ctrl-C before the slow imports below.
if os.path.basename(sys.argv[0] if sys.argv else "") in ("-m", "separation", "separation.exe"):
    import separation.cli.start  # noqa: F401

# Makes PyTorch's idle threads sleep instead of spin. Spinning threads take the cores from the fused layers' threads and
# from other processes: two songs at once took longer than one after the other. PyTorch reads this on import, so if it
# has been imported, the variable would only affect the processes that this one starts.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import importlib
from typing import TYPE_CHECKING, Any

from separation.errors import (
    AudioError,
    CheckpointError,
    DownloadError,
    EstimateError,
    InputError,
    OutputError,
    RecipeError,
    SeparationError,
)

__version__ = "0.2.0"  # pyproject.toml reads it

__all__ = [
    "AudioError",
    "Cache",
    "CheckpointError",
    "DownloadError",
    "EngineOptions",
    "EstimateError",
    "Excerpt",
    "InputError",
    "Loudness",
    "ModelPool",
    "OutputError",
    "OutputOptions",
    "RecipeError",
    "SeparationError",
    "SeparationModel",
    "Separator",
    "SongAnalysis",
    "StemFiles",
    "analyse",
    "load_model",
]

# Imported on first use: PyTorch takes a second to import, and `separation --help` does not need it.
_MODULES = {
    "Cache": "separation.engine.cache",
    "EngineOptions": "separation.engine.options",
    "Excerpt": "separation.audio.excerpt",
    "Loudness": "separation.analysis.facts",
    "ModelPool": "separation.engine.pool",
    "OutputOptions": "separation.audio.options",
    "SeparationModel": "separation.models.base",
    "Separator": "separation.engine.separator",
    "SongAnalysis": "separation.analysis.facts",
    "StemFiles": "separation.engine.separator",
    "analyse": "separation.analysis.song",
    "load_model": "separation.checkpoints.load",
}

if TYPE_CHECKING:
    from separation.analysis.facts import Loudness, SongAnalysis
    from separation.analysis.song import analyse
    from separation.audio.excerpt import Excerpt
    from separation.audio.options import OutputOptions
    from separation.checkpoints.load import load_model
    from separation.engine.cache import Cache
    from separation.engine.options import EngineOptions
    from separation.engine.pool import ModelPool
    from separation.engine.separator import Separator, StemFiles
    from separation.models.base import SeparationModel
else:  # a type checker that saw it would accept any name, misspelt ones as well

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'separation' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
