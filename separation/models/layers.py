"""The layers of the RoFormers, and two that other models share.

Module and attribute names match the keys of the community's checkpoints. Linear layers may be cast to bfloat16 or
float16; norms and rotary angles are computed in float32. Axes: B batch, N token of a sequence, D feature, H head,
K band.
"""

import math
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from rotary_embedding_torch import RotaryEmbedding as PackagedEmbedding
from rotary_embedding_torch import apply_rotary_emb
from torch import Tensor, nn

from separation.models.attention import BACKENDS, AttentionBackend
from separation.models.kernels.native import NotFusedError

MOST_TOKENS = 8192  # that a transformer processes at once on a CPU
Pair = tuple[Any, Any]  # two modules of a ModuleList, which is not typed


class RMSNorm(nn.Module):
    """Scales each feature vector to the length sqrt(D), then by a learned gain. Computes in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale: float = dim**0.5
        self.gamma: nn.Parameter = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = F.normalize(x.float(), dim=-1) * (self.scale * self.gamma)
        return normed.to(x.dtype)


class GroupNorm(nn.GroupNorm):
    """PyTorch's GroupNorm, computed in float32; the result has the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm, computed in float32; the result has the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


def _frequencies(count: int, theta: float) -> nn.Parameter:
    """Radians per token, from 1 down to almost 1 / theta, `[count]`. Checkpoints store them as a parameter."""
    if count < 2:  # the package would divide by zero
        raise ValueError("dim_head is too small for position embeddings: correct it")
    embedding = PackagedEmbedding(2 * count, theta=theta, cache_if_possible=False, cache_max_seq_len=0)
    frequencies: nn.Parameter = embedding.freqs
    return frequencies


def rotated(angles: Tensor, x: Tensor) -> Tensor:
    """Interleaved pairs of features, `[..., N, dim]`, rotated by `angles`, `[N, dim]`, which are equal in pairs."""
    # A complex product would be faster, but its rounding depends on the memory address.
    result: Tensor = apply_rotary_emb(angles, x)
    return result


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (RoFormer, Su et al. 2021) over interleaved pairs, `[..., N, dim] -> [..., N, dim]`.

    Like that of the package rotary-embedding-torch, but without cached tables, and with positions in float32 whatever
    the input's dtype.
    """

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.freqs: nn.Parameter = _frequencies(dim // 2, theta)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
        angles = torch.outer(positions, self.freqs.float()).repeat_interleave(2, dim=-1)  # [N, dim]
        return rotated(angles, x.float()).to(x.dtype)


class PolarEmbedding(nn.Module):
    """Polar position embedding (Gopalakrishnan et al. 2025, arXiv:2509.10534), `[B, H, N, dim] -> [B, H, N, 2 * dim]`.

    Each feature becomes a point in the plane: the feature sets its radius, the position its angle.
    """

    def __init__(self, dim: int, heads: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.inv_freqs: nn.Parameter = _frequencies(dim, theta)
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(heads, dim))  # radians, added to the angles of keys

    def forward(self, x: Tensor, *, is_key: bool) -> Tensor:
        positions = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
        angles = torch.outer(positions, self.inv_freqs.float())  # [N, dim]
        if is_key:
            angles = angles + self.bias.float().clamp(-2 * math.pi, 0)[:, None]  # [H, N, dim]
        radii = F.softplus(x.float())
        return torch.cat((radii * angles.cos(), radii * angles.sin()), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention with position embeddings and a sigmoid gate per head, `[B, N, D] -> [B, N, D]`."""

    def __init__(
        self, dim: int, *, heads: int, dim_head: int, positions: RotaryEmbedding | PolarEmbedding, backend: str
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.attend: AttentionBackend = BACKENDS[backend]
        self.rotary_embed: RotaryEmbedding | None = positions if isinstance(positions, RotaryEmbedding) else None
        self.pope_embed: PolarEmbedding | None = positions if isinstance(positions, PolarEmbedding) else None
        self.norm: RMSNorm = RMSNorm(dim)
        self.to_qkv: nn.Linear = nn.Linear(dim, inner * 3, bias=False)
        self.to_gates: nn.Linear = nn.Linear(dim, heads)
        self.to_out: nn.Sequential = nn.Sequential(nn.Linear(inner, dim, bias=False))

    def add_biases(self, qkv: nn.Parameter, out: nn.Parameter) -> None:
        """Set the biases that some checkpoints have, `[3 * inner]` and `[D]`. Several layers may share them."""
        self.to_qkv.bias = qkv
        cast(nn.Linear, self.to_out[0]).bias = out

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        out = self._attend(q, k, v)
        gates = rearrange(self.to_gates(x), "b n h -> b h n 1").sigmoid()
        projected: Tensor = self.to_out(rearrange(out * gates, "b h n d -> b n (h d)"))
        return projected

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.rotary_embed is not None:
            return self.attend(self.rotary_embed(q), self.rotary_embed(k), v)
        assert self.pope_embed is not None
        # The embedding doubles dim_head. Backends need q, k and v of one size, and scale by the size of q.
        q, k = self.pope_embed(q, is_key=False) * 2**0.5, self.pope_embed(k, is_key=True)
        return self.attend(q, k, F.pad(v, (0, v.shape[-1])))[..., : v.shape[-1]]


class LinearAttention(nn.Module):
    """Attention between features instead of tokens (El-Nouby et al. 2021, arXiv:2106.09681), `[B, N, D] -> [B, N, D]`.

    Its cost grows linearly with N. It has no position embeddings.
    """

    SCALE = 8.0

    def __init__(self, dim: int, *, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.norm: RMSNorm = RMSNorm(dim)
        self.to_qkv: nn.Sequential = nn.Sequential(nn.Linear(dim, inner * 3, bias=False))
        # The logarithm of a factor for the scores.
        self.temperature: nn.Parameter = nn.Parameter(torch.ones(heads, 1, 1))
        self.to_out: nn.Sequential = nn.Sequential(nn.Identity(), nn.Linear(inner, dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b n (three h d) -> three b h d n", three=3, h=self.heads)
        q, k = (F.normalize(each.float(), dim=-1) for each in (q, k))
        weights = (self.SCALE * self.temperature.exp() * (q @ k.mT)).softmax(dim=-1)  # [B, H, dim_head, dim_head]
        projected: Tensor = self.to_out(rearrange(weights.to(v.dtype) @ v, "b h d n -> b n (h d)"))
        return projected


class FeedForward(nn.Module):
    """A norm, then a linear layer, GELU and a linear layer back, `[..., D] -> [..., D]`.

    The identity stands for a dropout of training, so that the indices in `net` match the checkpoints' keys.
    """

    def __init__(self, dim: int, *, expansion: int = 4) -> None:
        super().__init__()
        inner = dim * expansion
        self.net: nn.Sequential = nn.Sequential(
            RMSNorm(dim), nn.Linear(dim, inner), nn.GELU(), nn.Identity(), nn.Linear(inner, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class Transformer(nn.Module):
    """A pre-norm transformer over one axis, `[B, N, D] -> [B, N, D]`.

    `make_attention` is called for each layer; it returns an Attention or a LinearAttention.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        make_attention: Callable[[], nn.Module],
        norm_output: bool = False,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.ModuleList([make_attention(), FeedForward(dim, expansion=expansion)]) for _ in range(depth)
        )
        self.norm: RMSNorm | nn.Identity = RMSNorm(dim) if norm_output else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_exporting():
            return self._all_layers(x)
        # The intermediate results of a few sequences fit into a CPU's caches; those of all do not.
        parts = x.split(max(1, MOST_TOKENS // x.shape[1]))
        return torch.cat([self._all_layers(part.contiguous()) for part in parts])

    def _all_layers(self, x: Tensor) -> Tensor:
        for attention, feed_forward in cast(Iterable[Pair], self.layers):
            x = x + attention(x)
            x = x + feed_forward(x)
        normed: Tensor = self.norm(x)
        return normed


def fusable_layers(transformer: nn.Module) -> Iterable[Pair]:
    """The pairs of attention and feed-forward layers of a transformer, for the kernels, which know no other layers.

    Raises NotFusedError for linear attention, polar positions, and anything but a plain Transformer.
    """
    if type(transformer) is not Transformer:
        raise NotFusedError(f"it does not support {_words(transformer)}")
    pairs = cast(Iterable[Pair], transformer.layers)
    for attention, _ in pairs:
        if type(attention) is not Attention:
            raise NotFusedError(f"it does not support {_words(attention)}")
        if attention.rotary_embed is None:
            raise NotFusedError("it does not support polar positions")
    return pairs


def _words(module: nn.Module) -> str:
    """A class's name as words: linear attention for LinearAttention."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(module).__name__).lower()


class BandSplit(nn.Module):
    """A norm and a linear layer for each band, `[..., sum(widths)] -> [..., K, D]`. Casts to the layers' dtype."""

    def __init__(self, dim: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths
        self.to_features: nn.ModuleList = nn.ModuleList(
            nn.Sequential(RMSNorm(width), nn.Linear(width, dim)) for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        bands = zip(x.split(self.widths, dim=-1), cast(Iterable[Pair], self.to_features), strict=True)
        return torch.stack([linear(norm(band).to(linear.weight.dtype)) for band, (norm, linear) in bands], dim=-2)


class MaskEstimator(nn.Module):
    """An MLP for each band, with tanh between its layers and a GLU at the end, `[..., K, D] -> [..., sum(widths)]`.

    `linear_layers` counts all linear layers of the MLP, including the last.
    """

    def __init__(self, dim: int, widths: tuple[int, ...], *, linear_layers: int, expansion: int) -> None:
        super().__init__()
        self.to_freqs: nn.ModuleList = band_mlps(dim, widths, linear_layers=linear_layers, expansion=expansion)

    def forward(self, x: Tensor) -> Tensor:
        return band_masks(self.to_freqs, x)


class VariantEstimator(nn.Module):
    """A mask estimator with other layers than MaskEstimator's, `[N, B, K, D] -> [N, B, sum(widths)]`."""

    def fused(self, fuse: Callable[[Transformer], nn.Module], fuse_mlps: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """An equal module for CPUs, from float32 to float32, with some layers replaced.

        `fuse` replaces a transformer, `fuse_mlps` the `to_freqs` of a module if they are those of a MaskEstimator.
        Raises NotFusedError for unsupported layers; the estimator is then unchanged.
        """
        return self

    def for_gpu(self, dtype: torch.dtype) -> nn.Module:
        """An equal module for a CUDA GPU, from float32 to float32, whose products may be in 16 bits."""
        return self


def chosen(spectra: Tensor, outputs: tuple[int, ...]) -> Tensor:
    """Some of the stems' spectrograms `[B, S, ...]`."""
    if outputs == tuple(range(spectra.shape[1])):
        return spectra
    return torch.stack([spectra[:, index] for index in outputs], dim=1)


def band_mlps(dim: int, widths: tuple[int, ...], *, linear_layers: int, expansion: int) -> nn.ModuleList:
    """The MLPs of a MaskEstimator."""
    hidden = [dim * expansion] * (linear_layers - 1)
    return nn.ModuleList(nn.Sequential(_tanh_mlp([dim, *hidden, width * 2]), nn.GLU(dim=-1)) for width in widths)


def band_masks(to_freqs: nn.ModuleList, x: Tensor) -> Tensor:
    """Apply the network of each band to its features, `[..., K, D] -> [..., sum(widths)]`."""
    return torch.cat([network(band) for band, network in zip(x.unbind(dim=-2), to_freqs, strict=True)], dim=-1)


def _tanh_mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def join_weights(lstm: nn.LSTM) -> None:
    """Store an LSTM's weights in one block of memory, as cuDNN needs them. PyTorch does so, except in bfloat16."""
    weights = cast(list[Tensor], lstm._flat_weights)
    are_separate = len({weight.data_ptr() for weight in weights}) == len(weights)
    if weights[0].is_cuda and weights[0].dtype == torch.bfloat16 and are_separate:
        mode, projected = torch.backends.cudnn.rnn.get_cudnn_mode("LSTM"), 0
        sizes = lstm.input_size, mode, lstm.hidden_size, projected, lstm.num_layers
        torch._cudnn_rnn_flatten_weight(weights, 4, *sizes, lstm.batch_first, lstm.bidirectional)
