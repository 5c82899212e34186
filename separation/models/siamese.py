"""BS-SiameseRoFormer (unwa 2026), whose transformers have two streams (SiameseNorm, Li et al. 2026, arXiv:2602.08064).

Each layer reads both streams and adds its output to both. One of them is normed after every layer, the other only when
it is read. Attribute names match the keys of the published checkpoint. Axes: B batch, N token or frame, D feature,
K band.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from separation.models.base import Identity
from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig
from separation.models.layers import MOST_TOKENS, Attention, FeedForward, Pair, RMSNorm, RotaryEmbedding

Streams = tuple[Tensor, Tensor]  # the normed one, and the one that is normed only when it is read


class BSSiameseRoFormer(BSRoFormer):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; see RoFormer."""

    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (*BSRoFormer.KEY_PATTERNS, r"layers\.\d+\.\d+\.ln_y_attn\.\d+\.gamma")
    has_int8: ClassVar[bool] = False

    def __init__(self, config: BSRoFormerConfig, identity: Identity, *, attention: str = "sdpa") -> None:
        super().__init__(config, identity, attention=attention)
        if config.linear_transformer_depth or config.use_pope or config.skip_connection or config.use_shared_bias:
            raise ValueError(
                "linear_transformer_depth must be 0, and use_pope, skip_connection and use_shared_bias false, with two "
                "streams"
            )
        along_time, along_bands = RotaryEmbedding(config.dim_head), RotaryEmbedding(config.dim_head)
        make_attention = partial(Attention, config.dim, heads=config.heads, dim_head=config.dim_head, backend=attention)
        depths = (config.time_transformer_depth, config.freq_transformer_depth)
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.ModuleList(
                SiameseTransformer(
                    config.dim,
                    depth=depth,
                    make_attention=partial(make_attention, positions=positions),
                    before=block * sum(depths) + axis * depths[0],
                )
                for axis, (depth, positions) in enumerate(zip(depths, (along_time, along_bands), strict=True))
            )
            for block in range(config.depth)
        )

    def _features(self, spectrum: Tensor) -> Tensor:
        normed = self.band_split(self._bands(rearrange(spectrum, "b c f n ri -> n b f (c ri)")))
        streams = normed, normed
        batch = normed.shape[1]
        for along_time, along_bands in cast(Iterable[Pair], self.layers):
            streams = along_time(*(rearrange(x, "n b k d -> (b k) n d") for x in streams))
            streams = along_bands(*(rearrange(x, "(b k) n d -> (n b) k d", b=batch) for x in streams))
            streams = cast(Streams, tuple(rearrange(x, "(n b) k d -> n b k d", b=batch) for x in streams))
        features: Tensor = streams[0] + self.final_norm(streams[1])
        return features


class SiameseTransformer(nn.Module):
    """A transformer of two streams over one axis, each `[B, N, D]`. `before` counts the model's layers before it.

    `make_attention` is called for each layer.
    """

    def __init__(self, dim: int, *, depth: int, make_attention: Callable[[], nn.Module], before: int) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.ModuleList([make_attention(), FeedForward(dim)]) for _ in range(depth)
        )
        self.ln_y_attn: nn.ModuleList = _norms(dim, depth)
        self.ln_x_attn: nn.ModuleList = _norms(dim, depth)
        self.ln_y_mlp: nn.ModuleList = _norms(dim, depth)
        self.ln_x_mlp: nn.ModuleList = _norms(dim, depth)
        self.y_attn: nn.ParameterList = nn.ParameterList(nn.Parameter(torch.ones(dim)) for _ in range(depth))
        self._shares = [1 + (before + number) ** -0.5 for number in range(1, depth + 1)]

    def forward(self, normed: Tensor, plain: Tensor) -> Streams:
        if normed.device.type != "cpu" or torch.compiler.is_exporting():
            return self._all_layers(normed, plain)
        rows = max(1, MOST_TOKENS // normed.shape[1])  # as in a plain Transformer
        parts = zip(normed.split(rows), plain.split(rows), strict=True)
        done = zip(*(self._all_layers(x.contiguous(), y.contiguous()) for x, y in parts), strict=True)
        return cast(Streams, tuple(map(torch.cat, done)))

    def _all_layers(self, normed: Tensor, plain: Tensor) -> Streams:
        norms = zip(self.ln_y_attn, self.ln_x_attn, self.ln_y_mlp, self.ln_x_mlp, strict=True)
        layers = zip(cast(Iterable[Pair], self.layers), norms, self.y_attn, self._shares, strict=True)
        for (attention, feed_forward), (read, norm, read_again, norm_again), gains, share in layers:
            output: Any = attention(normed * gains.to(normed.dtype) + read(plain))
            plain, normed = plain + output, norm(normed + output * share)
            output = feed_forward(normed + read_again(plain))
            plain, normed = plain + output, norm_again(normed + output * share)
        return normed, plain


def _norms(dim: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList(RMSNorm(dim) for _ in range(depth))
