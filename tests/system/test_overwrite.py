"""A file that this program did not write is never replaced unless the user says so, nor is another song's stem."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from helpers import common
from helpers.common import PROJECT, read
from separation.audio.options import OutputOptions
from separation.batch.songs import Job, Song, unfinished
from separation.checkpoints.convert import convert
from separation.cli import main as __main__
from separation.cli.demo import run_demo
from separation.cli.main import main
from separation.engine import separator
from separation.engine.options import EngineOptions
from separation.engine.separator import ModelPool, Separator
from separation.errors import OutputError
from separation.report.page import Report, write_report
from separation.report.picture import Row, draw
from separation.system.output import OutputFolder
from separation.system.record import RECORD, Record, Written, check_targets

DEMO = ("--recipe", "demo", "--device", "cpu", "--chunk-size", "4", "--overlap", "1")
QUICK = EngineOptions(chunk_seconds=4, overlap_seconds=1)


def write_song(path: Path, *, gain: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(common.song(0.1, gain=gain))
    os.utime(path, ns=(10**18, 10**18))
    return path


def separate(*arguments: str | Path) -> int:
    return main(["separate", *map(str, arguments), *DEMO])


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused is refused before a model is loaded."""
    monkeypatch.setattr(__main__, "_separator", None)


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool(EngineOptions(device="cpu"))


def linked(path: Path) -> None:
    """In the place of a stem a link to a file of the user's."""
    (path.parent / "mine.txt").write_text("mine")
    path.symlink_to("mine.txt")


def write_text(path: Path) -> None:
    path.write_text("mine")


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name, options, make",
    [
        ("vocals.wav", (), write_text),
        ("instrumental.wav", (), write_text),
        ("vocals.flac", ("--format", "flac"), write_text),
        ("no_drums.wav", ("--two-stems", "drums"), write_text),
        ("stems.html", ("--report",), write_text),
        (RECORD, (), write_text),
        ("vocals.wav", (), linked),
        ("vocals.wav", (), lambda path: path.symlink_to("nothing")),
        (RECORD, (), linked),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_a_file_of_the_users_is_named_before_a_model_is_loaded_and_stays(
    name: str,
    options: tuple[str, ...],
    make: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    song = write_song(tmp_path / "mysong.wav")
    (tmp_path / "mysong").mkdir()
    make(tmp_path / "mysong" / name)
    before = state(tmp_path)
    assert separate(song, "-o", tmp_path, *options) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {str(tmp_path / 'mysong' / name)!r} already exists") and told.count("\n") == 1
    assert "--overwrite" in told
    assert state(tmp_path) == before


def test_with_overwrite_files_of_the_users_are_replaced_and_links_are_not_followed(tmp_path: Path) -> None:
    song = write_song(tmp_path / "mysong.wav")
    folder = tmp_path / "mysong"
    folder.mkdir()
    linked(folder / "vocals.wav")
    write_text(folder / "instrumental.wav")
    write_text(folder / "stems.html")
    write_text(folder / RECORD)
    assert separate(song, "-o", tmp_path, "--overwrite", "--report") == 0
    assert (folder / "mine.txt").read_text() == "mine"
    assert not (folder / "vocals.wav").is_symlink()
    assert all(soundfile.info(folder / f"{stem}.wav").frames == 4410 for stem in ("vocals", "instrumental"))
    assert "<html" in (folder / "stems.html").read_text(encoding="utf-8")
    assert len(Record.read(folder).runs) == 1


def test_one_song_that_is_refused_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1", "2"):
        write_song(tmp_path / "music" / f"{name}.wav")
    (tmp_path / "out" / "1").mkdir(parents=True)
    write_text(tmp_path / "out" / "1" / "vocals.wav")
    assert separate(tmp_path / "music", "-o", tmp_path / "out") == 2
    assert "2 songs: 1 done, 1 failed" in capsys.readouterr().err
    assert (tmp_path / "out" / "2" / "vocals.wav").exists()
    assert state(tmp_path / "out" / "1") == {"vocals.wav": b"mine"}


def test_what_this_program_wrote_it_replaces_unless_the_user_has_changed_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    song, vocals = write_song(tmp_path / "1.wav"), tmp_path / "1" / "vocals.wav"
    assert separate(song, "-o", tmp_path, "--report") == 0
    assert separate(song, "-o", tmp_path, "--wav-depth", "16") == 0
    assert soundfile.info(vocals).subtype == "PCM_16"
    assert separate(song, "-o", tmp_path, "--report", "--wav-depth", "16", "--force-refresh") == 0
    capsys.readouterr()
    os.utime(vocals, (10**9, 10**9))  # as an editor does that saves it with as many bytes
    before = vocals.stat().st_mtime_ns
    assert separate(song, "-o", tmp_path) == 2
    assert "vocals.wav' already exists" in capsys.readouterr().err
    assert vocals.stat().st_mtime_ns == before and soundfile.info(vocals).subtype == "PCM_16"


# --- another song's stems


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a/01.wav` and `b/01.wav`, of one size and time, of which the first has its stems in `out/01`."""
    folder = tmp_path_factory.mktemp("twins")
    write_song(folder / "a" / "01.wav")
    write_song(folder / "b" / "01.wav", gain=0.5)
    assert separate(folder / "a" / "01.wav", "-o", folder / "out") == 0
    return folder


@pytest.fixture
def copy(twins: Path, tmp_path: Path) -> Path:
    """With the times that files had, as `cp -a` and most archives keep them."""
    return Path(shutil.copytree(twins, tmp_path / "copy"))


@pytest.mark.usefixtures("no_model")
def test_a_song_of_the_same_name_size_and_time_is_not_taken_for_another(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(copy)
    assert separate(copy / "b" / "01.wav", "-o", copy / "out") == 2
    told = capsys.readouterr().err
    assert f"{str(copy / 'out' / '01')!r} has the stems of another song, {str(copy / 'a' / '01.wav')!r}: " in told
    assert "--overwrite" in told
    assert separate(copy / "b" / "01.wav", "-o", copy / "out", "--two-stems", "drums") == 2  # nor beside them
    assert state(copy) == before


def test_with_another_output_or_overwrite_it_is_done(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(copy / "out")
    assert separate(copy / "b" / "01.wav", "-o", copy / "other") == 0
    assert state(copy / "out") == before
    assert separate(copy / "b" / "01.wav", "-o", copy / "out", "--overwrite") == 0
    for stem in ("vocals.wav", "instrumental.wav"):
        assert np.array_equal(read(copy / "out" / "01" / stem), read(copy / "other" / "01" / stem))
    capsys.readouterr()
    assert separate(copy / "b" / "01.wav", "-o", copy / "out") == 0
    assert "done already" in capsys.readouterr().out
    assert separate(copy / "a" / "01.wav", "-o", copy / "out") == 2  # these are now the other's
    assert "another song" in capsys.readouterr().err


def test_two_songs_that_share_their_name_are_done_with_an_output_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_song(tmp_path / "song.wav")
    soundfile.write(tmp_path / "song.flac", *soundfile.read(tmp_path / "song.wav"))
    assert separate(tmp_path, "-o", tmp_path / "stems") == 2
    assert "separate each with its own -o" in capsys.readouterr().err
    assert separate(tmp_path / "song.wav", "-o", tmp_path / "1") == 0
    assert separate(tmp_path / "song.flac", "-o", tmp_path / "2") == 0
    assert separate(tmp_path / "song.flac", "-o", tmp_path / "1") == 2
    assert "another song" in capsys.readouterr().err


def moved(copy: Path) -> tuple[Path, Path]:
    """Everything, to another place."""
    copy.rename(copy.with_name("elsewhere"))
    return copy.with_name("elsewhere") / "a" / "01.wav", copy.with_name("elsewhere") / "out"


def song_moved(copy: Path) -> tuple[Path, Path]:
    """The song alone; its stems stay."""
    (copy / "new").mkdir()
    return (copy / "a" / "01.wav").rename(copy / "new" / "01.wav"), copy / "out"


def touched(copy: Path) -> tuple[Path, Path]:
    """As a copy without times is."""
    os.utime(copy / "a" / "01.wav")
    return copy / "a" / "01.wav", copy / "out"


def linked_to(copy: Path) -> tuple[Path, Path]:
    (copy / "new").symlink_to(copy / "a")
    return copy / "new" / "01.wav", copy / "out"


@pytest.mark.parametrize("change", [moved, song_moved, touched, linked_to])
@pytest.mark.usefixtures("no_model")
def test_the_same_song_is_known_again(
    change: Callable[[Path], tuple[Path, Path]], copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    song, out = change(copy)
    assert separate(song, "-o", out) == 0
    assert "done already" in capsys.readouterr().out


def test_a_song_that_was_changed_in_its_place_is_done_again(copy: Path) -> None:
    before = read(copy / "out" / "01" / "vocals.wav")
    write_song(copy / "a" / "01.wav", gain=0.7)
    os.utime(copy / "a" / "01.wav")
    assert separate(copy / "a" / "01.wav", "-o", copy / "out") == 0
    assert not np.array_equal(read(copy / "out" / "01" / "vocals.wav"), before)


def as_an_earlier_version_wrote_it(folder: Path) -> None:
    record = Record.read(folder)
    for run in record.runs:
        run["source"] = {key: run["source"][key] for key in ("name", "bytes", "mtime_ns")}
    text = Record(record.runs).text().replace(',\n "files": []', "")
    assert '"files"' not in text
    (folder / RECORD).write_text(text, encoding="utf-8")


def test_an_earlier_versions_record_still_knows_its_song_and_its_stems(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy / "out" / "01"
    as_an_earlier_version_wrote_it(folder)
    assert separate(copy / "a" / "01.wav", "-o", copy / "out") == 0
    assert "done already" in capsys.readouterr().out
    assert separate(copy / "a" / "01.wav", "-o", copy / "out", "--wav-depth", "16") == 0
    assert soundfile.info(folder / "vocals.wav").subtype == "PCM_16"
    as_an_earlier_version_wrote_it(folder)
    write_text(folder / "vocals.wav")
    assert separate(copy / "a" / "01.wav", "-o", copy / "out") == 2
    assert "already exists" in capsys.readouterr().err


def test_another_songs_record_without_its_stems_is_in_nobodys_way(copy: Path) -> None:
    for stem in (copy / "out" / "01").glob("*.wav"):
        stem.unlink()
    assert separate(copy / "b" / "01.wav", "-o", copy / "out") == 0


# --- in Python


def test_separate_file_replaces_its_own_and_refuses_other_files(pool: ModelPool, tmp_path: Path) -> None:
    song, other = write_song(tmp_path / "1.wav"), write_song(tmp_path / "2.wav", gain=0.5)
    demo = Separator("demo", pool=pool, options=QUICK)
    first = read(demo.separate_file(song, tmp_path / "out")["vocals"])
    assert not np.array_equal(read(demo.separate_file(other, tmp_path / "out")["vocals"]), first)
    write_text(tmp_path / "out" / "vocals.wav")
    with pytest.raises(OutputError, match=r"vocals\.wav' already exists .*overwrite=True"):
        demo.separate_file(song, tmp_path / "out")
    assert np.array_equal(
        read(demo.separate_file(song, tmp_path / "out", OutputOptions(overwrite=True))["vocals"]), first
    )


def test_what_python_replaces_is_not_taken_for_the_other_songs(
    copy: Path, pool: ModelPool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new stems are of the same sizes as those that the record knew."""
    Separator("demo", pool=pool, options=QUICK).separate_file(copy / "b" / "01.wav", copy / "out" / "01")
    assert separate(copy / "a" / "01.wav", "-o", copy / "out") == 0
    assert "done already" not in capsys.readouterr().out


def test_a_file_that_appears_during_the_run_is_not_replaced(
    pool: ModelPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    song, run = write_song(tmp_path / "1.wav"), separator.Separator._run

    def running(*arguments: object) -> None:
        write_text(tmp_path / "out" / "vocals.wav")
        run(*arguments)

    monkeypatch.setattr(separator.Separator, "_run", running)
    with pytest.raises(OutputError, match="already exists"):
        Separator("demo", pool=pool, options=QUICK).separate_file(song, tmp_path / "out")
    assert state(tmp_path / "out") == {"vocals.wav": b"mine"}


def write_converted(path: Path, **options: bool) -> None:
    torch.save({"gain": torch.zeros(2)}, path.with_name("x.ckpt"))
    convert(path.with_name("x.ckpt"), path, **options)


def write_picture(path: Path, **options: bool) -> None:
    draw(path, [Row("a", torch.ones(2, 4410), 44100)], title="A", **options)


def write_page(path: Path, **options: bool) -> None:
    song = write_song(path.with_name("1.wav"))
    write_report(Report("A", song, {"a": song}), path, **options)


WRITERS: dict[str, Callable[..., None]] = {
    "x.safetensors": write_converted,
    "x.svg": write_picture,
    "x.html": write_page,
}


@pytest.mark.parametrize("make", [write_text, linked])
@pytest.mark.parametrize("name", WRITERS)
def test_what_else_writes_files_refuses_too(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    target = tmp_path / name
    make(target)
    with pytest.raises(OutputError, match=f"{name}' already exists"):
        WRITERS[name](target)
    assert target.read_text() == "mine"
    WRITERS[name](target, overwrite=True)
    assert target.is_file() and not target.is_symlink() and target.stat().st_size > 50
    assert make is write_text or (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["stems.svg", "stems.html", "all_6/bass.wav", RECORD, f"all_6/{RECORD}"])
def test_the_demo_refuses_before_any_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("separation.cli.demo.ModelPool", None)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_text(tmp_path / name)
    with pytest.raises(OutputError, match=f"{name}' already exists"):
        run_demo(tmp_path)
    assert state(tmp_path) == {name: b"mine"}


@pytest.mark.slow
def test_the_demo_can_be_run_again_and_over_a_users_files_only_with_overwrite(tmp_path: Path) -> None:
    assert main(["demo", "-o", str(tmp_path)]) == 0
    assert main(["demo", "-o", str(tmp_path)]) == 0
    write_text(tmp_path / "stems.svg")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert main(["demo", "-o", str(tmp_path), "--overwrite"]) == 0
    assert "<svg" in (tmp_path / "stems.svg").read_text(encoding="utf-8")


# --- the record


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


@pytest.mark.parametrize("moves", range(6))
def test_what_a_run_leaves_that_is_killed_between_two_moves_is_known_as_its_own(moves: int, tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as output:
        parts = {name: output.work / name for name in ("a.wav", "b.wav")}
        for path in parts.values():
            path.write_text("older")
        output.publish(parts)
    code = subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(moves)], cwd=PROJECT, check=False).returncode
    assert code == (9 if moves < 5 else 0)  # the record, and of each file the older one and the newer one
    check_targets(tmp_path, ["a.wav", "b.wav", RECORD])
    with OutputFolder(tmp_path) as output:
        assert [path.name for path in tmp_path.glob(".separating-*")] == [output.work.name]


@pytest.mark.parametrize(
    "text", ["", "7", "[]", '{"version": 1}', '{"version": 1, "runs": ["', "[" * 100_000, "\0" * 100, "\xff"]
)
def test_a_record_that_is_damaged_or_none_vouches_for_nothing_and_is_not_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_bytes(text.encode("latin-1"))
    assert Record.read(tmp_path) == Record()
    with pytest.raises(OutputError, match="already exists"):
        check_targets(tmp_path, [RECORD])
    check_targets(tmp_path, [RECORD], overwrite=True)


@pytest.mark.parametrize("content", ['{"version": 9, "runs": 3}', '{"version": 1, "runs": [7], "files": 1}'])
def test_a_record_that_is_not_understood_vouches_for_nothing(content: str, tmp_path: Path) -> None:
    write_text(tmp_path / "vocals.wav")
    (tmp_path / RECORD).write_text(content)
    assert Record.read(tmp_path) == Record()
    check_targets(tmp_path, [RECORD])
    with pytest.raises(OutputError, match="already exists"):
        check_targets(tmp_path, ["vocals.wav"])


RUN: dict[str, Any] = {
    "source": {"name": "\udce9.wav", "bytes": 4},
    "settings": {"format": "wav"},
    "stems": {"a": ("a.wav", 4)},
    "duration_seconds": 1.0,
    "elapsed_seconds": 2.0,
    "gain": 1.0,
    "warnings": ["loud"],
}


@pytest.mark.parametrize("key", RUN)
@pytest.mark.parametrize("value", [7, [7], "x", {"x": [7]}, None, -1.0, 0])
def test_a_run_of_wrong_values_is_no_crash(key: str, value: object, copy: Path) -> None:
    folder, song = copy / "out" / "01", Song(copy / "a" / "01.wav", copy / "out" / "01")
    job = Job(RUN["settings"], report=True, stems=("vocals",))
    text = Record([{**RUN, key: value}], Record.read(folder).files).text()
    (folder / RECORD).write_text(text, encoding="utf-8")
    left, done = unfinished([song], job)
    assert len(left) + len(done) == 1 and all(outcome.status == "failed" for outcome in done)


def test_a_time_that_changes_as_a_file_is_renamed_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_record_is_read_as_it_was_written_and_vouches_for_what_did_not_change_since(tmp_path: Path) -> None:
    write_text(tmp_path / "a.wav")
    write_text(tmp_path / "b.wav")
    record = Record([RUN], [Written.of(tmp_path / "a.wav"), Written("b.wav", 4, None)])
    (tmp_path / RECORD).write_text(record.text(), encoding="utf-8")
    assert Record.read(tmp_path) == record
    assert record.vouches_for(tmp_path / "a.wav") and record.vouches_for(tmp_path / "b.wav")
    a, b = tmp_path / "a.wav", tmp_path / "b.wav"
    time = a.stat().st_mtime_ns
    os.utime(a, ns=(time, time + 2 * 10**9))  # as a file system is that keeps two seconds
    assert record.vouches_for(a)
    os.utime(a, ns=(time, time + 3 * 10**9))
    b.write_text("longer")
    assert not record.vouches_for(a) and not record.vouches_for(b) and not record.vouches_for(tmp_path / "none.wav")


def test_a_disk_that_is_full_for_the_record_is_one_sentence_and_nothing_is_published(
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
