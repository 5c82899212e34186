"""A run that was stopped, however, goes on where it was; what is done is not done again; workers share."""

import argparse
import errno
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import common
from helpers.common import PROJECT, below, read, started
from separation.audio.options import OutputOptions
from separation.batch import songs
from separation.batch.find import find
from separation.batch.songs import Job, Outcome, Song
from separation.cli import main as __main__
from separation.cli.main import INDIFFERENT, build_parser, main
from separation.engine import chunking
from separation.engine.options import EngineOptions
from separation.engine.separator import Separator
from separation.progress import Progress
from separation.system.record import RECORD

DEMO = ("--recipe", "demo", "--device", "cpu")


def separate(*arguments: str | Path) -> int:
    return main(["separate", *map(str, arguments), *DEMO])


def separating(*arguments: str | Path) -> AbstractContextManager[subprocess.Popen[str]]:
    return started("separate", *map(str, arguments), *DEMO)


def wait_until(condition: Callable[[], Any], run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.02)


def write_songs(folder: Path, *names: str, seconds: float = 0.3) -> None:
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(common.song(seconds, gain=1 - index / 100))  # none is another


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def temporary(folder: Path) -> list[Path]:
    return below(folder, ".separating-*")


def test_bad_songs_do_not_stop_a_folder_and_a_second_run_skips_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    write_songs(music, "1.wav", "a/2.wav", "a/3.wav")
    (music / "a" / "bad.mp3").write_text("words")
    (music / "empty.flac").touch()
    assert separate(music, "-o", out, "--json") == 2
    captured = capsys.readouterr()
    first = {Path(line["song"]).name: line for line in lines(captured.out)}
    assert {name: line["status"] for name, line in first.items()} == {
        "1.wav": "done",
        "2.wav": "done",
        "3.wav": "done",
        "bad.mp3": "failed",
        "empty.flac": "failed",
    }
    told = captured.err.splitlines()
    assert told[-1] == "5 songs: 3 done, 2 failed" and len(told) == 3
    assert any(line.startswith(f"error: {music / 'a' / 'bad.mp3'}: 'bad.mp3' is not audio") for line in told)
    assert files_in(out) == sorted(
        f"{song}/{file}" for song in ("1", "a/2", "a/3") for file in ("vocals.wav", "instrumental.wav", RECORD)
    )
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.wav")}
    (music / "a" / "bad.mp3").unlink()
    (music / "empty.flac").unlink()
    monkeypatch.setattr(__main__, "_separator", None)  # no model is loaded
    assert separate(music, "-o", out, "--json") == 0
    captured = capsys.readouterr()
    for line in lines(captured.out):
        assert line == first[Path(line["song"]).name] | {"status": "skipped"}
    assert captured.err == "3 songs: 3 skipped\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.wav")} == before
    assert separate(music / "1.wav", "-o", out) == 0
    assert capsys.readouterr() == ("1.wav: done already (--force-refresh does it again)\n", "")


def test_what_is_done_already_is_known_without_pytorch(separated: Path) -> None:
    arguments = ["separate", str(separated / "1.wav"), "-o", str(separated / "out"), *DEMO]
    code = f"from separation.cli.main import main; import sys; assert main({arguments}) == 0"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def grow(path: Path) -> None:
    """Append to a file without another time."""
    times = path.stat()
    path.write_bytes(path.read_bytes() + bytes(1000))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES: dict[str, Callable[[Path, Path], object]] = {
    "the song": lambda song, folder: song.write_bytes(common.song(0.3, gain=0.5)),
    "the song's size, not its time": lambda song, folder: grow(song),
    "a stem is missing": lambda song, folder: (folder / "vocals.wav").unlink(),
    "a stem is cut": lambda song, folder: os.truncate(folder / "vocals.wav", 1000),
    "no record": lambda song, folder: (folder / RECORD).unlink(),
    "a record whose stems are no pairs": lambda song, folder: (folder / RECORD).write_text(
        re.sub(r'"stems": \{.*?\}', '"stems": {"vocals": 1}', (folder / RECORD).read_text(), flags=re.DOTALL)
    ),
    "another's record": lambda song, folder: (folder / RECORD).write_text('{"version": 1, "runs": [7]}'),
    "a later version's record": lambda song, folder: (folder / RECORD).write_text(
        (folder / RECORD).read_text().replace('"version": 1', '"version": 2')
    ),
}


@pytest.fixture(scope="module")
def separated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 1.wav and its stems in out/1."""
    folder = tmp_path_factory.mktemp("separated")
    write_songs(folder, "1.wav")
    assert separate(folder / "1.wav", "-o", folder / "out") == 0
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_a_song_is_not_done_any_more_when_this_changed(change: str, separated: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(separated, tmp_path / "copy"))
    job = Job(__main__._settings(build_parser().parse_args(["separate", "x", "-o", "y", *DEMO])))
    song = Song(copy / "1.wav", copy / "out" / "1")
    assert songs.unfinished([song], job)[0] == []
    CHANGES[change](song.path, song.folder)
    assert songs.unfinished([song], job)[0] == [song]


def test_a_folder_that_cannot_be_written_fails_its_song_alone(
    separated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(separated, tmp_path / "copy"))
    job = Job(__main__._settings(build_parser().parse_args(["separate", "x", "-o", "y", *DEMO])))
    bad, good = Song(copy / "1.wav", copy / "out" / "1"), Song(copy / "1.wav", copy / "out" / "2")

    def refuse(prefix: str, dir: Path) -> str:  # root may write everywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    left, done = songs.unfinished([bad, good], job, force=True)
    assert left == [good]
    assert [(outcome.status, outcome.path) for outcome in done] == [("failed", bad.path)]


OTHER: dict[str, tuple[str, ...]] = {  # for every option of `separate` another value than the default
    "stems": ("--stems", "all_4"),
    "recipe": ("--recipe", "sw"),
    "two_stems": ("--two-stems", "drums"),
    "model_name": ("--model-name", "demo"),
    "model_dir": ("--model-dir", "configs/models", "--model-name", "demo"),
    "model_path": ("--model-name", "demo", "--model-path", "weights/demo/demo.safetensors"),
    "chunk_size": ("--chunk-size", "9"),
    "overlap": ("--overlap", "3"),
    "attention": ("--attention", "sdpa"),
    "precision": ("--precision", "fp32"),
    "format": ("--format", "flac"),
    "sample_rate": ("--sample-rate", "48000"),
    "wav_depth": ("--wav-depth", "16"),
    "mp3_bitrate": ("--format", "mp3", "--mp3-bitrate", "192"),
    "flac_depth": ("--format", "flac", "--flac-depth", "16"),
    "device": ("--device", "cpu"),
    "batch_size": ("--batch-size", "3"),
    "workers": ("--workers", "3"),
    "ray": ("--ray", "auto"),
    "report": ("--report",),
    "json": ("--json",),
    "verbose": ("-v",),
    "force_refresh": ("--force-refresh",),
    "overwrite": ("--overwrite",),
    "accept_damaged": ("--accept-damaged",),
    "output": ("-o", "elsewhere"),
    "songs": ("another.wav",),
}


@pytest.mark.parametrize(
    "option", sorted(set(vars(build_parser().parse_args(["separate", "x", "-o", "y"]))) - {"command"})
)
def test_every_option_either_decides_what_the_stems_hold_or_does_not(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)

    def parsed(*arguments: str) -> argparse.Namespace:
        return build_parser().parse_args(["separate", "-o", "y", "x.wav", *arguments])

    usual, other = parsed(), parsed(*OTHER[option])
    assert getattr(usual, option) != getattr(other, option)
    assert (__main__._settings(usual) == __main__._settings(other)) == (option in INDIFFERENT)


@pytest.mark.parametrize("same", [("--chunk-size", "8"), ("--overlap", "4"), ("--chunk-size", "8", "--overlap", "4")])
def test_the_same_chunks_are_the_same_settings_whoever_chose_them(same: tuple[str, ...]) -> None:
    usual = build_parser().parse_args(["separate", "x.wav", "-o", "y", *DEMO])
    asked = build_parser().parse_args(["separate", "x.wav", "-o", "y", *DEMO, *same])
    assert __main__._settings(asked) == __main__._settings(usual)


def test_other_weights_or_another_recipe_of_the_same_name_are_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes((PROJECT / "weights" / "demo" / "demo.safetensors").read_bytes())
    arguments = ["separate", "x.wav", "-o", "y", "--model-name", "demo", "--model-path", str(own)]
    before = __main__._settings(build_parser().parse_args(arguments))
    assert __main__._settings(build_parser().parse_args(arguments)) == before
    touch(own)
    assert __main__._settings(build_parser().parse_args(arguments)) != before
    arguments = ["separate", "x.wav", "-o", "y", *DEMO]
    before = __main__._settings(build_parser().parse_args(arguments))
    load_recipe = __main__.load_recipe
    monkeypatch.setattr(__main__, "load_recipe", lambda name, choice, **rest: load_recipe("sw", choice, **rest))
    assert __main__._settings(build_parser().parse_args(arguments)) != before


@pytest.mark.slow
def test_runs_side_by_side_are_both_done_unless_one_took_the_others_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_songs(tmp_path, "1.wav")

    def status(*options: str) -> str:
        assert separate(tmp_path / "1.wav", "-o", tmp_path / "out", "--json", *options) == 0
        return lines(capsys.readouterr().out)[0]["status"]

    assert status() == "done"
    assert status("--two-stems", "drums") == status("--format", "flac") == "done"
    assert status() == status("--two-stems", "drums") == status("--format", "flac") == "skipped"
    assert status("--stems", "all_4") == "done"  # with a vocals.wav and a drums.wav of its own
    assert status("--format", "flac") == "skipped"
    assert status() == "done"
    assert status("--stems", "all_4") == "done"
    assert status("--stems", "all_4", "--force-refresh") == "done"


def test_a_page_is_made_for_stems_that_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_songs(tmp_path, "1.wav")
    assert separate(tmp_path / "1.wav", "-o", tmp_path / "out") == 0
    before = (tmp_path / "out" / "1" / "vocals.wav").stat().st_mtime_ns
    for status in ("done", "skipped"):
        capsys.readouterr()
        assert separate(tmp_path / "1.wav", "-o", tmp_path / "out", "--report", "--json") == 0
        assert lines(capsys.readouterr().out)[0]["status"] == status
    assert (tmp_path / "out" / "1" / "stems.html").exists()
    assert (tmp_path / "out" / "1" / "vocals.wav").stat().st_mtime_ns == before


@contextmanager
def no_bar(name: str) -> Iterator[Progress]:
    yield Progress()


def job(format: str = "wav") -> Job:
    return Job(settings={}, output=OutputOptions(format))


def test_workers_give_the_same_files_and_run_the_model_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{n}.wav" for n in range(5)]
    write_songs(tmp_path / "music", *names, seconds=2)
    separator = Separator("demo", options=EngineOptions(device="cpu", chunk_seconds=4, overlap_seconds=1))
    alone, found = {}, find([str(tmp_path / "music")], tmp_path / "alone").songs
    for outcome in songs.run(found, job(), [separator], workers=1, bar=no_bar):
        alone[outcome.path.name] = read(outcome.stems["vocals"])
    estimate, running, others = chunking._SongRun._estimates, threading.Lock(), []

    def watched(*arguments: Any) -> Any:
        others.append(not running.acquire(blocking=False))
        try:
            time.sleep(0.05)
            return estimate(*arguments)
        finally:
            running.release()

    monkeypatch.setattr(chunking._SongRun, "_estimates", watched)
    found = find([str(tmp_path / "music")], tmp_path / "together").songs
    outcomes = list(songs.run(found, job(), [separator], workers=3, bar=no_bar))
    assert len(others) >= 5 and not any(others)
    assert sorted(outcome.path.name for outcome in outcomes) == names
    for outcome in outcomes:
        assert outcome.status == "done"
        assert np.array_equal(read(outcome.stems["vocals"]), alone[outcome.path.name])


def test_of_several_separators_each_has_one_song_at_a_time_and_all_are_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, busy, others = threading.Barrier(3, timeout=60), {name: threading.Lock() for name in "abc"}, []

    def separated(song: Song, job: Job, separator: str, progress: object) -> Outcome:
        others.append(not busy[separator].acquire(blocking=False))
        together.wait()  # until all three have a song
        busy[separator].release()
        return Outcome(song.path, "done", facts={"by": separator})

    monkeypatch.setattr(songs, "separate_song", separated)
    found = [Song(tmp_path / f"{n}.wav", tmp_path / f"{n}") for n in range(9)]
    separators: Any = ["a", "b", "c"]
    outcomes = list(songs.run(found, job(), separators, workers=1, bar=no_bar))
    assert {outcome.path for outcome in outcomes} == {song.path for song in found}
    assert {outcome.facts["by"] for outcome in outcomes} == {"a", "b", "c"}
    assert len(others) == 9 and not any(others)


@pytest.mark.parametrize("device, n_songs, expected", [("cuda", 5, 3), ("auto", 2, 2), ("cuda:1", 5, 1)])
def test_a_separator_is_made_for_each_gpu_that_has_a_song(
    device: str, n_songs: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_songs(tmp_path / "music", *(f"{n}.wav" for n in range(n_songs)), seconds=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    asked: list[str] = []

    def run(found: list[Song], job: Job, separators: list[str], **options: Any) -> Iterator[Outcome]:
        asked.extend(separators)
        assert options["workers"] == 1
        yield from (Outcome(song.path, "done") for song in found)

    monkeypatch.setattr(songs, "run", run)
    monkeypatch.setattr(__main__, "_separator", lambda options: options.device)
    assert main(["separate", str(tmp_path / "music"), "-o", str(tmp_path / "out"), "--device", device]) == 0
    assert asked == (["cuda:0", "cuda:1", "cuda:2"][:expected] if expected > 1 else ["cuda:1"])


@pytest.mark.parametrize("format", ["wav", "mp3"])
def test_when_the_iterator_is_closed_workers_stop_and_remove_what_is_not_finished(format: str, tmp_path: Path) -> None:
    write_songs(tmp_path / "music", *(f"{n}.wav" for n in range(6)), seconds=10)
    separator = Separator("demo", options=EngineOptions(device="cpu"))
    found = find([str(tmp_path / "music")], tmp_path / "out").songs
    running = songs.run(found, job(format), [separator], workers=3, bar=no_bar)
    next(running)
    running.close()
    assert not temporary(tmp_path)
    folders = list((tmp_path / "out").iterdir())
    assert 1 <= len(folders) <= 3  # four if those at hand had gone on
    for folder in folders:
        assert files_in(folder) == [RECORD, f"instrumental.{format}", f"vocals.{format}"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_workers_and_a_second_run_goes_on(number: int, tmp_path: Path) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    write_songs(music, *(f"{n}.wav" for n in range(6)), seconds=12)
    with separating(music, "-o", out, "--workers", "2") as run:
        wait_until(lambda: below(out, RECORD) and len(temporary(out)) == 2, run)
        run.send_signal(number)
        _, told = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    done = {path.parent.name for path in out.rglob(RECORD)}
    assert 1 <= len(done) < 6
    assert {path.name for path in out.iterdir()} == done and not temporary(out)
    assert told.splitlines()[-1 if number == signal.SIGTERM else -2].startswith("6 songs: ")
    with separating(music, "-o", out, "--workers", "2", "--json") as run:
        printed, _ = run.communicate(timeout=120)
    assert run.returncode == 0
    statuses = {Path(line["song"]).stem: line["status"] for line in lines(printed)}
    assert statuses == {f"{n}": "skipped" if f"{n}" in done else "done" for n in range(6)}


def test_what_a_killed_run_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    write_songs(music, "1.wav", seconds=60)
    with separating(music, "-o", out) as run:
        wait_until(lambda: below(out, "waveform-*"), run)
        run.kill()
    assert temporary(out)
    write_songs(music, "1.wav", seconds=0.3)
    assert separate(music, "-o", out) == 0
    assert files_in(out) == ["1/" + RECORD, "1/instrumental.wav", "1/vocals.wav"] and not temporary(out)


@pytest.mark.slow
def test_the_temporary_folder_of_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    write_songs(music, "1.wav", seconds=60)
    with separating(music, "-o", out) as run:
        wait_until(lambda: below(out, "waveform-*"), run)
        run.send_signal(signal.SIGSTOP)
        (alive,) = temporary(out)
        write_songs(music, "1.wav", seconds=0.3)
        assert separate(music / "1.wav", "-o", out) == 0
        assert temporary(out) == [alive] and list(alive.glob("waveform-*"))
        run.send_signal(signal.SIGCONT)
        run.communicate(timeout=60)
    assert run.returncode == 0 and not temporary(out)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bars_are_for_terminals_and_for_each_song_and_all(
    workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_songs(tmp_path / "music", "1.wav", "2.wav", "3.wav")
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    shown = b""

    def look() -> None:
        nonlocal shown
        while b"3 songs: 3 done" not in shown:
            shown += os.read(terminal, 4096)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    with open(ours, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert separate(tmp_path / "music", "-o", tmp_path / "out", "--workers", workers) == 0
        thread.join(20)
    os.close(terminal)
    assert b"0 of 3 songs|" in shown and b"\r3.wav" in shown and b"3 songs: 3 done" in shown


@pytest.mark.parametrize(
    "options, words",
    [
        (("--workers", "0"), ("--workers", "from 1 up")),
        (("--ray", "auto", "--workers", "2"), ("--ray does not take --workers",)),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_songs(tmp_path, "1.wav")
    try:
        code = separate(tmp_path / "1.wav", "-o", tmp_path / "out", *options)
    except SystemExit as e:
        code = int(str(e.code))
    assert code == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
