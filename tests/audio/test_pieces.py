import io
import random
from pathlib import Path

import pytest

from separation.audio.pieces import Pieces

CONTENT = bytes(range(256)) * 20


@pytest.fixture
def pieces(tmp_path: Path) -> Pieces:
    (tmp_path / "file").write_bytes(CONTENT)
    return Pieces(tmp_path / "file", [b"start", (100, 300), b"", (50, 50), b"middle", (4000, 5000)])


EXPECTED = b"start" + CONTENT[100:300] + b"middle" + CONTENT[4000:5000]


def test_the_pieces_are_read_one_after_the_other(pieces: Pieces) -> None:
    with pieces:
        assert pieces.size == len(EXPECTED)
        assert pieces.read() == EXPECTED
        assert pieces.read(1) == b""


def test_any_bytes_are_read_in_any_order(pieces: Pieces) -> None:
    dice = random.Random(0)
    with pieces:
        assert pieces.readable() and pieces.seekable()
        for _ in range(200):
            start, n_bytes = dice.randrange(1300), dice.randrange(400)
            assert pieces.seek(start) == start == pieces.tell()
            assert pieces.read(n_bytes) == EXPECTED[start : start + n_bytes]


def test_seeking_counts_from_the_start_the_position_or_the_end(pieces: Pieces) -> None:
    with pieces:
        assert pieces.seek(10) == 10
        assert pieces.seek(5, io.SEEK_CUR) == 15
        assert pieces.seek(-1, io.SEEK_END) == len(EXPECTED) - 1
        assert pieces.read() == EXPECTED[-1:]
        assert pieces.seek(-5) == 0


def test_blocks_are_the_rest_of_the_file(pieces: Pieces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("separation.audio.pieces._BLOCK_BYTES", 100)
    with pieces:
        pieces.seek(3)
        blocks = list(pieces.blocks())
    assert b"".join(blocks) == EXPECTED[3:]
    assert {len(block) for block in blocks[:-1]} == {100}


def test_closing_closes_the_file(pieces: Pieces) -> None:
    pieces.seek(10)
    pieces.close()
    with pytest.raises(ValueError, match="closed"):
        pieces.read(1)
