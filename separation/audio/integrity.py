"""What the chunks of WAV, AIFF and their kin, and the boxes of MP4, say of a file: how much audio it should hold."""

import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO

from separation.errors import AudioError

# A file made to keep these checks busy can hold millions of each; beyond these numbers the decoders alone judge it.
_MAX_CHUNKS = 10_000
_MAX_ID3V2_TAGS = 100


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


@dataclass(frozen=True)
class Audio:
    """The bytes of a file's audio by its header, and by its size."""

    start: int  # the first byte
    n_announced: int | None  # None if the header does not say
    n_there: int
    is_wave: bool

    @property
    def missing_share(self) -> float:
        """How much of the announced audio is missing, as a share of what is there."""
        return max(0.0, ((self.n_announced or 0) - self.n_there) / max(self.n_there, 1))


def find_audio(file: IO[bytes], name: str) -> Audio | None:
    """Where the audio of WAV, RF64, W64, AIFF, CAF, AU, WMA, Matroska and WebM files is; None for others.

    The header does not say how much it is if the program that wrote it could not go back to fill that in, or if that
    needs more than 32 bits. Raises `AudioError` if a WAV over 4 GB ends within its audio.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    top = file.read(24)
    if top[:4] == _EBML:
        return _matroska(file, size)
    if top[:4] == b".snd" and len(top) == 24:
        start, n_bytes = struct.unpack(">II", top[4:12])
        return Audio(start, None if n_bytes == 2**32 - 1 else n_bytes, max(0, size - start), False)
    container = _CONTAINERS.get(top[:4])
    if container is None:
        return None
    long_bytes = 0
    for kind, start, n_bytes in chunks(file, top):
        if kind == container.audio:
            if top[:4] in (b"RF64", b"BW64") and n_bytes == 2**32 - 1:
                n_bytes = long_bytes
            elif any(n_bytes in unknown for unknown in _UNKNOWN_BYTES):
                n_bytes = -1
            return _audio(file, container, Audio(start, n_bytes, size - start, top[8:12] == b"WAVE"), top, name)
        if kind == b"ds64" and len(sizes := file.read(16)) == 16:
            long_bytes = struct.unpack("<q", sizes[8:])[0]
    return None


def chunks(file: IO[bytes], top: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each chunk's kind, first byte and size by its header, of a container that begins with `top`.

    Ends behind a chunk whose size cannot be right. At each, the file stands at the first byte.
    """
    container, size = _CONTAINERS[top[:4]], file.seek(0, os.SEEK_END)
    position = container.first
    for _ in range(_MAX_CHUNKS):
        file.seek(position)
        header = file.read(container.header.size)
        if len(header) < container.header.size:
            return
        kind, n_bytes = container.header.unpack(header)
        if container.counts_header:
            n_bytes -= len(header)
        start = position + len(header)
        yield kind, start, n_bytes
        if not 0 <= n_bytes <= size:
            return
        position = start + n_bytes + -n_bytes % container.alignment


def _audio(file: IO[bytes], container: _Container, audio: Audio, top: bytes, name: str) -> Audio:
    """The audio, of which the header's word is given, with what of that word holds."""
    n_bytes, rest = audio.n_announced or 0, audio.n_there
    if not 0 <= n_bytes < 2**62:
        return replace(audio, n_announced=None)
    if top[:4] in (b"RIFF", b"RIFX") and rest > _SIZE_LIMIT:  # its upper bits are lost
        n_bytes += (rest - n_bytes) // _SIZE_LIMIT * _SIZE_LIMIT
        if rest - n_bytes <= _MAX_BYTES_AFTER_AUDIO:
            return replace(audio, n_announced=None, n_there=n_bytes)
        raise _cut_short(name)
    if n_bytes > rest or not _chunks_follow(file, container, audio.start + n_bytes):
        return replace(audio, n_announced=n_bytes or None)
    return replace(audio, n_there=n_bytes)


def _chunks_follow(file: IO[bytes], container: _Container, position: int) -> bool:
    """Whether what is left from a position on are chunks, or tags or padding as some programs append them."""
    size = file.seek(0, os.SEEK_END)
    for _ in range(_MAX_CHUNKS):
        position += -(position - container.first) % container.alignment
        file.seek(position)
        header = file.read(container.header.size)
        if len(header) < 8 or header[:8] == bytes(8) or header.startswith((b"TAG", b"ID3", b"APETAGEX")):
            return True
        if len(header) < container.header.size or not all(32 <= byte < 127 for byte in header[:4]):
            return False
        n_bytes = container.header.unpack(header)[1]
        if not 0 <= n_bytes <= size - position:
            return False
        position += n_bytes + (0 if container.counts_header else len(header))
    return True


def _matroska(file: IO[bytes], size: int) -> Audio | None:
    """The segment of a Matroska or WebM file (RFC 8794, RFC 9559)."""
    position = 0
    for kind in (_EBML, _SEGMENT):
        file.seek(position)
        header = file.read(12)
        if len(header) < 12 or header[:4] != kind or not header[4]:
            return None
        width = 9 - header[4].bit_length()  # bytes of the size; the bit that tells it is not part of the number
        n_bytes = int.from_bytes(header[4 : 4 + width], "big") - (1 << 7 * width)
        start = position + 4 + width
        position = start + n_bytes
    is_known = n_bytes < (1 << 7 * width) - 1  # all ones: the writer did not know
    return Audio(start, n_bytes if is_known else None, size - start, False)


_TS_BYTES, _TS_SYNC = (188, 192, 204), 0x47  # of a packet, plain, with a time, with checksums
_PS_PACKET = re.compile(rb"\0\0\x01[\xbc-\xef]")


def ends_within_packet(file: IO[bytes], container: Sequence[str]) -> bool:
    """Whether an MPEG transport or program stream, which does not tell its length, ends within a packet."""
    size = file.seek(0, os.SEEK_END)
    if "mpegts" in container:
        file.seek(0)
        head = file.read(4 * max(_TS_BYTES))
        for n_bytes in _TS_BYTES:
            start = 4 if n_bytes == 192 else 0
            if len(head) > start + n_bytes and head[start] == head[start + n_bytes] == _TS_SYNC:
                return size % n_bytes != 0
    if "mpeg" in container:
        file.seek(max(0, size - 2**17))
        tail = file.read()
        *_, last = [None, *_PS_PACKET.finditer(tail)]
        if last is not None:
            n_bytes = int.from_bytes(tail[last.start() + 4 : last.start() + 6], "big")
            return last.start() + 6 + n_bytes > len(tail)
    return False


def check_mp4(file: IO[bytes], name: str) -> None:
    """Raise `AudioError` if an MP4 file ends before the index, without which nothing of it can be read."""
    size = file.seek(0, os.SEEK_END)
    position, is_mp4 = 0, False
    for _ in range(_MAX_CHUNKS):
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            break
        n_bytes, kind = struct.unpack(">I4s", header[:8])
        is_mp4 |= kind == b"ftyp" and position == 0
        if kind == b"moov" or not is_mp4:
            return
        if n_bytes == 1 and len(header) == 16:
            n_bytes = struct.unpack(">Q", header[8:])[0]
        if n_bytes < 8:
            n_bytes = size  # to the end
        position += n_bytes
    if is_mp4:
        raise AudioError(
            f"{name} is cut short: the index (moov) that an MP4 needs is missing; get the whole file again."
        )


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


def check_length(n_samples: int, sample_rate: int, max_seconds: float | None, name: str) -> None:
    """Raise `AudioError` if so many samples per channel last longer than `max_seconds`."""
    if max_seconds is not None and n_samples > max_seconds * sample_rate:
        raise AudioError(f"{name} is longer than {max_seconds:,g} s, the limit here; cut it into shorter parts.")


def _cut_short(name: str) -> AudioError:
    return AudioError(f"{name} is cut short: it ends before the audio that it announces; get the whole file again.")
