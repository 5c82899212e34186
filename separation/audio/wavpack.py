"""The blocks of WavPack: each says at which sample it stands, and the first how many there are."""

import struct
from dataclasses import dataclass, field
from pathlib import Path

from separation.audio.pieces import Window

_BLOCK = struct.Struct("<4sIHBBIIIII")
_UNKNOWN = 2**32 - 1
_MAX_BLOCK_BYTES = 2**20
_MAX_FALSE_BLOCKS = 100_000  # a file made to keep this busy can hold millions
_RATES = (6000, 8000, 9600, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000, 192000, 0)


@dataclass
class Blocks:
    """Blocks of one stream, in the order of their samples."""

    sample_rate: int = 0  # 0 if it is none of the usual ones
    total_samples: int = 0  # per channel; 0 if it does not say
    n_samples: int = 0  # per channel, in its blocks
    pieces: list[tuple[int, int]] = field(default_factory=list)  # bytes
    n_holes: int = 0  # where samples are missing, or bytes that are no block


def find_blocks(path: Path) -> list[Blocks]:
    """The blocks of a WavPack file, of each song if several are joined; none if it is no such file.

    None too of one made to keep a program busy.
    """
    with path.open("rb", buffering=0) as file:
        window = Window(file)
        if window.get(0, 4) != b"wvpk":
            return []
        blocks, due, position, n_false, missing = Blocks(), 0, 0, 0, False
        songs = [blocks]
        while position < window.size:
            block = _block(window, position)
            if block is not None and position + block[0] > window.size:
                block = None
            if block is not None and block[1] == 0 and block[2] and due and _fits(window, position, block, -1):
                blocks, due, missing = Blocks(), 0, False
                songs.append(blocks)
            if block is None or block[1] < due or not _fits(window, position, block, due):
                n_false += 1
                if n_false > _MAX_FALSE_BLOCKS:
                    return []
                missing = True
                position = _next_block(window, position + 1)
                continue
            n_bytes, index, n_samples, rate, total, is_last = block
            if n_samples:
                blocks.n_holes += missing or index > due
                blocks.sample_rate = blocks.sample_rate or rate
                blocks.total_samples = blocks.total_samples or total
                missing = False
                if is_last:  # of the blocks with the channels of the same samples
                    blocks.n_samples += n_samples
                    due = index + n_samples
            if blocks.pieces and blocks.pieces[-1][1] == position:
                blocks.pieces[-1] = (blocks.pieces[-1][0], position + n_bytes)
            else:
                blocks.pieces.append((position, position + n_bytes))
            position += n_bytes
        return songs


_Block = tuple[int, int, int, int, int, bool]


def _block(window: Window, position: int) -> _Block | None:
    """Bytes, first sample, samples, rate, samples of the whole, and whether no channels of these samples follow."""
    header = window.get(position, _BLOCK.size)
    if len(header) < _BLOCK.size or header[:4] != b"wvpk":
        return None
    _, size, version, index_high, total_high, total, index, n_samples, flags, _ = _BLOCK.unpack(header)
    if not 0x402 <= version <= 0x410 or size < 24 or size > _MAX_BLOCK_BYTES or n_samples > 2**22:
        return None
    total = 0 if total == _UNKNOWN else total + (total_high << 32) - total_high
    return size + 8, index + (index_high << 32), n_samples, _RATES[flags >> 23 & 15], total, bool(flags >> 12 & 1)


def _fits(window: Window, position: int, block: _Block, due: int) -> bool:
    """Whether a block stands where it should: with the sample that is due, or with a block after it that follows."""
    n_bytes, index, n_samples, _, total, is_last = block
    if index == due or not n_samples:
        return True
    if total and index + n_samples > total:
        return False
    following = _block(window, position + n_bytes)
    if following is None:
        return position + n_bytes == window.size
    return following[1] == (index + n_samples if is_last else index)


def _next_block(window: Window, position: int) -> int:
    while position < window.size:
        data = window.get(position, 2**16)
        if (at := data.find(b"wvpk")) >= 0:
            return position + at
        position += max(1, len(data) - 3)
    return window.size
