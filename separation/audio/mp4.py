"""Atoms of MP4 files: finds them, and adds to those that ffmpeg wrote."""

import io
import os
import struct
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from separation.errors import OutputError

_OFFSETS = {b"stco": ">I", b"co64": ">Q"}  # tables of places in the file, by atom


class Atom(NamedTuple):
    """An atom of an MP4 file: its kind, and where it and its content start and end."""

    kind: bytes
    start: int
    content: int
    end: int


def atom(kind: bytes, content: bytes) -> bytes:
    """The bytes of an atom."""
    return struct.pack(">I4s", 8 + len(content), kind) + content


def atoms(file: BinaryIO, start: int, end: int) -> Iterator[Atom]:
    """The atoms in a part of a file. Raises OutputError if it is not made of whole atoms."""
    while start < end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        content = start + 8
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))
            content += 8
        if size < content - start or start + size > end:
            raise OutputError(f"ffmpeg wrote a broken MP4 file at byte {start}: install another version")
        yield Atom(kind, start, content, start + size)
        start += size


def find_atom(file: BinaryIO, *path: bytes) -> Atom:
    """The first atom with a path such as `moov`, `udta`. Raises OutputError if there is none."""
    return _on_path(file, Atom(b"", 0, 0, file.seek(0, os.SEEK_END)), path)[-1]


def inserted(content: bytes, path: Sequence[bytes], addition: bytes) -> bytes:
    """Atoms with an addition at the end of the one that has this path."""
    parents = _on_path(io.BytesIO(content), Atom(b"", 0, 0, len(content)), path)
    grown = bytearray(content)
    for parent in parents:
        struct.pack_into(">I", grown, parent.start, parent.end - parent.start + len(addition))
    grown[parents[-1].end : parents[-1].end] = addition
    return bytes(grown)


def shifted(moov: bytes, n_bytes: int) -> bytes:
    """The atom `moov` of a file whose sound is to start that many bytes later."""
    file, moved = io.BytesIO(moov), bytearray(moov)
    whole = find_atom(file, b"moov")
    for track in atoms(file, whole.content, whole.end):
        if track.kind != b"trak":
            continue
        samples = _on_path(file, track, (b"mdia", b"minf", b"stbl"))[-1]
        for table in atoms(file, samples.content, samples.end):
            if form := _OFFSETS.get(table.kind):
                (n_offsets,) = struct.unpack_from(">I", moov, table.content + 4)
                for place in range(table.content + 8, table.end, struct.calcsize(form))[:n_offsets]:
                    struct.pack_into(form, moved, place, struct.unpack_from(form, moov, place)[0] + n_bytes)
    return bytes(moved)


def _on_path(file: BinaryIO, parent: Atom, path: Sequence[bytes]) -> list[Atom]:
    """The atoms on a path inside another atom, from the top down."""
    found: list[Atom] = []
    for kind in path:
        start = parent.content + (4 if parent.kind == b"meta" else 0)  # its version and flags
        parent = next((one for one in atoms(file, start, parent.end) if one.kind == kind), Atom(b"", 0, 0, 0))
        if not parent.kind:
            raise OutputError(f"ffmpeg wrote an MP4 file without {b'/'.join(path).decode()}: install another version")
        found.append(parent)
    return found
