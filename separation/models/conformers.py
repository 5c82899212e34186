"""BS-Conformer and MelBand-Conformer of Music-Source-Separation-Training: RoFormers with conformers along both axes.

A conformer (Gulati et al. 2020, arXiv:2005.08100) has a convolution over neighbouring tokens besides its attention.
Attribute names match the keys of the checkpoints. Axes: B batch, N token, D feature.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from separation.models.base import Identity
from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig
from separation.models.layers import (
    MOST_TOKENS,
    Attention,
    FeedForward,
    LinearAttention,
    RMSNorm,
    RotaryEmbedding,
    Transformer,
)
from separation.models.mel_band_roformer import MelBandRoFormer, MelBandRoFormerConfig
from separation.models.roformer import RoFormer, RoFormerConfig
from separation.models.shapes import Shapes, quotient


@dataclass(frozen=True, kw_only=True)
class ConformersConfig(RoFormerConfig):
    """The hyper-parameters of both architectures that the RoFormers do not have."""

    time_conformer_depth: int = 2
    freq_conformer_depth: int = 2
    linear_conformer_depth: int = 0  # of a transformer with linear attention over all tokens, first in each block
    ff_mult: int = 4
    conv_expansion_factor: int = 2
    conv_kernel_size: int = 31  # tokens
    zero_dc: bool = True  # as their only implementation has it

    def __post_init__(self) -> None:
        if not self.conv_kernel_size % 2:
            raise ValueError(f"conv_kernel_size {self.conv_kernel_size} must be odd")
        if self.use_pope:
            raise ValueError("use_pope must be false: conformers have rotary positions")


@dataclass(frozen=True, kw_only=True)
class BSConformerConfig(ConformersConfig, BSRoFormerConfig):
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    def __post_init__(self) -> None:
        ConformersConfig.__post_init__(self)
        BSRoFormerConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class MelBandConformerConfig(ConformersConfig, MelBandRoFormerConfig):
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    def __post_init__(self) -> None:
        ConformersConfig.__post_init__(self)
        MelBandRoFormerConfig.__post_init__(self)


class BatchNorm(nn.BatchNorm1d):
    """PyTorch's BatchNorm1d, computed in float32; the result has the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


class HalfStep(nn.Module):
    """Half of a feed-forward layer's output."""

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        self.ff: FeedForward = FeedForward(dim, expansion=expansion)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ff(x) * 0.5
        return y


def convolution_between_linear_layers(norm: nn.Module, along: nn.Module, *, dim: int, inner: int) -> nn.Sequential:
    """A norm, then a convolution `along` the tokens `[B, inner, N]` between linear layers, `[B, N, D] -> [B, N, D]`.

    The Rearranges have the places of the checkpoints' ones, so that the indices match their keys.
    """
    return nn.Sequential(
        norm,
        Rearrange("b n d -> b d n"),
        nn.Conv1d(dim, inner * 2, 1),
        nn.GLU(dim=1),
        along,
        BatchNorm(inner),
        nn.SiLU(),
        nn.Conv1d(inner, dim, 1),
        Rearrange("b d n -> b n d"),
    )


class Convolution(nn.Module):
    """A convolution of each feature along the tokens, between linear layers, `[B, N, D] -> [B, N, D]`."""

    def __init__(self, dim: int, expansion: int, kernel_size: int) -> None:
        super().__init__()
        inner = dim * expansion
        along = nn.Conv1d(inner, inner, kernel_size, padding=kernel_size // 2, groups=inner)
        self.net: nn.Sequential = convolution_between_linear_layers(RMSNorm(dim), along, dim=dim, inner=inner)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class ConformerBlock(nn.Module):
    """Half a feed-forward layer, attention, a convolution and another half, each beside a residual; then a norm."""

    def __init__(self, config: Any, attention: Attention) -> None:
        super().__init__()
        self.ff1: HalfStep = HalfStep(config.dim, config.ff_mult)
        self.attn = attention
        self.conv: Convolution = Convolution(config.dim, config.conv_expansion_factor, config.conv_kernel_size)
        self.ff2: HalfStep = HalfStep(config.dim, config.ff_mult)
        self.out_norm: RMSNorm = RMSNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.ff1, self.attn, self.conv, self.ff2):
            x = x + layer(x)
        normed: Tensor = self.out_norm(x)
        return normed


class Conformer(nn.Module):
    """Blocks along one axis, `[B, N, D] -> [B, N, D]`."""

    def __init__(self, blocks: Iterable[ConformerBlock]) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.compiler.is_exporting():
            return self._all_layers(x)
        parts = x.split(max(1, MOST_TOKENS // x.shape[1]))  # as in a Transformer
        return torch.cat([self._all_layers(part.contiguous()) for part in parts])

    def _all_layers(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


class _Conformers(RoFormer):
    """A RoFormer with conformers in place of its transformers."""

    TRAINING_KEYS = RoFormer.TRAINING_KEYS | {"conv_dropout"}
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv1d)
    has_int8 = False

    def _replace_transformers(self, config: Any, attention: str) -> None:
        heads = {"heads": config.heads, "dim_head": config.dim_head}
        positions = RotaryEmbedding(config.dim_head), RotaryEmbedding(config.dim_head)
        depths = config.time_conformer_depth, config.freq_conformer_depth

        def conformers() -> Iterator[nn.Module]:
            if depth := config.linear_conformer_depth:
                linear = partial(LinearAttention, config.dim, **heads)
                yield Transformer(config.dim, depth=depth, make_attention=linear)
            for depth, rotary in zip(depths, positions, strict=True):
                make = partial(Attention, config.dim, **heads, positions=rotary, backend=attention)
                yield Conformer(ConformerBlock(config, make()) for _ in range(depth))

        self.layers: nn.ModuleList = nn.ModuleList(nn.ModuleList(conformers()) for _ in range(config.depth))

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        is_linear = shapes.count(r"layers\.0\.(\d+)\..*") > 2
        time, bands = (1, 2) if is_linear else (0, 1)
        block = f"layers.0.{time}.layers.0"
        dim, heads = (
            shapes.size("band_split.to_features.0.1.weight", 0),
            shapes.size(f"{block}.attn.to_gates.weight", 0),
        )
        qkv = shapes.size(f"{block}.attn.to_qkv.weight", 0)
        found = super().sizes_in(shapes, config)
        unused = dict.fromkeys(("linear_transformer_depth", "time_transformer_depth", "freq_transformer_depth"))
        return (
            found
            | unused
            | {
                "heads": heads,
                "dim_head": quotient(qkv, heads and 3 * heads),
                "time_conformer_depth": shapes.count(rf"layers\.0\.{time}\.layers\.(\d+)\..*"),
                "freq_conformer_depth": shapes.count(rf"layers\.0\.{bands}\.layers\.(\d+)\..*"),
                "linear_conformer_depth": shapes.count(r"layers\.0\.0\.layers\.(\d+)\..*") if is_linear else 0,
                "ff_mult": quotient(shapes.size(f"{block}.ff1.ff.net.1.weight", 0), dim),
                "conv_expansion_factor": quotient(shapes.size(f"{block}.conv.net.4.weight", 0), dim),
                "conv_kernel_size": shapes.size(f"{block}.conv.net.4.weight", 2),
            }
        )


class BSConformer(_Conformers, BSRoFormer):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; see RoFormer."""

    Config: ClassVar[type] = BSConformerConfig
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"band_split\.to_features\..*",
        r"layers\.\d+\.\d+\.layers\.\d+\.attn\.to_qkv\.weight",
        r"final_norm\.gamma",
    )

    def __init__(self, config: BSConformerConfig, identity: Identity, *, attention: str = "sdpa") -> None:
        super().__init__(config, identity, attention=attention)
        self._replace_transformers(config, attention)


class MelBandConformer(_Conformers, MelBandRoFormer):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; see RoFormer."""

    Config: ClassVar[type] = MelBandConformerConfig
    more_mask_layers = 0
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"band_split\.to_features\..*",
        r"layers\.\d+\.\d+\.layers\.\d+\.attn\.to_qkv\.weight",
    )

    def __init__(self, config: MelBandConformerConfig, identity: Identity, *, attention: str = "sdpa") -> None:
        super().__init__(config, identity, attention=attention)
        self._replace_transformers(config, attention)
