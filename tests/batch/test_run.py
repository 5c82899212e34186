"""Many songs are separated, with workers or without; a run that was stopped resumes."""

import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.command_line import files_in, json_lines, separate, separating, write_songs
from helpers.common import below, read
from separation.audio.options import OutputOptions
from separation.batch import run
from separation.batch.find import find
from separation.batch.job import Job, Outcome, Song
from separation.engine import chunking
from separation.engine.options import EngineOptions
from separation.engine.selection import Selection
from separation.engine.separator import Separator
from separation.errors import EstimateError
from separation.progress import Progress
from separation.system.output import OutputFolder
from separation.system.record import RECORD


def wait_until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


def temporary(folder: Path) -> list[Path]:
    return below(folder, ".separating-*")


def test_bad_songs_do_not_stop_the_others_and_a_second_run_skips_finished_songs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    write_songs(music, "1.wav", "a/2.wav", "a/3.wav")
    (music / "a" / "bad.mp3").write_text("words")
    (music / "empty.flac").touch()
    assert separate(music, "-o", out, "--json") == 2
    captured = capsys.readouterr()
    first = {Path(line["song"]).name: line for line in json_lines(captured.out)}
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
    monkeypatch.setattr(run, "load_separator", None)  # no model is loaded
    assert separate(music, "-o", out, "--json") == 0
    captured = capsys.readouterr()
    for line in json_lines(captured.out):
        assert line == first[Path(line["song"]).name] | {"status": "skipped", "tries": 0}
    assert captured.err == "3 songs: 3 skipped\n"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.wav")} == before
    assert separate(music / "1.wav", "-o", out) == 0
    assert capsys.readouterr() == ("1.wav: done already (use --force-refresh to separate it again)\n", "")


@contextmanager
def no_bar(name: str) -> Iterator[Progress]:
    yield Progress()


def never(songs: Sequence[Song]) -> Iterator[Outcome]:
    raise AssertionError("no GPU has crashed")


def job(format: str = "wav") -> Job:
    return Job({}, output=OutputOptions(format))


@pytest.mark.slow
def test_workers_write_the_same_files_and_use_the_model_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{n}.wav" for n in range(5)]
    write_songs(tmp_path / "music", *names, seconds=2)
    separator = Separator("demo", options=EngineOptions(device="cpu", chunk_seconds=4, overlap_seconds=1))
    alone, found = {}, find([str(tmp_path / "music")], tmp_path / "alone").songs
    for outcome in run.run(found, job(), [separator], workers=1, bar=no_bar, afresh=never):
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
    outcomes = list(run.run(found, job(), [separator], workers=3, bar=no_bar, afresh=never))
    assert len(others) >= 5 and not any(others)
    assert sorted(outcome.path.name for outcome in outcomes) == names
    for outcome in outcomes:
        assert outcome.status == "done"
        assert np.array_equal(read(outcome.stems["vocals"]), alone[outcome.path.name])


def test_several_separators_work_at_once_on_one_song_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, busy, others = threading.Barrier(3, timeout=60), {name: threading.Lock() for name in "abc"}, []

    def separated(song: Song, job: Job, separator: str, progress: object) -> Outcome:
        others.append(not busy[separator].acquire(blocking=False))
        together.wait()  # until all three have a song
        busy[separator].release()
        return Outcome(song.path, "done", facts={"by": separator})

    monkeypatch.setattr(run, "separate_anywhere", separated)
    found = [Song(tmp_path / f"{n}.wav", tmp_path / f"{n}") for n in range(9)]
    separators: Any = ["a", "b", "c"]
    outcomes = list(run.run(found, job(), separators, workers=1, bar=no_bar, afresh=never))
    assert {outcome.path for outcome in outcomes} == {song.path for song in found}
    assert {outcome.facts["by"] for outcome in outcomes} == {"a", "b", "c"}
    assert len(others) == 9 and not any(others)


@pytest.mark.parametrize(
    "device, n_songs, expected",
    [
        ("cuda", 5, ["cuda:0", "cuda:1", "cuda:2"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cuda:1", 5, ["cuda:1"]),
    ],
)
def test_each_gpu_with_a_song_gets_a_separator(
    device: str, n_songs: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(run, "load_separator", lambda selection, options, *, refresh: options.device)
    assert run.load_separators(Selection("demo"), EngineOptions(device=device), n_songs) == expected
    if device == "auto":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
        options = EngineOptions(device=device)
        assert run.load_separators(Selection("demo"), options, n_songs, gpus=[2, 1]) == ["cuda:2", "cuda:1"]
        assert run.load_separators(Selection("demo"), options, 1, gpus=[2, 1]) == ["cuda:2"]


def test_a_gpu_that_does_not_hold_the_models_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = {"cuda:1"}

    def load(selection: Selection, options: EngineOptions, *, refresh: bool) -> str:
        if options.device in full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return options.device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(run, "load_separator", load)
    assert run.load_separators(Selection("demo"), EngineOptions(), 9) == ["cuda:0", "cuda:2"]
    assert caplog.messages == ["cuda:1 is left out: its memory does not hold the models"]
    full |= {"cuda:0", "cuda:2"}
    with pytest.raises(EstimateError, match=r"^the GPU's memory does not hold the models: end other programs"):
        run.load_separators(Selection("demo"), EngineOptions(), 9)


@dataclass(frozen=True)
class Gpu:
    """What stands for a separator on a GPU."""

    device: str


@pytest.mark.parametrize("workers", [1, 2])
def test_songs_of_a_crashed_gpu_go_to_the_others_and_then_to_a_new_process(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = [Song(tmp_path / f"{n}.wav", tmp_path / f"{n}") for n in range(6)]
    crashed: set[str] = set()
    crash_after = {"cuda:0": 1, "cuda:1": 3}
    counts, lock = dict.fromkeys(crash_after, 0), threading.Lock()

    def separated(song: Song, job: Job, separator: Gpu, progress: object) -> Outcome:
        with lock:
            counts[separator.device] += 1
            if counts[separator.device] >= crash_after[separator.device]:
                crashed.add(separator.device)
                return Outcome(song.path, "failed", "CUDA error", may_pass=True)
        return Outcome(song.path, "done", facts={"by": separator.device})

    def afresh(left: Sequence[Song]) -> Iterator[Outcome]:
        return (Outcome(song.path, "done", facts={"by": "new process"}) for song in left)

    monkeypatch.setattr(run, "separate_anywhere", separated)
    monkeypatch.setattr(run, "works", lambda device: device not in crashed)
    separators: Any = [Gpu("cuda:0"), Gpu("cuda:1")]
    outcomes = list(run.run(songs, job(), separators, workers=workers, bar=no_bar, afresh=afresh))
    assert separators == [] and crashed == {"cuda:0", "cuda:1"}
    assert sorted(outcome.path for outcome in outcomes) == [song.path for song in songs]
    by = Counter(outcome.facts.get("by", outcome.error) for outcome in outcomes)
    assert by["CUDA error"] >= 2 and by["cuda:1"] == 2 and by["new process"] >= 1
    again = list(run.run(songs[:2], job(), separators, workers=workers, bar=no_bar, afresh=afresh))
    assert [outcome.facts["by"] for outcome in again] == ["new process"] * 2


def test_there_are_no_more_workers_than_songs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()

    def separated(song: Song, job: Job, separator: object, progress: object) -> Outcome:
        threads.add(threading.current_thread().name)
        return Outcome(song.path, "done")

    monkeypatch.setattr(run, "separate_anywhere", separated)
    separators: Any = ["a"]
    (outcome,) = run.run(
        [Song(tmp_path / "1.wav", tmp_path / "1")], job(), separators, workers=3, bar=no_bar, afresh=never
    )
    assert outcome.status == "done" and threads == {threading.main_thread().name}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["wav", "mp3"])
def test_closing_the_iterator_stops_workers_and_removes_unfinished_files(format: str, tmp_path: Path) -> None:
    write_songs(tmp_path / "music", *(f"{n}.wav" for n in range(6)), seconds=10)
    separator = Separator("demo", options=EngineOptions(device="cpu", chunk_seconds=4, overlap_seconds=1))
    found = find([str(tmp_path / "music")], tmp_path / "out").songs
    running = run.run(found, job(format), [separator], workers=3, bar=no_bar, afresh=never)
    next(running)
    running.close()
    assert not temporary(tmp_path)
    folders = list((tmp_path / "out").iterdir())
    assert 1 <= len(folders) <= 3  # more if the songs in progress had been finished
    for folder in folders:
        assert files_in(folder) == [RECORD, f"instrumental.{format}", f"vocals.{format}"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_workers_and_a_second_run_resumes(number: int, tmp_path: Path) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    write_songs(music, *(f"{n}.wav" for n in range(6)), seconds=12)
    with separating(music, "-o", out, "--workers", "2") as process:
        wait_until(lambda: below(out, RECORD) and len(temporary(out)) == 2, process)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    done = {path.parent.name for path in out.rglob(RECORD)}
    assert 1 <= len(done) < 6
    assert {path.name for path in out.iterdir()} == done and not temporary(out)
    assert told.splitlines()[-1 if number == signal.SIGTERM else -2].startswith("6 songs: ")
    with separating(music, "-o", out, "--workers", "2", "--json") as process:
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    statuses = {Path(line["song"]).stem: line["status"] for line in json_lines(printed)}
    assert statuses == {f"{n}": "skipped" if f"{n}" in done else "done" for n in range(6)}


@pytest.mark.slow
def test_the_next_run_removes_what_a_killed_one_left_behind(tmp_path: Path) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    write_songs(music, "1.wav", seconds=60)
    with separating(music, "-o", out) as process:
        wait_until(lambda: below(out, "waveform-*"), process)
        process.kill()
    assert temporary(out)
    write_songs(music, "1.wav", seconds=0.3)
    assert separate(music, "-o", out) == 0
    assert files_in(out) == ["1/" + RECORD, "1/instrumental.wav", "1/vocals.wav"] and not temporary(out)


@pytest.mark.slow
def test_the_temporary_folder_of_a_running_process_stays(tmp_path: Path) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    write_songs(music, "1.wav", seconds=60)
    with separating(music, "-o", out) as process:
        wait_until(lambda: below(out, "waveform-*"), process)
        process.send_signal(signal.SIGSTOP)
        (alive,) = temporary(out)
        with OutputFolder(out / "1"):
            pass
        assert temporary(out) == [alive] and list(alive.glob("waveform-*"))
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=60)
    assert process.returncode == 0 and not temporary(out)
