"""Frames at the times that the file gives them: how much silence belongs before each."""

from types import SimpleNamespace
from typing import Any

import pytest

from separation.audio.damage import Damage
from separation.audio.ffmpeg import Frame
from separation.audio.holes import Timeline

RATE = 48000
FRAME = 960  # samples, 20 ms


def silences(starts: list[int | None], n_errors: int, announced: float = 10.0) -> tuple[list[int], Damage]:
    """The samples of silence before each of these frames, once ffmpeg has complained so often; and what is found."""
    damage = Damage("'song.opus'")
    decoding: Any = SimpleNamespace(n_errors=n_errors)
    timeline = Timeline(decoding, RATE, announced, damage)
    n_written, found = 0, []
    for start in starts:
        found.append(timeline.silence_before(Frame(start, FRAME), n_written))
        n_written += found[-1] + FRAME
    return found, damage


@pytest.mark.parametrize("n_errors, jump, silence", [(0, FRAME, 0), (1, FRAME, FRAME), (1, 720, 720), (1, 719, 0)])
def test_a_jump_of_most_of_a_frame_is_a_hole_once_ffmpeg_has_complained(n_errors: int, jump: int, silence: int) -> None:
    found, damage = silences([0, FRAME, 2 * FRAME + jump, 3 * FRAME + jump], n_errors)
    assert found == [0, 0, silence, 0]
    assert damage.holes == ([(2 * FRAME / RATE, silence / RATE)] if silence else [])


@pytest.mark.parametrize("jump, silence", [(2400, 0), (2401, 2401)])
def test_without_a_complaint_only_a_jump_of_more_than_50_ms_is_a_hole(jump: int, silence: int) -> None:
    found, _ = silences([0, FRAME + jump], n_errors=0)
    assert found == [0, silence]


def test_times_count_from_the_first_frame_and_frames_without_a_time_follow_the_one_before() -> None:
    found, damage = silences([5000, 5000 + FRAME, None, 5000 + 3 * FRAME], n_errors=1)
    assert found == [0, 0, 0, 0] and not damage


@pytest.mark.parametrize(
    "announced, seconds, is_believed", [(10.0, 10.9, True), (10.0, 11.1, False), (0.0, 59.0, True), (0.0, 61.0, False)]
)
def test_a_time_beyond_what_the_file_announces_is_in_doubt(announced: float, seconds: float, is_believed: bool) -> None:
    found, damage = silences([0, round(seconds * RATE)], n_errors=1, announced=announced)
    assert found[1] == (round(seconds * RATE) - FRAME if is_believed else 0)
    assert bool(damage.holes) == is_believed and damage
