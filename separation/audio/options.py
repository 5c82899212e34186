"""What stems are written as: format, sample rate, channels, bitrate and depth. Importing it is cheap."""

from dataclasses import dataclass, replace
from typing import Literal

from separation.audio.excerpt import Excerpt
from separation.errors import InputError
from separation.system.names import fields_in

SNDFILE_FORMATS = ("wav", "mp3", "flac")
FFMPEG_FORMATS = ("m4a", "opus", "ogg")
STEM_FILE = "stem.mp4"  # all stems in one file; see `separation.audio.stem_file`
FORMATS = (*SNDFILE_FORMATS, *FFMPEG_FORMATS, STEM_FILE)
SAMPLE_RATES: tuple[int | str, ...] = (44100, 48000, "source")  # hertz; `source` is the song's own
CHANNELS = ("stereo", "mono", "source")  # `source`: mono for a mono song
WAV_DEPTHS = ("16", "24", "32f")  # bits of integers, or of floats
FLAC_DEPTHS = ("16", "24")
BITRATES = (128, 160, 192, 224, 256, 320)  # kbit/s
LOSSLESS = "lossless"  # in place of a bitrate, for m4a: ALAC instead of AAC
WAV_DEPTH, FLAC_DEPTH = "32f", "24"  # the defaults
DEFAULT_BITRATES = {"mp3": 320, "m4a": 256, "opus": 192, "ogg": 256, STEM_FILE: 256}
OPUS_SAMPLE_RATE = 48000  # hertz, of every Opus file

Bitrate = int | Literal["lossless"]


@dataclass(frozen=True)
class OutputOptions:
    """What a song's stems are written as.

    Only 32-bit float WAV holds samples beyond full scale. In every other format, if one stem is louder, all stems of
    the song are scaled by the same gain, and a warning is logged. 16 bits are dithered.

    Args:
        format: `wav`, `mp3` or `flac`; or with ffmpeg `m4a`, `opus`, `ogg` or `stem.mp4`. The last holds the song and
            four stems in one file, for DJ programs.
        sample_rate: 44100, 48000, or `source` for the song's own rate. Opus always has 48000.
        bitrate: kbit/s, one of BITRATES, for the formats in DEFAULT_BITRATES; None means theirs. `lossless`, for m4a
            and stem.mp4, is ALAC with 24 bits. Ogg Vorbis takes it as a quality, so that the music decides.
        wav_depth: `16`, `24` or `32f` (float); None means `32f`.
        flac_depth: `16` or `24`; None means `24`.
        channels: `stereo`, `mono` for the mean of both channels, or `source` for mono stems of mono songs.
        name: a template for the names of the files, such as `{artist}/{album}/{song} ({stem}).{ext}`, with the fields
            in `separation.system.names.FIELDS`; None means `{stem}.{ext}`, and for stem.mp4
            `{folder}/{song}.{ext}`.
        reaper: also write a REAPER project, `stems.rpp`, with the stems on its tracks.
        video: for a video, also write it again with this stem as its sound, or with a mix such as `drums+bass`.
        overwrite: replace files that this program did not write.
        excerpt: the part of the song to separate; None means the whole song.

    Raises:
        InputError: a value is not offered, or belongs to another format.
    """

    format: str = "wav"
    sample_rate: int | Literal["source"] = 44100
    bitrate: Bitrate | None = None
    wav_depth: str | None = None
    flac_depth: str | None = None
    channels: str = "stereo"
    name: str | None = None
    reaper: bool = False
    video: str | None = None
    overwrite: bool = False
    excerpt: Excerpt | None = None

    def __post_init__(self) -> None:
        _check("output format", self.format, FORMATS)
        _check("sample rate", self.sample_rate, SAMPLE_RATES)
        _check("number of channels", self.channels, CHANNELS)
        if self.format == STEM_FILE:
            if self.channels != "stereo":
                raise InputError(f"{STEM_FILE} is always in stereo: leave the channels out")
            if self.video:
                raise InputError(f"a video cannot be made of {STEM_FILE}: choose another format")
            if self.reaper:
                raise InputError(f"a REAPER project cannot hold {STEM_FILE}: choose another format")
            if self.name is None:
                object.__setattr__(self, "name", "{folder}/{song}.{ext}")
        if self.video and self.excerpt:
            raise InputError("a video is written whole: leave out the part of the song, or the video")
        if self.name is not None:
            fields_in(self.name)
        if self.format == "opus" and self.sample_rate == "source":
            raise InputError(f"Opus always has {OPUS_SAMPLE_RATE} Hz: leave the sample rate out")
        bitrates = (*BITRATES, LOSSLESS) if self.format in ("m4a", STEM_FILE) else BITRATES
        for owners, what, value, offered in (
            (("wav",), "WAV depth", self.wav_depth, WAV_DEPTHS),
            (("flac",), "FLAC depth", self.flac_depth, FLAC_DEPTHS),
            (tuple(DEFAULT_BITRATES), "bitrate", self.bitrate, bitrates),
        ):
            if value is None:
                continue
            if self.format not in owners:
                raise InputError(f"{what} {value!r} does not apply to {self.format.upper()}: leave it out")
            _check(what, value, offered)

    @property
    def encoding(self) -> dict[str, int | str]:
        """The option that only this format has, by name, with its default filled in."""
        if self.format == "wav":
            return {"wav_depth": self.wav_depth or WAV_DEPTH}
        if self.format == "flac":
            return {"flac_depth": self.flac_depth or FLAC_DEPTH}
        return {f"{self.format}_bitrate": self.bitrate or DEFAULT_BITRATES[self.format]}

    @property
    def kbps(self) -> int | None:
        """The bitrate in kbit/s; None if the format is lossless."""
        (value,) = self.encoding.values()
        return value if isinstance(value, int) else None

    @property
    def of_tracks(self) -> "OutputOptions":
        """The options for each track of a `stem.mp4`; the same options in every other format."""
        return replace(self, format="m4a") if self.format == STEM_FILE else self

    @property
    def clips(self) -> bool:
        """Whether the files cannot hold samples beyond full scale."""
        return self.format != "wav" or (self.wav_depth or WAV_DEPTH) != "32f"

    def rate_of_stems(self, source_rate: int) -> int:
        """The stems' sample rate for a song of `source_rate`, both in hertz."""
        if self.format == "opus":
            return OPUS_SAMPLE_RATE
        return source_rate if self.sample_rate == "source" else self.sample_rate


def _check(what: str, value: object, offered: tuple[int | str, ...]) -> None:
    if value not in offered:
        raise InputError(f"{what} {value!r} is not offered: choose {' or '.join(map(str, offered))}")
