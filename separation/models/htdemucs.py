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
import torch.nn.functional as F
from demucs.htdemucs import HTDemucs as Network
from torch import Tensor, nn

from separation.models.attention import BACKENDS
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
        plain = (module for module in self.modules() if isinstance(module, nn.MultiheadAttention))
        self.head_size = next((module.head_dim for module in plain), None)
        self._precision = torch.float32

    @classmethod
    def key_prefix(cls, stem: str | None) -> str:
        return "network." if stem is None else f"specialists.{stem}."

    def only(self, stems: tuple[str, ...]) -> "HTDemucs":
        if not self._specialised:
            return self
        fewer = copy.copy(self)  # shares the networks
        fewer.stems = stems
        return fewer

    def to_precision(self, dtype: torch.dtype) -> None:
        self._precision = dtype

    def prepare(self, dtype: torch.dtype, *, attention: str | None = None) -> None:
        if attention is not None:
            for module in list(self.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.MultiheadAttention):
                        setattr(module, name, MultiheadAttention(child, attention))
        super().prepare(dtype)

    def forward(self, chunks: Tensor) -> Tensor:
        # Weights stay in float32 and are cast in passing: norms, STFT and residual sums choose their own precision.
        with torch.autocast(chunks.device.type, self._precision, enabled=self._precision != torch.float32):
            if not self._specialised:
                return self.network(chunks).float()
            estimates = [self.specialists[stem](chunks)[:, self._sources.index(stem)] for stem in self.stems]
            return torch.stack(estimates, dim=1).float()


class MultiheadAttention(nn.Module):
    """An `nn.MultiheadAttention` on its weights by one of our backends; batch first, no masks, no attention weights."""

    def __init__(self, plain: nn.MultiheadAttention, backend: str) -> None:
        super().__init__()
        assert plain.batch_first and plain.in_proj_weight is not None and plain.bias_k is None
        self.in_proj_weight, self.in_proj_bias, self.out_proj = plain.in_proj_weight, plain.in_proj_bias, plain.out_proj
        self.heads = plain.num_heads
        self.attend = BACKENDS[backend]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """`[B, N, D]` and twice `[B, M, D]` to `[B, N, D]`; key and value are the same."""
        assert attn_mask is None and key_padding_mask is None and not need_weights and key is value
        dim = query.shape[-1]
        if query is key:
            q, k, v = self._heads(query, 0, 3 * dim).chunk(3, dim=1)
        else:
            q = self._heads(query, 0, dim)
            k, v = self._heads(key, dim, 3 * dim).chunk(2, dim=1)
        with torch.autocast(q.device.type, enabled=False):  # it would compute the softmax in float32
            out = self.attend(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    def _heads(self, x: Tensor, start: int, stop: int) -> Tensor:
        """These rows of the input projection, `[B, heads of all, tokens, dim_head]`."""
        projected = F.linear(x, self.in_proj_weight[start:stop], self.in_proj_bias[start:stop])
        return projected.unflatten(-1, (-1, x.shape[-1] // self.heads)).transpose(1, 2)
