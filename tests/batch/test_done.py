"""A song with complete stems is skipped. Only with --overwrite are files of the user or stems of others replaced."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helpers import common
from helpers.command_line import (
    DEMO,
    RUN,
    Make,
    contents,
    json_lines,
    separate,
    settings_of,
    write_link,
    write_songs,
    write_text,
)
from helpers.common import PROJECT, read
from separation.audio.options import OutputOptions
from separation.batch import run
from separation.batch.done import unfinished
from separation.batch.job import Job, Song
from separation.engine.options import EngineOptions
from separation.engine.pool import ModelPool
from separation.engine.separator import Separator
from separation.errors import OutputError
from separation.system.record import RECORD, Record

QUICK = EngineOptions(chunk_seconds=4, overlap_seconds=1)


def write_song(path: Path, *, gain: float = 1.0) -> Path:
    """A short song; all have the same size and time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(common.song(0.1, gain=gain))
    os.utime(path, ns=(10**18, 10**18))
    return path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model can be loaded."""
    monkeypatch.setattr(run, "load_separator", None)


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool(EngineOptions(device="cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# Done or not


@pytest.fixture(scope="module")
def separated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 1.wav and its stems in out/1."""
    folder = tmp_path_factory.mktemp("separated")
    write_songs(folder, "1.wav")
    assert separate(folder / "1.wav", "-o", folder / "out") == 0
    return folder


def test_a_finished_song_is_skipped_without_importing_pytorch(separated: Path) -> None:
    arguments = ["separate", str(separated / "1.wav"), "-o", str(separated / "out"), *DEMO]
    code = f"from separation.cli.main import main; import sys; assert main({arguments}) == 0"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def grow(path: Path) -> None:
    """Append to a file without changing its time."""
    times = path.stat()
    path.write_bytes(path.read_bytes() + bytes(1000))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "the song": lambda song, folder: song.write_bytes(common.song(0.3, gain=0.5)),
    "the song's size but not its time": lambda song, folder: grow(song),
    "a stem is missing": lambda song, folder: (folder / "vocals.wav").unlink(),
    "a stem is cut": lambda song, folder: os.truncate(folder / "vocals.wav", 1000),
    "the record is missing": lambda song, folder: (folder / RECORD).unlink(),
    "the record has no sizes of stems": lambda song, folder: (folder / RECORD).write_text(
        re.sub(r'"stems": \{.*?\}', '"stems": {"vocals": 1}', (folder / RECORD).read_text(), flags=re.DOTALL)
    ),
    "a record of something else": lambda song, folder: (folder / RECORD).write_text('{"version": 1, "runs": [7]}'),
    "a later version's record": lambda song, folder: (folder / RECORD).write_text(
        (folder / RECORD).read_text().replace('"version": 1', '"version": 2')
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_song_is_separated_again_after_this_change(change: str, separated: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(separated, tmp_path / "copy"))
    job = Job(settings_of(*DEMO))
    song = Song(copy / "1.wav", copy / "out" / "1")
    assert unfinished([song], job)[0] == []
    CHANGES[change](song.path, song.folder)
    assert unfinished([song], job)[0] == [song]


def test_a_folder_that_cannot_be_written_fails_only_its_song(
    separated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(separated, tmp_path / "copy"))
    job = Job(settings_of(*DEMO))
    bad, good = Song(copy / "1.wav", copy / "out" / "1"), Song(copy / "1.wav", copy / "out" / "2")

    def refuse(prefix: str, dir: Path) -> str:  # root may write everywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    left, done = unfinished([bad, good], job, force=True)
    assert left == [good]
    assert [(outcome.status, outcome.path) for outcome in done] == [("failed", bad.path)]


@pytest.mark.slow
def test_runs_with_different_settings_are_both_done_unless_they_share_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_songs(tmp_path, "1.wav")

    def status(*options: str) -> str:
        assert separate(tmp_path / "1.wav", "-o", tmp_path / "out", "--json", *options) == 0
        return json_lines(capsys.readouterr().out)[0]["status"]

    assert status() == "done"
    assert status("--two-stems", "drums") == status("--format", "flac") == "done"
    assert status() == status("--two-stems", "drums") == status("--format", "flac") == "skipped"
    assert status("--stems", "all_4") == "done"  # replaces vocals.wav and drums.wav
    assert status("--format", "flac") == "skipped"
    assert status() == "done"
    assert status("--stems", "all_4") == "done"
    assert status("--stems", "all_4", "--force-refresh") == "done"


@pytest.mark.parametrize("key", RUN)
@pytest.mark.parametrize("value", [7, [7], "x", {"x": [7]}, None, -1.0, 0])
def test_a_run_with_wrong_values_does_not_crash(key: str, value: object, copy: Path) -> None:
    folder, song = copy / "out" / "01", Song(copy / "a" / "01.wav", copy / "out" / "01")
    job = Job(RUN["settings"], report=True, stems={"vocals": "demo"})
    text = Record([{**RUN, key: value}], Record.read(folder).files).text()
    (folder / RECORD).write_text(text, encoding="utf-8")
    left, done = unfinished([song], job)
    assert len(left) + len(done) == 1 and all(outcome.status == "failed" for outcome in done)


# ---------------------------------------------------------------------------------------------------------------------
# The user's files


@pytest.mark.parametrize(
    "name, options, make",
    [
        ("vocals.wav", (), write_text),
        ("instrumental.wav", (), write_text),
        ("vocals.flac", ("--format", "flac"), write_text),
        ("no_drums.wav", ("--two-stems", "drums"), write_text),
        ("stems.html", ("--report",), write_text),
        (RECORD, (), write_text),
        ("vocals.wav", (), write_link),
        ("vocals.wav", (), lambda path: path.symlink_to("nothing")),
        (RECORD, (), write_link),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_a_users_file_is_refused_before_a_model_is_loaded(
    name: str,
    options: tuple[str, ...],
    make: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    song = write_song(tmp_path / "mysong.wav")
    (tmp_path / "mysong").mkdir()
    make(tmp_path / "mysong" / name)
    before = contents(tmp_path)
    assert separate(song, "-o", tmp_path, *options) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {str(tmp_path / 'mysong' / name)!r} already exists") and told.count("\n") == 1
    assert "--overwrite" in told
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_with_overwrite_a_users_files_are_replaced_and_links_are_not_followed(tmp_path: Path) -> None:
    song = write_song(tmp_path / "mysong.wav")
    folder = tmp_path / "mysong"
    folder.mkdir()
    write_link(folder / "vocals.wav")
    write_text(folder / "instrumental.wav")
    write_text(folder / "stems.html")
    write_text(folder / RECORD)
    assert separate(song, "-o", tmp_path, "--overwrite", "--report") == 0
    assert (folder / "mine.txt").read_text() == "mine"
    assert not (folder / "vocals.wav").is_symlink()
    assert all(soundfile.info(folder / f"{stem}.wav").frames == 4410 for stem in ("vocals", "instrumental"))
    assert "<html" in (folder / "stems.html").read_text(encoding="utf-8")
    assert len(Record.read(folder).runs) == 1


def test_a_refused_song_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1", "2"):
        write_song(tmp_path / "music" / f"{name}.wav")
    (tmp_path / "out" / "1").mkdir(parents=True)
    write_text(tmp_path / "out" / "1" / "vocals.wav")
    assert separate(tmp_path / "music", "-o", tmp_path / "out") == 2
    assert "2 songs: 1 done, 1 failed" in capsys.readouterr().err
    assert (tmp_path / "out" / "2" / "vocals.wav").exists()
    assert contents(tmp_path / "out" / "1") == {"vocals.wav": b"mine"}


@pytest.mark.slow
def test_stems_are_replaced_unless_the_user_has_changed_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    song, vocals = write_song(tmp_path / "1.wav"), tmp_path / "1" / "vocals.wav"
    assert separate(song, "-o", tmp_path, "--report") == 0
    assert separate(song, "-o", tmp_path, "--wav-depth", "16") == 0
    assert soundfile.info(vocals).subtype == "PCM_16"
    assert separate(song, "-o", tmp_path, "--report", "--wav-depth", "16", "--force-refresh") == 0
    capsys.readouterr()
    os.utime(vocals, (10**9, 10**9))  # as if an editor had saved the same number of bytes
    before = vocals.stat().st_mtime_ns
    assert separate(song, "-o", tmp_path) == 2
    assert "vocals.wav' already exists" in capsys.readouterr().err
    assert vocals.stat().st_mtime_ns == before and soundfile.info(vocals).subtype == "PCM_16"


def test_separate_file_replaces_stems_but_not_a_users_files(pool: ModelPool, tmp_path: Path) -> None:
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


def test_a_file_that_appears_during_the_run_is_not_replaced(pool: ModelPool, tmp_path: Path) -> None:
    song = write_song(tmp_path / "1.wav")

    def appear(share: float, stage: str) -> None:
        if stage == "demo":
            write_text(tmp_path / "out" / "vocals.wav")

    with pytest.raises(OutputError, match="already exists"):
        Separator("demo", pool=pool, options=QUICK).separate_file(song, tmp_path / "out", progress=appear)
    assert contents(tmp_path / "out") == {"vocals.wav": b"mine"}


# ---------------------------------------------------------------------------------------------------------------------
# Other songs' stems


@pytest.fixture(scope="module")
def same_named_songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a/01.wav` and `b/01.wav`, with the same size and time. The stems of the first are in `out/01`."""
    folder = tmp_path_factory.mktemp("twins")
    write_song(folder / "a" / "01.wav")
    write_song(folder / "b" / "01.wav", gain=0.5)
    assert separate(folder / "a" / "01.wav", "-o", folder / "out") == 0
    return folder


@pytest.fixture
def copy(same_named_songs: Path, tmp_path: Path) -> Path:
    """A copy with the same modification times."""
    return Path(shutil.copytree(same_named_songs, tmp_path / "copy"))


@pytest.mark.usefixtures("no_model")
def test_another_song_with_the_same_name_size_and_time_is_told_apart(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copy)
    assert separate(copy / "b" / "01.wav", "-o", copy / "out") == 2
    told = capsys.readouterr().err
    assert f"{str(copy / 'out' / '01')!r} has the stems of another song, {str(copy / 'a' / '01.wav')!r}: " in told
    assert "--overwrite" in told
    assert separate(copy / "b" / "01.wav", "-o", copy / "out", "--two-stems", "drums") == 2  # not even beside them
    assert contents(copy) == before


@pytest.mark.slow
def test_another_song_is_separated_into_another_folder_or_with_overwrite(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copy / "out")
    assert separate(copy / "b" / "01.wav", "-o", copy / "other") == 0
    assert contents(copy / "out") == before
    assert separate(copy / "b" / "01.wav", "-o", copy / "out", "--overwrite") == 0
    for stem in ("vocals.wav", "instrumental.wav"):
        assert np.array_equal(read(copy / "out" / "01" / stem), read(copy / "other" / "01" / stem))
    capsys.readouterr()
    assert separate(copy / "b" / "01.wav", "-o", copy / "out") == 0
    assert "done already" in capsys.readouterr().out
    assert separate(copy / "a" / "01.wav", "-o", copy / "out") == 2  # its stems were replaced
    assert "another song" in capsys.readouterr().err


@pytest.mark.slow
def test_two_songs_with_the_same_name_are_separated_into_two_folders(
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
    """Everything has moved."""
    copy.rename(copy.with_name("elsewhere"))
    return copy.with_name("elsewhere") / "a" / "01.wav", copy.with_name("elsewhere") / "out"


def song_moved(copy: Path) -> tuple[Path, Path]:
    """Only the song has moved."""
    (copy / "new").mkdir()
    return (copy / "a" / "01.wav").rename(copy / "new" / "01.wav"), copy / "out"


def touched(copy: Path) -> tuple[Path, Path]:
    """The song has another time, as a copy has."""
    os.utime(copy / "a" / "01.wav")
    return copy / "a" / "01.wav", copy / "out"


def behind_a_link(copy: Path) -> tuple[Path, Path]:
    (copy / "new").symlink_to(copy / "a")
    return copy / "new" / "01.wav", copy / "out"


@pytest.mark.parametrize("change", [moved, song_moved, touched, behind_a_link])
@pytest.mark.usefixtures("no_model")
def test_the_same_song_is_recognised(
    change: Callable[[Path], tuple[Path, Path]], copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    song, out = change(copy)
    assert separate(song, "-o", out) == 0
    assert "done already" in capsys.readouterr().out


def test_a_song_that_has_changed_is_separated_again(copy: Path) -> None:
    before = read(copy / "out" / "01" / "vocals.wav")
    write_song(copy / "a" / "01.wav", gain=0.7)
    os.utime(copy / "a" / "01.wav")
    assert separate(copy / "a" / "01.wav", "-o", copy / "out") == 0
    assert not np.array_equal(read(copy / "out" / "01" / "vocals.wav"), before)


EARLIER = """{
 "version": 1,
 "runs": [
  {
   "source": %s,
   "settings": {
    "precision": "auto",
    "model_name": null,
    "model_dir": null,
    "model_path": null,
    "attention": "auto",
    "two_stems": null,
    "format": "wav",
    "sample_rate": 44100,
    "wav_depth": "32f",
    "recipe": "demo",
    "stems": "vocals_instrumental",
    "sources": {
     "vocals": "((Estimate(run=Run(model='demo', input=((None, 1.0),)), stem='vocals'), 1.0),)",
     "instrumental": "((None, 1.0), (Estimate(run=Run(model='demo', input=((None, 1.0),)), stem='vocals'), -1.0))"
    },
    "chunks": {"demo": [176400, 44100]},
    "weights": {"demo/demo.safetensors": "e9b307729fd3a66b82723e58dfcc631ffa5b600d3a0562b0f9fa5d8e56026bef"}
   },
   "stems": {"vocals": ["vocals.wav", 35400], "instrumental": ["instrumental.wav", 35406]},
   "duration_seconds": 0.1,
   "elapsed_seconds": 1.2602410190011142,
   "gain": 1.0,
   "warnings": [],
   "finished": "2026-11-26T22:28:41+00:00"
  }
 ],
 "files": [["vocals.wav", 35400, 1795732121982484692], ["instrumental.wav", 35406, 1795732121982484692]]
}"""


@pytest.mark.usefixtures("no_model")
def test_a_song_with_a_record_of_version_0_2_0_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    song, folder = write_song(tmp_path / "1.wav"), tmp_path / "out" / "1"
    folder.mkdir(parents=True)
    (folder / "vocals.wav").write_bytes(bytes(35400))
    (folder / "instrumental.wav").write_bytes(bytes(35406))
    facts = song.stat()
    source = {"name": "1.wav", "path": "../../1.wav", "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    (folder / RECORD).write_text(EARLIER % json.dumps(source), encoding="utf-8")
    assert separate(song, "-o", tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("1.wav: done already")


def downgrade_record(folder: Path) -> None:
    """Leave out what earlier versions did not record."""
    record = Record.read(folder)
    for entry in record.runs:
        entry["source"] = {key: entry["source"][key] for key in ("name", "bytes", "mtime_ns")}
    text = Record(record.runs).text().replace(',\n "files": []', "")
    assert '"files"' not in text
    (folder / RECORD).write_text(text, encoding="utf-8")


def test_a_record_of_an_earlier_version_is_recognised(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy / "out" / "01"
    downgrade_record(folder)
    assert separate(copy / "a" / "01.wav", "-o", copy / "out") == 0
    assert "done already" in capsys.readouterr().out
    assert separate(copy / "a" / "01.wav", "-o", copy / "out", "--wav-depth", "16") == 0
    assert soundfile.info(folder / "vocals.wav").subtype == "PCM_16"
    downgrade_record(folder)
    write_text(folder / "vocals.wav")
    assert separate(copy / "a" / "01.wav", "-o", copy / "out") == 2
    assert "already exists" in capsys.readouterr().err


def test_the_record_of_another_song_without_stems_is_ignored(copy: Path) -> None:
    for stem in (copy / "out" / "01").glob("*.wav"):
        stem.unlink()
    assert separate(copy / "b" / "01.wav", "-o", copy / "out") == 0


@pytest.mark.slow
def test_stems_that_python_replaced_do_not_count_as_the_other_songs(
    copy: Path, pool: ModelPool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although the new stems have the recorded sizes."""
    Separator("demo", pool=pool, options=QUICK).separate_file(copy / "b" / "01.wav", copy / "out" / "01")
    assert separate(copy / "a" / "01.wav", "-o", copy / "out") == 0
    assert "done already" not in capsys.readouterr().out
