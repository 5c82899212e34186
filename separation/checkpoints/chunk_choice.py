"""The chunk and the overlap: as the user asks, or as the model was trained."""

from dataclasses import dataclass
from typing import Literal

from separation.errors import InputError

CHUNK_SECONDS = range(4, 31)
OVERLAP_SECONDS = range(1, 9)
# chunk_size and overlap of the container. Its inputs are numbers, so these two stand for `auto`.
CONTAINER_DEFAULTS = (8, 4)

Seconds = int | Literal["auto"]


@dataclass(frozen=True)
class ChunkChoice:
    """The chunk and the overlap for all models of a recipe. Raises InputError for a value that is not offered."""

    chunk_seconds: Seconds = "auto"  # auto: the model's chunk in training
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
        """The choice for the container's inputs. Both defaults together mean `auto`; other values mean themselves."""
        return cls() if (chunk_size, overlap) == CONTAINER_DEFAULTS else cls(chunk_size, overlap)

    def samples(self, model: str, own_samples: int, sample_rate: int, *, is_fixed: bool) -> tuple[int, int]:
        """The chunk and the overlap in samples for the model of that name, which was trained with `own_samples`.

        A model that `is_fixed` takes chunks of `own_samples` only. If seconds were asked for, its overlap is the same
        fraction of its chunk. Raises InputError for an overlap that is not shorter than the chunk.
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
