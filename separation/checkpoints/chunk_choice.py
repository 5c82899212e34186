"""How long chunks are and what neighbours share: what somebody asks for, or what the model was trained on."""

from dataclasses import dataclass
from typing import Literal

from separation.errors import InputError

CHUNK_SECONDS = range(4, 31)
OVERLAP_SECONDS = range(1, 9)
# The container's inputs are numbers, so that its defaults, chunk_size and overlap, stand for `auto`.
CONTAINER_DEFAULTS = (8, 4)

Seconds = int | Literal["auto"]


@dataclass(frozen=True)
class ChunkChoice:
    """What is asked of all models of a recipe, in seconds; with `auto` it depends on the model.

    Raises InputError for what is not offered.
    """

    chunk_seconds: Seconds = "auto"  # auto: the length that the model was trained on
    overlap_seconds: Seconds = "auto"  # auto: half the chunk

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("chunk size", self.chunk_seconds, CHUNK_SECONDS),
            ("overlap", self.overlap_seconds, OVERLAP_SECONDS),
        ):
            if value != "auto" and (not isinstance(value, int) or value not in allowed):
                raise InputError(
                    f"{name} {value} s is not offered: choose auto or whole seconds from {allowed[0]} to {allowed[-1]}"
                )
        if (
            self.chunk_seconds != "auto"
            and self.overlap_seconds != "auto"
            and self.overlap_seconds >= self.chunk_seconds
        ):
            raise InputError(
                f"overlap ({self.overlap_seconds} s) must be smaller than the chunk size ({self.chunk_seconds} s): "
                f"choose an overlap below {self.chunk_seconds} s"
            )

    @classmethod
    def of_container(cls, chunk_size: int, overlap: int) -> "ChunkChoice":
        """What the container's two inputs ask for: their defaults together are `auto`, anything else is a request."""
        return cls() if (chunk_size, overlap) == CONTAINER_DEFAULTS else cls(chunk_size, overlap)

    def samples(self, model: str, own_samples: int, sample_rate: int, *, is_fixed: bool) -> tuple[int, int]:
        """Chunk and overlap of the model of that name, in samples.

        A model `is_fixed` if it takes no other chunks than of its own length, `own_samples`: of those asked for in
        seconds it has the overlap's share. Raises InputError for an overlap that is not smaller than the chunk.
        """
        chunk_samples = own_samples if is_fixed or self.chunk_seconds == "auto" else self.chunk_seconds * sample_rate
        if self.overlap_seconds == "auto":
            return chunk_samples, chunk_samples // 2
        if is_fixed and self.chunk_seconds != "auto":
            return chunk_samples, chunk_samples * self.overlap_seconds // self.chunk_seconds
        overlap_samples = self.overlap_seconds * sample_rate
        if overlap_samples >= chunk_samples:
            raise InputError(
                f"overlap ({self.overlap_seconds} s) must be smaller than the chunk of {model} "
                f"({chunk_samples / sample_rate:.3g} s): choose a smaller overlap, or auto"
            )
        return chunk_samples, overlap_samples
