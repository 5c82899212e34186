"""Streams of bare frames (MPEG audio, AAC in ADTS, AC-3, E-AC-3): which frames a file has, and where some are missing.

Such a stream has no timestamps, and at most one count of its frames, in a Xing or VBRI header. A frame counts if its
header is in step with its neighbours, that is, it begins where the previous frame ends. Other bytes are gaps.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from separation.audio.reader import ByteRange, ByteReader, append_range
from separation.audio.tags import TAIL_MARKS, after_id3v2, tag_bytes

# A hostile file can hold millions of each; beyond these numbers, the decoders alone judge the file.
_MAX_FALSE_HEADERS = 100_000
_MAX_GAPS = 2000

_DECODER_DELAY = 529  # samples, in MP3 decoders
EXTRA_SAMPLES = 8190  # per channel: the most that an MP3 encoder may add before and after the song
_ENCODERS = (b"LAME", b"Lavf", b"Lavc")  # they write a checksum into the Xing header
_HEAD_BYTES = 192  # enough for a frame's header and the Xing or VBRI header after it
_MAX_LEAD_BYTES = 2**20
_MAX_TAIL_BYTES = 2**16


class Header(NamedTuple):
    """What a frame's header says about the frame."""

    kind: tuple[int, ...]  # the same for all frames of a stream
    sample_rate: int  # hertz
    n_bytes: int  # of the frame
    n_samples: int  # per channel


class Codec(NamedTuple):
    """How to find and parse the frames of a codec."""

    demuxer: str  # ffmpeg's name of the format
    sync: re.Pattern[bytes]
    parse: Callable[[bytes], Header | None]


# MPEG audio. Version 3 is MPEG-1, 2 is MPEG-2, 0 is MPEG-2.5. The layer field is 4 minus the layer's number.
_MPEG_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by version
_MPEG_KBPS = {  # by (is MPEG-1, layer field)
    (True, 3): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 3): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_LAYER_III = 1


def _mpeg(data: bytes) -> Header | None:
    if len(data) < 4 or data[0] != 0xFF or data[1] < 0xE0:
        return None
    version, layer, bitrate_index, rate_index = data[1] >> 3 & 3, data[1] >> 1 & 3, data[2] >> 4, data[2] >> 2 & 3
    if version == 1 or layer == 0 or bitrate_index in (0, 15) or rate_index == 3:
        return None
    mpeg1, padding = version == 3, data[2] >> 1 & 1
    rate, kbps = _MPEG_HZ[version][rate_index], _MPEG_KBPS[mpeg1, layer][bitrate_index]
    if layer == 3:
        n_samples, n_bytes = 384, (12 * kbps * 1000 // rate + padding) * 4
    else:
        n_samples = 1152 if mpeg1 or layer == 2 else 576
        n_bytes = n_samples // 8 * kbps * 1000 // rate + padding
    is_mono = data[3] >> 6 == 3
    return Header((version, layer, rate, is_mono), rate, n_bytes, n_samples)


_ADTS_HZ = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)


def _adts(data: bytes) -> Header | None:
    if len(data) < 7 or data[0] != 0xFF or data[1] & 0xF6 != 0xF0:
        return None
    rate_index = data[2] >> 2 & 15
    n_bytes = (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5
    if rate_index >= len(_ADTS_HZ) or n_bytes < 8:
        return None
    rate, channels = _ADTS_HZ[rate_index], (data[2] & 1) << 2 | data[3] >> 6
    return Header((data[1] >> 3 & 1, data[2] >> 6, rate, channels), rate, n_bytes, 1024 * ((data[6] & 3) + 1))


_AC3_HZ = (48000, 44100, 32000)
_AC3_KBPS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 576, 640)


def _ac3_or_eac3(data: bytes) -> Header | None:
    if len(data) < 7 or data[:2] != b"\x0bw":
        return None
    return _eac3(data) if data[5] >> 3 > 10 else _ac3(data)


def _ac3(data: bytes) -> Header | None:
    rate_index, size = data[4] >> 6, data[4] & 63
    if rate_index == 3 or size // 2 >= len(_AC3_KBPS):
        return None
    rate = _AC3_HZ[rate_index] >> max(0, (data[5] >> 3) - 8)
    words = _AC3_KBPS[size // 2] * 96000 // _AC3_HZ[rate_index]
    if rate_index == 1:
        words += size & 1
    return Header((0, rate, data[5] >> 3, data[6] >> 5), rate, 2 * words, 1536)


def _eac3(data: bytes) -> Header | None:
    stream, rate_index, blocks = data[2] >> 6, data[4] >> 6, (1, 2, 3, 6)[data[4] >> 4 & 3]
    if stream == 3 or data[5] >> 3 > 16 or (rate_index == 3 and blocks == 6):
        return None
    rate = _AC3_HZ[data[4] >> 4 & 3] // 2 if rate_index == 3 else _AC3_HZ[rate_index]
    blocks = 6 if rate_index == 3 else blocks
    n_bytes = 2 * (((data[2] & 7) << 8 | data[3]) + 1)
    # The frames of a dependent stream add channels to the samples of the independent one.
    is_dependent = stream == 1 or data[2] >> 3 & 7
    return Header((1, rate), rate, n_bytes, 0 if is_dependent else 256 * blocks)


MPEG = Codec("mp3", re.compile(rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]"), _mpeg)
CODECS = {  # by ffmpeg's name of the format
    "mp3": MPEG,
    "aac": Codec("aac", re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"), _adts),
    "ac3": Codec("ac3", re.compile(rb"\x0bw"), _ac3_or_eac3),
    "eac3": Codec("eac3", re.compile(rb"\x0bw"), _ac3_or_eac3),
}


class Gap(NamedTuple):
    """Bytes between two runs that do not belong to a frame."""

    frame: int  # the number of frames before it, in the part
    n_bytes: int  # 0 if there is only a tag


@dataclass
class Part:
    """Frames of one kind. A file has several parts if files were joined."""

    header: Header
    is_mpeg: bool
    runs: list[ByteRange] = field(default_factory=list)  # adjacent frames
    gaps: list[Gap] = field(default_factory=list)  # one before each run but the first
    n_frames: int = 0  # without the frame that holds the Xing or VBRI header
    n_bytes: int = 0  # of these frames
    sizes: tuple[int, int] = (2**31, 0)  # bytes, of the shortest and the longest frame
    info: ByteRange | None = None  # the frame that holds the Xing or VBRI header
    announced: int = 0  # frames, by that header; 0 if unknown
    skipped: int = 0  # samples at the start that decoders drop, by LAME's header
    padding: int = 0  # samples that the encoder added at the end, by LAME's header
    is_info_intact: bool = True  # by LAME's checksum, if there is one
    is_cut: bool = False  # the file ends within a frame, which is not counted
    n_lead: int = 0  # bytes before the first frame of the file that are neither tags nor zeros
    n_extra: int = 0  # bytes after the last frame that are neither tags nor zeros

    @property
    def is_cbr(self) -> bool:
        return self.sizes[1] - self.sizes[0] <= 1

    @property
    def frame_seconds(self) -> float:
        return self.header.n_samples / self.header.sample_rate

    @property
    def is_layer_iii(self) -> bool:
        return self.is_mpeg and self.header.kind[1] == _LAYER_III

    @property
    def is_mono(self) -> bool:
        return self.is_mpeg and bool(self.header.kind[3])

    @property
    def n_samples(self) -> int:
        """Per channel, including what the encoder added."""
        return self.n_frames * self.header.n_samples

    @property
    def song_samples(self) -> int:
        """Per channel, without what the encoder added."""
        return self.n_samples - self.skipped - self.padding

    @property
    def least_samples(self) -> int:
        """The fewest samples per channel that a decoder should return: it may drop a frame or two."""
        return self.song_samples - 2 * self.header.n_samples

    @property
    def has_no_gaps(self) -> bool:
        return not any(gap.n_bytes for gap in self.gaps)


def find_parts(path: Path, codec: Codec, check: Callable[[Part], None] = lambda part: None) -> list[Part]:
    """The parts of a file. Empty if it is no such stream, or has so many false headers that it must be hostile.

    `check` is called with the growing part after each of its frames; it may raise to stop the search.
    """
    with ByteReader.open(path) as reader:
        return _FrameFinder(reader, codec, check).parts()


class _FrameFinder:
    def __init__(self, reader: ByteReader, codec: Codec, check: Callable[[Part], None]) -> None:
        self._reader, self._codec, self._check = reader, codec, check
        self._parts: list[Part] = []
        self._start = self._position = after_id3v2(reader)
        self._n_false = self._n_gaps = 0
        self._last: ByteRange = (self._start, self._start)  # the last frame

    def parts(self) -> list[Part]:
        while self._position < self._reader.size:
            head = self._head(self._position)
            header = self._codec.parse(head)
            if header is None or not self._parts or header.kind != self._parts[-1].header.kind:
                n_bytes = tag_bytes(head)
                if n_bytes:
                    self._position += n_bytes
                elif not self._resynchronise():
                    break
            elif self._position + header.n_bytes > self._reader.size:
                self._parts[-1].is_cut = True
                break
            else:
                self._take(header, head)
        if self._n_false > _MAX_FALSE_HEADERS or self._n_gaps > _MAX_GAPS:
            return []
        if self._parts:
            self._measure_ends()
        return self._parts

    def _head(self, position: int) -> bytes:
        return self._reader.get(position, _HEAD_BYTES)

    def _measure_ends(self) -> None:
        """Count the bytes before and after all frames."""
        first, last = self._parts[0], self._parts[-1]
        first_frame = (first.info or first.runs[0])[0]
        lead = self._reader.get(self._start, min(first_frame - self._start, _MAX_LEAD_BYTES))
        first.n_lead = len(lead.strip(b"\0"))
        last.n_extra = 0 if last.is_cut else _n_extra_bytes(self._reader, last.runs[-1][1])

    def _take(self, header: Header, head: bytes) -> None:
        """Add the frame at the current position, which is in step with the last one or the first after a gap."""
        frame = (self._position, self._position + header.n_bytes)
        info = _xing_info(head)
        if info is None:
            self._add_frame(header, head, frame)
        else:
            self._add_info(header, head, frame, info)
        self._last = frame
        self._position = frame[1]

    def _add_info(self, header: Header, head: bytes, frame: ByteRange, info: tuple[int, int, int]) -> None:
        """Add a frame with a Xing or VBRI header."""
        part = self._parts[-1]
        if part.n_frames or part.info:  # another file begins
            part = self._new_part(header)
        part.info = frame
        part.announced, part.skipped, part.padding = info
        part.is_info_intact = header.n_bytes < _HEAD_BYTES or _is_info_intact(head)

    def _add_frame(self, header: Header, head: bytes, frame: ByteRange) -> None:
        part = self._parts[-1]
        if part.runs and part.runs[-1][1] != frame[0]:
            part.gaps.append(Gap(part.n_frames, 0))
        append_range(part.runs, *frame)
        if not part.n_frames and not part.info and _is_info_without_mark(head):
            part.is_info_intact = False
        part.n_frames += 1
        part.n_bytes += header.n_bytes
        part.sizes = (min(part.sizes[0], header.n_bytes), max(part.sizes[1], header.n_bytes))
        self._check(part)

    def _new_part(self, header: Header) -> Part:
        self._parts.append(Part(header, self._codec is MPEG))
        return self._parts[-1]

    def _resynchronise(self) -> bool:
        """Go to the next frame that is in step with others, and note the gap before it. False if there is none."""
        part = self._parts[-1] if self._parts else None
        lost_at = self._position
        # The last frame may have been false, or shorter than its header says, so the search begins inside it.
        was_in_step = part is not None and lost_at == self._last[1]
        header = self._find_frame(self._last[0] + 1 if was_in_step else lost_at, part.header.kind if part else None)
        if header is None:
            return False
        start = self._position
        if part is None or header.kind != part.header.kind:
            self._new_part(header)
        else:
            if start < lost_at and part.runs and part.n_frames:
                self._drop_last(part)
            if part.runs and part.runs[-1][1] != start:
                part.gaps.append(Gap(part.n_frames, start - part.runs[-1][1]))
                part.runs.append((start, start))
                self._n_gaps += 1
                if self._n_gaps > _MAX_GAPS:
                    return False
        self._take(header, self._head(start))
        return True

    def _find_frame(self, position: int, kind: tuple[int, ...] | None) -> Header | None:
        """Go to the first confirmed frame from `position` on; None if there is none."""
        while (position := self._next_sync(position)) < self._reader.size:
            header = self._codec.parse(self._head(position))
            if header and self._is_confirmed(header, position, kind):
                self._position = position
                return header
            self._n_false += 1
            if self._n_false > _MAX_FALSE_HEADERS:
                return None
            position += 1
        return None

    def _drop_last(self, part: Part) -> None:
        """Take the last frame away again, because the next one begins within it."""
        start, stop = self._last
        if part.runs[-1][1] != stop:  # it was the frame with the Xing header
            return
        part.runs[-1] = (part.runs[-1][0], start)
        part.n_frames -= 1
        part.n_bytes -= stop - start

    def _is_confirmed(self, header: Header, position: int, kind: tuple[int, ...] | None) -> bool:
        """Whether frames of its kind follow: one for the kind of the current part, two for a new kind."""
        for _ in range(1 if header.kind == kind else 2):
            position += header.n_bytes
            if position == self._reader.size:
                return True
            following = self._codec.parse(head := self._head(position))
            if following is None or following.kind != header.kind:
                return header.kind == kind and tag_bytes(head) > 0
            header = following
        return True

    def _next_sync(self, position: int) -> int:
        """The first position from `position` on where a frame may begin; the file's size if there is none."""
        while position < self._reader.size:
            data = self._reader.get(position, 2**16)
            if found := self._codec.sync.search(data):
                return position + found.start()
            position += max(1, len(data) - 1)  # the last byte may be the first one of a header
        return self._reader.size


def _n_extra_bytes(reader: ByteReader, position: int) -> int:
    """How many bytes from a position on are neither tags nor zeros."""
    end = reader.size
    rest = reader.get(position, _MAX_TAIL_BYTES)
    for mark in TAIL_MARKS:
        if (at := rest.find(mark)) >= 0:
            rest, end = rest[:at], min(end, position + at)
    return len(rest.strip(b"\0")) if len(rest) < _MAX_TAIL_BYTES else end - position


def _xing_info(head: bytes) -> tuple[int, int, int] | None:
    """Frames, skipped samples and padding, by a frame's Xing or VBRI header; None if it has neither."""
    if b"Xing" not in head and b"Info" not in head and b"VBRI" not in head:
        return None
    at = 4 + side_bytes(head)
    if head[36:40] == b"VBRI":
        return int.from_bytes(head[50:54], "big"), 0, 0
    if head[at : at + 4] not in (b"Xing", b"Info"):
        return None
    flags = head[at + 7]
    frames = int.from_bytes(head[at + 8 : at + 12], "big") if flags & 1 else 0
    lame = at + 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    packed = int.from_bytes(head[lame + 21 : lame + 24], "big") if head[lame : lame + 1] > b" " else 0
    delay, padding = packed >> 12, packed & 4095
    return (frames, delay + _DECODER_DELAY, max(0, padding - _DECODER_DELAY)) if packed else (frames, 0, 0)


def _is_info_without_mark(head: bytes) -> bool:
    """Whether the frame holds LAME's header, but the word Xing or Info in it is damaged."""
    at = 4 + side_bytes(head)
    return head[at + 120 : at + 124] in _ENCODERS


def _is_info_intact(head: bytes) -> bool:
    """Whether the checksum of LAME's header is right. Other programs may not write one, which counts as right."""
    at = 4 + side_bytes(head)
    if head[at + 120 : at + 124] not in _ENCODERS or len(head) < _HEAD_BYTES:
        return True
    announced = int.from_bytes(head[at + 154 : at + 156], "big")
    by_lame = head[: at + 154]
    by_lavf = (by_lame + bytes(2) + head[at + 156 :])[:190]  # with zeros in place of the checksum
    return announced in (_checksum(by_lame), _checksum(by_lavf))


def _checksum(data: bytes) -> int:
    checksum = 0
    for byte in data:
        checksum ^= byte
        for _ in range(8):
            checksum = checksum >> 1 ^ (0xA001 if checksum & 1 else 0)
    return checksum


def side_bytes(head: bytes) -> int:
    """The length of an MP3 frame's side information. A Xing header follows it."""
    mpeg1, mono = head[1] >> 3 & 3 == 3, head[3] >> 6 == 3
    return (17 if mono else 32) if mpeg1 else (9 if mono else 17)
