"""Configs and weights are found in a checkout and in an installed package; downloads and caches have their folders."""

import sys
from pathlib import Path

import pytest

from helpers.common import PROJECT
from separation.system import places
from separation.system.places import cache_folder, program, shipped, weights_folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as a wheel lays it out."""
    package = tmp_path / "site-packages" / "separation"
    for folder in ("configs", "weights"):
        (package / folder).mkdir(parents=True)
    monkeypatch.setattr(places, "PACKAGE", package)
    return package


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEPARATION_WEIGHTS", raising=False)


def test_a_checkout_uses_its_own_folders() -> None:
    assert shipped("configs") == PROJECT / "configs"
    assert shipped("weights") == weights_folder() == PROJECT / "weights"


def test_an_installed_package_reads_its_own_files_and_downloads_to_the_users_folder(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installed.parent / "configs").mkdir()  # another package's
    assert shipped("configs") == installed / "configs"
    assert shipped("weights") == installed / "weights"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert weights_folder() == tmp_path / "data" / "music-separation" / "weights"


@pytest.mark.skipif(sys.platform != "linux", reason="these folders are those of Linux")
def test_linux_keeps_data_and_caches_in_the_users_home(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_folder() == tmp_path / ".local" / "share" / "music-separation" / "weights"
    assert cache_folder() == tmp_path / ".cache" / "music-separation"


def test_an_environment_variable_moves_the_weights(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEPARATION_WEIGHTS", str(tmp_path / "mine"))
    assert weights_folder() == tmp_path / "mine"


@pytest.mark.parametrize(
    "started, name",
    [
        ("/usr/bin/separation", "separation"),
        ("separation.exe", "separation"),
        ("/src/separation/cli/main.py", "python -m separation"),
        ("-c", "python -m separation"),
    ],
)
def test_messages_name_the_program_as_it_was_started(started: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert program() == name
