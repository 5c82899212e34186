"""The commands that are a single call print what they return."""

import signal
from pathlib import Path

import pytest

from helpers.command_line import separate, write_songs
from helpers.common import started
from separation.cli.main import main


def test_null_prints_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_songs(tmp_path, "1.wav", "2.wav")
    assert main(["null", str(tmp_path / "1.wav"), str(tmp_path / "1.wav")]) == 0
    same = capsys.readouterr().out
    assert main(["null", str(tmp_path / "1.wav"), str(tmp_path / "2.wav")]) == 0
    other = capsys.readouterr().out
    assert same == "1.wav: identical\n" and "dBFS" in other


def test_the_cache_is_listed_and_cleared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SEPARATION_CACHE", str(folder))
    write_songs(tmp_path, "1.wav")
    assert separate(tmp_path / "1.wav", "-o", tmp_path / "out") == 0
    capsys.readouterr()
    assert main(["cache", "list"]) == 0
    entry, total = capsys.readouterr().out.splitlines()
    assert "1.wav" in entry and total == f"1 estimate in {folder}: 0.00 of 8 GiB"
    assert main(["cache", "clear"]) == 0
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out == f"0 estimates in {folder}: 0.00 of 8 GiB\n"


@pytest.mark.slow
def test_serve_prints_the_pages_address_and_ends_with_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPARATION_SONGS", str(tmp_path / "songs"))
    with started("serve", "--port", "0", "--no-browser", "--device", "cpu") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
