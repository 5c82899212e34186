"""What the local page writes stems as: for every program, or for one kind of programs."""

from dataclasses import dataclass
from typing import Any

from separation.audio.ffmpeg import is_installed
from separation.audio.options import SNDFILE_FORMATS, STEM_FILE, OutputOptions
from separation.audio.stem_file import N_STEMS


@dataclass(frozen=True)
class Format:
    """A format.

    Args:
        title: in words.
        options: what it stands for.
    """

    title: str
    options: OutputOptions

    @property
    def is_stereo(self) -> bool:
        """Whether it is always in stereo."""
        return self.options.format == STEM_FILE

    @property
    def n_stems(self) -> int | None:
        """How many stems it needs; None for any number."""
        return N_STEMS if self.options.format == STEM_FILE else None


# By the name in orders. Some players and samplers take no float WAV.
FORMATS = {
    "wav": Format("WAV, 32-bit float", OutputOptions("wav")),
    "wav24": Format("WAV, 24 bit", OutputOptions("wav", wav_depth="24")),
    "flac": Format("FLAC, 24 bit", OutputOptions("flac")),
    "mp3": Format("MP3, 320 kbit/s", OutputOptions("mp3")),
    "m4a": Format("M4A (AAC), 256 kbit/s", OutputOptions("m4a")),
    "opus": Format("Opus, 192 kbit/s", OutputOptions("opus")),
    "ogg": Format("Ogg Vorbis, about 256 kbit/s", OutputOptions("ogg")),
    "reaper": Format("REAPER project with WAV files", OutputOptions("wav", reaper=True)),
    # The name that others would give it needs the song's, which is not safe in the address of a page.
    STEM_FILE: Format("Stem file for DJ programs (.stem.mp4)", OutputOptions(STEM_FILE, name="{stem}.{ext}")),
}


def offered() -> dict[str, dict[str, Any]]:
    """The formats that can be written here as JSON.

    Each has `title`; `stems`, how many are needed, or null for any number; and `stereo`, whether it is always that.
    """
    has_ffmpeg = is_installed()
    return {
        name: {"title": format.title, "stems": format.n_stems, "stereo": format.is_stereo}
        for name, format in FORMATS.items()
        if has_ffmpeg or format.options.format in SNDFILE_FORMATS
    }
