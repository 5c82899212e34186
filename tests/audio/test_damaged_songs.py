"""Damaged songs: losses are reported, the rest stays in time, and harmless faults are tolerated."""

import json
import logging
import random
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helpers import damaged_songs
from helpers.command_line import DEMO
from helpers.common import PROJECT, needs_ffmpeg
from helpers.damaged_songs import RATE, SECONDS, Answer, decode_all, make, survival, table
from separation import AudioError
from separation.audio.decode import decode
from separation.audio.frames import MPEG
from separation.cli.main import main

N_MUTATIONS = 1500


def songs(folder: Path, format: str, **options: object) -> bytes:
    """The test song, encoded by libsndfile."""
    path = folder / f"source.{format}"
    soundfile.write(path, damaged_songs.song(), RATE, format=format, **options)  # type: ignore[arg-type]
    return path.read_bytes()


def decoded(content: bytes, folder: Path, **options: bool) -> np.ndarray:
    """The left channel of a file with this content."""
    (folder / "song").write_bytes(content)
    with decode(folder / "song", folder, **options) as wave:
        result: np.ndarray = wave.read(0, wave.n_samples)[0].numpy()
        return result


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


# Seeded damage to songs in all formats


def check(answers: list[Answer], n_jobs: int) -> None:
    assert len(answers) == n_jobs
    assert not [answer for answer in answers if answer.left], "files stayed after"
    for answer in answers:
        if answer.refusal:
            assert repr(f"{answer.number}-{answer.name}") in answer.refusal
            assert ": " in answer.refusal and not answer.refusal.endswith(".") and "\n" not in answer.refusal
        for warning in answer.warning.split(" | "):
            assert not warning or warning.startswith(repr(f"{answer.number}-{answer.name}"))
    lost = [answer for answer in answers if answer.is_silent_loss]
    assert not lost, f"{lost}\n{table(answers)}"


@needs_ffmpeg
@pytest.mark.slow
def test_a_damaged_song_of_each_format_loses_nothing_silently(tmp_path: Path) -> None:
    whole = make(tmp_path)
    jobs = [(name, number) for number, name in enumerate(whole)]
    check(decode_all(jobs, whole, tmp_path, PROJECT), len(jobs))


@needs_ffmpeg
@pytest.mark.slow
def test_none_of_1500_damaged_songs_loses_more_than_50_ms_silently(tmp_path: Path) -> None:
    whole = make(tmp_path)
    names = list(whole)
    jobs = [(names[number % len(names)], number) for number in range(N_MUTATIONS)]
    answers = decode_all(jobs, whole, tmp_path, PROJECT)
    check(answers, N_MUTATIONS)
    assert sum(bool(answer.refusal) for answer in answers) < N_MUTATIONS / 2


@pytest.mark.slow
def test_survival_measures_the_intact_moved_lost_and_altered_seconds() -> None:
    whole = damaged_songs.song()[:, 0]
    part = RATE // 2
    assert survival(whole, whole).right == pytest.approx(SECONDS)
    silenced = np.concatenate([whole[:part], np.zeros(part, np.float32), whole[2 * part :]])
    assert survival(whole, silenced).lost == pytest.approx(0.5, abs=0.05)
    assert survival(whole, whole[:-part]).lost == pytest.approx(0.5, abs=0.05)
    shorter = np.concatenate([whole[:part], whole[2 * part :]])
    assert survival(whole, shorter).moved == pytest.approx(SECONDS - 1, abs=0.05)
    noise = np.concatenate([whole[:part], -whole[part : 2 * part][::-1], whole[2 * part :]])
    assert survival(whole, noise).altered == pytest.approx(0.5, abs=0.05)


# Holes


def ogg_with_a_flipped_bit(folder: Path) -> bytes:
    content = songs(folder, "OGG")
    return flipped(content, len(content) // 2)


def flac_with_a_flipped_bit(folder: Path) -> bytes:
    content = songs(folder, "FLAC")
    return flipped(content, len(content) // 2)


def flac_without_some_frames(folder: Path) -> bytes:
    content = songs(folder, "FLAC")
    return content[: len(content) // 2] + content[len(content) // 2 + 20_000 :]


def mp3_with_overwritten_frames(folder: Path) -> bytes:
    content = songs(folder, "MP3", bitrate_mode="CONSTANT")
    at = len(content) // 2
    return content[:at] + random.Random(1).randbytes(1500) + content[at + 1500 :]


@pytest.mark.parametrize(
    "damaged", [ogg_with_a_flipped_bit, flac_with_a_flipped_bit, flac_without_some_frames, mp3_with_overwritten_frames]
)
def test_a_hole_is_silent_the_rest_stays_in_time_and_a_warning_names_song_place_and_length(
    damaged: Callable[[Path], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = decoded(damaged(tmp_path), tmp_path, accept_damaged=True)
    lived = survival(damaged_songs.song()[:, 0], samples)
    assert len(samples) == pytest.approx(SECONDS * RATE, abs=1)
    assert lived.moved <= 0.04 and lived.right > 0.85 * SECONDS
    (record,) = caplog.records
    told = re.match(
        r"'song' is damaged \((0\.\d\d) s of 3.\d\d s are missing .*replaced by silence", record.getMessage()
    )
    assert told and float(told[1]) == pytest.approx(lived.lost + lived.altered, abs=0.1)


def test_bytes_inserted_into_an_mp3_do_not_cost_music(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = songs(tmp_path, "MP3", bitrate_mode="CONSTANT")
    at = len(content) // 2
    samples = decoded(content[:at] + random.Random(1).randbytes(500) + content[at:], tmp_path)
    assert len(samples) == SECONDS * RATE
    assert survival(damaged_songs.song()[:, 0], samples).right > SECONDS - 0.15
    assert "500 bytes at 1.4" in caplog.text


@needs_ffmpeg
def test_mp3_frames_after_a_gap_that_need_no_earlier_data_are_unchanged(tmp_path: Path) -> None:
    songs(tmp_path, "WAV")
    command = ["ffmpeg", "-v", "error", "-i", str(tmp_path / "source.WAV"), "-b:a", "128k", "-reservoir", "0"]
    subprocess.run([*command, "-id3v2_version", "0", str(tmp_path / "whole.mp3")], check=True)
    content = (tmp_path / "whole.mp3").read_bytes()
    at = 0
    while at < len(content) // 2:
        frame = MPEG.parse(content[at : at + 4])
        assert frame is not None
        at += frame.n_bytes
    damaged = content[:at] + bytes(500) + content[at:]
    np.testing.assert_array_equal(decoded(damaged, tmp_path), decoded(content, tmp_path))


@pytest.mark.parametrize("format", ["FLAC", "OGG", "MP3"])
def test_a_song_appended_to_itself_is_read_whole(format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = songs(tmp_path, format)
    samples = decoded(content + content, tmp_path)
    assert len(samples) == 2 * SECONDS * RATE
    assert np.array_equal(samples[: SECONDS * RATE], samples[SECONDS * RATE :])
    assert not caplog.records


@pytest.mark.parametrize("format", ["FLAC", "MP3"])
def test_joined_songs_of_different_rates_and_channels_are_read_at_the_rate_of_the_first(
    format: str, tmp_path: Path
) -> None:
    content = songs(tmp_path, format)
    other = tmp_path / "other"
    soundfile.write(other, damaged_songs.song()[:96_000, 0], 48000, format=format)
    assert len(decoded(content + other.read_bytes(), tmp_path)) == (SECONDS + 2) * RATE


# What is refused, and what --accept-damaged does


def test_a_song_with_half_of_it_missing_is_refused_unless_damage_is_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = songs(tmp_path, "WAV")
    with pytest.raises(AudioError, match=r"'song' is cut short \(the last 1\.50 s of 3\.00 s are missing.*--accept"):
        decoded(content[: len(content) // 2], tmp_path)
    assert len(decoded(content[: len(content) // 2], tmp_path, accept_damaged=True)) == pytest.approx(66_150, abs=20)
    assert "'song' is cut short (the last 1.50 s of 3.00 s are missing, from 1.50 s on)" in caplog.text


def test_the_command_line_separates_the_rest_of_a_song_with_accept_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = songs(tmp_path, "WAV")
    (tmp_path / "song.wav").write_bytes(content[: len(content) // 2])
    command = ["separate", str(tmp_path / "song.wav"), "-o", str(tmp_path / "out"), *DEMO, "--json"]
    assert main([*command, "--device", "cpu"]) == 2
    assert "--accept-damaged" in capsys.readouterr().err
    assert main([*command, "--device", "cpu", "--accept-damaged"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["duration_seconds"] == pytest.approx(1.5, abs=0.01)
    assert "'song.wav' is cut short" in report["warnings"][0]


def test_a_song_without_its_last_twentieth_gets_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for format in ("WAV", "W64", "RF64", "AIFF", "AU", "FLAC", "MP3"):
        caplog.clear()
        content = songs(tmp_path, format)
        samples = decoded(content[: len(content) * 19 // 20], tmp_path)
        assert len(samples) == pytest.approx(SECONDS * RATE * 19 / 20, abs=8000), format
        assert "'song' is cut short (the last 0." in caplog.text, format


# What is tolerated


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:40] + struct.pack("<I", len(content) - 44 + 1) + content[44:],
        lambda content: content[:40] + bytes(4) + content[44:],
        lambda content: content[:4] + bytes(4) + content[8:],
        lambda content: content[:4] + b"\xff\xff\xff\x7f" + content[8:],
        lambda content: content + b"\0",
        lambda content: content + b"TAG" + bytes(125),
    ],
    ids=["a byte too many", "no size", "RIFF 0", "RIFF too large", "padding", "ID3v1"],
)
def test_a_wav_with_a_harmless_fault_is_read_whole_without_a_warning(
    spoil: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = songs(tmp_path, "WAV")
    assert content[36:40] == b"data"
    assert np.array_equal(decoded(spoil(content), tmp_path), decoded(content, tmp_path))
    assert not caplog.records


@pytest.mark.parametrize(
    "tail", [b"TAG" + bytes(125), b"APETAGEX" + struct.pack("<IIII8x", 2000, 32, 0, 0), b"LYRICSBEGIN" + bytes(50)]
)
def test_an_mp3_may_have_tags_at_its_end_or_miss_the_end_of_its_last_frame(
    tail: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = songs(tmp_path, "MP3", bitrate_mode="CONSTANT")
    assert len(decoded(content + tail, tmp_path)) == SECONDS * RATE
    assert len(decoded(content[:-100], tmp_path)) >= SECONDS * RATE - 2 * 1152
    assert not caplog.records


@needs_ffmpeg
def test_an_mp4_without_its_index_is_reported_as_cut_short(tmp_path: Path) -> None:
    whole = make(tmp_path, ["aac.m4a"])["aac.m4a"]
    assert whole.index(b"mdat") < whole.index(b"moov")
    with pytest.raises(AudioError, match=r"'song' is cut short \(its index"):
        decoded(whole[: whole.index(b"moov") - 100], tmp_path)


# What libmpg123 prints


def mp3_with_corrupt_frames(folder: Path) -> bytes:
    """An MP3 in which some frames hold noise between their headers and their last bytes."""
    content = bytearray(songs(folder, "MP3", bitrate_mode="CONSTANT"))
    at = len(content) // 2
    for _ in range(10):
        at = content.index(content[:3], at + 400)
        content[at + 6 : at + 300] = random.Random(at).randbytes(294).replace(b"\xff", b"\xfe")
    return bytes(content)


def test_messages_of_libmpg123_become_one_warning_with_the_songs_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    decoded(mp3_with_corrupt_frames(tmp_path), tmp_path)
    assert capfd.readouterr().err == ""
    (record,) = caplog.records
    assert record.getMessage().startswith("'song' is damaged (") and "libmpg123 reports" in record.getMessage()


def test_intact_songs_of_every_format_get_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for format in ("WAV", "W64", "RF64", "AIFF", "CAF", "AU", "FLAC", "OGG", "MP3"):
        assert len(decoded(songs(tmp_path, format), tmp_path)) == SECONDS * RATE
    assert not caplog.records
