"""The exceptions that a user may meet, each with one sentence that says what is wrong and what to do.

    SeparationError
    ├── InputError          an option or a value that cannot be used: overlap >= chunk size, an unknown format
    │   ├── AudioError      a file that is not audio, is damaged, empty, or holds NaN
    │   └── RecipeError     an unknown recipe, choice of stems or model, or a YAML file that does not make sense
    ├── CheckpointError     weights that are missing, incomplete, altered, or of another architecture
    │   └── DownloadError   weights that could not be fetched
    ├── EstimateError       a model that gave NaN or Inf, or that needs more memory than there is
    └── OutputError         stems that could not be written: a full disk, an unwritable folder

Nothing else is raised on purpose. To cancel a running separation, raise any exception of your own from the progress
callback: it passes through unchanged and no partial file stays behind.
"""


class SeparationError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(SeparationError):
    """An option or a value that cannot be used."""


class AudioError(InputError):
    """A file that is not audio, is damaged or empty, or holds NaN or Inf."""


class RecipeError(InputError):
    """An unknown recipe, choice of stems or model, or a YAML file that does not make sense."""


class CheckpointError(SeparationError):
    """Weights that are missing, incomplete, altered, or of another architecture."""


class DownloadError(CheckpointError):
    """Weights that could not be fetched."""


class EstimateError(SeparationError):
    """A model that gave NaN or Inf, or that needs more memory than there is."""


class OutputError(SeparationError):
    """Stems that could not be written."""
