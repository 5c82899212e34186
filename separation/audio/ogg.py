"""The pages of Ogg (RFC 3533): which are intact, which are missing, and which songs they make up.

Each page has a checksum, a number and a granule position, which counts the samples that are complete at its end. A file
with several songs one after the other is a *chain* of *links*.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from separation.audio.pieces import Piece
from separation.audio.reader import ByteRange, ByteReader, append_range
from separation.errors import AudioError

_MARK = b"OggS\0"
_HEADER = struct.Struct("<4sBBqIIIB")
_HEADER_BYTES = 27  # without the table of segments
_MAX_SEGMENTS = 255
_CONTINUED, _FIRST, _LAST = 1, 2, 4  # flags of a page
_MAX_BAD_PAGES = 1000  # a hostile file can hold millions
_MAX_RUNS = 2000
_MAX_HEADER_PAGES = 1000
_CODECS = {b"\x01vorbis": "vorbis", b"OpusHead": "opus", b"\x7fFLAC": "flac", b"Speex   ": "speex"}

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_NO_CHECKSUM = bytes(4)


def _checksum(page: bytes) -> int:
    """Ogg's checksum of a page whose checksum field is 0. It equals zlib's CRC over bits in reverse order."""
    reverse = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reverse:032b}"[::-1], 2)


class _Page(NamedTuple):
    start: int
    n_bytes: int
    flags: int
    granule: int  # -1 if no packet ends in the page
    serial: int
    number: int
    is_intact: bool  # the checksum is right

    @property
    def stop(self) -> int:
        return self.start + self.n_bytes


@dataclass
class PageRun:
    """Pages with consecutive numbers."""

    first: int  # the number of its first page
    ranges: list[ByteRange] = field(default_factory=list)
    granule: int = -1  # of the last page that has one
    n_pages: int = 0


@dataclass
class Link:
    """One song: its header pages, and the runs of its audio pages."""

    codec: str
    serial: int
    sample_rate: int
    pre_skip: int  # samples at 48 kHz that Opus decoders drop
    headers: list[ByteRange] = field(default_factory=list)
    header_numbers: list[int] = field(default_factory=list)
    runs: list[PageRun] = field(default_factory=list)
    is_ended: bool = False  # its last page is marked as the last
    end_granule: int = -1  # of a damaged page after the last intact one, which `is_ended` then describes
    n_bad_pages: int = 0

    @property
    def is_whole(self) -> bool:
        return len(self.runs) == 1 and not self.n_bad_pages and self.starts_whole and self.end_granule < 0

    @property
    def has_all_headers(self) -> bool:
        """Whether no number is missing among the header pages."""
        numbers = [*self.header_numbers, *(run.first for run in self.runs[:1])]
        return numbers[:1] == [0] and self.header_numbers == list(range(len(self.header_numbers)))

    @property
    def starts_whole(self) -> bool:
        """Whether no page is missing before the first audio page."""
        return self.has_all_headers and bool(self.runs) and self.runs[0].first == len(self.header_numbers)

    def file_of(self, run: PageRun, path: Path) -> list[Piece]:
        """A file with this run alone. Its header pages get new numbers, so that the run follows them."""
        pieces: list[Piece] = []
        with ByteReader.open(path) as reader:
            for i, (start, stop) in enumerate(self.headers):
                page = bytearray(reader.get(start, stop - start))
                page[18:22] = (run.first - len(self.headers) + i & 0xFFFFFFFF).to_bytes(4, "little")
                page[22:26] = _NO_CHECKSUM
                page[22:26] = _checksum(bytes(page)).to_bytes(4, "little")
                pieces.append(bytes(page))
        return [*pieces, *run.ranges]

    def intact_ranges(self) -> list[ByteRange]:
        """The bytes of all intact pages."""
        return self.headers + [part for run in self.runs for part in run.ranges]

    def n_samples(self, granule: int) -> int:
        """The samples per channel up to a granule position."""
        return granule - self.pre_skip


@dataclass
class Chain:
    """The songs of a file, and what is wrong with the file as a whole."""

    links: list[Link] = field(default_factory=list)
    n_extra: int = 0  # bytes at the end that are not an intact page
    is_cut: bool = False  # the file ends within a page
    n_bad_pages: int = 0  # in all streams

    @property
    def is_whole(self) -> bool:
        return len(self.links) == 1 and self.links[0].is_whole and not self.is_cut


def read_chain(path: Path, name: str) -> Chain:
    """The songs of an Ogg file. Raises `AudioError` if the file has so many bad pages that it must be hostile."""
    chain, link = Chain(), None
    with ByteReader.open(path) as reader:
        for page in _pages(reader, name, chain):
            if not page.is_intact:
                chain.n_bad_pages += 1
                if link is not None and page.serial == link.serial:
                    _add_bad_page(link, page)
            elif page.flags & _FIRST:
                new = _new_link(reader, page)
                if new is not None and (link is None or link.runs):
                    link = new
                    chain.links.append(link)
                    _add_header(link, page)
            elif link is not None and page.serial == link.serial:
                if _is_header(link, page):
                    _add_header(link, page)
                else:
                    _add_audio(link, page)
                if len(link.runs) > _MAX_RUNS:
                    raise AudioError(f"{name} is damaged (most of its Ogg pages are missing): get the file again")
    return chain


def _is_header(link: Link, page: _Page) -> bool:
    if link.runs or page.granule > 0 or len(link.headers) >= _MAX_HEADER_PAGES:
        return False
    return page.granule == 0 or bool(page.flags & _CONTINUED) or link.codec != "opus"


def _add_header(link: Link, page: _Page) -> None:
    link.headers.append((page.start, page.stop))
    link.header_numbers.append(page.number)


def _add_audio(link: Link, page: _Page) -> None:
    run = link.runs[-1] if link.runs else None
    if run is not None and page.number < run.first + run.n_pages and not page.flags & _LAST:
        link.n_bad_pages += 1  # a duplicate, or out of order
        return
    if run is None or page.number != run.first + run.n_pages:
        run = PageRun(page.number)
        link.runs.append(run)
    append_range(run.ranges, page.start, page.stop)
    run.n_pages += 1
    if page.granule >= 0:
        run.granule = page.granule
    link.is_ended = bool(page.flags & _LAST)
    link.end_granule = -1


def _add_bad_page(link: Link, page: _Page) -> None:
    link.n_bad_pages += 1
    last = link.runs[-1].granule if link.runs else 0
    if last < page.granule < last + 60 * link.sample_rate:  # otherwise the granule itself is probably damaged
        link.end_granule = page.granule
        link.is_ended = bool(page.flags & _LAST)


def _pages(reader: ByteReader, name: str, chain: Chain) -> Iterator[_Page]:
    """All pages in order, including damaged ones, but none inside another. Notes in `chain` how the file ends."""
    position, n_bad = 0, 0
    while position < reader.size:
        header = reader.get(position, _HEADER_BYTES + _MAX_SEGMENTS)
        if not header.startswith(_MARK) or len(header) < _HEADER_BYTES or len(header) < _HEADER_BYTES + header[26]:
            chain.n_extra = reader.size - position
            position = reader.find(_MARK, position + 1)
            continue
        _, _, flags, granule, serial, number, checksum, n_segments = _HEADER.unpack(header[:_HEADER_BYTES])
        content = _HEADER_BYTES + n_segments
        n_bytes = content + sum(header[_HEADER_BYTES:content])
        data = reader.get(position, n_bytes)
        is_cut = len(data) < n_bytes
        is_intact = not is_cut and _checksum(data[:22] + _NO_CHECKSUM + data[26:]) == checksum
        yield _Page(position, n_bytes, flags, granule, serial, number, is_intact)
        chain.is_cut, chain.n_extra = is_cut, 0 if is_intact else reader.size - position
        if is_intact:
            position += n_bytes
            continue
        n_bad += 1
        if n_bad > _MAX_BAD_PAGES:
            raise AudioError(f"{name} is damaged (most of its Ogg pages are broken): get the file again")
        position = reader.find(_MARK, position + 1)
        if position < reader.size:
            chain.is_cut = False


def _new_link(reader: ByteReader, page: _Page) -> Link | None:
    """The song that a first page begins; None if it is not audio in a known codec."""
    data = reader.get(page.start, page.n_bytes)
    packet = data[_HEADER_BYTES + data[26] :]
    codec = next((codec for mark, codec in _CODECS.items() if packet.startswith(mark)), None)
    match codec:
        case None:
            return None
        case "opus":
            return Link(codec, page.serial, 48000, pre_skip=int.from_bytes(packet[10:12], "little"))
        case "flac":
            sample_rate = int.from_bytes(packet[27:30], "big") >> 4
        case _:
            at = 12 if codec == "vorbis" else 36
            sample_rate = int.from_bytes(packet[at : at + 4], "little")
    return Link(codec, page.serial, sample_rate, pre_skip=0)
