"""OutputOptions: what is offered, and what is refused before any work."""

from typing import Any

import pytest

from separation.audio.options import DEFAULT_BITRATES, FORMATS, LOSSLESS, OutputOptions
from separation.errors import InputError


def test_without_arguments_stems_are_float_wav_at_44100_hz() -> None:
    options = OutputOptions()
    assert (options.format, options.sample_rate, options.encoding) == ("wav", 44100, {"wav_depth": "32f"})
    assert OutputOptions("flac").encoding == {"flac_depth": "24"}
    assert OutputOptions("mp3").encoding == {"mp3_bitrate": 320}
    assert OutputOptions("opus").encoding == {"opus_bitrate": 192}
    assert OutputOptions("m4a", bitrate="lossless").encoding == {"m4a_bitrate": "lossless"}


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"format": "aac"},
            "output format 'aac' is not offered: choose wav or mp3 or flac or m4a or",
        ),
        ({"format": "wav", "wav_depth": "8"}, "WAV depth '8' is not offered: choose 16 or 24 or 32f"),
        ({"format": "flac", "flac_depth": "32f"}, "FLAC depth '32f' is not offered: choose 16 or 24"),
        *(({"format": "mp3", "bitrate": rate}, f"bitrate {rate} is not offered") for rate in (0, 96, 200, 321)),
        ({"format": "opus", "sample_rate": "source"}, "Opus always has 48000 Hz: leave the sample rate out"),
        ({"format": "ogg", "bitrate": "lossless"}, "bitrate 'lossless' is not offered: choose 128"),
        ({"channels": "left"}, "number of channels 'left' is not offered: choose stereo or mono or source"),
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
            ("mp3", {"bitrate": 320}),
        )
        for format in FORMATS
        if format != owner and not (owner == "mp3" and format in DEFAULT_BITRATES)
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


def test_the_rate_of_the_stems_is_the_songs_the_chosen_one_or_that_of_opus() -> None:
    assert OutputOptions().rate_of_stems(96000) == 44100
    assert OutputOptions(sample_rate="source").rate_of_stems(96000) == 96000
    assert OutputOptions("opus").rate_of_stems(96000) == 48000


@pytest.mark.parametrize("format, kbps", [("wav", None), ("flac", None), ("mp3", 320), ("m4a", 256), ("ogg", 256)])
def test_lossy_formats_have_a_bitrate(format: str, kbps: int | None) -> None:
    assert OutputOptions(format).kbps == kbps


def test_alac_has_no_bitrate() -> None:
    assert OutputOptions("m4a", bitrate=LOSSLESS).kbps is None
