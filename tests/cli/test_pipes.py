"""A song from stdin, a stem to stdout, progress as JSON: what programs need."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from helpers.command_line import DEMO, json_lines, separate, write_songs
from helpers.common import PROJECT, SONG, read, song


def piped(*arguments: str | Path, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, with pipes."""
    command = [sys.executable, "-m", "separation", "separate", *DEMO, *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, input=stdin, capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["WAV", "FLAC"])
def test_a_song_from_stdin_gives_the_stem_of_the_file_on_stdout(tmp_path: Path, format: str) -> None:
    path = tmp_path / "song.bin"
    path.write_bytes(song(1, format=format))
    assert separate(path, "-o", tmp_path / "out", "--only", "vocals") == 0
    ran = piped("-", "-o", "-", "--only", "vocals", stdin=path.read_bytes())
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout[:4] == b"RIFF"
    assert (read(ran.stdout) == read(tmp_path / "out" / "song" / "vocals.wav")).all()


@pytest.mark.slow
def test_a_stem_on_stdout_has_the_format_that_is_asked_for(tmp_path: Path) -> None:
    write_songs(tmp_path, "song.wav")
    ran = piped(tmp_path / "song.wav", "-o", "-", "--only", "vocals", "--format", "flac", stdin=b"")
    assert ran.returncode == 0
    assert ran.stdout[:4] == b"fLaC"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["song.wav"]


@pytest.mark.slow
def test_stems_of_a_song_from_stdin_go_to_a_folder_with_progress_as_json(tmp_path: Path) -> None:
    ran = piped("-", "-o", tmp_path, "--json", "--progress", "json", stdin=song(1))
    assert ran.returncode == 0
    (line,) = json_lines(ran.stdout.decode())
    assert line["song"] == "-" and line["stems"]["vocals"] == str(tmp_path / "stdin" / "vocals.wav")
    events = json_lines(ran.stderr.decode())
    assert {event["event"] for event in events} == {"progress"} and {event["song"] for event in events} == {"-"}
    shares = [event["share"] for event in events]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert {"decoding", "done"} < {event["stage"] for event in events}


def test_errors_and_warnings_are_events_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_songs(tmp_path, "song.wav")
    missing = tmp_path / "missing.wav"
    assert separate(missing, tmp_path / "song.wav", "-o", tmp_path / "out", "--progress", "json", "--quiet") == 2
    captured = capsys.readouterr()
    *progress, error = json_lines(captured.err)
    assert captured.out == ""
    assert {event["event"] for event in progress} == {"progress"}
    assert error == {"event": "error", "message": f"{missing}: {str(missing)!r} does not exist: check the path"}


def test_quiet_prints_nothing_but_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_songs(tmp_path, "1.wav", "2.wav")
    assert separate(tmp_path, "-o", tmp_path / "out", "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert separate(tmp_path, "-o", tmp_path / "out", "-q", "--json") == 0
    captured = capsys.readouterr()
    assert [line["status"] for line in json_lines(captured.out)] == ["skipped", "skipped"]
    assert captured.err == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("-o", "-"), ("vocals, instrumental", "--only vocals")),
        (("-o", "-", "--only", "vocals", "--json"), ("--json",)),
        (("-o", "-", "--only", "vocals", "--report"), ("--report",)),
        (("-o", "-", "--only", "vocals", "--reaper"), ("--reaper",)),
        (("-o", "-", "--only", "vocals", "--video", "vocals"), ("--video",)),
        (("another.wav", "-o", "-", "--only", "vocals"), ("one song", "2 songs")),
    ],
)
def test_what_does_not_fit_into_stdout_is_refused(
    arguments: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert separate(SONG, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: -o -") and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words)


def test_a_folder_of_songs_does_not_fit_into_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_songs(tmp_path, "1.wav", "2.wav")
    assert separate(tmp_path, "-o", "-", "--only", "vocals") == 2
    assert "2 songs" in capsys.readouterr().err


@pytest.mark.slow
def test_nothing_on_stdin_is_one_line(tmp_path: Path) -> None:
    ran = piped("-", "-o", tmp_path / "out", stdin=b"")
    assert ran.returncode == 2
    assert ran.stderr.startswith(b"error: 'stdin' is empty") and ran.stderr.count(b"\n") == 1


def test_a_terminal_is_neither_a_song_nor_a_place_for_a_stem(tmp_path: Path) -> None:
    ours, terminal = pty.openpty()
    try:
        command = [sys.executable, "-m", "separation", "separate", *DEMO]
        reading = subprocess.run(
            [*command, "-", "-o", str(tmp_path)], cwd=PROJECT, stdin=terminal, capture_output=True, check=False
        )
        assert reading.returncode == 2 and b"nothing is piped in" in reading.stderr
        writing = subprocess.run(
            [*command, str(SONG), "-o", "-", "--only", "vocals"],
            cwd=PROJECT,
            stdout=terminal,
            stderr=subprocess.PIPE,
            check=False,
        )
        assert writing.returncode == 2 and b"is a terminal" in writing.stderr
    finally:
        os.close(ours)
        os.close(terminal)


def test_a_folder_and_a_song_may_be_called_minus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").mkdir()
    (tmp_path / "-" / "song.wav").write_bytes(song(0.3))
    assert separate("./-", "-o", "./-/out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    assert separate("./-/song.wav", "-o", "./-", "--json") == 0
    assert soundfile.info(tmp_path / "-" / "song" / "vocals.wav").frames == int(0.3 * 44100)
