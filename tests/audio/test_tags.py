import io
import struct

import pytest

from separation.audio.reader import ByteReader
from separation.audio.tags import after_id3v2, tag_bytes


def id3v2(n_bytes: int, *, flags: int = 0) -> bytes:
    footer = bytes(10) if flags & 16 else b""
    return b"ID3\4\0" + bytes([flags, *(n_bytes >> shift & 127 for shift in (21, 14, 7, 0))]) + bytes(n_bytes) + footer


def ape(n_bytes: int, *, is_header: bool) -> bytes:
    return b"APETAGEX" + struct.pack("<IIII8x", 2000, n_bytes, 0, (1 << 29) if is_header else 0)


@pytest.mark.parametrize(
    "data, n_bytes",
    [
        (id3v2(0), 10),
        (id3v2(300), 310),
        (id3v2(300, flags=16), 320),  # with a footer
        (b"TAG" + bytes(125), 128),
        (ape(500, is_header=True), 532),
        (ape(500, is_header=False), 32),  # a footer, after its items
        (b"ID3\4\0", 0),
        (b"APETAGEX", 0),
        (b"\xff\xfb\x90\x64", 0),
        (b"", 0),
    ],
)
def test_the_length_of_a_tag_is_in_its_header(data: bytes, n_bytes: int) -> None:
    assert tag_bytes(data[:24]) == n_bytes


@pytest.mark.parametrize(
    "content, start", [(b"", 0), (b"fLaC", 0), (id3v2(20), 30), (id3v2(20) + id3v2(5, flags=16) + b"fLaC", 55)]
)
def test_the_audio_begins_after_all_id3v2_tags(content: bytes, start: int) -> None:
    assert after_id3v2(ByteReader(io.BytesIO(content))) == start


def test_a_file_full_of_tags_is_not_read_to_its_end() -> None:
    assert after_id3v2(ByteReader(io.BytesIO(id3v2(0) * 1000))) == 1000
