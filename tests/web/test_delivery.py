"""Stems that Cog's server may fail to deliver are announced before the models run, with a format that fits."""

import logging
import re
from pathlib import Path

import pytest
import soundfile

from helpers.common import PROJECT, SONG, STEMS
from helpers.small_separators import Recorder
from separation import OutputOptions
from separation.web import delivery
from separation.web.delivery import DeliveredSeparator, delivery_problem, stem_bytes

GIB = 2**30
FORMATS = {name: OutputOptions(name) for name in ("wav", "flac", "mp3")}


@pytest.mark.parametrize(
    "minutes, n_stems, format, memory_bytes, said",
    [
        (3, 6, "wav", 64 * GIB, ""),
        (60, 6, "mp3", 64 * GIB, ""),
        (11, 2, "wav", 64 * GIB, ""),
        (11, 2, "wav", 0, ""),
        (
            12,
            2,
            "wav",
            64 * GIB,
            "2 stems of 12.0 minutes as wav are about 254 MB each: an upload may take more than the 25 s that Cog "
            "allows: choose output_format flac, about 122 MB a stem",
        ),
        (
            6,
            6,
            "wav",
            7 * GIB,
            "6 stems of 6.0 minutes as wav are about 127 MB each: without uploads, Cog's server needs about 5,959 MiB "
            "of memory to answer: choose output_format flac, about 61 MB a stem",
        ),
        (
            60,
            6,
            "wav",
            16 * GIB,
            "6 stems of 60.0 minutes as wav are about 1,270 MB each: an upload may take more than the 25 s that Cog "
            "allows and without uploads, Cog's server needs about 59,593 MiB of memory to answer: choose output_format "
            "mp3, about 144 MB a stem",
        ),
        (
            180,
            2,
            "mp3",
            64 * GIB,
            "2 stems of 180.0 minutes as mp3 are about 432 MB each: an upload may take more than the 25 s that Cog "
            "allows: send the song in parts",
        ),
    ],
)
def test_what_cannot_be_delivered_is_named_with_the_first_format_that_fits(
    minutes: int, n_stems: int, format: str, memory_bytes: int, said: str
) -> None:
    assert delivery_problem(minutes * 60, n_stems, FORMATS[format], memory_bytes) == said


@pytest.mark.parametrize(
    "options, per_second",
    [
        (OutputOptions("wav"), 44100 * 8),
        (OutputOptions("wav", sample_rate=48000, wav_depth="16"), 48000 * 4),
        (OutputOptions("mp3", bitrate=128), 16000),
    ],
)
def test_the_size_of_a_stem_follows_its_format(options: OutputOptions, per_second: int) -> None:
    assert stem_bytes(10, options) == 10 * per_second


def test_flac_is_a_part_of_its_integers() -> None:
    assert stem_bytes(1, OutputOptions("flac")) == pytest.approx(44100 * 6 * delivery.FLAC_RATIO)


def test_the_warning_comes_after_decoding_and_before_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    samples, rate = soundfile.read(SONG, frames=44100)
    soundfile.write(tmp_path / "song.wav", samples, rate)
    monkeypatch.setattr(delivery, "UPLOADED_PER_SECOND", 1)
    stages: list[tuple[str, int]] = []

    def progress(share: float, stage: str) -> None:
        stages.append((stage, len(caplog.messages)))

    separator = DeliveredSeparator.from_model(Recorder("recorder", ("a", "b"), 44100))
    with caplog.at_level(logging.WARNING):
        separator.separate_file(tmp_path / "song.wav", tmp_path / "stems", progress=progress)
    (warning,) = caplog.messages
    assert warning.startswith("'song.wav': 2 stems of 0.0 minutes as wav are about 0 MB each: an upload may take")
    assert {n_warnings for stage, n_warnings in stages if stage == "decoding"} == {0}
    assert {n_warnings for stage, n_warnings in stages if stage != "decoding"} == {1}


def test_the_documented_sizes_are_those_that_are_expected() -> None:
    text = (PROJECT / "docs" / "deploy.md").read_text(encoding="utf-8")
    table = text.partition("### Large stems")[2].partition("\n### ")[0]
    rows = [re.findall(r"[\d,]+", line) for line in table.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 5
    for minutes, *sizes in rows:
        expected = [
            stem_bytes(int(minutes) * 60, FORMATS[format]) * len(STEMS[stems]) / 1e6
            for stems in STEMS
            for format in FORMATS
        ]
        assert [int(size.replace(",", "")) for size in sizes] == [round(size) for size in expected]
