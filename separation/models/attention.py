"""Attention backends, each `(q, k, v) -> out` over `[B, heads, tokens, dim_head]`, without mask or dropout."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionBackend = Callable[[Tensor, Tensor, Tensor], Tensor]


def einsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, softmax(q k^T / sqrt(dim_head)) v, in plain operations: the reference for the others."""
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's fused kernel; it picks flash, memory-efficient or plain attention by device and dtype."""
    return F.scaled_dot_product_attention(q, k, v)


BACKENDS: dict[str, AttentionBackend] = {"sdpa": sdpa_attention, "einsum": einsum_attention}
