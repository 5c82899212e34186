"""What a folder's record is taken for."""

from pathlib import Path

import pytest

from separation.system.record import RECORD, Record, Written, is_record


@pytest.mark.parametrize("spaces, is_one", [(0, True), (2**24 - 100, True), (2**24, False)])
def test_a_record_of_more_than_16_mebibytes_is_not_read(spaces: int, is_one: bool, tmp_path: Path) -> None:
    record = Record(files=[Written("a.wav", 3, None)])
    (tmp_path / RECORD).write_text(record.text().replace("\n", " ") + " " * spaces, encoding="utf-8")
    assert is_record(tmp_path / RECORD) == is_one
    assert Record.read(tmp_path) == (record if is_one else Record())
