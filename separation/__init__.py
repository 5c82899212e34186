"""Split a song into stems. See README.md for the command line, the container and recipes.

>>> from separation import Separator
>>> stems = Separator(recipe="demo", stems="all_4").separate(mixture)  # [2, T] at 44100 Hz -> {"vocals": [2, T], ...}
"""

from separation.checkpoints import load_model
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
from separation.separator import ModelPool, Separator

__all__ = [
    "AudioError",
    "CheckpointError",
    "DownloadError",
    "EstimateError",
    "InputError",
    "ModelPool",
    "OutputError",
    "RecipeError",
    "SeparationError",
    "Separator",
    "load_model",
]
