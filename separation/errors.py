"""The errors that this package raises on purpose. Each message says what is wrong and what to do, in one sentence.

    SeparationError         the base of them all; catch it to catch any of them
    ├── InputError          an option or value is not usable, such as an overlap longer than the chunk
    │   ├── AudioError      a song is not audio, is empty or too damaged, or holds NaN or Inf
    │   └── RecipeError     a recipe, choice of stems or model is unknown, or its YAML file is wrong
    ├── CheckpointError     weights are missing, incomplete, altered, or for another architecture
    │   └── DownloadError   weights cannot be downloaded
    ├── EstimateError       a model outputs NaN or Inf, or needs more memory than there is
    └── OutputError         files cannot be written: the disk is full, or a file is not ours to replace

To cancel a separation, raise an exception of your own from the progress callback. It passes through unchanged, and no
partial file stays behind.
"""


class SeparationError(Exception):
    """The base of all errors that this package raises on purpose."""


class InputError(SeparationError):
    """An option or value is not usable."""


class AudioError(InputError):
    """A song is not audio, is empty or too damaged, or holds NaN or Inf."""


class RecipeError(InputError):
    """A recipe, choice of stems or model is unknown, or its YAML file is wrong."""


class CheckpointError(SeparationError):
    """Weights are missing, incomplete, altered, or for another architecture."""


class DownloadError(CheckpointError):
    """Weights cannot be downloaded."""


class EstimateError(SeparationError):
    """A model outputs NaN or Inf, or needs more memory than there is."""


class OutputError(SeparationError):
    """Files cannot be written."""
