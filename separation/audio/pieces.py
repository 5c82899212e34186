"""A file put together from ranges of another file's bytes and from bytes in memory."""

import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path

from separation.audio.reader import ByteRange

Piece = bytes | ByteRange

_BLOCK_BYTES = 2**20


class Pieces(io.RawIOBase):
    """The pieces, one after the other, as a file to read. Ranges are of the file at `path`."""

    def __init__(self, path: Path, pieces: Iterable[Piece]) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._pieces: list[Piece] = []
        self._starts: list[int] = []  # the position of each piece's first byte
        self.size: int = 0
        self._position = 0
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
        while done < len(view) and (data := self._read_within_piece(len(view) - done)):
            view[done : done + len(data)] = data
            done += len(data)
            self._position += len(data)
        return done

    def _read_within_piece(self, n_bytes: int) -> bytes:
        """At most `n_bytes` from the current position, all of one piece; empty at the end."""
        if self._position >= self.size:
            return b""
        i = bisect_right(self._starts, self._position) - 1
        piece, offset = self._pieces[i], self._position - self._starts[i]
        if isinstance(piece, bytes):
            return piece[offset : offset + n_bytes]
        self._file.seek(piece[0] + offset)
        return self._file.read(min(n_bytes, piece[1] - piece[0] - offset)) or b""

    def blocks(self) -> Iterator[bytes]:
        """The rest of the file, block by block."""
        while data := self.read(_BLOCK_BYTES):
            yield data

    def close(self) -> None:
        self._file.close()
        super().close()
