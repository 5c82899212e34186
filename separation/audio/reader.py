"""Reads structured bytes: a few at a time, at any position of a file."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self

ByteRange = tuple[int, int]  # the first byte, and the one after the last

_WINDOW_BYTES = 2**18
_SEARCH_BYTES = 2**16


class ByteReader:
    """Random access to a file's bytes. A part of the file stays in memory, so that many small reads are cheap."""

    def __init__(self, file: IO[bytes] | io.RawIOBase) -> None:
        self._file = file
        self._start, self._window = 0, b""
        self.size: int = file.seek(0, io.SEEK_END)

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        with path.open("rb", buffering=0) as file:
            yield cls(file)

    def get(self, position: int, n_bytes: int) -> bytes:
        """The bytes from a position on; fewer at the end of the file."""
        if position >= self.size:
            return b""
        offset = position - self._start
        if offset < 0 or offset + n_bytes > len(self._window):
            self._file.seek(position)
            self._start, offset = position, 0
            self._window = self._file.read(max(n_bytes, _WINDOW_BYTES)) or b""
        return self._window[offset : offset + n_bytes]

    def find(self, mark: bytes, position: int) -> int:
        """The position of the first mark from `position` on; the file's size if there is none."""
        while position < self.size:
            data = self.get(position, _SEARCH_BYTES)
            if (at := data.find(mark)) >= 0:
                return position + at
            position += max(1, len(data) - len(mark) + 1)
        return self.size


def append_range(ranges: list[ByteRange], start: int, stop: int) -> None:
    """Append a range of bytes; extend the last one if the new one follows it directly."""
    if ranges and ranges[-1][1] == start:
        ranges[-1] = (ranges[-1][0], stop)
    else:
        ranges.append((start, stop))
