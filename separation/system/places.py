"""Where files are: those that ship with the program, and the user's weights and caches.

Importing this is cheap: PyTorch is not needed.
"""

import os
import sys
from pathlib import Path

from platformdirs import PlatformDirs

PACKAGE = Path(__file__).parents[1]  # separation/
NAME = "music-separation"


def shipped(folder: str) -> Path:
    """The folder `configs` or `weights` as shipped: inside the package in a wheel, beside it in a checkout."""
    installed = PACKAGE / folder
    return installed if installed.is_dir() else PACKAGE.parent / folder


def is_installed() -> bool:
    """Whether this is an installed package rather than a checkout."""
    return (PACKAGE / "configs").is_dir()


def weights_folder() -> Path:
    """Where downloads go: SEPARATION_WEIGHTS, else `weights` in the checkout or in the user's data folder."""
    if chosen := os.environ.get("SEPARATION_WEIGHTS"):
        return Path(chosen)
    return _user_folders().user_data_path / "weights" if is_installed() else shipped("weights")


def size_bytes(path: Path) -> int:
    """The size of a file, or 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def cache_folder() -> Path:
    """The program's folder among the user's caches."""
    return _user_folders().user_cache_path


def songs_folder() -> Path:
    """Where the local page keeps songs: SEPARATION_SONGS, else in the program's folder of the user's state."""
    if chosen := os.environ.get("SEPARATION_SONGS"):
        return Path(chosen)
    return _user_folders().user_state_path / "songs"


def program() -> str:
    """How the user started the program: `separation`, or `python -m separation`."""
    return "separation" if Path(sys.argv[0]).stem == "separation" else "python -m separation"


def _user_folders() -> PlatformDirs:
    return PlatformDirs(NAME, appauthor=False)
