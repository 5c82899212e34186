"""Names that a terminal would act on are shown with escapes, and JSON holds them exactly."""

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
from separation.cli.main import main
from separation.system.text import shown


@pytest.mark.parametrize(
    "text, expected",
    [
        ("song.wav", "song.wav"),
        ("Füße – 日本\u3000歌 🎵.wav", "Füße – 日本\u3000歌 🎵.wav"),
        ("می\u200cخواهم 👩\u200d🎤", "می\u200cخواهم 👩\u200d🎤"),  # words that are spelt with joiners
        ("Cafe\u0301", "Cafe\u0301"),  # as macOS names files
        ("\x1b[2J.wav", r"\x1b[2J.wav"),
        ("\x9b2J", r"\x9b2J"),
        ("a\nb\rc\td\x07\x7f\0", r"a\nb\rc\td\x07\x7f\x00"),
        ("\u202egpj.wav\u2066\u061c\u200f", r"\u202egpj.wav\u2066\u061c\u200f"),
        ("a\u2028b\u2029\ufeff", r"a\u2028b\u2029\ufeff"),
        (os.fsdecode(b"caf\xe9.wav"), r"caf\udce9.wav"),
        ("\U000e0041", r"\U000e0041"),
        (r"C:\new\x1b.wav", r"C:\new\x1b.wav"),
    ],
)
def test_what_a_terminal_would_act_on_is_shown_as_an_escape(text: str, expected: str) -> None:
    assert shown(text) == expected
    assert shown(expected) == expected


HOSTILE = ["\x1b[2J\x1b]0;owned\x07", "line\nfeed\r", "\u202egnp", os.fsdecode(b"latin \xe9"), "\x7f\x9b31m"]


def hostile_folder(folder: Path) -> Path:
    """Songs of which one can be separated and one cannot, for each name that the file system takes."""
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

    def look() -> None:
        while b"6 songs: 1 done" not in seen:
            seen.extend(os.read(terminal, 4096))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    with open(ours, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        code = main(["separate", str(music), "-o", str(tmp_path / "out"), "--recipe", "demo", "--workers", "2"])
        thread.join(30)
    os.close(terminal)
    assert code == 2
    text = bytes(seen).replace(b"\x1b[A", b"").decode()  # tqdm's own: up a line
    assert all(character in "\r\n" or character.isprintable() for character in text), ascii(text)
    assert r"\x1b[2J\x1b]0;owned\x07.wav: 0.3 s in" in text and r"\u202egnp.wav" in text


def test_json_holds_names_exactly_and_nothing_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    music = hostile_folder(tmp_path / "music")
    assert main(["separate", str(music), "-o", str(tmp_path / "out"), "--recipe", "demo", "--json"]) == 2
    captured = capsys.readouterr()
    lines = captured.out.split("\n")
    assert lines.pop() == "" and all(line.isascii() and line.isprintable() for line in lines)
    assert {json.loads(line)["song"] for line in lines} == {str(path) for path in music.iterdir()}
    assert all(line.isprintable() for line in captured.err.split("\n"))


@pytest.mark.parametrize("arguments", [["separate", "x\x1b[2J"], ["null", "\x1b[2J", "b\n"], ["\x1b[2J"]])
def test_a_wrong_argument_is_told_in_one_printable_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        sys.exit(main(arguments))
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.removesuffix("\n").split("\n")
    assert line.isprintable() and line.startswith("error: ")
