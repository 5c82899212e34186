"""Parts of songs: only their chunks are computed, with the samples of the whole song, and the rest reuses them."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.common import quick_first
from helpers.small_separators import Recorder, StandardRecorder, read, write
from separation import Separator
from separation.audio.excerpt import Excerpt
from separation.audio.options import OutputOptions
from separation.audio.waveform import Waveform
from separation.engine.cache import Cache
from separation.engine.chunk_plan import Span
from separation.engine.parts import MARGIN_SAMPLES, EstimatePart, KnownPart, excerpt, with_margin
from separation.engine.pool import LoadedModels
from separation.engine.recipes import Recipe, resolve
from separation.models.base import Origin

CHUNK = 20_000
HOP = CHUNK // 2


class Ramp(Recorder):
    """Its estimate of a sample depends on the sample's place in the chunk, so that another grid would show."""

    def forward(self, chunks: Tensor) -> Tensor:
        return super().forward(chunks) * torch.linspace(0.5, 1.0, chunks.shape[-1])


class StandardRamp(Ramp, StandardRecorder):
    pass


def with_origin(model: Recorder) -> Recorder:
    model.origin = Origin(
        architecture=type(model).__name__, hyper_parameters={}, stems=model.stems, weights={"0": lambda: model.name}
    )
    return model


def models() -> dict[str, Recorder]:
    ramp, standard = Ramp("ramp", ("vocals", "drums"), CHUNK), StandardRamp("standard", ("kick", "bass"), CHUNK)
    fast = Ramp("fast", ("speech", "music"), CHUNK, sample_rate=48000)
    return {model.name: with_origin(model) for model in (ramp, standard, fast)}


ONE = {"vocals": "ramp", "rest": "residual"}
CHAIN = {"(drums)": "ramp", "kick": "standard of drums", "bass": "standard"}


OTHER_RATE = {"speech": "fast", "rest": "residual"}
VIEWS = {"vocals": "ramp with tta and 2 shifts", "rest": "residual"}
ENSEMBLE: dict[str, Any] = {"vocals": {"max_fft": ["ramp", "vocals by ramp with polarity"]}, "rest": "residual"}
LINES = {"one": ONE, "chain": CHAIN, "other rate": OTHER_RATE, "views": VIEWS, "ensemble": ENSEMBLE}


def recipe(lines: dict[str, Any]) -> Recipe:
    return resolve("test", "test", lines)


@pytest.mark.parametrize(
    "kind, rate, part",
    quick_first(
        [
            *(("one", 44100, part) for part in (Excerpt(2.0, 2.5), Excerpt(0, 0.01), Excerpt(5.7))),
            *((kind, 48000, Excerpt(1.23456, 1.3)) for kind in LINES),
        ],
        3,
    ),
    ids=str,
)
def test_the_samples_of_a_part_are_those_of_the_whole_song(
    clip: Tensor, tmp_path: Path, one_thread: None, kind: str, rate: int, part: Excerpt
) -> None:
    lines = LINES[kind]
    separator = Separator(recipe(lines), pool=LoadedModels(models()))
    song = write(tmp_path / "song.wav", clip * 0.4 + 0.01)
    whole = separator.separate_file(song, tmp_path / "whole", OutputOptions(sample_rate=rate))
    parts = separator.separate_file(song, tmp_path / "part", OutputOptions(sample_rate=rate, excerpt=part))
    start, stop = round(part.start_seconds * rate), round((part.end_seconds or 6) * rate)
    assert list(parts) == list(whole)
    assert parts.duration_seconds == pytest.approx((stop - start) / rate, abs=1 / rate)
    for stem, path in parts.items():
        samples = read(path)
        assert samples.shape[1] == stop - start
        assert torch.equal(samples, read(whole[stem])[:, start:stop])


def test_only_the_chunks_of_a_part_are_computed(clip: Tensor, tmp_path: Path, one_thread: None) -> None:
    loaded = models()
    separator = Separator(recipe(ONE), pool=LoadedModels(loaded))
    song = write(tmp_path / "song.wav", clip)
    shares: list[float] = []
    separator.separate_file(
        song,
        tmp_path / "out",
        OutputOptions(excerpt=Excerpt(2.0, 2.5)),
        progress=lambda share, stage: shares.append(share),
    )
    needed = 0.5 * 44100 + 2 * MARGIN_SAMPLES
    assert 0 < len(loaded["ramp"].seen) <= (needed + 2 * CHUNK) / HOP
    assert shares == sorted(shares) and shares[-1] == 1


def test_models_whose_estimates_another_model_needs_run_over_the_whole_song(
    clip: Tensor, tmp_path: Path, one_thread: None
) -> None:
    loaded = models()
    separator = Separator(recipe(CHAIN), pool=LoadedModels(loaded))
    separator.separate_file(
        write(tmp_path / "song.wav", clip), tmp_path / "out", OutputOptions(excerpt=Excerpt(2.0, 2.5))
    )
    assert len(loaded["ramp"].seen) == len(separator.plans["ramp"].starts(clip.shape[1]))
    assert len(loaded["standard"].seen) < len(separator.plans["standard"].starts(clip.shape[1]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", LINES)
def test_the_whole_song_reuses_the_part_that_is_in_the_cache(
    clip: Tensor, tmp_path: Path, one_thread: None, kind: str
) -> None:
    lines, song = LINES[kind], write(tmp_path / "song.wav", clip * 0.4 + 0.01)
    expected = Separator(recipe(lines), pool=LoadedModels(models())).separate_file(song, tmp_path / "expected")

    def separate(part: Excerpt | None) -> int:
        """Separates the part, checks its samples, and returns how many chunks were computed."""
        loaded = models()
        separator = Separator(recipe(lines), pool=LoadedModels(loaded), cache=Cache(tmp_path / "cache"))
        found = separator.separate_file(song, tmp_path / "out", OutputOptions(excerpt=part))
        start = round((part.start_seconds if part else 0) * 44100)
        for stem, path in found.items():
            samples = read(path)
            assert torch.equal(samples, read(expected[stem])[:, start : start + samples.shape[1]])
        return sum(len(chunk) for model in loaded.values() for chunk in model.seen)

    first = separate(Excerpt(2.0, 3.0))
    assert first > 0
    assert separate(Excerpt(2.0, 3.0)) == 0
    assert separate(Excerpt(2.2, 2.4)) == 0
    assert 0 < separate(Excerpt(2.5, 3.5)) < first  # beside it: both are known afterwards
    assert separate(Excerpt(2.0, 3.5)) == 0
    rest = separate(None)
    loaded = models()
    Separator(recipe(lines), pool=LoadedModels(loaded)).separate_file(song, tmp_path / "again")
    everything = sum(len(chunk) for model in loaded.values() for chunk in model.seen)
    assert 0 < rest < everything
    assert separate(None) == separate(Excerpt(5)) == 0


def test_what_is_known_of_a_span() -> None:
    assert KnownPart().missing(Span(2, 5)) == [(2, 5)]
    assert KnownPart().with_span(Span(2, 5)) == (2, 5)
    assert KnownPart([None]).span is None
    assert with_margin(Span(100, MARGIN_SAMPLES + 200), MARGIN_SAMPLES + 300) == (0, MARGIN_SAMPLES + 300)


@pytest.mark.parametrize(
    "span, missing, both",
    [
        ((0, 10), [], (0, 10)),
        ((4, 6), [], (0, 10)),
        ((5, 15), [(10, 15)], (0, 15)),
        ((10, 15), [(10, 15)], (0, 15)),
        ((12, 15), [(12, 15)], (12, 15)),
    ],
)
def test_what_is_missing_beside_a_known_part(
    tmp_path: Path, span: tuple[int, int], missing: list[tuple[int, int]], both: tuple[int, int]
) -> None:
    with Waveform(tmp_path) as wave:
        known = KnownPart([EstimatePart(Span(0, 10), wave)])
        assert known.missing(Span(*span)) == missing
        assert known.with_span(Span(*span)) == both


def test_a_part_in_the_middle_leaves_both_ends(tmp_path: Path) -> None:
    with ExitStack() as stack:
        waves = [stack.enter_context(Waveform(tmp_path)) for _ in range(2)]
        for wave in waves:
            wave.append(torch.ones(2, 4))
        known = KnownPart([EstimatePart(Span(3, 7), wave) for wave in waves])
        assert known.missing(Span(0, 10)) == [(0, 3), (7, 10)]
        blocks = [torch.zeros(2, 5), torch.zeros(2, 5)]
        known.fill_in(blocks, 1)
        assert all(block[0].tolist() == [0, 0, 1, 1, 1] for block in blocks)
        other = KnownPart([EstimatePart(Span(3, 7), waves[0]), EstimatePart(Span(2, 7), waves[1])])
        assert other.span is None


@pytest.mark.parametrize("start, stop", [(0, 10), (0, 1), (3, 4), (2, 9), (4, 8), (9, 10)])
def test_an_excerpt_of_blocks(start: int, stop: int) -> None:
    samples = torch.arange(20).reshape(1, 20)
    blocks = samples[:, :10].split(4, dim=1)
    assert torch.equal(torch.cat(list(excerpt(blocks, start, stop)), dim=1), samples[:, start:stop])
