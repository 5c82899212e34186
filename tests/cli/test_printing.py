"""Names of songs are printed with escapes, JSON holds them exactly, and only a terminal gets progress bars."""

import fcntl
import json
import os
import pty
import struct
import sys
import termios
import threading
from pathlib import Path

import pytest

from helpers import common
from helpers.command_line import DEMO, separate, write_songs
from separation.cli.main import main

HOSTILE = ["\x1b[2J\x1b]0;owned\x07", "line\nfeed\r", "\u202egnp", os.fsdecode(b"latin \xe9"), "\x7f\x9b31m"]


def hostile_folder(folder: Path) -> Path:
    """Songs with names that a terminal would interpret; only the first can be separated."""
    folder.mkdir()
    (folder / "words\x1b[31m.wav").write_text("words")
    try:
        for name in HOSTILE:
            (folder / f"{name}.wav").write_text("words")
    except OSError as e:
        pytest.skip(f"this file system does not take such a name: {e}")
    (folder / f"{HOSTILE[0]}.wav").write_bytes(common.song(0.3))
    return folder


def test_names_of_songs_never_reach_a_terminal_raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    music = hostile_folder(tmp_path / "music")
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))
    seen = bytearray()

    def read_terminal() -> None:
        while b"6 songs: 1 done" not in seen:
            seen.extend(os.read(terminal, 4096))

    thread = threading.Thread(target=read_terminal, daemon=True)
    thread.start()
    with open(ours, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        code = main(["separate", str(music), "-o", str(tmp_path / "out"), *DEMO, "--workers", "2"])
        thread.join(60)
    os.close(terminal)
    assert code == 2
    text = bytes(seen).replace(b"\x1b[A", b"").decode()  # tqdm moves the cursor up
    assert all(character in "\r\n" or character.isprintable() for character in text), ascii(text)
    assert r"\x1b[2J\x1b]0;owned\x07.wav: 0.3 s in" in text and r"\u202egnp.wav" in text


@pytest.mark.slow
def test_json_holds_names_exactly_and_nothing_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    music = hostile_folder(tmp_path / "music")
    assert main(["separate", str(music), "-o", str(tmp_path / "out"), *DEMO, "--json"]) == 2
    captured = capsys.readouterr()
    lines = captured.out.split("\n")
    assert lines.pop() == "" and all(line.isascii() and line.isprintable() for line in lines)
    assert {json.loads(line)["song"] for line in lines} == {str(path) for path in music.iterdir()}
    assert all(line.isprintable() for line in captured.err.split("\n"))


@pytest.mark.parametrize("arguments", [["separate", "x\x1b[2J"], ["null", "\x1b[2J", "b\n"], ["\x1b[2J"]])
def test_an_error_about_a_wrong_argument_is_one_printable_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        sys.exit(main(arguments))
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.removesuffix("\n").split("\n")
    assert line.isprintable() and line.startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_terminal_gets_a_bar_for_each_song_and_one_for_all(
    workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_songs(tmp_path / "music", "1.wav", "2.wav", "3.wav")
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    shown = b""

    def read_terminal() -> None:
        nonlocal shown
        while b"3 songs: 3 done" not in shown:
            shown += os.read(terminal, 4096)

    thread = threading.Thread(target=read_terminal, daemon=True)
    thread.start()
    with open(ours, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert separate(tmp_path / "music", "-o", tmp_path / "out", "--workers", workers) == 0
        thread.join(60)
    os.close(terminal)
    assert b"0 of 3 songs|" in shown and b"\r3.wav" in shown and b"3 songs: 3 done" in shown
