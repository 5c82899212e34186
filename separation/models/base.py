"""What every architecture has in common."""

from typing import ClassVar, Literal

import torch
from torch import nn


class SeparationModel(nn.Module):
    """Chunks of waveform `[B, C, T]` in float32 to estimates `[B, S, C, T]` in float32.

    An architecture sets the class attributes; `checkpoints.load_model` sets the rest from the checkpoint's YAML.
    """

    # A frozen dataclass of hyper-parameters under the community's names, and names that only training reads.
    Config: ClassVar[type]
    TRAINING_KEYS: ClassVar[frozenset[str]] = frozenset()
    # Keys of the YAML's `audio:` section that the Config takes as well.
    AUDIO_KEYS: ClassVar[frozenset[str]] = frozenset()
    # What the track is scaled by before chunking: its peak to 0.9, or its mono mixture to zero mean and unit variance.
    normalisation: ClassVar[Literal["peak", "standard"]] = "peak"
    # Whether the song's ends are extended by their reflection; if not, by silence.
    reflects_border: ClassVar[bool] = True
    # Whether chunks must have exactly `chunk_samples`; if not, the caller chooses.
    fixed_chunk: ClassVar[bool] = False
    name: str
    stems: tuple[str, ...]  # S names, in the order of the estimates
    sample_rate: int  # hertz
    chunk_samples: int  # the length the checkpoint was trained with
    channels: int  # C: 1 or 2
    head_size: int | None = None  # features a head, of a model that is told an attention backend by `prepare`
    attention: str | None = None  # the attention backend's name, if it has one

    @classmethod
    def key_prefix(cls, stem: str | None) -> str:
        """What stands before a checkpoint's keys in this class; `stem` for a file that holds one stem's specialist."""
        return ""

    def only(self, stems: tuple[str, ...]) -> "SeparationModel":
        """The model as it gives at least these of its stems, on the same weights.

        What only the others need is then not computed, where the architecture has such parts.
        """
        return self

    def prepare(self, dtype: torch.dtype, *, attention: str | None = None) -> None:
        """Make the loaded weights ready to compute in a precision, with an attention backend."""
        if dtype != torch.float32:
            self.to_precision(dtype)

    def to_precision(self, dtype: torch.dtype) -> None:
        """Cast the linear layers; norms, rotary angles, STFT and the mask product stay in float32."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
