"""Hybrid Transformer Demucs (Rouard, Massa and Defossez 2023, arXiv:2211.08553): the network is the demucs package's.

One network that gives every stem (htdemucs, htdemucs_6s), or one fine-tuned specialist a stem (htdemucs_ft), of which
only the stem that it was tuned for is used.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import asdict, field, make_dataclass
from fractions import Fraction
from typing import Any

import torch
from demucs.htdemucs import HTDemucs as Network
from torch import Tensor, nn

from separation.models.base import SeparationModel


def _parameter(parameter: inspect.Parameter) -> tuple[str, Any, Any]:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return parameter.name, Any, field()
    return parameter.name, Any, field(default=tuple(default) if isinstance(default, list) else default)


# The hyper-parameters are the arguments of the package's class, under their names and with their defaults.
HTDemucsConfig = make_dataclass(
    "HTDemucsConfig",
    [_parameter(p) for p in inspect.signature(Network).parameters.values()],
    frozen=True,
    kw_only=True,
)


class HTDemucs(SeparationModel):
    """Chunks `[B, 2, T]` to estimates `[B, S, 2, T]`; T is `chunk_samples` exactly, as the transformer was trained."""

    Config = HTDemucsConfig
    normalisation = "standard"
    reflects_border = False
    fixed_chunk = True
    half_precision = False
    channels = 2

    def __init__(self, config: Any, *, specialists: Sequence[str] | None = None) -> None:
        super().__init__()
        arguments = asdict(config) | {"sources": list(config.sources), "segment": Fraction(config.segment)}
        if specialists is None:
            self.network = Network(**arguments)
            self.stems = tuple(config.sources)
        else:
            self.specialists = nn.ModuleDict({stem: Network(**arguments) for stem in specialists})
            self.stems = tuple(specialists)
        self._sources = tuple(config.sources)
        self._specialised = specialists is not None

    @classmethod
    def key_prefix(cls, stem: str | None) -> str:
        return "network." if stem is None else f"specialists.{stem}."

    def only(self, stems: tuple[str, ...]) -> "HTDemucs":
        if not self._specialised:
            return self
        fewer = copy.copy(self)  # shares the networks
        fewer.stems = stems
        return fewer

    def forward(self, chunks: Tensor) -> Tensor:
        if not self._specialised:
            return self.network(chunks)
        estimates = [self.specialists[stem](chunks)[:, self._sources.index(stem)] for stem in self.stems]
        return torch.stack(estimates, dim=1)
