"""REAPER projects: read back by a small parser of the format's own rules."""

import shlex
from typing import Any

import pytest

from separation.audio.options import FORMATS, STEM_FILE
from separation.audio.reaper import COLOURS, SOURCES, Project, quoted

FILES = {"vocals": 'So"ng (vocals).flac', "drums": "drums/It's a song.flac", "no_bass": "`a\"b'c.flac"}
PROJECT = Project(FILES, "flac", 48000, 183.25)


def parsed(text: str) -> list[Any]:
    """A block as `[name, values, lines and blocks in it]`, the others as lists of words."""
    root: list[Any] = []
    blocks = [root]
    for line in text.splitlines():
        words = words_of(line.strip())
        if words == [">"]:
            blocks.pop()
        elif words[0].startswith("<"):
            block = [words[0][1:], words[1:], []]
            blocks[-1].append(block)
            blocks.append(block[2])
        else:
            blocks[-1].append(words)
    assert len(blocks) == 1
    return root


def words_of(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.quotes, lexer.escape, lexer.commenters = True, "\"'`", "", ""
    return list(lexer)


def value(lines: list[Any], name: str) -> list[str]:
    return next(line[1:] for line in lines if line[0] == name and isinstance(line[1], str))


def block(lines: list[Any], name: str) -> list[Any]:
    return next(line[2] for line in lines if line[0] == name and isinstance(line[1], list))


def test_each_stem_is_an_item_from_0_on_a_named_coloured_track_with_a_relative_path() -> None:
    ((name, _, lines),) = parsed(PROJECT.text())
    assert name == "REAPER_PROJECT"
    assert value(lines, "SAMPLERATE")[0] == "48000"
    assert value(lines, "TIMELOCKMODE") == ["0"]
    tracks = [line for line in lines if line[0] == "TRACK"]
    assert [value(track[2], "NAME") for track in tracks] == [[stem] for stem in FILES]
    ids = [track[1] for track in tracks]
    assert len({id for (id,) in ids}) == len(FILES)
    expected = [*[*FILES.values()][:2], "'a\"b'c.flac"]
    for (_, id, track), colour, file in zip(tracks, COLOURS, expected, strict=False):
        assert value(track, "TRACKID") == id
        item = block(track, "ITEM")
        assert (value(item, "POSITION"), value(item, "LENGTH"), value(item, "SOFFS")) == (["0"], ["183.25"], ["0"])
        source = next(line for line in item if line[0] == "SOURCE")
        assert source[1] == ["FLAC"]
        assert value(source[2], "FILE") == [file]
        number = int(value(track, "PEAKCOL")[0])
        assert number >> 24 == 1
        assert f"#{number & 255:02X}{number >> 8 & 255:02X}{number >> 16 & 255:02X}" == colour


def test_the_same_stems_give_the_same_project() -> None:
    assert PROJECT.text() == Project(FILES, "flac", 48000, 183.25).text()


def test_every_format_of_single_stems_has_a_kind_of_source() -> None:
    assert SOURCES.keys() == set(FORMATS) - {STEM_FILE}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a b", '"a b"'),
        ('a "b"', "'a \"b\"'"),
        ("\"a\" 'b'", "`\"a\" 'b'`"),
        ("\"a\" 'b' `c`", "`\"a\" 'b' 'c'`"),
        ("two\nlines", '"two lines"'),
    ],
)
def test_a_text_is_in_quotes_that_it_does_not_contain(text: str, expected: str) -> None:
    assert quoted(text) == expected
