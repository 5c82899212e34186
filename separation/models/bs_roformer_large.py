"""BS-RoFormer Large v2 (unwa 2026), whose mask estimators have four more pairs of transformers before their MLPs.

Attribute names match the keys of the published checkpoint.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from separation.models.bs_roformer import BSRoFormer
from separation.models.kernels.roformer_gpu import GpuMaskEstimator, GpuNorm, GpuTransformer
from separation.models.layers import (
    Attention,
    RMSNorm,
    RotaryEmbedding,
    Transformer,
    VariantEstimator,
    band_masks,
    band_mlps,
)
from separation.models.roformer import axial

PAIRS = 4
HEADS, DIM_HEAD = 8, 64  # of the mask estimators' attention, whatever the rest of the model has


class BSRoFormerLarge(BSRoFormer):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; see RoFormer."""

    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        *BSRoFormer.KEY_PATTERNS,
        r"mask_estimators\.\d+\.layers\.\d+\.\d+\.layers\.0\.0\.to_qkv\.weight",
    )

    def _mask_estimator(self, config: Any, widths: tuple[int, ...], linear_layers: int, attention: str) -> nn.Module:
        return RefiningEstimator(config, widths, linear_layers, attention)


class RefiningEstimator(VariantEstimator):
    """Transformers along time and along bands in turn, a norm, and the MLPs of a MaskEstimator.

    `[N, B, K, D] -> [N, B, sum(widths)]`.
    """

    def __init__(self, config: Any, widths: tuple[int, ...], linear_layers: int, attention: str) -> None:
        super().__init__()
        expansion = config.mlp_expansion_factor
        self.to_freqs: nn.ModuleList = band_mlps(config.dim, widths, linear_layers=linear_layers, expansion=expansion)
        along_time, along_bands = RotaryEmbedding(DIM_HEAD), RotaryEmbedding(DIM_HEAD)
        make_attention = partial(Attention, config.dim, heads=HEADS, dim_head=DIM_HEAD, backend=attention)

        def transformer(positions: RotaryEmbedding) -> Transformer:
            return Transformer(config.dim, depth=1, make_attention=partial(make_attention, positions=positions))

        self.layers: nn.ModuleList = nn.ModuleList(
            nn.ModuleList(map(transformer, (along_time, along_bands))) for _ in range(PAIRS)
        )
        self.norm: RMSNorm = RMSNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return band_masks(self.to_freqs, self.norm(refined(self.layers, x)))

    def fused(self, fuse: Callable[[Transformer], nn.Module], fuse_mlps: Callable[[nn.Module], nn.Module]) -> nn.Module:
        layers = [nn.ModuleList(map(fuse, pair)) for pair in cast(Iterable[Iterable[Transformer]], self.layers)]
        return _Replaced(nn.ModuleList(layers), self.norm, fuse_mlps(self))

    def for_gpu(self, dtype: torch.dtype) -> nn.Module:
        carry = torch.zeros_like(self.norm.gamma)
        layers = []
        for pair in cast(Iterable[Iterable[Transformer]], self.layers):
            replaced = []
            for transformer in pair:
                replaced.append(GpuTransformer(transformer, carry, dtype))
                carry = replaced[-1].carry_out
            layers.append(nn.ModuleList(replaced))
        return _Replaced(nn.ModuleList(layers), GpuNorm(self.norm, carry, dtype), GpuMaskEstimator(self, dtype))


class _Replaced(nn.Module):
    """The parts of a RefiningEstimator, some of which are replaced by faster ones."""

    def __init__(self, layers: nn.ModuleList, norm: nn.Module, mlps: nn.Module) -> None:
        super().__init__()
        self.layers, self.norm, self.mlps = layers, norm, mlps

    def forward(self, x: Tensor) -> Tensor:
        masks: Tensor = self.mlps(self.norm(refined(self.layers, x.clone())))  # the layers work in place
        return masks


def refined(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """The features `[N, B, K, D]` after all pairs of transformers."""
    for along_time, along_bands in cast(Iterable[Any], layers):
        x = axial(x, along_time, along_bands)
    return x
