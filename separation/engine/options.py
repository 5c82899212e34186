"""Options of the engine. Importing this module is cheap: it does not need PyTorch."""

from dataclasses import dataclass
from typing import Literal

from separation.checkpoints.chunk_choice import ChunkChoice, Seconds
from separation.errors import InputError

# Spelt out because `separation.device` and `separation.models.attention` import PyTorch; a test compares them.
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")
ATTENTIONS = ("auto", "fused", "triton", "sage", "sdpa", "itemwise", "einsum")


@dataclass(frozen=True)
class EngineOptions:
    """What models run on, in which precision, and how a song is cut into chunks.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `auto`, `fp32`, `bf16`, `fp16`, or `int8` for RoFormers on a CPU.
        attention: `auto` or a name in `separation.models.attention.NAMES`.
        batch_size: chunks in a batch, or `auto`: 1 on a CPU, 4 on an Apple GPU, and on a CUDA GPU as many as fit into a
            third of its total memory, at most 8. A CPU computes two batches at a time; see `engine/pairs.py`.
        chunk_seconds: 4 to 30, or `auto` for the length that each model was trained on. Models that only take chunks of
            their own length (Demucs, MDX23C) always keep it.
        overlap_seconds: 1 to 8 and shorter than a chunk, or `auto` for half a chunk. If `chunk_seconds` is a number,
            models that keep their own chunk length overlap their chunks by the same share.

    Raises:
        InputError: a value is not offered. Device, precision and attention are only checked when models are loaded.
    """

    device: str = "auto"
    precision: str = "auto"
    attention: str = "auto"
    batch_size: int | Literal["auto"] = "auto"
    chunk_seconds: Seconds = "auto"
    overlap_seconds: Seconds = "auto"

    def __post_init__(self) -> None:
        if self.batch_size != "auto" and (not isinstance(self.batch_size, int) or self.batch_size < 1):
            raise InputError(f"batch size {self.batch_size!r} is not offered: choose auto or a whole number from 1 up")
        self.chunks  # noqa: B018  # checks chunk and overlap

    @property
    def chunks(self) -> ChunkChoice:
        """Chunk and overlap."""
        return ChunkChoice(self.chunk_seconds, self.overlap_seconds)
