"""ID3 and APE tags around a stream: how many bytes they take."""

from separation.audio.reader import ByteReader

TAIL_MARKS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3", b"3DI")  # the first bytes of tags after the audio

_MAX_ID3V2_TAGS = 100  # a hostile file can hold millions
_ID3V1_BYTES = 128
_ID3V2_HEADER_BYTES = 10
_APE_HEADER_BYTES = 32


def tag_bytes(data: bytes) -> int:
    """The length of the tag that `data` (24 bytes are enough) begins with; 0 if it begins with none."""
    if data[:3] == b"ID3" and len(data) >= _ID3V2_HEADER_BYTES:
        n_bytes = sum((byte & 127) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
        has_footer = bool(data[5] & 16)
        return _ID3V2_HEADER_BYTES + n_bytes + (_ID3V2_HEADER_BYTES if has_footer else 0)
    if data[:3] == b"TAG":
        return _ID3V1_BYTES
    if data[:8] == b"APETAGEX" and len(data) >= 24:
        is_header = bool(data[23] & 0x20)  # a footer comes after its items
        return _APE_HEADER_BYTES + (int.from_bytes(data[12:16], "little") if is_header else 0)
    return 0


def after_id3v2(reader: ByteReader) -> int:
    """The first byte after the ID3v2 tags at a file's start."""
    position = 0
    for _ in range(_MAX_ID3V2_TAGS):
        header = reader.get(position, _ID3V2_HEADER_BYTES)
        if header[:3] != b"ID3" or len(header) < _ID3V2_HEADER_BYTES:
            break
        position += tag_bytes(header)
    return position
