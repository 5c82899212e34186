"""The pages of Ogg (RFC 3533): which are whole, which are missing, and the songs that stand one after the other.

A page has a checksum, a number, and as its granule position the samples that are complete when it ends.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from separation.audio.pieces import Piece, Window
from separation.errors import AudioError

_MARK = re.compile(b"OggS\0")
_HEADER = struct.Struct("<4sBBqIIIB")
_CONTINUED, _FIRST, _LAST = 1, 2, 4  # flags of a page
_MAX_FALSE_PAGES = 1000  # a file made to keep this busy can hold millions
_MAX_PAGE_BYTES = 27 + 255 + 255 * 255
_MAX_RUNS = 2000
_MAX_HEADER_BYTES = 2**26
_CODECS = {b"\x01vorbis": "vorbis", b"OpusHead": "opus", b"\x7fFLAC": "flac", b"Speex   ": "speex"}

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_NO_CHECKSUM = bytes(4)


def _checksum(page: bytes) -> int:
    """Ogg's checksum of a page whose checksum is 0: zlib's of the bits in the reverse order, which C computes."""
    reverse = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reverse:032b}"[::-1], 2)


class _Page(NamedTuple):
    start: int
    n_bytes: int
    flags: int
    granule: int  # -1: no packet ends in it
    serial: int
    number: int
    is_whole: bool  # its checksum is right


@dataclass
class Run:
    """Pages that stand side by side by their numbers."""

    first: int  # the number of its first page
    pieces: list[tuple[int, int]]  # bytes
    granule: int = -1  # of its last page that has one
    n_pages: int = 0


@dataclass
class Link:
    """One song: its header pages and the runs of those with audio."""

    codec: str
    serial: int
    sample_rate: int
    pre_skip: int  # samples at 48 kHz, of Opus
    headers: list[tuple[int, int]] = field(default_factory=list)  # bytes
    header_numbers: list[int] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    is_ended: bool = False  # its last page says that it is the last
    end_granule: int = -1  # of a page at the end that is not whole; `is_ended` is of it then too
    n_bad_pages: int = 0

    @property
    def is_whole(self) -> bool:
        return len(self.runs) == 1 and not self.n_bad_pages and self.starts_whole and self.end_granule < 0

    @property
    def are_headers_whole(self) -> bool:
        """Whether the header pages, and the first audio page behind them, are numbered without a gap."""
        numbers = [*self.header_numbers, *(run.first for run in self.runs[:1])]
        return numbers[:1] == [0] and self.header_numbers == list(range(len(self.header_numbers)))

    @property
    def starts_whole(self) -> bool:
        return self.are_headers_whole and bool(self.runs) and self.runs[0].first == len(self.header_numbers)

    def pieces(self, run: Run, path: Path) -> list[Piece]:
        """A file of this run alone: the header pages, numbered anew so that the run follows them."""
        pieces: list[Piece] = []
        with path.open("rb") as file:
            for i, (start, stop) in enumerate(self.headers):
                file.seek(start)
                page = bytearray(file.read(stop - start))
                page[18:22] = (run.first - len(self.headers) + i & 0xFFFFFFFF).to_bytes(4, "little")
                page[22:26] = _NO_CHECKSUM
                page[22:26] = _checksum(bytes(page)).to_bytes(4, "little")
                pieces.append(bytes(page))
        return [*pieces, *run.pieces]

    def all_pieces(self) -> list[tuple[int, int]]:
        """The bytes of all its whole pages."""
        return self.headers + [piece for run in self.runs for piece in run.pieces]

    def samples(self, granule: int) -> int:
        """Samples of the song, at its own rate, up to a granule position."""
        return granule - self.pre_skip


@dataclass
class Chain:
    """The songs of a file, one after the other, and bytes at its end that are no whole page."""

    links: list[Link] = field(default_factory=list)
    n_extra: int = 0
    is_cut: bool = False  # it ends within a page
    n_bad_pages: int = 0  # of any stream

    @property
    def is_whole(self) -> bool:
        return len(self.links) == 1 and self.links[0].is_whole and not self.is_cut


def find_links(path: Path, name: str) -> Chain:
    """The songs in an Ogg file. Raises `AudioError` if it is full of what looks like pages and is none."""
    chain, link = Chain(), None
    with path.open("rb", buffering=0) as file:
        window = Window(file)
        for page in _pages(window, name, chain):
            if not page.is_whole:
                chain.n_bad_pages += 1
                if link is not None and page.serial == link.serial:
                    link.n_bad_pages += 1
                    last = link.runs[-1].granule if link.runs else 0
                    if last < page.granule < last + 60 * link.sample_rate:
                        link.end_granule = page.granule
                        link.is_ended = bool(page.flags & _LAST)
                continue
            if page.flags & _FIRST:
                new = _new_link(window, page)
                if new is not None and (link is None or link.runs):
                    link = new
                    chain.links.append(link)
                    _add_header(link, page)
                continue
            if link is None or page.serial != link.serial:
                continue
            is_header = not link.runs and page.granule <= 0 and len(link.headers) < 1000
            if is_header and (page.granule == 0 or page.flags & _CONTINUED or link.codec != "opus"):
                _add_header(link, page)
            else:
                _add_audio(link, page)
            if len(link.runs) > _MAX_RUNS:
                raise AudioError(f"{name} is damaged: most of its Ogg pages are missing; get the file again.")
    return chain


def _add_header(link: Link, page: _Page) -> None:
    link.headers.append((page.start, page.start + page.n_bytes))
    link.header_numbers.append(page.number)


def _add_audio(link: Link, page: _Page) -> None:
    start, stop = page.start, page.start + page.n_bytes
    run = link.runs[-1] if link.runs else None
    if run is not None and page.number < run.first + run.n_pages and not page.flags & _LAST:
        link.n_bad_pages += 1  # once more, or out of order
        return
    if run is None or page.number != run.first + run.n_pages:
        run = Run(page.number, [])
        link.runs.append(run)
    if run.pieces and run.pieces[-1][1] == start:
        run.pieces[-1] = (run.pieces[-1][0], stop)
    else:
        run.pieces.append((start, stop))
    run.n_pages += 1
    if page.granule >= 0:
        run.granule = page.granule
    link.is_ended = bool(page.flags & _LAST)
    link.end_granule = -1


def _pages(window: Window, name: str, chain: Chain) -> Iterator[_Page]:
    """All pages in order, those with a wrong checksum too, but none within another."""
    position, n_false = 0, 0
    while position < window.size:
        header = window.get(position, 27 + 255)
        if header[:5] != b"OggS\0" or len(header) < 27 or len(header) < 27 + header[26]:
            n_false += header[:4] == b"OggS"
            found = _next_mark(window, position + 1)
            chain.n_extra = window.size - position
            position = found
            continue
        _, _, flags, granule, serial, number, checksum, n_segments = _HEADER.unpack(header[:27])
        n_bytes = 27 + n_segments + sum(header[27 : 27 + n_segments])
        data = window.get(position, n_bytes)
        is_cut = len(data) < n_bytes
        is_whole = not is_cut and _checksum(data[:22] + _NO_CHECKSUM + data[26:]) == checksum
        yield _Page(position, n_bytes, flags, granule, serial, number, is_whole)
        chain.is_cut, chain.n_extra = is_cut, 0 if is_whole else window.size - position
        if is_whole:
            position += n_bytes
            continue
        n_false += 1
        if n_false > _MAX_FALSE_PAGES:
            raise AudioError(f"{name} is damaged: it is full of false Ogg pages; get the file again.")
        position = _next_mark(window, position + 1)
        if position < window.size:
            chain.is_cut = False


def _next_mark(window: Window, position: int) -> int:
    while position < window.size:
        data = window.get(position, 2**16)
        if found := _MARK.search(data):
            return position + found.start()
        position += max(1, len(data) - 4)
    return window.size


def _new_link(window: Window, page: _Page) -> Link | None:
    """The song that a first page begins; None if it is not audio that is known."""
    data = window.get(page.start, page.n_bytes)
    packet = data[27 + data[26] :]
    codec = next((codec for mark, codec in _CODECS.items() if packet.startswith(mark)), None)
    if codec is None:
        return None
    if codec == "opus":
        return Link(codec, page.serial, 48000, int.from_bytes(packet[10:12], "little"))
    if codec == "flac":
        rate = int.from_bytes(packet[27:30], "big") >> 4
    else:
        at = 12 if codec == "vorbis" else 36
        rate = int.from_bytes(packet[at : at + 4], "little")
    return Link(codec, page.serial, rate, 0)
