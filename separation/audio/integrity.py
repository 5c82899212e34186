"""How much audio a file should hold, by the chunks of WAV, AIFF and related formats and by the boxes of MP4."""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from separation.audio.reader import ByteReader
from separation.errors import AudioError

_MAX_CHUNKS = 10_000  # a hostile file can hold millions; beyond this, the decoders alone judge the file


@dataclass(frozen=True)
class _Container:
    """How the chunks of a container are laid out, and which one holds the audio."""

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
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"  # the header of Matroska, and the element that holds the rest
_UNKNOWN_BYTES = (range(2**31 - 2**12, 2**31 + 1), range(2**32 - 2**12, 2**32))  # sizes that streaming programs write
_SIZE_LIMIT = 2**32  # bytes that the 32-bit sizes of WAV can count
_MAX_BYTES_AFTER_AUDIO = 2**24  # the most that the tags of a larger WAV may take


@dataclass(frozen=True)
class Audio:
    """How many bytes of audio a file's header announces, and how many the file holds."""

    start: int  # the first byte
    n_announced: int | None  # None if the header does not say
    n_there: int
    is_wave: bool

    @property
    def missing_share(self) -> float:
        """The missing part of the announced audio, as a share of what is there."""
        return max(0.0, ((self.n_announced or 0) - self.n_there) / max(self.n_there, 1))


def find_audio(reader: ByteReader, name: str) -> Audio | None:
    """Find the audio of a WAV, RF64, W64, AIFF, CAF, AU, WMA, Matroska or WebM file; None for other formats.

    A header does not announce a size if the program that wrote it could not go back to fill the size in, or if the size
    needs more than 32 bits. Raises `AudioError` if a WAV over 4 GB ends within its audio.
    """
    top = reader.get(0, 24)
    if top[:4] == _EBML:
        return _matroska_audio(reader)
    if top[:4] == b".snd" and len(top) == 24:
        start, n_bytes = struct.unpack(">II", top[4:12])
        return Audio(start, None if n_bytes == 2**32 - 1 else n_bytes, max(0, reader.size - start), False)
    container = _CONTAINERS.get(top[:4])
    if container is None:
        return None
    n_bytes_in_ds64 = 0
    for kind, start, n_bytes in chunks(reader):
        if kind == container.audio:
            if top[:4] in (b"RF64", b"BW64") and n_bytes == 2**32 - 1:
                n_bytes = n_bytes_in_ds64
            elif any(n_bytes in unknown for unknown in _UNKNOWN_BYTES):
                n_bytes = -1
            audio = Audio(start, n_bytes, reader.size - start, top[8:12] == b"WAVE")
            return _with_corrected_sizes(reader, container, audio, name)
        if kind == b"ds64" and len(sizes := reader.get(start, 16)) == 16:
            n_bytes_in_ds64 = struct.unpack("<q", sizes[8:])[0]
    return None


def chunks(reader: ByteReader) -> Iterator[tuple[bytes, int, int]]:
    """The kind, first byte and announced size of each chunk in a container of `_CONTAINERS`.

    Stops after a chunk whose size is impossible.
    """
    container = _CONTAINERS[reader.get(0, 4)]
    position = container.first
    for _ in range(_MAX_CHUNKS):
        header = reader.get(position, container.header.size)
        if len(header) < container.header.size:
            return
        kind, n_bytes = container.header.unpack(header)
        if container.counts_header:
            n_bytes -= len(header)
        start = position + len(header)
        yield kind, start, n_bytes
        if not 0 <= n_bytes <= reader.size:
            return
        position = start + n_bytes + -n_bytes % container.alignment


def _with_corrected_sizes(reader: ByteReader, container: _Container, audio: Audio, name: str) -> Audio:
    """The audio, with its sizes corrected where the header must be wrong."""
    n_bytes, n_left = audio.n_announced or 0, audio.n_there
    if not 0 <= n_bytes < 2**62:
        return replace(audio, n_announced=None)
    if reader.get(0, 4) in (b"RIFF", b"RIFX") and n_left > _SIZE_LIMIT:  # the size's upper bits are lost
        n_bytes += (n_left - n_bytes) // _SIZE_LIMIT * _SIZE_LIMIT
        if n_left - n_bytes <= _MAX_BYTES_AFTER_AUDIO:
            return replace(audio, n_announced=None, n_there=n_bytes)
        raise AudioError(f"{name} is cut short (it ends within its audio): get the file again")
    if n_bytes > n_left or not _chunks_follow(reader, container, audio.start + n_bytes):
        return replace(audio, n_announced=n_bytes or None)
    return replace(audio, n_there=n_bytes)


def _chunks_follow(reader: ByteReader, container: _Container, position: int) -> bool:
    """Whether the file goes on with chunks, or with the tags or padding that some programs append."""
    for _ in range(_MAX_CHUNKS):
        position += -(position - container.first) % container.alignment
        header = reader.get(position, container.header.size)
        if len(header) < 8 or header[:8] == bytes(8) or header.startswith((b"TAG", b"ID3", b"APETAGEX")):
            return True
        if len(header) < container.header.size or not all(32 <= byte < 127 for byte in header[:4]):
            return False
        n_bytes = container.header.unpack(header)[1]
        if not 0 <= n_bytes <= reader.size - position:
            return False
        position += n_bytes + (0 if container.counts_header else len(header))
    return True


def _matroska_audio(reader: ByteReader) -> Audio | None:
    """The segment of a Matroska or WebM file (RFC 8794, RFC 9559)."""
    position = 0
    for kind in (_EBML, _SEGMENT):
        header = reader.get(position, 12)
        if len(header) < 12 or header[:4] != kind or not header[4]:
            return None
        width = 9 - header[4].bit_length()  # bytes of the size; the bit that marks the width is not part of it
        n_bytes = int.from_bytes(header[4 : 4 + width], "big") - (1 << 7 * width)
        start = position + 4 + width
        position = start + n_bytes
    is_known = n_bytes < (1 << 7 * width) - 1  # all ones: the writer did not know
    return Audio(start, n_bytes if is_known else None, reader.size - start, False)


_TS_BYTES, _TS_SYNC = (188, 192, 204), 0x47  # packets may be plain, or have a timestamp or checksums
_PS_PACKET = re.compile(rb"\0\0\x01[\xbc-\xef]")


def ends_within_packet(reader: ByteReader, container: Sequence[str]) -> bool:
    """Whether an MPEG transport or program stream, which does not announce its length, ends within a packet.

    `container` holds ffmpeg's names of the format.
    """
    if "mpegts" in container:
        head = reader.get(0, 4 * max(_TS_BYTES))
        for n_bytes in _TS_BYTES:
            start = 4 if n_bytes == 192 else 0
            if len(head) > start + n_bytes and head[start] == head[start + n_bytes] == _TS_SYNC:
                return reader.size % n_bytes != 0
    if "mpeg" in container:
        tail_start = max(0, reader.size - 2**17)
        tail = reader.get(tail_start, reader.size - tail_start)
        *_, last = [None, *_PS_PACKET.finditer(tail)]
        if last is not None:
            n_bytes = int.from_bytes(tail[last.start() + 4 : last.start() + 6], "big")
            return last.start() + 6 + n_bytes > len(tail)
    return False


def check_mp4(reader: ByteReader, name: str) -> None:
    """Raise `AudioError` if an MP4 file ends before its index, without which nothing in it can be read."""
    position, is_mp4 = 0, False
    for _ in range(_MAX_CHUNKS):
        header = reader.get(position, 16)
        if len(header) < 8:
            break
        n_bytes, kind = struct.unpack(">I4s", header[:8])
        is_mp4 |= kind == b"ftyp" and position == 0
        if kind == b"moov" or not is_mp4:
            return
        if n_bytes == 1 and len(header) == 16:
            n_bytes = struct.unpack(">Q", header[8:])[0]
        if n_bytes < 8:
            n_bytes = reader.size  # the box reaches to the end
        position += n_bytes
    if is_mp4:
        raise AudioError(f"{name} is cut short (its index, the moov box, is missing): get the file again")


def check_length(n_samples: int, sample_rate: int, max_seconds: float | None, name: str) -> None:
    """Raise `AudioError` if `n_samples` per channel last longer than `max_seconds`."""
    if max_seconds is not None and n_samples > max_seconds * sample_rate:
        raise AudioError(f"{name} is longer than {max_seconds:,g} s, the limit here: cut it into shorter parts")
