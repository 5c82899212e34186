"""Streams of bare frames, MPEG audio, AAC in ADTS, AC-3 and E-AC-3: which frames a file has, and which are missing.

Such a stream has no times and at most one count of its frames, in a Xing or VBRI header. A frame is taken where its
header stands in step with its neighbours; whatever lies between is a gap.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from separation.audio.integrity import after_id3v2
from separation.audio.pieces import Window

# A file made to keep these checks busy can hold millions of each; beyond these numbers the decoders alone judge it.
_MAX_FALSE_HEADERS = 100_000
_MAX_GAPS = 2000

_DECODER_DELAY = 529  # samples, of MP3
EXTRA_SAMPLES = 8190  # per channel: the most that an MP3 encoder may add before and after the song
_ENCODERS = (b"LAME", b"Lavf", b"Lavc")  # that write a checksum into that header
_LOOK_BYTES = 192  # of a frame: what its header, and a Xing or VBRI header within, take


class Header(NamedTuple):
    kind: tuple[int, ...]  # the same for all frames of a stream
    sample_rate: int
    n_bytes: int  # of the frame
    n_samples: int  # per channel


class Codec(NamedTuple):
    """How frames begin, and ffmpeg's name of the format."""

    demuxer: str
    sync: re.Pattern[bytes]
    parse: Callable[[bytes], Header | None]


# Of a frame header of MPEG audio: version (3 is MPEG-1, 2 is MPEG-2, 0 is MPEG-2.5) to rates, and whether MPEG-1 and
# layer to bitrates by their index. A layer's code is 4 minus its number.
_MPEG_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_MPEG_KBPS = {
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
    return Header((version, layer, rate, data[3] >> 6 == 3), rate, n_bytes, n_samples)


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


def _ac3(data: bytes) -> Header | None:
    if len(data) < 7 or data[:2] != b"\x0bw":
        return None
    return _eac3(data) if data[5] >> 3 > 10 else _plain_ac3(data)


def _plain_ac3(data: bytes) -> Header | None:
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
    # A dependent stream's frames belong to the time of those of the independent one.
    return Header((1, rate), rate, n_bytes, 0 if stream == 1 or data[2] >> 3 & 7 else 256 * blocks)


MPEG = Codec("mp3", re.compile(rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]"), _mpeg)
CODECS = {  # by ffmpeg's name of the format
    "mp3": MPEG,
    "aac": Codec("aac", re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"), _adts),
    "ac3": Codec("ac3", re.compile(rb"\x0bw"), _ac3),
    "eac3": Codec("eac3", re.compile(rb"\x0bw"), _ac3),
}


class Gap(NamedTuple):
    """Bytes that are no frames, before a run; 0 where only a tag is there."""

    frame: int  # how many frames stand before it in the part
    n_bytes: int


@dataclass
class Part:
    """Frames of one kind. A file has several parts where files were joined."""

    header: Header
    is_mpeg: bool
    runs: list[tuple[int, int]] = field(default_factory=list)  # bytes of frames that stand side by side
    gaps: list[Gap] = field(default_factory=list)  # one before each run but the first
    n_frames: int = 0  # without that of the Xing header
    n_bytes: int = 0  # of these frames
    sizes: tuple[int, int] = (2**31, 0)  # the shortest and the longest frame
    info: tuple[int, int] | None = None  # the bytes of the frame that holds the Xing or VBRI header
    announced: int = 0  # frames, by that header; 0 if it does not say
    skipped: int = 0  # samples at the start that decoders leave out, by LAME's header
    padding: int = 0  # samples that the encoder added at the end
    is_info_whole: bool = True  # as far as LAME's checksum tells
    is_cut: bool = False  # the last frame is not whole; it is not counted
    n_lead: int = 0  # bytes before the first frame of the file that are neither tags nor zeros
    n_extra: int = 0  # bytes behind the last frame that are neither

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
    def n_samples(self) -> int:
        return self.n_frames * self.header.n_samples

    @property
    def is_mono(self) -> bool:
        return self.is_mpeg and bool(self.header.kind[3])

    @property
    def least_samples(self) -> int:
        """Per channel: what a decoder gives that leaves out what the encoder added, and a frame or two of rounding."""
        return self.n_samples - self.skipped - self.padding - 2 * self.header.n_samples

    @property
    def is_plain(self) -> bool:
        """Whether nothing is between its frames."""
        return not any(gap.n_bytes for gap in self.gaps)


def find_parts(path: Path, codec: Codec, check: Callable[[Part], None] = lambda part: None) -> list[Part]:
    """The parts of a file; none if it is not such a stream, or one made to keep a program busy.

    `check` is called with the part after each of its frames; raise from it to stop.
    """
    with path.open("rb", buffering=0) as file:
        return _Walk(Window(file), after_id3v2(file), codec, check).parts()


class _Walk:
    def __init__(self, window: Window, start: int, codec: Codec, check: Callable[[Part], None]) -> None:
        self._window, self._codec, self._check = window, codec, check
        self._parts: list[Part] = []
        self._position, self._n_false, self._n_gaps = start, 0, 0
        self._start = start
        self._last = (start, 0)  # the first byte of the last frame, and its length

    def parts(self) -> list[Part]:
        window, parse = self._window, self._codec.parse
        while self._position < window.size:
            look = window.get(self._position, _LOOK_BYTES)
            header = parse(look)
            if header is None or not self._parts or header.kind != self._parts[-1].header.kind:
                tag_bytes = _tag_bytes(look)
                if tag_bytes:
                    self._position += tag_bytes
                elif not self._find():
                    break
                continue
            if self._position + header.n_bytes > window.size:
                self._parts[-1].is_cut = True
                break
            self._take(header, look)
        if self._n_false > _MAX_FALSE_HEADERS or self._n_gaps > _MAX_GAPS:
            return []
        if self._parts:
            first = self._parts[0].info or self._parts[0].runs[0]
            lead = window.get(self._start, min(first[0] - self._start, 2**20))
            self._parts[0].n_lead = len(lead.strip(b"\0"))
            end = self._parts[-1].runs[-1][1]
            self._parts[-1].n_extra = 0 if self._parts[-1].is_cut else _extra_bytes(window, end)
        return self._parts

    def _take(self, header: Header, look: bytes) -> None:
        """A frame in step with the one before, or the first one after a gap."""
        part, start = self._parts[-1], self._position
        stop = start + header.n_bytes
        info = _info(look)
        if info is not None:
            if part.n_frames or part.info:  # another file begins
                part = self._new_part(header)
            part.info = (start, stop)
            part.announced, part.skipped, part.padding = info
            part.is_info_whole = header.n_bytes < 192 or _is_info_whole(look)
        else:
            if part.runs and part.runs[-1][1] == start:
                part.runs[-1] = (part.runs[-1][0], stop)
            else:
                if part.runs:
                    part.gaps.append(Gap(part.n_frames, 0))
                part.runs.append((start, stop))
            if not part.n_frames and not part.info and _is_spoilt_info(look):
                part.is_info_whole = False
            part.n_frames += 1
            part.n_bytes += header.n_bytes
            if header.n_bytes > part.sizes[1] or header.n_bytes < part.sizes[0]:
                part.sizes = (min(part.sizes[0], header.n_bytes), max(part.sizes[1], header.n_bytes))
            self._check(part)
        self._last = (start, header.n_bytes)
        self._position = stop

    def _new_part(self, header: Header) -> Part:
        self._parts.append(Part(header, self._codec is MPEG))
        return self._parts[-1]

    def _find(self) -> bool:
        """Go to the next frame that is in step with others, and note the gap before it."""
        part = self._parts[-1] if self._parts else None
        is_in_step = part is not None and self._position == sum(self._last)
        position = self._last[0] + 1 if is_in_step else self._position
        lost_at = self._position
        while (position := _next_sync(self._window, self._codec, position)) < self._window.size:
            header = self._codec.parse(self._window.get(position, _LOOK_BYTES))
            if header and self._is_confirmed(header, position, part.header.kind if part else None):
                break
            self._n_false += 1
            if self._n_false > _MAX_FALSE_HEADERS:
                return False
            position += 1
        else:
            return False
        assert header is not None
        if part is None or header.kind != part.header.kind:
            part = self._new_part(header)
            self._position = position
            self._take(header, self._window.get(position, _LOOK_BYTES))
            return True
        if position < lost_at and part.runs and part.n_frames:  # the frame before was not whole
            self._drop_last(part)
        end = part.runs[-1][1] if part.runs else lost_at
        if part.runs and part.runs[-1][1] != position:
            part.gaps.append(Gap(part.n_frames, position - end))
            part.runs.append((position, position))
            self._n_gaps += 1
            if self._n_gaps > _MAX_GAPS:
                return False
        self._position = position
        self._take(header, self._window.get(position, _LOOK_BYTES))
        return True

    def _drop_last(self, part: Part) -> None:
        start, n_bytes = self._last
        if part.runs[-1][1] != start + n_bytes:  # it was the one with the Xing header
            return
        part.runs[-1] = (part.runs[-1][0], start)
        part.n_frames -= 1
        part.n_bytes -= n_bytes

    def _is_confirmed(self, header: Header, position: int, kind: tuple[int, ...] | None) -> bool:
        """Whether frames of its kind follow: one is enough for a kind that was there before, else two are asked."""
        for _ in range(1 if header.kind == kind else 2):
            position += header.n_bytes
            if position == self._window.size:
                return True
            following = self._codec.parse(look := self._window.get(position, _LOOK_BYTES))
            if following is None or following.kind != header.kind:
                return header.kind == kind and _tag_bytes(look) > 0
            header = following
        return True


def _next_sync(window: Window, codec: Codec, position: int) -> int:
    """The first position from `position` on where a frame may begin, or the file's size."""
    while position < window.size:
        data = window.get(position, 2**16)
        if found := codec.sync.search(data):
            return position + found.start()
        position += max(1, len(data) - 1)  # the last byte may be the first of a header
    return window.size


def _tag_bytes(data: bytes) -> int:
    """The length of the tag that data begins with; 0 if there is none."""
    if data[:3] == b"ID3" and len(data) > 9:
        n_bytes = sum((byte & 127) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
        return 10 + n_bytes + (10 if data[5] & 16 else 0)
    if data[:3] == b"TAG":
        return 128
    if data[:8] == b"APETAGEX" and len(data) > 23:
        is_header = data[23] >> 5 & 1
        return int.from_bytes(data[12:16], "little") + 32 if is_header else 32
    return 0


def _extra_bytes(window: Window, position: int) -> int:
    """How many bytes from a position on are neither tags nor zeros."""
    end = window.size
    rest = window.get(position, 2**16)
    for mark in (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3", b"3DI"):
        if (at := rest.find(mark)) >= 0:
            rest, end = rest[:at], min(end, position + at)
    return len(rest.strip(b"\0")) if len(rest) < 2**16 else end - position


def _info(look: bytes) -> tuple[int, int, int] | None:
    """Frames, skipped samples and padding that a Xing or VBRI header announces; None if the frame holds none."""
    if b"Xing" not in look and b"Info" not in look and b"VBRI" not in look:
        return None
    at = 4 + side_bytes(look)
    if look[36:40] == b"VBRI":
        return int.from_bytes(look[50:54], "big"), 0, 0
    if look[at : at + 4] not in (b"Xing", b"Info"):
        return None
    flags = look[at + 7]
    frames = int.from_bytes(look[at + 8 : at + 12], "big") if flags & 1 else 0
    lame = at + 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    packed = int.from_bytes(look[lame + 21 : lame + 24], "big") if look[lame : lame + 1] > b" " else 0
    delay, padding = packed >> 12, packed & 4095
    return (frames, delay + _DECODER_DELAY, max(0, padding - _DECODER_DELAY)) if packed else (frames, 0, 0)


def _is_spoilt_info(look: bytes) -> bool:
    """Whether it is the header of an encoder that counts the frames, but for its mark."""
    at = 4 + side_bytes(look)
    return look[at + 120 : at + 124] in _ENCODERS


def _is_info_whole(look: bytes) -> bool:
    """Whether the checksum of LAME's header is right; those of other programs may have none."""
    at = 4 + side_bytes(look)
    if look[at + 120 : at + 124] not in _ENCODERS or len(look) < 192:
        return True
    covered = look[: at + 154]  # by LAME; by Lavf 190 bytes, those of the checksum as zeros
    announced = int.from_bytes(look[at + 154 : at + 156], "big")
    return announced in (_checksum(covered), _checksum((covered + bytes(2) + look[at + 156 :])[:190]))


def _checksum(data: bytes) -> int:
    checksum = 0
    for byte in data:
        checksum ^= byte
        for _ in range(8):
            checksum = checksum >> 1 ^ (0xA001 if checksum & 1 else 0)
    return checksum


def side_bytes(look: bytes) -> int:
    """The length of the side information of an MP3 frame, behind which a Xing header may stand."""
    mpeg1, mono = look[1] >> 3 & 3 == 3, look[3] >> 6 == 3
    return (17 if mono else 32) if mpeg1 else (9 if mono else 17)
