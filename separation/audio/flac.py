"""The frames of FLAC (RFC 9639): which are whole, by their checksums, and at which sample each stands."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from separation.audio.integrity import after_id3v2
from separation.audio.pieces import Piece, Window
from separation.errors import AudioError

_SYNC = re.compile(rb"\xff[\xf8\xf9]")
_START = b"fLaC\0\0\0\x22"  # with the header of STREAMINFO, which comes first
_HEADER_BYTES = 16  # at most
_TAIL_BYTES = 2**17
_MAX_FALSE_HEADERS = 100_000  # a file made to keep this busy can hold millions
_MAX_RUNS = 2000
_MAX_TRIES = 4  # headers within a frame that are none
_CHUNK_BYTES = 4096
_BITS = (0, 8, 12, 0, 16, 20, 24, 32)
_HZ = (0, 88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000)


class Frame(NamedTuple):
    start: int  # byte
    sample: int  # per channel: where it belongs
    n_samples: int


@dataclass
class Song:
    """One FLAC stream in a file."""

    start: int  # byte of its mark
    audio: int  # byte of its first frame
    end: int
    sample_rate: int
    channels: int
    bits: int
    block_samples: int  # of a stream with blocks of one size
    total_samples: int  # per channel; 0 if it does not say
    info: bytes = b""


@dataclass
class Run:
    """Whole frames that follow each other."""

    sample: int  # of the first one
    n_samples: int = 0
    pieces: list[tuple[int, int]] = field(default_factory=list)  # bytes


def find_songs(path: Path) -> list[Song]:
    """The FLAC streams of a file, one after the other; none if it is not FLAC."""
    songs: list[Song] = []
    with path.open("rb", buffering=0) as file:
        start = after_id3v2(file)
        window = Window(file)
        while (song := _song(window, start)) is not None:
            if songs:
                songs[-1].end = start
            songs.append(song)
            if (start := _find(window, _START, song.audio)) < 0:
                break
    return songs


def _find(window: Window, mark: bytes, position: int) -> int:
    while position < window.size:
        data = window.get(position, 2**20)
        if (at := data.find(mark)) >= 0:
            return position + at
        position += max(1, len(data) - len(mark) + 1)
    return -1


def _song(window: Window, start: int) -> Song | None:
    head = window.get(start, 8 + 34)
    if head[:8] not in (_START, b"fLaC\x80\0\0\x22") or len(head) < 42:
        return None
    info = head[8:]
    packed = int.from_bytes(info[10:18], "big")
    position, is_last = start + 4, False
    for _ in range(100_000):
        block = window.get(position, 4)
        if is_last or len(block) < 4:
            break
        is_last = block[0] >= 128
        position += 4 + int.from_bytes(block[1:], "big")
    smallest, largest = int.from_bytes(info[:2], "big"), int.from_bytes(info[2:4], "big")
    return Song(
        start=start,
        audio=position,
        end=window.size,
        sample_rate=packed >> 44,
        channels=(packed >> 41 & 7) + 1,
        bits=(packed >> 36 & 31) + 1,
        block_samples=largest if smallest == largest else 0,
        total_samples=packed & 2**36 - 1,
        info=info,
    )


def ends_as_announced(path: Path, song: Song) -> bool:
    """Whether the last frame ends with the sample that the song announces, if it does."""
    with path.open("rb", buffering=0) as file:
        window = Window(file)
        start = max(song.audio, song.end - _TAIL_BYTES)
        data = window.get(start, song.end - start)
        last = None
        for match in _SYNC.finditer(data):
            last = _frame(data[match.start() : match.start() + _HEADER_BYTES], match.start(), song) or last
    return last is None or song.total_samples in (0, last.sample + last.n_samples)


def find_runs(path: Path, song: Song, name: str) -> list[Run]:
    """The runs of whole frames, in the order of their samples. Raises `AudioError` if there are too many."""
    runs: list[Run] = []
    due = 0  # the sample after the last frame
    for frame, stop in _whole_frames(path, song):
        if frame.sample < due:
            continue  # once more
        if not runs or frame.sample > due:
            runs.append(Run(frame.sample))
        run = runs[-1]
        if run.pieces and run.pieces[-1][1] == frame.start:
            run.pieces[-1] = (run.pieces[-1][0], stop)
        else:
            run.pieces.append((frame.start, stop))
        run.n_samples += frame.n_samples
        due = frame.sample + frame.n_samples
        if len(runs) > _MAX_RUNS:
            raise AudioError(f"{name} is damaged: most of its FLAC frames are missing; get the file again.")
    return runs


def pieces(song: Song, run: Run) -> list[Piece]:
    """A file of this run alone."""
    info = bytearray(song.info)
    info[4:10] = bytes(6)  # the frames' sizes
    # The sample behind the last one, at which decoders stop: what follows would be an error to them.
    packed = int.from_bytes(info[10:18], "big") >> 36 << 36 | run.sample + run.n_samples
    info[10:18] = packed.to_bytes(8, "big")
    info[18:] = bytes(16)  # the samples' checksum
    return [b"fLaC\x80\0\0\x22" + bytes(info), *run.pieces]


def n_extra_bytes(path: Path, song: Song, runs: list[Run]) -> int:
    """Bytes behind the last frame that are no tag."""
    end = runs[-1].pieces[-1][1] if runs else song.audio
    with path.open("rb", buffering=0) as file:
        return next(stop.start for stop in _ends(Window(file), song) if stop.start >= end) - end


def _whole_frames(path: Path, song: Song) -> Iterator[tuple[Frame, int]]:
    """Frames whose checksum is right, each with the byte after it."""
    with path.open("rb", buffering=0) as file:
        window = Window(file)
        waiting: list[Frame] = []
        for frame in _headers(window, song):
            waiting.append(frame)
            while len(waiting) > _MAX_TRIES:
                yield from _take_first(window, waiting)
        waiting += _ends(window, song)
        while waiting[0].n_samples:
            yield from _take_first(window, waiting)


def _take_first(window: Window, waiting: list[Frame]) -> Iterator[tuple[Frame, int]]:
    """Take the first frame off, with those that stand within it if it is whole."""
    stop = _stop(window, waiting)
    if stop is not None:
        yield waiting[0], stop
    waiting[:] = [later for later in waiting[1:] if stop is None or later.start >= stop]


def _stop(window: Window, waiting: list[Frame]) -> int | None:
    """Where the first of these frames ends: at one of the others, where its checksum comes out right."""
    position = waiting[0].start
    checksum = 0
    for later in waiting[1:]:
        checksum = _checksum(window, position, later.start, checksum)
        position = later.start
        if checksum == 0:  # which it is over a frame with its checksum
            return position
    return None


def _headers(window: Window, song: Song) -> Iterator[Frame]:
    position, n_false = song.start + 42, 0  # not from `audio`, since the lengths before it may be wrong
    while position < song.end:
        data = window.get(position, 2**18)[: song.end - position]
        for match in _SYNC.finditer(data):
            at = match.start()
            if at + _HEADER_BYTES > len(data) and position + len(data) < song.end:
                break
            frame = _frame(data[at : at + _HEADER_BYTES], position + at, song)
            if frame is not None:
                yield frame
            else:
                n_false += 1
                if n_false > _MAX_FALSE_HEADERS + song.end // 2**14:
                    return
        position += max(1, len(data) - _HEADER_BYTES) if position + len(data) < song.end else len(data)


def _ends(window: Window, song: Song) -> list[Frame]:
    """Where the last frame may end: at a tag, or with the song."""
    start = max(song.audio, song.end - _TAIL_BYTES)
    tail = window.get(start, song.end - start)
    ends = {start + at for mark in (b"TAG", b"APETAGEX", b"ID3") if (at := tail.rfind(mark)) >= 0}
    return [Frame(end, 0, 0) for end in [*sorted(end for end in ends if end < song.end), song.end]]


def _frame(data: bytes, start: int, song: Song) -> Frame | None:
    """The frame whose header stands there, if its checksum is right and it is of this song."""
    if len(data) < 6 or data[2] >> 4 == 0 or data[2] & 15 == 15 or data[3] & 1 or data[3] >> 4 > 10:
        return None
    assignment, bits = data[3] >> 4, _BITS[data[3] >> 1 & 7]
    if (assignment + 1 if assignment < 8 else 2) != song.channels or bits not in (0, song.bits):
        return None
    number, n_coded = _coded_number(data[4:11])
    if n_coded == 0:
        return None
    at, size_code, rate_code = 4 + n_coded, data[2] >> 4, data[2] & 15
    n_samples = 192 if size_code == 1 else 144 << size_code if size_code < 6 else 1 << size_code
    if size_code in (6, 7):
        n_samples = int.from_bytes(data[at : at + size_code - 5], "big") + 1
        at += size_code - 5
    at += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if at >= len(data) or _checksum8(data[:at]) != data[at]:
        return None
    if rate_code < 12 and _HZ[rate_code] not in (0, song.sample_rate):
        return None
    return Frame(start, number if data[1] & 1 else number * (song.block_samples or n_samples), n_samples)


def _coded_number(data: bytes) -> tuple[int, int]:
    """A number coded as in UTF-8, and how many bytes it takes; 0 of them if it is none."""
    first = data[0]
    if first < 0x80:
        return first, 1
    n = 8 - (first ^ 0xFF).bit_length()
    if n < 2 or n > 7 or len(data) < n or any(byte & 0xC0 != 0x80 for byte in data[1:n]):
        return 0, 0
    number = first & (0x7F >> n)
    for byte in data[1:n]:
        number = number << 6 | byte & 0x3F
    return number, n


def _checksum8(data: bytes) -> int:
    table, checksum = _table8(), 0
    for byte in data:
        checksum = table[checksum ^ byte]
    return checksum


@cache
def _table8() -> bytes:
    table = bytearray()
    for byte in range(256):
        for _ in range(8):
            byte = byte << 1 ^ (0x107 if byte & 0x80 else 0)
        table.append(byte)
    return bytes(table)


@cache
def _tables16() -> NDArray[np.uint16]:
    """`[k, byte]`: the checksum of a byte with k zeros behind it, by the polynomial x^16 + x^15 + x^2 + 1."""
    first = np.zeros(256, np.uint32)
    for byte in range(256):
        value = byte << 8
        for _ in range(8):
            value = value << 1 ^ (0x18005 if value & 0x8000 else 0)
        first[byte] = value
    tables = np.empty((_CHUNK_BYTES, 256), np.uint16)
    tables[0] = first
    for k in range(1, _CHUNK_BYTES):
        before = tables[k - 1].astype(np.uint32)
        tables[k] = (before << 8 & 0xFFFF) ^ first[before >> 8]
    return tables


def _checksum(window: Window, start: int, stop: int, checksum: int) -> int:
    """The checksum of bytes, going on from that of those before them."""
    tables = _tables16()
    while start < stop:
        data = np.frombuffer(window.get(start, min(stop - start, _CHUNK_BYTES)), np.uint8).copy()
        if len(data) == 0:
            break
        start += len(data)
        data[0] ^= checksum >> 8
        rest = checksum << 8 & 0xFF00 if len(data) == 1 else 0
        if len(data) > 1:
            data[1] ^= checksum & 0xFF
        places = np.arange(len(data) - 1, -1, -1)
        checksum = int(np.bitwise_xor.reduce(tables[places, data])) ^ rest
    return checksum
