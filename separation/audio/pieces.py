"""A file made of pieces: byte ranges of another file, and bytes of our own. And a file read in windows."""

import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

Piece = bytes | tuple[int, int]  # or the first byte and the one after the last

_WINDOW_BYTES = 2**20


class Pieces(io.RawIOBase):
    """The pieces one after the other, as a file to read."""

    def __init__(self, path: Path, pieces: Iterable[Piece]) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._pieces: list[Piece] = []
        self._starts: list[int] = []  # of each piece
        self.size = self._position = 0
        for piece in pieces:
            n_bytes = len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]
            if n_bytes:
                self._pieces.append(piece)
                self._starts.append(self.size)
                self.size += n_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and (data := self._part(len(view) - done)):
            view[done : done + len(data)] = data
            done += len(data)
            self._position += len(data)
        return done

    def _part(self, n_bytes: int) -> bytes:
        """Up to so many bytes of the piece at the position."""
        if self._position >= self.size:
            return b""
        i = bisect_right(self._starts, self._position) - 1
        piece, offset = self._pieces[i], self._position - self._starts[i]
        if isinstance(piece, bytes):
            return piece[offset : offset + n_bytes]
        self._file.seek(piece[0] + offset)
        return self._file.read(min(n_bytes, piece[1] - piece[0] - offset)) or b""

    def blocks(self) -> Iterator[bytes]:
        while data := self.read(_WINDOW_BYTES):
            yield data

    def close(self) -> None:
        self._file.close()
        super().close()


class Window:
    """A file of which any few bytes can be had at once: a part of it is kept."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._start, self._data = 0, b""
        self.size = file.seek(0, io.SEEK_END)

    def get(self, position: int, n_bytes: int) -> bytes:
        """Bytes from a position on, fewer at the end of the file; up to 1 MB."""
        offset = position - self._start
        if offset < 0 or offset + n_bytes > len(self._data):
            self._file.seek(position)
            self._start, self._data, offset = position, self._file.read(_WINDOW_BYTES), 0
        return self._data[offset : offset + n_bytes]
