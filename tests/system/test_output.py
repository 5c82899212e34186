"""Files of a run appear together or not at all, and other people's files are never replaced unasked."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.command_line import Make, write_link, write_songs, write_text
from helpers.common import PROJECT
from separation.checkpoints.convert import convert
from separation.errors import OutputError
from separation.report.page import Report, write_report
from separation.report.picture import Row, draw
from separation.system import output
from separation.system.output import OutputFolder, not_through_links
from separation.system.record import RECORD, check_targets


@pytest.mark.parametrize("older", [{}, {"vocals.wav": b"older"}])
def test_if_one_file_cannot_be_published_none_is(older: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in older.items():
        (tmp_path / name).write_bytes(content)
    with OutputFolder(tmp_path, overwrite=True, record=None) as output:
        vocals = output.work / "vocals.wav"
        vocals.write_bytes(b"newer")
        with pytest.raises(OutputError, match=r"drums\.wav"):
            output.publish({"vocals": vocals, "drums": output.work / "drums.wav"})  # never written
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == older


KILLED = """
import os, sys
from pathlib import Path
from separation.system.output import OutputFolder
replace, left = os.replace, int(sys.argv[2])
def killed(*paths):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    replace(*paths)
os.replace = killed
with OutputFolder(Path(sys.argv[1])) as output:
    parts = {name: output.work / name for name in ("a.wav", "b.wav")}
    for path in parts.values():
        path.write_text("newer, and longer")
    output.publish(parts)
"""


@pytest.mark.parametrize("renames", range(6))
def test_a_run_killed_between_two_renames_leaves_only_files_that_the_next_run_may_replace(
    renames: int, tmp_path: Path
) -> None:
    with OutputFolder(tmp_path) as output:
        parts = {name: output.work / name for name in ("a.wav", "b.wav")}
        for path in parts.values():
            path.write_text("older")
        output.publish(parts)
    code = subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(renames)], cwd=PROJECT, check=False).returncode
    assert code == (9 if renames < 5 else 0)  # one for the record, and two for each file
    check_targets(tmp_path, ["a.wav", "b.wav", RECORD])
    with OutputFolder(tmp_path) as output:
        assert [path.name for path in tmp_path.glob(".separating-*")] == [output.work.name]


def test_a_modification_time_that_renaming_changes_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def renamed(source: Path, target: Path) -> None:
        replace(source, target)
        os.utime(target, (10**9, 10**9))

    monkeypatch.setattr(os, "replace", renamed)
    with OutputFolder(tmp_path) as output:
        part = output.work / "a.wav"
        write_text(part)
        output.publish({"a": part})
    check_targets(tmp_path, ["a.wav"])


def test_nothing_is_published_if_the_disk_is_too_full_for_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with OutputFolder(tmp_path / "out") as output:
        part = output.work / "a.wav"
        write_text(part)
        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OutputError, match=rf"{RECORD}. \(No space left on device\): free space there, or choose"):
            output.publish({"a": part})
    assert not (tmp_path / "out").exists()


def write_converted(path: Path, **options: bool) -> None:
    torch.save({"gain": torch.zeros(2)}, path.with_name("x.ckpt"))
    convert(path.with_name("x.ckpt"), path, **options)


def write_picture(path: Path, **options: bool) -> None:
    draw(path, [Row("a", torch.ones(2, 4410), 44100)], title="A", **options)


def write_page(path: Path, **options: bool) -> None:
    write_songs(path.parent, "1.wav")
    song = path.with_name("1.wav")
    write_report(Report("A", song, {"a": song}), path, **options)


WRITERS: dict[str, Callable[..., None]] = {
    "x.safetensors": write_converted,
    "x.svg": write_picture,
    "x.html": write_page,
}


@pytest.mark.parametrize("make", [write_text, write_link])
@pytest.mark.parametrize("name", WRITERS)
def test_weights_pictures_and_pages_replace_a_users_file_only_with_overwrite(
    name: str, make: Make, tmp_path: Path
) -> None:
    target = tmp_path / name
    make(target)
    with pytest.raises(OutputError, match=f"{name}' already exists"):
        WRITERS[name](target)
    assert target.read_text() == "mine"
    WRITERS[name](target, overwrite=True)
    assert target.is_file() and not target.is_symlink() and target.stat().st_size > 50
    assert make is write_text or (tmp_path / "mine.txt").read_text() == "mine"


def test_a_work_folder_that_another_process_removes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, made = output.lock, list[Path]()

    def removed_meanwhile(path: Path) -> Any:
        held = locked(path)
        made.append(path.parent)
        if len(made) == 1:  # the other process holds the lock while it removes the folder
            held.acquire()
            shutil.rmtree(path.parent)
        return held

    monkeypatch.setattr(output, "lock", removed_meanwhile)
    with OutputFolder(tmp_path, record=None) as folder:
        assert folder.work == made[1] and folder.work.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_file_is_never_opened_through_a_symbolic_link(tmp_path: Path) -> None:
    write_link(tmp_path / "a.txt")
    with pytest.raises(OSError, match="it is a symbolic link"), open(tmp_path / "a.txt", "w", opener=not_through_links):
        pass
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with open(tmp_path / "b.txt", "w", opener=not_through_links) as file:
        file.write("new")
    assert (tmp_path / "b.txt").read_text() == "new"


def test_folders_that_a_failed_run_made_are_removed_and_others_stay(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="failed"), OutputFolder(tmp_path / "mine" / "new" / "song"):
        raise ValueError("failed")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
