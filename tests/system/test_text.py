"""Characters that a terminal would interpret are shown as escapes."""

import os

import pytest

from separation.system.text import close_matches, shown


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


@pytest.mark.parametrize(
    "word, expected",
    [
        ("kim", ["roformer_kim", "roformer_kim_ft2"]),
        ("ft2-kim", ["roformer_kim_ft2"]),
        ("Roformer Kim", ["roformer_kim", "roformer_kim_ft2"]),
        ("htdemuks", ["htdemucs"]),
        ("xyz", []),
        ("", []),
    ],
)
def test_close_matches_have_all_parts_of_a_word_or_are_similar(word: str, expected: list[str]) -> None:
    assert close_matches(word, ["htdemucs", "roformer_kim_ft2", "roformer_kim", "scnet"]) == expected


def test_close_matches_are_few() -> None:
    assert close_matches("a", ["aaaa", "a", "aaa", "aaaaa", "aa"], most=2) == ["a", "aa"]
