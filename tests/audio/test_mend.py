import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from helpers.sounds import noise, write_mp3
from separation.audio.damage import Damage
from separation.audio.frames import MPEG, Gap, Header, Part, find_parts
from separation.audio.mend import Hole, find_holes, whole_frames, with_silence

RATE = 44100
HEADER = Header((3, 1, RATE, False), RATE, 400, 1152)


def part(gaps: list[Gap], **facts: object) -> Part:
    """A part of 100 frames of 400 bytes."""
    return Part(HEADER, True, gaps=gaps, n_frames=100, n_bytes=40_000, sizes=(400, 400), **facts)  # type: ignore[arg-type]


@pytest.fixture
def damage() -> Damage:
    return Damage("'song.mp3'", accept=True)


def message(damage: Damage, caplog: pytest.LogCaptureFixture) -> str:
    damage.judge(10.0)
    return caplog.text


@pytest.mark.parametrize(
    "n_bytes, announced, n_missing",
    [
        (800, 0, 2),  # the size of two frames
        (801, 0, 2),
        (700, 0, 2),  # less than two frames, rounded
        (1000, 0, 0),  # two and a half frames were probably inserted
        (800, 102, 2),
        (800, 101, 1),  # the header counts one missing frame only
        (800, 100, 0),
        (1000, 105, 5),  # the header is right about a gap that does not fit
        (100, 103, 3),  # frames were cut out
    ],
)
def test_the_missing_frames_of_a_gap_are_counted(n_bytes: int, announced: int, n_missing: int, damage: Damage) -> None:
    assert find_holes(part([Gap(50, n_bytes)], announced=announced), damage) == [Hole(50, n_missing)]


def test_frames_that_the_header_counts_and_no_gap_explains_are_missing_at_the_end(damage: Damage) -> None:
    assert find_holes(part([], announced=110), damage) == []
    assert damage.cut_seconds == pytest.approx(10 * 1152 / RATE)


def test_missing_frames_are_spread_over_the_gaps_that_do_not_fit(damage: Damage) -> None:
    gaps = [Gap(10, 800), Gap(50, 600), Gap(60, 1800)]
    assert [hole.n_frames for hole in find_holes(part(gaps, announced=110), damage)] == [2, 2, 6]


def test_long_gaps_that_cannot_be_counted_are_a_doubt(damage: Damage, caplog: pytest.LogCaptureFixture) -> None:
    find_holes(part([Gap(50, 10_100)]), damage)
    assert "up to 0.7 s between its frames are not audio, and how much is missing is unknown" in message(damage, caplog)


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"is_info_intact": False}, "does not match its checksum"),
        ({"n_lead": 500}, "500 bytes at its start are not audio"),
        ({"n_extra": 900}, "900 bytes at its end are not audio"),
        ({"is_cut": True}, "it ends within a frame"),
    ],
)
def test_other_faults_are_noted(
    facts: dict[str, object], words: str, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_holes(part([], **facts), damage) == []
    assert words in message(damage, caplog)


def test_the_whole_frames_are_a_file_whose_header_counts_them(tmp_path: Path) -> None:
    path = write_mp3(tmp_path / "song.mp3", noise(RATE))
    (whole,) = find_parts(path, MPEG)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"\1" * 1500 + content[middle + 1500 :])
    (damaged,) = find_parts(path, MPEG)
    with whole_frames(damaged, path) as pieces:
        mended = pieces.read()
    (tmp_path / "mended.mp3").write_bytes(mended)
    (again,) = find_parts(tmp_path / "mended.mp3", MPEG)
    assert again.announced == again.n_frames == damaged.n_frames < whole.n_frames
    assert again.has_no_gaps
    n_lost = (whole.n_frames - damaged.n_frames) * 1152
    assert soundfile.info(io.BytesIO(mended)).frames == whole.song_samples - n_lost


def blocks(n_samples: int, size: int) -> Iterator[NDArray[np.float32]]:
    samples = np.arange(1, n_samples + 1, dtype=np.float32)[:, None]
    yield from (samples[start : start + size] for start in range(0, n_samples, size))


@pytest.mark.parametrize("size", [500, 1152, 5000])
def test_silence_takes_the_place_of_missing_frames(size: int, damage: Damage) -> None:
    holes = [Hole(1, 2), Hole(2, 0), Hole(3, 1)]
    found = np.concatenate(list(with_silence(blocks(4 * 1152, size), part([]), holes, RATE, damage)))[:, 0]
    frames = found.reshape(-1, 1152)
    assert [frame[0] for frame in frames] == [1, 0, 0, 1153, 2305, 0, 3457]
    assert np.allclose(damage.holes, np.array([(1152, 2304), (5 * 1152, 1152)]) / RATE)


def test_silence_is_placed_at_the_decoders_rate_after_the_samples_that_it_drops(damage: Damage) -> None:
    found = with_silence(blocks(2000, 300), part([], skipped=1000), [Hole(1, 1)], 2 * RATE, damage)
    samples = np.concatenate(list(found))[:, 0]
    assert len(samples) == 2000 + 2 * 1152
    assert np.flatnonzero(samples == 0).tolist() == list(range(2 * 152, 2 * 152 + 2 * 1152))
