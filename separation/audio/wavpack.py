"""The blocks of WavPack. Each block states which sample it starts at; the first one states how many there are."""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from separation.audio.reader import ByteRange, ByteReader, append_range

_MARK = b"wvpk"
_HEADER = struct.Struct("<4sIHBBIIIII")
_UNKNOWN = 2**32 - 1
_MAX_BLOCK_BYTES = 2**20
_MAX_BLOCK_SAMPLES = 2**22
_MAX_BAD_BLOCKS = 100_000  # a hostile file can hold millions
_RATES = (6000, 8000, 9600, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000, 192000, 0)


@dataclass
class WavPackSong:
    """The good blocks of one song, in the order of their samples."""

    sample_rate: int = 0  # hertz; 0 if it is not one of `_RATES`
    total_samples: int = 0  # per channel, as announced; 0 if unknown
    ranges: list[ByteRange] = field(default_factory=list)
    n_holes: int = 0  # places where samples are missing or where bytes belong to no block


class _Block(NamedTuple):
    n_bytes: int
    start: int  # the number of its first sample
    n_samples: int  # per channel
    sample_rate: int  # hertz; 0 if unknown
    total_samples: int  # per channel, of the song; 0 if unknown
    is_last: bool  # no further channels of the same samples follow


def find_songs(path: Path) -> list[WavPackSong]:
    """The songs of a WavPack file, several if files were joined.

    Empty if the file is not WavPack, or if it has so many bad blocks that it must be hostile.
    """
    with ByteReader.open(path) as reader:
        if reader.get(0, 4) != _MARK:
            return []
        song, due, position, n_bad, is_hole = WavPackSong(), 0, 0, 0, False
        songs = [song]
        while position < reader.size:
            block = _block(reader, position)
            if block and position + block.n_bytes > reader.size:
                block = None
            if block and block.start == 0 and block.n_samples and due and _next_continues(reader, position, block):
                song, due, is_hole = WavPackSong(), 0, False
                songs.append(song)
            if block is None or block.start < due or not _is_in_place(reader, position, block, due):
                n_bad += 1
                if n_bad > _MAX_BAD_BLOCKS:
                    return []
                is_hole = True
                position = reader.find(_MARK, position + 1)
                continue
            if block.n_samples:
                song.n_holes += is_hole or block.start > due
                song.sample_rate = song.sample_rate or block.sample_rate
                song.total_samples = song.total_samples or block.total_samples
                is_hole = False
                if block.is_last:
                    due = block.start + block.n_samples
            append_range(song.ranges, position, position + block.n_bytes)
            position += block.n_bytes
        return songs


def _block(reader: ByteReader, position: int) -> _Block | None:
    """The block at a position; None if there is no valid header."""
    header = reader.get(position, _HEADER.size)
    if len(header) < _HEADER.size or header[:4] != _MARK:
        return None
    _, size, version, index_high, total_high, total, index, n_samples, flags, _ = _HEADER.unpack(header)
    if not 0x402 <= version <= 0x410 or not 24 <= size <= _MAX_BLOCK_BYTES or n_samples > _MAX_BLOCK_SAMPLES:
        return None
    return _Block(
        n_bytes=size + 8,
        start=index + (index_high << 32),
        n_samples=n_samples,
        sample_rate=_RATES[flags >> 23 & 15],
        total_samples=0 if total == _UNKNOWN else total + (total_high << 32) - total_high,
        is_last=bool(flags >> 12 & 1),
    )


def _is_in_place(reader: ByteReader, position: int, block: _Block, due: int) -> bool:
    """Whether a block starts at the sample that is due, or the block after it confirms that samples are missing."""
    return block.start == due or not block.n_samples or _next_continues(reader, position, block)


def _next_continues(reader: ByteReader, position: int, block: _Block) -> bool:
    """Whether the next block continues with the next sample, or the file ends."""
    end = block.start + block.n_samples
    if block.total_samples and end > block.total_samples:
        return False
    following = _block(reader, position + block.n_bytes)
    if following is None:
        return position + block.n_bytes == reader.size
    return following.start == (end if block.is_last else block.start)
