"""What an analysis finds. Importing it is cheap."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

MIXTURE = "mixture"


@dataclass(frozen=True)
class Loudness:
    """How loud a recording is; None where it is silent or too short to tell.

    Attributes:
        integrated_lufs: loudness of the whole, gated; needs 0.4 s.
        range_lu: loudness range; needs 3 s.
        true_peak_dbtp: the largest magnitude between and at the samples, in dB against full scale.
    """

    integrated_lufs: float | None
    range_lu: float | None
    true_peak_dbtp: float | None

    def as_json(self) -> dict[str, float | None]:
        """The attributes as a JSON object, rounded to 0.01."""
        return {name: None if value is None else round(value, 2) for name, value in vars(self).items()}


@dataclass(frozen=True)
class SongAnalysis:
    """What a song is like. Whatever cannot be told is None, such as the tempo of a song without drums.

    Attributes:
        tempo_bpm: beats per minute.
        key: such as "F# minor" or "Bb major".
        loudness: of the song, under "mixture", and of each stem, under its name.
    """

    tempo_bpm: float | None
    key: str | None
    loudness: Mapping[str, Loudness]

    def as_json(self) -> dict[str, Any]:
        """The analysis as a JSON object: the tempo is rounded to 0.1 BPM, loudness to 0.01."""
        return {
            "tempo_bpm": None if self.tempo_bpm is None else round(self.tempo_bpm, 1),
            "key": self.key,
            "loudness": {name: of_one.as_json() for name, of_one in self.loudness.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `as_json`. Raises LookupError, TypeError or AttributeError for any other object."""
        return cls(
            data["tempo_bpm"], data["key"], {name: Loudness(**of_one) for name, of_one in data["loudness"].items()}
        )

    def __str__(self) -> str:
        beat = "no regular beat" if self.tempo_bpm is None else f"{self.tempo_bpm:.1f} BPM"
        loud = self.loudness[MIXTURE].integrated_lufs
        return f"{beat}, {self.key or 'no key'}, {'silent' if loud is None else f'{loud:.1f} LUFS'}"
