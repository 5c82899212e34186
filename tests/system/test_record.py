"""A record vouches for the files that this program wrote and that have not changed since."""

import os
from pathlib import Path

import pytest

from helpers.command_line import RUN, write_text
from separation.errors import InputError, OutputError
from separation.system.record import RECORD, Record, Written, check_targets, is_record


def test_a_record_vouches_for_files_that_have_not_changed_since_it_was_written(tmp_path: Path) -> None:
    write_text(tmp_path / "a.wav")
    write_text(tmp_path / "b.wav")
    record = Record([RUN], [Written.of("a.wav", tmp_path / "a.wav"), Written("b.wav", 4, None)])
    (tmp_path / RECORD).write_text(record.text(), encoding="utf-8")
    assert Record.read(tmp_path) == record
    assert record.vouches_for(tmp_path, "a.wav") and record.vouches_for(tmp_path, "b.wav")
    a, b = tmp_path / "a.wav", tmp_path / "b.wav"
    time = a.stat().st_mtime_ns
    os.utime(a, ns=(time, time + 2 * 10**9))  # as on a file system that keeps times to two seconds
    assert record.vouches_for(tmp_path, a.name)
    os.utime(a, ns=(time, time + 3 * 10**9))
    b.write_text("longer")
    assert not any(record.vouches_for(tmp_path, name) for name in ("a.wav", "b.wav", "none.wav"))


@pytest.mark.parametrize(
    "text", ["", "7", "[]", '{"version": 1}', '{"version": 1, "runs": ["', "[" * 100_000, "\0" * 100, "\xff"]
)
def test_a_damaged_record_vouches_for_nothing_and_is_not_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_bytes(text.encode("latin-1"))
    assert Record.read(tmp_path) == Record()
    with pytest.raises(OutputError, match="already exists"):
        check_targets(tmp_path, [RECORD])
    check_targets(tmp_path, [RECORD], overwrite=True)


@pytest.mark.parametrize("content", ['{"version": 9, "runs": 3}', '{"version": 1, "runs": [7], "files": 1}'])
def test_a_record_of_a_later_version_vouches_for_nothing(content: str, tmp_path: Path) -> None:
    write_text(tmp_path / "vocals.wav")
    (tmp_path / RECORD).write_text(content)
    assert Record.read(tmp_path) == Record()
    check_targets(tmp_path, [RECORD])
    with pytest.raises(OutputError, match="already exists"):
        check_targets(tmp_path, ["vocals.wav"])


@pytest.mark.parametrize("spaces, is_read", [(0, True), (2**24 - 100, True), (2**24, False)])
def test_a_record_of_more_than_16_mebibytes_is_not_read(spaces: int, is_read: bool, tmp_path: Path) -> None:
    record = Record(files=[Written("a.wav", 3, None)])
    (tmp_path / RECORD).write_text(record.text().replace("\n", " ") + " " * spaces, encoding="utf-8")
    assert is_record(tmp_path / RECORD) == is_read
    assert Record.read(tmp_path) == (record if is_read else Record())


def test_a_run_replaces_the_run_with_the_same_settings() -> None:
    other = {**RUN, "settings": {"format": "flac"}}
    newer = {**RUN, "gain": 0.5}
    record = Record([RUN, other])
    assert record.with_run(newer).runs == [other, newer]
    assert record.without_run(RUN["settings"]).runs == [other]


def test_new_files_remove_the_runs_whose_stems_they_replace(tmp_path: Path) -> None:
    other = {**RUN, "settings": {}, "stems": {"b": ("b.wav", 4)}, "page_bytes": 9}
    write_text(tmp_path / "a.wav")
    write_text(tmp_path / "stems.html")
    parts = [tmp_path / "a.wav", tmp_path / "stems.html"]
    record = Record([RUN, other]).with_files(tmp_path, {part.name: part for part in parts})
    assert record.runs == [{key: value for key, value in other.items() if key != "page_bytes"}]
    assert all(record.vouches_for(tmp_path, part.name) for part in parts)


def test_neither_a_folder_nor_the_song_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "vocals.wav").mkdir()
    with pytest.raises(OutputError, match=r"vocals\.wav' is a folder: remove it, or choose another place"):
        check_targets(tmp_path, ["vocals.wav"], overwrite=True)
    write_text(tmp_path / "drums.wav")
    with pytest.raises(InputError, match=r"would overwrite the song 'drums\.wav': choose another output folder"):
        check_targets(tmp_path, ["drums.wav"], overwrite=True, song=tmp_path / "drums.wav")
