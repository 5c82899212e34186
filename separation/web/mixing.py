"""A mix of a song's stems, from their own files, as the page asks for it: a sound file, or the sound of a video."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from separation.audio.beside import suffix_of
from separation.audio.excerpt import Excerpt
from separation.audio.ffmpeg_writer import check_installed
from separation.audio.mix import write_mix
from separation.audio.video import write_video
from separation.errors import InputError
from separation.web.queued import QueuedSong

MIX, VIDEO = "mix.wav", "video"  # names in the URL
START, END = "start", "end"  # beside the names of stems
MOST = 16.0  # level; the page's sliders reach 1


@dataclass(frozen=True)
class Mix:
    """What to mix.

    Args:
        levels: what to multiply stems by, by their names; stems that are not here are silent.
        part: of the stems.
    """

    levels: Mapping[str, float]
    part: Excerpt = Excerpt()

    @classmethod
    def read(cls, query: str) -> "Mix":
        """The mix in a URL's query, such as `vocals=0.5&drums=1&start=10&end=20`, with times in seconds.

        Raises InputError if it is not such a query, or no stem is audible.
        """
        try:
            values = {name: float(text) for name, text in parse_qsl(query, strict_parsing=True, max_num_fields=100)}
        except ValueError as e:
            raise InputError("the mix must be levels of stems, such as vocals=0.5&drums=1: send numbers") from e
        start, end = values.pop(START, 0.0), values.pop(END, None)
        for stem, level in values.items():
            if not 0 <= level <= MOST:
                raise InputError(f"the level of {stem!r:.100} is {level:g}: choose one from 0 to {MOST:g}")
        levels = {stem: level for stem, level in values.items() if level}
        if not levels:
            raise InputError("no stem of the mix is audible: give one a level above 0")
        return cls(levels, Excerpt(start, None if end == math.inf else end))

    def write(self, song: QueuedSong, folder: Path) -> Path:
        """Write the mix of a song's stems, 32-bit float WAV, into a folder.

        Raises InputError if the song has no such stem, and what `write_mix` raises.
        """
        stems = song.stems(folder)
        if unknown := [stem for stem in self.levels if stem not in stems]:
            raise InputError(f"{song.name!r} has no stem {unknown[0]!r:.100}: choose from {', '.join(stems)}")
        levels = {stems[stem]: level for stem, level in self.levels.items()}
        write_mix(levels, folder / MIX, part=self.part, tags={"title": f"{song.title} (mix)"})
        return folder / MIX

    def write_video(self, song: QueuedSong, folder: Path) -> Path:
        """Write the song's video into a folder, with the mix as its sound. Its name is that of the only stem, or `mix`.

        Raises InputError if the mix is not whole, and what `write` and `write_video` raise.
        """
        if self.part != Excerpt():
            raise InputError("a video is written whole: leave out start and end")
        check_installed("a video")
        name = next(iter(self.levels)) if len(self.levels) == 1 else "mix"
        target = folder / f"{name}.{suffix_of(song.path)}"
        write_video(song.path, {"mix": self.write(song, folder)}, target)
        return target
