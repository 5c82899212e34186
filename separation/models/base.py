"""What every architecture has in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Blueprint:
    """What a file of weights may say of its network, as those of the demucs package do: the class and its arguments."""

    class_name: str  # demucs.hdemucs.HDemucs
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class SeparationModel(nn.Module):
    """Chunks of waveform `[B, C, T]` in float32 to estimates `[B, S, C, T]` in float32.

    An architecture sets the class attributes; `checkpoints.load_model` sets the rest from the checkpoint's YAML.
    """

    # A frozen dataclass of hyper-parameters under the community's names, and names that only training reads.
    Config: ClassVar[type]
    TRAINING_KEYS: ClassVar[frozenset[str]] = frozenset()
    # Keys of the YAML's `audio:` section that the Config takes as well, each with the field's name.
    AUDIO_KEYS: ClassVar[Mapping[str, str]] = {}
    # Regular expressions: a state dict is of this architecture if each matches (re.fullmatch) at least one of its keys.
    KEY_PATTERNS: ClassVar[tuple[str, ...]]
    # Another, of keys that some files hold and that are not read: what they hold follows from the Config.
    UNUSED_KEYS: ClassVar[str] = ""
    # What `to_precision` casts.
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    # What is done to the track before chunking: nothing, its peak is scaled to 0.9, or its mono mixture to zero mean
    # and unit variance. A checkpoint's YAML can ask for the last.
    normalisation: Literal["none", "peak", "standard"] = "peak"
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
    def key_prefix(cls, part: str) -> str:
        """What stands before the keys of a file in this class: the file of one stem's specialist or, by its number."""
        return ""

    def follow(self, part: str, blueprint: Blueprint) -> None:
        """Rebuild the part of that file without weights as its own blueprint says, if the architecture knows such."""

    def input_samples(self, length: int) -> int | None:
        """How many samples the model is given for a chunk of which `length` lie in the song; None for a whole chunk."""
        return None

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
        """Cast the linear layers or `CAST_LAYERS`; norms, rotary angles, STFT and the mask product stay in float32."""
        for module in self.modules():
            if isinstance(module, self.CAST_LAYERS):
                module.to(dtype)
