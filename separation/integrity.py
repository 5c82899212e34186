"""What a file's own structure says of it where the decoders do not tell: cut short, too long, made to keep them busy.

Walks the chunks of WAV, AIFF and their kin, the pages of Ogg and the frames of MP3. Every error is one sentence that
begins with the file's `name`.
"""

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from separation.errors import AudioError

# A file made to keep these checks busy can hold millions of each; beyond these numbers the decoders alone judge it.
_MAX_CHUNKS = 10_000
_MAX_ID3V2_TAGS = 100
_MAX_FALSE_HEADERS = 100_000
_MAX_FALSE_PAGES = 1000

_OGG_MARK = re.compile(b"OggS")
_OGG_HEADER_BYTES = 27 + 255  # at most


@dataclass(frozen=True)
class _Container:
    """Where the chunks of a container stand, how each begins, and which one holds the audio."""

    first: int  # byte of the first chunk
    header: struct.Struct  # a chunk's kind and its size in bytes
    audio: bytes  # the audio chunk's kind
    alignment: int = 1  # of each chunk, in bytes
    counts_header: bool = False  # whether a chunk's size includes its header


_WAV = _Container(12, struct.Struct("<4sI"), b"data", 2)
_W64_AUDIO = b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a")
_WMA_AUDIO = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_CONTAINERS = {  # by a file's first four bytes
    b"RIFF": _WAV,
    b"RF64": _WAV,  # EBU Tech 3306
    b"BW64": _WAV,  # ITU-R BS.2088
    b"RIFX": _Container(12, struct.Struct(">4sI"), b"data", 2),
    b"FORM": _Container(12, struct.Struct(">4sI"), b"SSND", 2),  # AIFF
    b"caff": _Container(8, struct.Struct(">4sq"), b"data"),
    b"riff": _Container(40, struct.Struct("<16sq"), _W64_AUDIO, 8, counts_header=True),
    b"0&\xb2u": _Container(0, struct.Struct("<16sq"), _WMA_AUDIO, counts_header=True),
}
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"  # the header of Matroska, and what holds all else
_UNKNOWN_BYTES = (range(2**31 - 2**12, 2**31 + 1), range(2**32 - 2**12, 2**32))  # what streaming programs write
_SIZE_LIMIT = 2**32  # bytes, of a WAV with sizes of 32 bits
_MAX_BYTES_AFTER_AUDIO = 2**24  # of a WAV beyond that: its tags


def check_chunks(file: IO[bytes], name: str) -> tuple[int, int] | None:
    """Where the audio of a WAV is, as its first byte and its bytes, if the header does not say; else None.

    It does not if the program that wrote it could not go back to fill the size in, or if that needs more than 32 bits.
    Raises `AudioError` if a WAV, RF64, W64, AIFF, CAF, WMA, Matroska or WebM file ends within its audio.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    top = file.read(12)
    if top[:4] == _EBML:
        _check_matroska(file, size, name)
    container = _CONTAINERS.get(top[:4])
    if container is None:
        return None
    position, long_bytes = container.first, 0
    for _ in range(_MAX_CHUNKS):
        file.seek(position)
        header = file.read(container.header.size)
        if len(header) < container.header.size:
            return None
        kind, n_bytes = container.header.unpack(header)
        start = position + len(header)
        if container.counts_header:
            n_bytes -= len(header)
        if kind == container.audio:
            if top[:4] in (b"RF64", b"BW64") and n_bytes == 2**32 - 1:
                n_bytes = long_bytes
            elif any(n_bytes in unknown for unknown in _UNKNOWN_BYTES):
                n_bytes = -1
            if n_bytes == 0 and top[4:8] in (bytes(4), b"\xff" * 4):
                n_bytes = -1
            return _audio_bytes(top, start, n_bytes, size, name)
        if kind == b"ds64" and len(sizes := file.read(16)) == 16:
            long_bytes = struct.unpack("<q", sizes[8:])[0]
        if not 0 <= n_bytes <= size:
            return None
        position = start + n_bytes + -n_bytes % container.alignment
    return None


def _audio_bytes(top: bytes, start: int, n_bytes: int, size: int, name: str) -> tuple[int, int] | None:
    """For an audio chunk of `n_bytes` from `start`, as the header has it, what `check_chunks` does."""
    rest = size - start
    if not 0 <= n_bytes < 2**62:
        return (start, rest) if top[8:] == b"WAVE" else None
    if top[:4] in (b"RIFF", b"RIFX") and rest > _SIZE_LIMIT:  # its upper bits are lost
        n_bytes += (rest - n_bytes) // _SIZE_LIMIT * _SIZE_LIMIT
        if rest - n_bytes <= _MAX_BYTES_AFTER_AUDIO:
            return start, n_bytes
        raise _cut_short(name)
    if n_bytes > rest:
        raise _cut_short(name)
    return None


def _check_matroska(file: IO[bytes], size: int, name: str) -> None:
    """Raise `AudioError` if a Matroska or WebM file ends within its segment (RFC 8794, RFC 9559)."""
    position = 0
    for kind in (_EBML, _SEGMENT):
        file.seek(position)
        header = file.read(12)
        if len(header) < 12 or header[:4] != kind or not header[4]:
            return
        width = 9 - header[4].bit_length()  # bytes of the size; the bit that tells it is not part of the number
        n_bytes = int.from_bytes(header[4 : 4 + width], "big") - (1 << 7 * width)
        position += 4 + width + n_bytes
    if n_bytes < (1 << 7 * width) - 1 and position > size:  # all ones: the writer did not know
        raise _cut_short(name)


def check_ogg(file: IO[bytes], name: str) -> bool:
    """Raise `AudioError` if an Ogg file ends within a page (RFC 3533, section 6).

    False if its first and last page are of different streams: with songs one after the other, as radio stations send
    them, libsndfile would read the first and say nothing.
    """
    file.seek(0)
    first = file.read(18)
    if first[:4] != b"OggS":
        return True
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2**17))  # a page has 65307 bytes at most
    end = file.read()
    page = end[end.rfind(b"OggS\0") :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    if len(page) < 27 or len(page) < 27 + page[26] + sum(segments):
        raise _cut_short(name)
    _check_ogg_pages(file, name)
    return page[14:18] == first[14:18]  # the stream's serial number


def _check_ogg_pages(file: IO[bytes], name: str) -> None:
    """Raise `AudioError` if the mark of a page often stands within other pages: libogg checks up to 64 KB at each."""
    data, start, n_false, page_end = b"", 0, 0, 0
    file.seek(0)
    while block := file.read(2**20):
        data += block
        done = max(0, len(data) - _OGG_HEADER_BYTES)
        for mark in _OGG_MARK.finditer(data, 0, done):
            at = mark.start()
            if start + at < page_end:
                n_false += 1
                if n_false > _MAX_FALSE_PAGES:
                    raise AudioError(f"{name} is damaged: it is full of false Ogg pages; get the file again.")
            else:
                page_end = start + at + 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        data, start = data[done:], start + done


# Of a Layer III frame header: version (3 is MPEG-1, 2 is MPEG-2, 0 is MPEG-2.5) to rates and bitrates by their index.
_MP3_HZ = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
_MP3_KBPS = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),  # MPEG-1
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),  # MPEG-2 and 2.5
)
MP3_EXTRA_SAMPLES = 8190  # per channel: the most that an encoder may add before and after the song
_MP3_SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")


@dataclass(frozen=True)
class _Mp3Frame:
    sample_rate: int
    n_bytes: int
    n_samples: int
    xing_offset: int  # where the first frame may hold a Xing header


def check_mp3(path: Path, name: str, max_seconds: float | None) -> int:
    """The samples per channel in the MPEG Layer III frames of a file, the encoder's delay included; 0 if it has none.

    Raises `AudioError` if the last frame is cut short, if there are fewer frames than a Xing header announces, or if it
    is longer than `max_seconds`. Bytes between, before and after the frames, such as tags, are passed over.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        position = after_id3v2(file)
        first: _Mp3Frame | None = None
        n_frames, n_false, announced, contiguous, cut = 0, 0, 0, False, False
        while position < size:
            frame = _mp3_frame(file, position)
            if frame is not None and first is not None and frame.sample_rate != first.sample_rate:
                frame = None
            if frame is not None and not contiguous and position + frame.n_bytes != size:
                # Two bytes that look like a header are common in other data; two such in step are not.
                following = _mp3_frame(file, position + frame.n_bytes)
                if following is None or following.sample_rate != frame.sample_rate:
                    frame = None
            contiguous = frame is not None
            if frame is None:
                n_false += 1
                if n_false > _MAX_FALSE_HEADERS:
                    return 0
                position = _next_sync(file, position + 1, size)
                continue
            position += frame.n_bytes
            cut = position > size
            if first is None:
                first = frame
                announced = _xing_frames(file, position - frame.n_bytes + frame.xing_offset)
                n_frames -= announced > 0  # the frame with the header holds no audio and is not counted in it
            n_frames += not cut
            check_length(n_frames * frame.n_samples - MP3_EXTRA_SAMPLES, frame.sample_rate, max_seconds, name)
    if first is None:
        return 0
    # Some encoders count the header's own frame too.
    if (cut and n_frames < announced) or n_frames < announced - 1 or (cut and announced == 0):
        raise _cut_short(name)
    return n_frames * first.n_samples


def _mp3_frame(file: IO[bytes], position: int) -> _Mp3Frame | None:
    """The Layer III frame whose header stands at a position; None if there is none, or one without a bitrate."""
    file.seek(position)
    header = file.read(4)
    if len(header) < 4 or not _MP3_SYNC.match(header):
        return None
    version, bitrate_index, rate_index = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if bitrate_index in (0, 15) or rate_index == 3:
        return None
    mpeg1, mono = version == 3, header[3] >> 6 == 3
    sample_rate, kbps = _MP3_HZ[version][rate_index], _MP3_KBPS[0 if mpeg1 else 1][bitrate_index]
    n_samples = 1152 if mpeg1 else 576
    n_bytes = n_samples // 8 * kbps * 1000 // sample_rate + (header[2] >> 1 & 1)
    side_bytes = (17 if mono else 32) if mpeg1 else (9 if mono else 17)
    return _Mp3Frame(sample_rate, n_bytes, n_samples, 4 + side_bytes)


def _next_sync(file: IO[bytes], position: int, size: int) -> int:
    """The first position from `position` on where a Layer III header may stand, or `size`."""
    while position < size:
        file.seek(position)
        data = file.read(2**16)
        if found := _MP3_SYNC.search(data):
            return position + found.start()
        position += max(1, len(data) - 1)  # the last byte may be the first of a header
    return size


def after_id3v2(file: IO[bytes]) -> int:
    position = 0
    for _ in range(_MAX_ID3V2_TAGS):
        file.seek(position)
        header = file.read(10)
        if len(header) < 10 or header[:3] != b"ID3":
            break
        n_bytes = sum((byte & 127) << shift for byte, shift in zip(header[6:], (21, 14, 7, 0), strict=True))
        position += 10 + n_bytes + (10 if header[5] & 16 else 0)  # the flag says that a footer follows
    return position


def _xing_frames(file: IO[bytes], position: int) -> int:
    """The frames that a Xing header announces; 0 if there is no header or it does not say."""
    file.seek(position)
    header = file.read(12)
    if len(header) < 12 or header[:4] not in (b"Xing", b"Info") or not header[7] & 1:
        return 0
    return int.from_bytes(header[8:], "big")


def check_length(n_samples: int, sample_rate: int, max_seconds: float | None, name: str) -> None:
    """Raise `AudioError` if so many samples per channel last longer than `max_seconds`."""
    if max_seconds is not None and n_samples > max_seconds * sample_rate:
        raise AudioError(f"{name} is longer than {max_seconds:,g} s, the limit here; cut it into shorter parts.")


def _cut_short(name: str) -> AudioError:
    return AudioError(f"{name} is cut short: it ends before the audio that it announces; get the whole file again.")
