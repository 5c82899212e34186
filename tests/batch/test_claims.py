"""Each song is separated by one process at a time, and by another one only if the first leaves it."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from helpers.command_line import files_in, json_lines, separating, write_songs
from helpers.common import below
from helpers.served_process import wait_for
from separation.batch import claims
from separation.batch.claims import Waiting, claimed
from separation.batch.job import AnySong, Song
from separation.batch.urls import Url
from separation.system.names import Place
from separation.system.record import RECORD

FOREVER = threading.Event()


def songs_in(folder: Path, *names: str) -> list[Song]:
    return [Song(folder / f"{name}.wav", folder / "out" / name) for name in names]


def taken(waiting: Waiting) -> list[str]:
    names = []
    while True:
        with waiting.next(FOREVER) as song:
            if song is None:
                return names
            names.append(song.path.stem)


def test_a_song_is_claimed_once_and_nothing_is_left(tmp_path: Path) -> None:
    one, other = songs_in(tmp_path, "a", "b")
    with claimed(one) as mine, claimed(one) as again, claimed(other) as others:
        assert (mine, again, others) == (True, False, True)
        assert files_in(tmp_path) == ["out/a/.separation.lock", "out/b/.separation.lock"]
    assert list(tmp_path.iterdir()) == []
    with claimed(one) as mine:
        assert mine


def test_songs_that_share_a_folder_have_claims_of_their_own(tmp_path: Path) -> None:
    places = [Place.of("{song} ({stem}).{ext}", {"song": song}) for song in "ab"]
    one, other = (Song(tmp_path / "x.wav", tmp_path / "out", place) for place in places)
    with claimed(one) as first, claimed(other) as second, claimed(other) as third:
        assert (first, second, third) == (True, True, False)


def test_what_is_in_the_folder_stays(tmp_path: Path) -> None:
    (song,) = songs_in(tmp_path, "a")
    song.folder.mkdir(parents=True)
    (song.folder / ".separation.lock").touch()  # of a killed process
    with claimed(song) as mine:
        assert mine
        (song.folder / "vocals.wav").touch()
    assert files_in(tmp_path) == ["out/a/vocals.wav"]


@pytest.mark.parametrize("hindrance", ["out", "out/a", "out/a/.separation.lock/x"])
def test_where_nothing_can_be_locked_there_are_no_claims(hindrance: str, tmp_path: Path) -> None:
    (song,) = songs_in(tmp_path, "a")
    (tmp_path / hindrance).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / hindrance).touch()
    with claimed(song) as mine, claimed(song) as again:
        assert mine and again
    assert files_in(tmp_path) == [hindrance]


def test_stems_in_a_store_have_no_claims(tmp_path: Path) -> None:
    song = AnySong(tmp_path / "a.wav", Url("s3", "bucket", "a"))
    with claimed(song) as mine, claimed(song) as again:
        assert mine and again
    assert list(tmp_path.iterdir()) == []


def test_songs_of_another_process_come_last_and_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)
    songs = songs_in(tmp_path, *"abcd")
    code = (
        "import sys; from pathlib import Path; from separation.batch.claims import claimed\n"
        "from separation.batch.job import Song\n"
        "song, other = (Song(Path(name), Path(name)) for name in sys.argv[1:])\n"
        "with claimed(song) as one, claimed(other) as two: print(one, two, flush=True); input()"
    )
    folders = [str(song.folder) for song in songs[:2]]
    with subprocess.Popen(
        [sys.executable, "-c", code, *folders], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "True True\n"
        names: list[str] = []
        thread = threading.Thread(target=lambda: names.extend(taken(Waiting(songs))))
        thread.start()
        wait_for(lambda: caplog.messages, "the waiting")
        process.kill()  # which leaves its claims
        thread.join()
    assert names[:2] == ["c", "d"] and sorted(names) == list("abcd")
    (told,) = caplog.messages
    assert told == "waiting for another command, which is separating 'b.wav' and 1 more"
    assert files_in(tmp_path) == []


def test_waiting_ends_when_the_run_is_stopped(tmp_path: Path) -> None:
    (song,) = songs_in(tmp_path, "a")
    stopped, waiting = threading.Event(), Waiting([song])
    with claimed(song):
        threading.Timer(0.05, stopped.set).start()
        with waiting.next(stopped) as taken_song:
            assert taken_song is None
    assert waiting.left() == [song]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_two_commands_at_once_share_the_songs(workers: str, tmp_path: Path) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    write_songs(music, *(f"{n}.wav" for n in range(6)), seconds=12)
    command = (music, "-o", out, "--json", "--workers", workers)
    with separating(*command) as one, separating(*command) as other:
        printed = [process.communicate(timeout=300)[0] for process in (one, other)]
    assert [one.returncode, other.returncode] == [0, 0]
    lines = [line for text in printed for line in json_lines(text)]
    assert Counter(line["status"] for line in lines) == {"done": 6, "skipped": 6}
    assert len({line["song"] for line in lines if line["status"] == "done"}) == 6
    names = (RECORD, "instrumental.wav", "vocals.wav")
    assert files_in(out) == sorted(f"{n}/{name}" for n in range(6) for name in names)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_another_command_takes_over_what_the_first_leaves(number: int, tmp_path: Path) -> None:
    music, out = tmp_path / "music", tmp_path / "out"
    write_songs(music, "1.wav", seconds=60)
    with separating(music, "-o", out, "--json") as first:
        wait_for(lambda: below(out, "waveform-*"), "the first command's work", seconds=60)
        first.send_signal(signal.SIGSTOP)
        with separating(music, "-o", out, "--json") as second:
            assert second.stderr
            assert second.stderr.readline() == "waiting for another command, which is separating '1.wav'\n"
            first.send_signal(number)
            first.send_signal(signal.SIGCONT)
            (line,) = json_lines(second.communicate(timeout=300)[0])
    assert line["status"] == "done"
    assert files_in(out) == [f"1/{name}" for name in (RECORD, "instrumental.wav", "vocals.wav")]
