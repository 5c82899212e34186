"""A REAPER project: a text file with the stems on named, coloured tracks.

The format is public by its files only. A block begins with `<` and its name, and ends with `>`; every other line is a
name and its values. Texts are in quotes of a kind that they do not contain.
"""

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

COLOURS = ("#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#0072B2", "#F0E442", "#999999")  # Okabe and Ito's
SOURCES = {"wav": "WAVE", "flac": "FLAC", "mp3": "MP3", "ogg": "VORBIS", "opus": "OPUS", "m4a": "VIDEO"}  # by format

_HAS_COLOUR = 0x1000000
_TIME = 0  # items stay at their seconds when the tempo changes


@dataclass(frozen=True)
class Project:
    """A project.

    Args:
        files: the stems' files relative to the project, with `/` between folders, by stem.
        format: of the files; one of SOURCES.
        sample_rate: of the files, in hertz.
        seconds: their length.
    """

    files: Mapping[str, str]
    format: str
    sample_rate: int
    seconds: float

    def text(self) -> str:
        """The content of the file. The same stems give the same text."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield '<REAPER_PROJECT 0.1 "7.0" 0'
        yield f"  SAMPLERATE {self.sample_rate} 0 0"
        yield f"  TIMELOCKMODE {_TIME}"
        yield "  TEMPO 120 4 4"
        for index, (stem, file) in enumerate(self.files.items()):
            yield from self._track(stem, file, COLOURS[index % len(COLOURS)])
        yield ">"

    def _track(self, stem: str, file: str, colour: str) -> Iterator[str]:
        id = str(uuid.uuid5(uuid.NAMESPACE_URL, file)).upper()
        red, green, blue = bytes.fromhex(colour[1:])
        yield f"  <TRACK {{{id}}}"
        yield f"    NAME {quoted(stem)}"
        yield f"    PEAKCOL {_HAS_COLOUR | blue << 16 | green << 8 | red}"
        yield f"    TRACKID {{{id}}}"
        yield "    VOLPAN 1 0 -1 -1 1"
        yield "    NCHAN 2"
        yield "    <ITEM"
        yield "      POSITION 0"
        yield f"      LENGTH {self.seconds:.14g}"
        yield "      LOOP 0"
        yield "      FADEIN 1 0 0 1 0 0 0"
        yield "      FADEOUT 1 0 0 1 0 0 0"
        yield f"      NAME {quoted(file.rpartition('/')[2])}"
        yield "      VOLPAN 1 0 1 -1"
        yield "      SOFFS 0"
        yield f"      <SOURCE {SOURCES[self.format]}"
        yield f"        FILE {quoted(file)}"
        yield "      >"
        yield "    >"
        yield "  >"


def quoted(text: str) -> str:
    """A text in quotes. A text with all three kinds of quotes loses its backticks, as REAPER does it."""
    line = " ".join(text.splitlines())
    for quote in "\"'`":
        if quote not in line:
            return f"{quote}{line}{quote}"
    return f"`{line.replace('`', chr(39))}`"
