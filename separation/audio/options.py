"""What stems are written as: format, sample rate, bitrate and depth. Importing it is cheap."""

from dataclasses import dataclass
from typing import Literal

from separation.audio.excerpt import Excerpt
from separation.errors import InputError

FORMATS = ("wav", "mp3", "flac")
SAMPLE_RATES: tuple[int | str, ...] = (44100, 48000, "source")  # hertz; `source` is the song's own
WAV_DEPTHS = ("16", "24", "32f")  # bits of integers, or of floats
FLAC_DEPTHS = ("16", "24")
MP3_BITRATES = (128, 160, 192, 224, 256, 320)  # kbit/s
WAV_DEPTH, FLAC_DEPTH, MP3_BITRATE = "32f", "24", 320  # the defaults


@dataclass(frozen=True)
class OutputOptions:
    """What a song's stems are written as.

    Only 32-bit float WAV holds samples beyond full scale. In every other format, if one stem is louder, all stems of
    the song are scaled by the same gain, and a warning is logged. 16 bits are dithered.

    Args:
        format: `wav`, `mp3` or `flac`.
        sample_rate: 44100, 48000, or `source` for the song's own rate.
        mp3_bitrate: kbit/s, one of MP3_BITRATES; None means 320.
        wav_depth: `16`, `24` or `32f` (float); None means `32f`.
        flac_depth: `16` or `24`; None means `24`.
        overwrite: replace files that this program did not write.
        excerpt: the part of the song to separate; None means the whole song.

    Raises:
        InputError: a value is not offered, or belongs to another format.
    """

    format: str = "wav"
    sample_rate: int | Literal["source"] = 44100
    mp3_bitrate: int | None = None
    wav_depth: str | None = None
    flac_depth: str | None = None
    overwrite: bool = False
    excerpt: Excerpt | None = None

    def __post_init__(self) -> None:
        _check("output format", self.format, FORMATS)
        _check("sample rate", self.sample_rate, SAMPLE_RATES)
        for owner, what, value, offered in (
            ("wav", "WAV depth", self.wav_depth, WAV_DEPTHS),
            ("flac", "FLAC depth", self.flac_depth, FLAC_DEPTHS),
            ("mp3", "MP3 bitrate", self.mp3_bitrate, MP3_BITRATES),
        ):
            if value is None:
                continue
            if self.format != owner:
                raise InputError(f"{what} {value!r} does not apply to {self.format.upper()}: leave it out")
            _check(what, value, offered)

    @property
    def encoding(self) -> dict[str, int | str]:
        """The option that only this format has, by name, with its default filled in."""
        return {
            "wav": {"wav_depth": self.wav_depth or WAV_DEPTH},
            "flac": {"flac_depth": self.flac_depth or FLAC_DEPTH},
            "mp3": {"mp3_bitrate": self.mp3_bitrate or MP3_BITRATE},
        }[self.format]  # type: ignore[return-value]

    @property
    def clips(self) -> bool:
        """Whether the files cannot hold samples beyond full scale."""
        return self.format != "wav" or (self.wav_depth or WAV_DEPTH) != "32f"


def _check(what: str, value: object, offered: tuple[int | str, ...]) -> None:
    if value not in offered:
        raise InputError(f"{what} {value!r} is not offered: choose {' or '.join(map(str, offered))}")
