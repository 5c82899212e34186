"""Where files lie: what ships with the program, in a checkout or an installed package, and what it keeps for its user.

Does without PyTorch, for what answers at once.
"""

import os
import sys
from pathlib import Path

from platformdirs import PlatformDirs

PACKAGE = Path(__file__).parents[1]  # separation/
NAME = "music-separation"


def shipped(folder: str) -> Path:
    """`configs` or `weights` as they ship: a wheel holds them in the package, a checkout has them beside it."""
    installed = PACKAGE / folder
    return installed if installed.is_dir() else PACKAGE.parent / folder


def is_installed() -> bool:
    """Whether this is an installed package, not a checkout."""
    return (PACKAGE / "configs").is_dir()


def weights_folder() -> Path:
    """Where downloads go: SEPARATION_WEIGHTS, else `weights` in a checkout or in the user's folder of data."""
    if chosen := os.environ.get("SEPARATION_WEIGHTS"):
        return Path(chosen)
    return _user_folders().user_data_path / "weights" if is_installed() else shipped("weights")


def size_bytes(path: Path) -> int:
    """The size of a file, 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0


def cache_folder() -> Path:
    """The program's folder in the user's caches."""
    return _user_folders().user_cache_path


def program() -> str:
    """How the user calls the command line: `separation` where that is what runs, else by Python's `-m`."""
    return "separation" if Path(sys.argv[0]).stem == "separation" else "python -m separation"


def _user_folders() -> PlatformDirs:
    return PlatformDirs(NAME, appauthor=False)
