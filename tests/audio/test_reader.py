import io
import random
from pathlib import Path

import pytest

from separation.audio import reader
from separation.audio.reader import ByteReader, append_range

CONTENT = random.Random(0).randbytes(5000)


@pytest.fixture(params=[7, 100, 10_000])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ByteReader:
    """A reader of CONTENT with a window of few bytes."""
    monkeypatch.setattr(reader, "_WINDOW_BYTES", request.param)
    monkeypatch.setattr(reader, "_SEARCH_BYTES", request.param)
    return ByteReader(io.BytesIO(CONTENT))


def test_any_bytes_are_read_in_any_order(small: ByteReader) -> None:
    dice = random.Random(1)
    for _ in range(500):
        start, n_bytes = dice.randrange(5200), dice.randrange(300)
        assert small.get(start, n_bytes) == CONTENT[start : start + n_bytes]


def test_nothing_is_read_after_the_end(small: ByteReader) -> None:
    assert small.size == 5000
    assert small.get(4990, 20) == CONTENT[4990:]
    assert small.get(5000, 1) == b"" and small.get(2**70, 1) == b""


def test_a_mark_is_found_wherever_it_stands(small: ByteReader) -> None:
    for start in range(4900, 4994):
        assert small.find(CONTENT[start : start + 6], start - 50) == start
    assert small.find(CONTENT[100:106], 100) == 100
    assert small.find(CONTENT[100:106], 101) == 5000
    assert small.find(b"x" * 6, 6000) == 5000


def test_a_file_is_opened_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with ByteReader.open(tmp_path / "file") as opened:
        assert opened.get(4000, 10) == CONTENT[4000:4010]


def test_adjacent_ranges_are_merged() -> None:
    ranges: list[tuple[int, int]] = []
    for start, stop in ((0, 5), (5, 8), (10, 12), (12, 13)):
        append_range(ranges, start, stop)
    assert ranges == [(0, 8), (10, 13)]
