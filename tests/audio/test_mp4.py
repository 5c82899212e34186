"""Atoms of MP4 files."""

import io
import struct

import pytest

from separation.audio.mp4 import atom, atoms, find_atom, inserted, shifted
from separation.errors import OutputError


def test_what_is_inserted_comes_last_and_all_parents_grow() -> None:
    meta = atom(b"meta", bytes(4) + atom(b"ilst", atom(b"1111", b"")) + atom(b"free", b"x"))
    moov = atom(b"moov", atom(b"mvhd", b"head") + atom(b"udta", meta) + atom(b"tail", b""))
    grown = inserted(moov, (b"moov", b"udta", b"meta", b"ilst"), atom(b"2222", b"two"))
    assert len(grown) == len(moov) + 11
    file = io.BytesIO(grown)
    whole, items = find_atom(file, b"moov"), find_atom(file, b"moov", b"udta", b"meta", b"ilst")
    assert [one.kind for one in atoms(file, whole.content, whole.end)] == [b"mvhd", b"udta", b"tail"]
    assert [one.kind for one in atoms(file, items.content, items.end)] == [b"1111", b"2222"]
    assert find_atom(file, b"moov", b"udta", b"meta", b"free").end == find_atom(file, b"moov", b"udta").end


@pytest.mark.parametrize("kind, form", [(b"stco", ">I"), (b"co64", ">Q")])
def test_the_places_of_all_tracks_are_shifted_and_nothing_else(kind: bytes, form: str) -> None:
    def moov(*places: int) -> bytes:
        tracks = []
        for place in places:
            table = struct.pack(">II", 0, 2) + struct.pack(form, place) + struct.pack(form, place + 7)
            inner = atom(b"stbl", atom(b"stsz", b"other") + atom(kind, table))
            tracks.append(atom(b"trak", atom(b"tkhd", b"") + atom(b"mdia", atom(b"minf", inner))))
        return atom(b"moov", atom(b"mvhd", b"") + b"".join(tracks) + atom(b"udta", b""))

    assert shifted(moov(100, 2000), 35) == moov(135, 2035)


@pytest.mark.parametrize("content", [b"\0\0\0\4moov", b"\0\0\0\20mo", b"\0\0\1\0moov", b"\0\0\0\1moov" + bytes(8)])
def test_a_broken_file_is_an_error(content: bytes) -> None:
    with pytest.raises(OutputError, match="broken MP4 file at byte 0"):
        find_atom(io.BytesIO(content), b"moov")


def test_a_missing_atom_is_an_error() -> None:
    with pytest.raises(OutputError, match="without moov/udta"):
        find_atom(io.BytesIO(b"\0\0\0\10moov"), b"moov", b"udta")
