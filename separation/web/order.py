"""What somebody wants of a song: which stems, by a recipe or a model, of which part of it, in which format."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from separation.audio.excerpt import PREVIEW_SECONDS, Excerpt
from separation.audio.options import STEM_FILE, OutputOptions
from separation.audio.stem_file import tracks_of
from separation.checkpoints.catalogue import available, read_config
from separation.documents import quoted
from separation.engine.recipes import Recipe, load_recipe, one_model
from separation.errors import InputError, RecipeError
from separation.web.formats import FORMATS

MOST_SECONDS = 10**6  # far beyond any song
BYTES_PER_SECOND = {".wav": 176_400, ".aiff": 176_400, ".aif": 176_400, ".flac": 110_000}  # of a CD's sound
LOSSY_BYTES_PER_SECOND = 32_000  # 256 kbit/s


@dataclass(frozen=True)
class Order:
    """What to do with a song.

    Args:
        name: of the song's file.
        format: of the stems' files, one of FORMATS.
        recipe: the recipe, by its name, with `stems`, its choice of stems.
        model: instead of a recipe, the name of the model whose stems are wanted.
        part: the part of the song to separate; None means the whole song.
        channels: of the stems, as in OutputOptions.
        accept_damaged: take what can be read of a damaged song.
        song_seconds: how long the song lasts, as its sender says; None if the sender cannot tell.

    Raises:
        InputError: there is no such recipe, choice of stems, model, format or number of channels, or the format cannot
            hold the stems.
    """

    name: str
    format: str
    recipe: str | None = None
    stems: str | None = None
    model: str | None = None
    part: Excerpt | None = None
    channels: str = "stereo"
    accept_damaged: bool = False
    song_seconds: float | None = None

    def __post_init__(self) -> None:
        stems = self.load().stems
        if self.format not in FORMATS:
            raise InputError(f"output format {quoted(self.format)} is not offered: choose {' or '.join(FORMATS)}")
        if self.format == STEM_FILE:
            tracks_of(stems)
        replace(FORMATS[self.format].options, channels=self.channels)  # which refuses wrong ones
        if not isinstance(self.accept_damaged, bool):
            raise InputError(f"accept_damaged is {str(self.accept_damaged)[:20]!r}: send true or false")

    @classmethod
    def read(cls, order: Mapping[Any, Any]) -> "Order":
        """The order in a JSON object, as `as_json` writes it. The name is made safe for files and headers.

        Raises InputError if a key is missing or has a wrong value.
        """
        seconds = order.get("seconds")
        options: dict[str, Any] = {
            "part": _part(order.get("part")),
            "channels": order.get("channels", "stereo"),
            "accept_damaged": order.get("accept_damaged", False),
            "song_seconds": None if seconds is None else _time(seconds),
        }
        match order:
            case {"name": str(name), "format": str(format), "model": str(model)}:
                return cls(_safe_name(name), format, model=model, **options)
            case {"name": str(name), "format": str(format), "recipe": str(recipe), "stems": str(stems)}:
                return cls(_safe_name(name), format, recipe, stems, **options)
        raise InputError("the order is incomplete: give name, recipe and stems or model, format, and bytes or again")

    def as_json(self) -> dict[str, Any]:
        wanted = {"recipe": self.recipe, "stems": self.stems} if self.model is None else {"model": self.model}
        known = {
            "part": self.part and self.part.as_json(),
            "channels": None if self.channels == "stereo" else self.channels,
            "accept_damaged": self.accept_damaged or None,
            "seconds": self.song_seconds,
        }
        known = {key: value for key, value in known.items() if value is not None}
        return {"name": self.name, **wanted, "format": self.format, **known}

    def load(self) -> Recipe:
        """The recipe to run."""
        if self.model is None:
            return load_recipe(self.recipe or "", self.stems)
        if self.model not in available():  # `read_config` would also take a path on the server
            raise RecipeError(f"unknown model {quoted(self.model)}: choose one that the page offers")
        model = read_config(self.model)
        return one_model(self.model, model.stems, model.residual)

    @cached_property
    def n_stems(self) -> int:
        return len(self.load().stems)

    @property
    def output(self) -> OutputOptions:
        return replace(FORMATS[self.format].options, channels=self.channels, excerpt=self.part)

    @property
    def choice(self) -> str:
        """The recipe with its stems, or the model: songs with the same choice take equally long."""
        return self.model or f"{self.recipe} {self.stems}"

    def seconds(self, n_bytes: int) -> float:
        """About how much music is wanted, in seconds. Only for estimates of time.

        Args:
            n_bytes: the size of the song's file.
        """
        rate = BYTES_PER_SECOND.get(Path(self.name).suffix.lower(), LOSSY_BYTES_PER_SECOND)
        whole = self.song_seconds or n_bytes / rate
        if self.part is None:
            return whole
        if self.part.is_preview:
            return min(whole, float(PREVIEW_SECONDS))
        end = whole if self.part.end_seconds is None else self.part.end_seconds
        return max(1.0, end - self.part.start_seconds)


def _part(value: object) -> Excerpt | None:
    match value:
        case None:
            return None
        case "preview":
            return Excerpt(is_preview=True)
        case [start, end]:
            return Excerpt(_time(start), None if end is None else _time(end))
    raise InputError("the part of the song must be [start, end] in seconds, or preview: choose it again")


def _time(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_SECONDS:
        raise InputError(f"a part of a song cannot start or end at {str(value)[:20]} s: choose it again")
    return float(value)


def _safe_name(name: str) -> str:
    """The last part of a path, at most 200 bytes, without characters that a file system or a header forbids."""
    name = re.split(r"[/\\]", name)[-1]
    name = "".join("_" if letter in '<>:"|?*' or not letter.isprintable() else letter for letter in name)
    return name.encode()[:200].decode(errors="ignore").strip(" .") or "song"
