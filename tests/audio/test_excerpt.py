"""Parts of songs: their times, their names, and where a preview is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from separation.audio.excerpt import Excerpt
from separation.audio.waveform import Waveform
from separation.errors import InputError

RATE = 1000


@pytest.fixture
def song(tmp_path: Path) -> Iterator[Waveform]:
    """Seconds 70 to 99 of 120.5 are loud, and the last half second is louder."""
    samples = torch.full((2, 120_500), 0.1)
    samples[:, 70_000:100_000] = 0.5
    samples[:, 120_000:] = 0.9
    with Waveform(tmp_path, sample_rate=RATE) as wave:
        wave.append(samples)
        yield wave


@pytest.mark.parametrize(
    "excerpt, samples, name",
    [
        (Excerpt(), (0, 120_500), "0s-end"),
        (Excerpt(80), (80_000, 120_500), "1m20s-end"),
        (Excerpt(9.5, 80), (9_500, 80_000), "9.5s-1m20s"),
        (Excerpt(62.25, 3723), (62_250, 120_500), "1m02.25s-62m03s"),
        (Excerpt(119.9999, 120), (120_000, 120_001), "2m00s-2m00s"),
        (Excerpt(is_preview=True), (70_000, 100_000), "preview"),
    ],
)
def test_a_part_has_samples_and_a_name(song: Waveform, excerpt: Excerpt, samples: tuple[int, int], name: str) -> None:
    assert excerpt.samples(song) == samples
    assert str(excerpt) == name


def test_a_preview_of_a_short_song_is_all_of_it(tmp_path: Path) -> None:
    with Waveform(tmp_path, sample_rate=RATE) as wave:
        wave.append(torch.ones(2, 29_999))
        assert Excerpt(is_preview=True).samples(wave) == (0, 29_999)


def test_of_equally_loud_previews_the_first_is_taken(tmp_path: Path) -> None:
    with Waveform(tmp_path, sample_rate=RATE) as wave:
        wave.append(torch.zeros(2, 100_000))
        assert Excerpt(is_preview=True).samples(wave) == (0, 30_000)


def test_a_part_that_starts_after_the_song_is_an_error(song: Waveform) -> None:
    with pytest.raises(
        InputError, match=r"a part from 2m01s starts after the song's end at 2m00.5s: choose an earlier"
    ):
        Excerpt(121).samples(song)


@pytest.mark.parametrize(
    "start, end, is_preview, error",
    [
        (90, 80, False, "a part from 1m30s to 1m20s is empty: choose an end after its start"),
        (80, 80, False, "is empty"),
        (0, float("nan"), False, "is empty"),
        (-1, None, False, "a part of a song cannot start at -1 s"),
        (float("inf"), None, False, "cannot start at inf s"),
        (0, 10, True, "a preview chooses its part of the song: leave out its start and end"),
        (1, None, True, "leave out its start and end"),
    ],
)
def test_an_impossible_part_is_an_error(start: float, end: float | None, is_preview: bool, error: str) -> None:
    with pytest.raises(InputError, match=error):
        Excerpt(start, end, is_preview=is_preview)
