import contextlib

import pytest

from separation.audio.damage import Damage, counted
from separation.errors import AudioError


@pytest.fixture
def damage() -> Damage:
    return Damage("'song.mp3'")


@pytest.mark.parametrize("missing, is_refused", [(1.0, False), (1.1, False), (1.12, True)])
@pytest.mark.parametrize("where", ["end", "middle"])
def test_a_tenth_of_the_whole_song_may_be_missing(
    where: str, missing: float, is_refused: bool, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    if where == "end":
        damage.add_cut(missing)
        decoded_seconds = 10.0  # the whole song lasts about 11.1 s
    else:
        damage.add_hole(5.0, missing)
        decoded_seconds = 10.0 + missing  # which includes the silence in the hole
    with pytest.raises(AudioError) if is_refused else contextlib.nullcontext():
        damage.judge(decoded_seconds)
    assert len(caplog.messages) == (0 if is_refused else 1)


def test_adjacent_holes_are_merged_and_others_are_not(damage: Damage) -> None:
    for start, seconds in ((1.0, 0.5), (1.5, 0.25), (1.76, 0.1)):
        damage.add_hole(start, seconds)
    assert damage.holes == [(1.0, 0.75), (1.76, 0.1)]
    damage.start_part(1.86)
    damage.add_hole(0.0, 1.0)
    assert damage.holes == [(1.0, 0.75), (1.76, 1.1)]


def test_times_in_a_part_count_from_its_start(damage: Damage) -> None:
    damage.start_part(10.0)
    damage.add_hole(1.0, 0.5)
    assert damage.holes == [(11.0, 0.5)]
    assert damage.time_in_song(2.0) == 12.0


def test_an_intact_song_gets_no_warning(damage: Damage, caplog: pytest.LogCaptureFixture) -> None:
    damage.judge(10.0)
    assert not damage and not caplog.records


def test_a_warning_lists_holes_and_faults(damage: Damage, caplog: pytest.LogCaptureFixture) -> None:
    damage.add_hole(1.0, 0.005)
    damage.add_hole(2.0, 0.25)
    damage.add_note("2 broken pages")
    damage.judge(10.0)
    assert caplog.messages == [
        "'song.mp3' is damaged (0.26 s of 10.00 s are missing and replaced by silence: 5.0 ms at 1.00 s, "
        "0.25 s at 2.00 s; 2 broken pages)"
    ]


def test_many_holes_and_faults_are_counted(damage: Damage, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(7):
        damage.add_hole(float(i), 0.1)
        damage.add_note(f"fault {i}")
    damage.judge(10.0)
    (message,) = caplog.messages
    assert "0.10 s at 3.00 s, 3 more; fault 0;" in message
    assert message.endswith("fault 3; 3 other faults)")


def test_a_song_that_misses_its_end_is_cut_short(damage: Damage, caplog: pytest.LogCaptureFixture) -> None:
    damage.add_cut(0.5)
    damage.judge(9.5)
    assert caplog.messages == ["'song.mp3' is cut short (the last 0.50 s of 10.00 s are missing, from 9.50 s on)"]


def test_an_unknown_loss_refuses_the_song(damage: Damage) -> None:
    damage.add_doubt("100 bytes are not audio")
    damage.add_unknown_cut("it ends within a page")
    with pytest.raises(AudioError) as caught:
        damage.judge(10.0)
    assert str(caught.value) == (
        "'song.mp3' is cut short (it ends within a page, and how much is missing is unknown) and is damaged (100 bytes "
        "are not audio): get the file again, or use what is there with --accept-damaged (in Python accept_damaged=True)"
    )


def test_accepted_damage_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    damage = Damage("'song.mp3'", accept=True)
    damage.add_doubt("100 bytes are not audio")
    damage.add_cut(9.0)
    damage.judge(1.0)
    assert len(caplog.messages) == 1


def test_nouns_are_counted() -> None:
    assert [counted(n, "page") for n in (0, 1, 1234)] == ["0 pages", "1 page", "1,234 pages"]
