import pytest

from separation.audio.damage import Damage
from separation.audio.ffmpeg import DecodedFrame
from separation.audio.holes import Timeline, announced_seconds

RATE = 48000
FRAME = 960  # samples, 20 ms


def silences(starts: list[int | None], *, after_error: bool, announced: float = 10.0) -> tuple[list[int], Damage]:
    """The samples of silence before frames with these timestamps, and the damage that was found."""
    damage = Damage("'song.opus'")
    timeline = Timeline(RATE, announced, damage)
    n_written, found = 0, []
    for start in starts:
        found.append(timeline.silence_before(DecodedFrame(start, FRAME), n_written, after_error=after_error))
        n_written += found[-1] + FRAME
    return found, damage


@pytest.mark.parametrize(
    "after_error, jump, silence", [(False, FRAME, 0), (True, FRAME, FRAME), (True, 720, 720), (True, 719, 0)]
)
def test_after_an_error_a_jump_of_three_quarters_of_a_frame_is_a_hole(
    after_error: bool, jump: int, silence: int
) -> None:
    found, damage = silences([0, FRAME, 2 * FRAME + jump, 3 * FRAME + jump], after_error=after_error)
    assert found == [0, 0, silence, 0]
    assert damage.holes == ([(2 * FRAME / RATE, silence / RATE)] if silence else [])


@pytest.mark.parametrize("jump, silence", [(2400, 0), (2401, 2401)])
def test_without_an_error_only_a_jump_of_more_than_50_ms_is_a_hole(jump: int, silence: int) -> None:
    found, _ = silences([0, FRAME + jump], after_error=False)
    assert found == [0, silence]


def test_timestamps_count_from_the_first_frame_and_a_frame_without_one_follows_the_frame_before() -> None:
    found, damage = silences([5000, 5000 + FRAME, None, 5000 + 3 * FRAME], after_error=True)
    assert found == [0, 0, 0, 0] and not damage


@pytest.mark.parametrize(
    "announced, seconds, is_plausible", [(10.0, 10.9, True), (10.0, 11.1, False), (0.0, 59.0, True), (0.0, 61.0, False)]
)
def test_a_timestamp_beyond_the_announced_length_is_a_doubt_and_no_hole(
    announced: float, seconds: float, is_plausible: bool
) -> None:
    found, damage = silences([0, round(seconds * RATE)], after_error=True, announced=announced)
    assert found[1] == (round(seconds * RATE) - FRAME if is_plausible else 0)
    assert bool(damage.holes) == is_plausible and damage


def test_timestamps_that_go_back_are_noted_and_add_no_silence() -> None:
    found, damage = silences([0, 100 * FRAME, 50 * FRAME, 51 * FRAME], after_error=False)
    assert found == [0, 99 * FRAME, 0, 0]
    assert damage.holes == [(FRAME / RATE, 99 * FRAME / RATE)]


@pytest.mark.parametrize(
    "container, stream, seconds",
    [
        ("mov", {"duration": "3.5"}, 3.5),
        ("mov", {}, 0.0),
        ("caf", {"codec_name": "pcm_s16be", "duration": "3.5"}, 3.5),
        ("caf", {"codec_name": "alac", "duration": "3.5", "sample_rate": "40960"}, 3.4),  # the last packet may be short
        ("avi", {"time_base": "3/100", "nb_frames": "200", "duration": "9"}, 6.0),
        ("matroska", {"start_time": "0.5", "tags": {"DURATION": "00:01:02.500000000"}}, 62.0),
        ("matroska", {"start_time": "0.5"}, 6.5),  # of the whole file
        ("mpegts", {"duration": "3.5"}, 0.0),
    ],
)
def test_a_containers_own_statement_is_the_announced_length(
    container: str, stream: dict[str, object], seconds: float
) -> None:
    answer = {"streams": [stream], "format": {"duration": "7.0"}}
    assert announced_seconds(stream, answer, [container]) == pytest.approx(seconds)


def test_the_length_of_a_file_with_a_picture_is_not_that_of_its_sound() -> None:
    answer = {"streams": [{}, {}], "format": {"duration": "7.0"}}
    assert announced_seconds({}, answer, ["matroska"]) == 0.0
