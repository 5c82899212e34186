"""Characters that a terminal would interpret are shown as escapes."""

import os

import pytest

from separation.system.text import shown


@pytest.mark.parametrize(
    "text, expected",
    [
        ("song.wav", "song.wav"),
        ("Füße – 日本\u3000歌 🎵.wav", "Füße – 日本\u3000歌 🎵.wav"),
        ("می\u200cخواهم 👩\u200d🎤", "می\u200cخواهم 👩\u200d🎤"),  # some languages and emoji need joiners
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
def test_what_a_terminal_would_interpret_is_shown_as_an_escape(text: str, expected: str) -> None:
    assert shown(text) == expected
    assert shown(expected) == expected
