"""The frames of FLAC (RFC 9639): which are intact, by their checksums, and which sample each one starts at."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from separation.audio.pieces import Piece
from separation.audio.reader import ByteRange, ByteReader, append_range
from separation.audio.tags import after_id3v2
from separation.errors import AudioError

_SYNC = re.compile(rb"\xff[\xf8\xf9]")
_STREAM_MARK = b"fLaC"
_INFO_HEADER = b"\0\0\0\x22"  # begins STREAMINFO, the first metadata block
_LAST_INFO_HEADER = b"\x80\0\0\x22"  # begins STREAMINFO if no other metadata follow
_INFO_BYTES = 34
_MAX_METADATA_BLOCKS = 100_000
_MAX_HEADER_BYTES = 16  # of a frame's header
_MAX_TAIL_BYTES = 2**17  # the last frame's header and the tags after it lie within
_SCAN_BYTES = 2**18
_MAX_FALSE_HEADERS = 100_000  # a hostile file can hold millions
_MAX_RUNS = 2000
_MAX_FALSE_ENDS = 4  # inside a frame, this many sync codes may look like the next header
_CHECKSUM_BYTES = 4096  # computed at once
_BITS = (0, 8, 12, 0, 16, 20, 24, 32)
_HZ = (0, 88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000)


class _Frame(NamedTuple):
    start: int  # byte
    sample: int  # per channel: the number of its first sample
    n_samples: int  # per channel; 0 for a mark of where the last frame may end


@dataclass(frozen=True)
class FlacSong:
    """One FLAC stream in a file."""

    start: int  # byte of the stream's mark
    first_frame: int  # byte, by the lengths of the metadata blocks
    end: int
    info: bytes  # the STREAMINFO block

    @property
    def sample_rate(self) -> int:
        return self._packed >> 44

    @property
    def channels(self) -> int:
        return (self._packed >> 41 & 7) + 1

    @property
    def bits(self) -> int:
        return (self._packed >> 36 & 31) + 1

    @property
    def total_samples(self) -> int:
        """Per channel, as announced; 0 if unknown."""
        return self._packed & 2**36 - 1

    @property
    def block_samples(self) -> int:
        """Per channel, of a stream whose blocks have one size; else 0."""
        smallest, largest = int.from_bytes(self.info[:2], "big"), int.from_bytes(self.info[2:4], "big")
        return largest if smallest == largest else 0

    @property
    def _packed(self) -> int:
        """Rate, channels, bits and samples."""
        return int.from_bytes(self.info[10:18], "big")


@dataclass
class FrameRun:
    """Intact frames that follow each other."""

    sample: int  # per channel: the number of the first one's first sample
    n_samples: int = 0  # per channel
    ranges: list[ByteRange] = field(default_factory=list)


def find_songs(path: Path) -> list[FlacSong]:
    """The FLAC streams of a file, in their order; empty if the file is not FLAC."""
    songs: list[FlacSong] = []
    with ByteReader.open(path) as reader:
        start = after_id3v2(reader)
        while _starts_stream(reader, start):
            first_frame = _after_metadata(reader, start + len(_STREAM_MARK))
            following = reader.find(_STREAM_MARK + _INFO_HEADER, first_frame)
            end = following if _starts_stream(reader, following) else reader.size
            songs.append(FlacSong(start, first_frame, end, reader.get(start + 8, _INFO_BYTES)))
            start = following
    return songs


def _starts_stream(reader: ByteReader, position: int) -> bool:
    head = reader.get(position, 8 + _INFO_BYTES)
    marks = (_STREAM_MARK + _INFO_HEADER, _STREAM_MARK + _LAST_INFO_HEADER)
    return head.startswith(marks) and len(head) == 8 + _INFO_BYTES


def _after_metadata(reader: ByteReader, position: int) -> int:
    """The first byte after the metadata blocks that begin at a position."""
    for _ in range(_MAX_METADATA_BLOCKS):
        header = reader.get(position, 4)
        if len(header) < 4:
            break
        position += 4 + int.from_bytes(header[1:], "big")
        if header[0] & 0x80:  # the last block
            break
    return position


def ends_as_announced(path: Path, song: FlacSong) -> bool:
    """Whether the last frame ends with the last sample of the song, if the song announces its length."""
    with ByteReader.open(path) as reader:
        start = max(song.first_frame, song.end - _MAX_TAIL_BYTES)
        data = reader.get(start, song.end - start)
    last = None
    for match in _SYNC.finditer(data):
        last = _frame(data[match.start() : match.start() + _MAX_HEADER_BYTES], match.start(), song) or last
    return last is None or song.total_samples in (0, last.sample + last.n_samples)


def find_runs(path: Path, song: FlacSong, name: str) -> list[FrameRun]:
    """The runs of intact frames, in the order of their samples. Raises `AudioError` if there are too many."""
    runs: list[FrameRun] = []
    due = 0  # the sample after the last frame
    for frame, stop in _intact_frames(path, song):
        if frame.sample < due:  # a duplicate
            continue
        if not runs or frame.sample > due:
            runs.append(FrameRun(frame.sample))
        run = runs[-1]
        append_range(run.ranges, frame.start, stop)
        run.n_samples += frame.n_samples
        due = frame.sample + frame.n_samples
        if len(runs) > _MAX_RUNS:
            raise AudioError(f"{name} is damaged (most of its FLAC frames are missing): get the file again")
    return runs


def file_of(song: FlacSong, run: FrameRun) -> list[Piece]:
    """A file with this run alone."""
    info = bytearray(song.info)
    info[4:10] = bytes(6)  # the smallest and the largest frame are unknown
    # Decoders stop after the announced number of samples, counted from the start of the song.
    packed = int.from_bytes(info[10:18], "big") >> 36 << 36 | run.sample + run.n_samples
    info[10:18] = packed.to_bytes(8, "big")
    info[18:] = bytes(16)  # no checksum of the samples
    return [_STREAM_MARK + _LAST_INFO_HEADER + bytes(info), *run.ranges]


def n_extra_bytes(path: Path, song: FlacSong, runs: list[FrameRun]) -> int:
    """How many bytes after the last intact frame do not belong to a tag."""
    end = runs[-1].ranges[-1][1] if runs else song.first_frame
    with ByteReader.open(path) as reader:
        return next(mark.start for mark in _possible_ends(reader, song) if mark.start >= end) - end


def _intact_frames(path: Path, song: FlacSong) -> Iterator[tuple[_Frame, int]]:
    """Frames whose checksum is right, each with the byte after it."""
    with ByteReader.open(path) as reader:
        waiting: list[_Frame] = []
        for frame in _frame_headers(reader, song):
            waiting.append(frame)
            while len(waiting) > _MAX_FALSE_ENDS:
                yield from _take_first(reader, waiting)
        waiting += _possible_ends(reader, song)
        while waiting[0].n_samples:
            yield from _take_first(reader, waiting)


def _take_first(reader: ByteReader, waiting: list[_Frame]) -> Iterator[tuple[_Frame, int]]:
    """Take the first frame off the list. If it is intact, the headers inside it were false: take them off too."""
    stop = _end_of_first(reader, waiting)
    if stop is not None:
        yield waiting[0], stop
    waiting[:] = [later for later in waiting[1:] if stop is None or later.start >= stop]


def _end_of_first(reader: ByteReader, frames: list[_Frame]) -> int | None:
    """Where the first frame ends: at the first header up to which its checksum is right; None if it is damaged."""
    position = frames[0].start
    checksum = 0
    for later in frames[1:]:
        checksum = _checksum16(reader, position, later.start, checksum)
        position = later.start
        if checksum == 0:  # the checksum of a frame together with its own checksum
            return position
    return None


def _frame_headers(reader: ByteReader, song: FlacSong) -> Iterator[_Frame]:
    """Everything that looks like the header of a frame."""
    # The search begins after STREAMINFO, since the lengths of the other metadata blocks may be wrong.
    position, n_false = song.start + 8 + _INFO_BYTES, 0
    while position < song.end:
        data = reader.get(position, _SCAN_BYTES)[: song.end - position]
        is_end = position + len(data) >= song.end
        for match in _SYNC.finditer(data):
            at = match.start()
            if at + _MAX_HEADER_BYTES > len(data) and not is_end:
                break
            frame = _frame(data[at : at + _MAX_HEADER_BYTES], position + at, song)
            if frame is not None:
                yield frame
            else:
                n_false += 1
                if n_false > _MAX_FALSE_HEADERS + song.end // 2**14:
                    return
        position += len(data) if is_end else max(1, len(data) - _MAX_HEADER_BYTES)


def _possible_ends(reader: ByteReader, song: FlacSong) -> list[_Frame]:
    """Where the last frame may end: at a tag, or at the end of the song."""
    start = max(song.first_frame, song.end - _MAX_TAIL_BYTES)
    tail = reader.get(start, song.end - start)
    tags = {start + at for mark in (b"TAG", b"APETAGEX", b"ID3") if (at := tail.rfind(mark)) >= 0}
    return [_Frame(end, 0, 0) for end in [*sorted(end for end in tags if end < song.end), song.end]]


def _frame(data: bytes, start: int, song: FlacSong) -> _Frame | None:
    """The frame whose header `data` begins with, if the header's checksum is right and it fits the song."""
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
    is_sample_number = bool(data[1] & 1)  # else the number counts frames
    return _Frame(start, number if is_sample_number else number * (song.block_samples or n_samples), n_samples)


def _coded_number(data: bytes) -> tuple[int, int]:
    """A number in the coding of UTF-8, and how many bytes it takes; 0 bytes if it is invalid."""
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
    """By byte: its checksum with the polynomial x^8 + x^2 + x + 1."""
    table = bytearray()
    for byte in range(256):
        for _ in range(8):
            byte = byte << 1 ^ (0x107 if byte & 0x80 else 0)
        table.append(byte)
    return bytes(table)


@cache
def _tables16() -> NDArray[np.uint16]:
    """`[k, byte]`: the checksum of a byte followed by k zeros, with the polynomial x^16 + x^15 + x^2 + 1."""
    first = np.zeros(256, np.uint32)
    for byte in range(256):
        value = byte << 8
        for _ in range(8):
            value = value << 1 ^ (0x18005 if value & 0x8000 else 0)
        first[byte] = value
    tables = np.empty((_CHECKSUM_BYTES, 256), np.uint16)
    tables[0] = first
    for k in range(1, _CHECKSUM_BYTES):
        before = tables[k - 1].astype(np.uint32)
        tables[k] = (before << 8 & 0xFFFF) ^ first[before >> 8]
    return tables


def _checksum16(reader: ByteReader, start: int, stop: int, checksum: int) -> int:
    """The checksum of the bytes from `start` to `stop`, given the checksum of the bytes before them."""
    tables = _tables16()
    while start < stop:
        data = np.frombuffer(reader.get(start, min(stop - start, _CHECKSUM_BYTES)), np.uint8).copy()
        if len(data) == 0:
            break
        start += len(data)
        data[0] ^= checksum >> 8
        carried = checksum << 8 & 0xFF00 if len(data) == 1 else 0
        if len(data) > 1:
            data[1] ^= checksum & 0xFF
        n_following = np.arange(len(data) - 1, -1, -1)
        checksum = int(np.bitwise_xor.reduce(tables[n_following, data])) ^ carried
    return checksum
