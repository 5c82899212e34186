"""OutputOptions: what is offered, and what is refused before any work."""

from typing import Any

import pytest

from separation.audio.options import FORMATS, OutputOptions
from separation.errors import InputError


def test_without_arguments_stems_are_float_wav_at_44100_hz() -> None:
    options = OutputOptions()
    assert (options.format, options.sample_rate, options.encoding) == ("wav", 44100, {"wav_depth": "32f"})
    assert OutputOptions("flac").encoding == {"flac_depth": "24"}
    assert OutputOptions("mp3").encoding == {"mp3_bitrate": 320}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"format": "aac"}, "output format 'aac' is not offered: choose wav or mp3 or flac"),
        ({"format": "wav", "wav_depth": "8"}, "WAV depth '8' is not offered: choose 16 or 24 or 32f"),
        ({"format": "flac", "flac_depth": "32f"}, "FLAC depth '32f' is not offered: choose 16 or 24"),
        *(({"format": "mp3", "mp3_bitrate": rate}, f"MP3 bitrate {rate} is not offered") for rate in (0, 96, 200, 321)),
        ({"sample_rate": 96000}, "sample rate 96000 is not offered: choose 44100 or 48000 or source"),
    ],
)
def test_a_value_that_is_not_offered_is_refused_with_the_choices(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        OutputOptions(**options)


@pytest.mark.parametrize(
    "format, options",
    [
        (format, options)
        for owner, options in (
            ("wav", {"wav_depth": "32f"}),
            ("flac", {"flac_depth": "24"}),
            ("mp3", {"mp3_bitrate": 320}),
        )
        for format in FORMATS
        if format != owner
    ],
)
def test_an_option_of_another_format_is_refused_even_with_its_default(format: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"does not apply to {format.upper()}: leave it out"):
        OutputOptions(format, **options)


@pytest.mark.parametrize(
    "options, clips",
    [
        (OutputOptions(), False),
        (OutputOptions(wav_depth="32f"), False),
        (OutputOptions(wav_depth="24"), True),
        (OutputOptions("flac"), True),
        (OutputOptions("mp3"), True),
    ],
)
def test_only_float_wav_holds_samples_beyond_full_scale(options: OutputOptions, clips: bool) -> None:
    assert options.clips == clips
