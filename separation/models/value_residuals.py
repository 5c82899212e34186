"""RoFormers whose attention mixes in the values of the first block (Zhou et al. 2024, arXiv:2410.17897).

There are two forms, with the same keys. That of lucidrains/BS-RoFormer 0.5.1, with which unwa's model was trained, adds
the output of each layer to its input. The experimental ones of Music-Source-Separation-Training do so in the first
block only. Axes: B batch, N token, D feature, H head.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from separation.models.base import Identity
from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig
from separation.models.layers import MOST_TOKENS, Attention, FeedForward, Pair, RMSNorm, RotaryEmbedding
from separation.models.mel_band_roformer import MelBandRoFormer, MelBandRoFormerConfig
from separation.models.roformer import RoFormer, RoFormerConfig

MIXES = r"layers\.\d+\.\d+\.layers\.\d+\.0\.to_value_residual_mix\.weight"


@dataclass(frozen=True, kw_only=True)
class ExperimentalConfig(RoFormerConfig):
    """The hyper-parameters of both experimental RoFormers that the plain ones do not have."""

    use_value_residual_learning: bool = False
    num_residual_streams: int = 1

    def __post_init__(self) -> None:
        if self.num_residual_streams != 1:
            raise ValueError(
                "num_residual_streams must be 1: versions of the package hyper-connections compute different things"
            )


@dataclass(frozen=True, kw_only=True)
class BSRoFormerExperimentalConfig(ExperimentalConfig, BSRoFormerConfig):
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    def __post_init__(self) -> None:
        ExperimentalConfig.__post_init__(self)
        BSRoFormerConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class MelBandRoFormerExperimentalConfig(ExperimentalConfig, MelBandRoFormerConfig):
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    def __post_init__(self) -> None:
        ExperimentalConfig.__post_init__(self)
        MelBandRoFormerConfig.__post_init__(self)


class AttentionWithFirstValues(Attention):
    """Attention that also returns its values, and mixes those of the first block into them if `mixes`."""

    def __init__(self, dim: int, *, mixes: bool, **arguments: Any) -> None:
        super().__init__(dim, **arguments)
        self.to_value_residual_mix: nn.Linear | None = nn.Linear(dim, self.heads) if mixes else None

    def with_values(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[B, N, D]` and values `[B, H, N, dim_head]` to the same."""
        x = self.norm(x)
        q, k, v = rearrange(self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = v
        if self.to_value_residual_mix is not None:
            assert first is not None
            mixed = v.lerp(first, rearrange(self.to_value_residual_mix(x), "b n h -> b h n 1").sigmoid())
        gates = rearrange(self.to_gates(x), "b n h -> b h n 1").sigmoid()
        projected: Tensor = self.to_out(rearrange(self._attend(q, k, mixed) * gates, "b h n d -> b n (h d)"))
        return projected, v


class TransformerWithFirstValues(nn.Module):
    """A Transformer that takes the values of the first block and returns those of its own first layer.

    If not `always_adds`, it adds the outputs of layers to their inputs only in the first block.
    """

    def __init__(
        self, dim: int, *, depth: int, make_attention: Callable[[], nn.Module], norm_output: bool, always_adds: bool
    ) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.ModuleList([make_attention(), FeedForward(dim)]) for _ in range(depth)
        )
        self.norm: RMSNorm | nn.Identity = RMSNorm(dim) if norm_output else nn.Identity()
        self._always_adds = always_adds

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[B, N, D]` and values `[B, H, N, dim_head]` to the same."""
        if x.device.type != "cpu" or torch.compiler.is_exporting():
            return self._all_layers(x, first)
        rows = max(1, MOST_TOKENS // x.shape[1])  # as in a plain Transformer
        parts = x.split(rows)
        firsts = [None] * len(parts) if first is None else first.split(rows)
        done = [self._all_layers(part.contiguous(), values) for part, values in zip(parts, firsts, strict=True)]
        outputs, values = zip(*done, strict=True)
        return torch.cat(outputs), torch.cat(values)

    def _all_layers(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        own: Tensor | None = None
        adds = self._always_adds or first is None
        for attention, feed_forward in cast(Iterable[Pair], self.layers):
            output, values = attention.with_values(x, first)
            own = values if own is None else own
            x = output + x if adds else output
            output = feed_forward(x)
            x = output + x if adds else output
        assert own is not None
        return self.norm(x), own


class _ValueResiduals(RoFormer):
    """A RoFormer with transformers of this module in place of the plain ones."""

    always_adds: ClassVar[bool] = False

    def _replace_transformers(self, config: RoFormerConfig, attention: str, *, norm_output: bool, mixes: bool) -> None:
        if config.linear_transformer_depth or config.use_pope:
            raise ValueError("linear_transformer_depth must be 0 and use_pope false with value residuals")
        along_time, along_bands = RotaryEmbedding(config.dim_head), RotaryEmbedding(config.dim_head)
        make_attention = partial(
            AttentionWithFirstValues, config.dim, heads=config.heads, dim_head=config.dim_head, backend=attention
        )
        make = partial(TransformerWithFirstValues, config.dim, norm_output=norm_output, always_adds=self.always_adds)
        axes = ((config.time_transformer_depth, along_time), (config.freq_transformer_depth, along_bands))
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.ModuleList(
                make(
                    depth=depth, make_attention=partial(make_attention, positions=positions, mixes=mixes and block > 0)
                )
                for depth, positions in axes
            )
            for block in range(config.depth)
        )

    def _features(self, spectrum: Tensor) -> Tensor:
        x = self.band_split(self._bands(rearrange(spectrum, "b c f n ri -> n b f (c ri)")))
        frames, batch = x.shape[:2]
        time_values: Tensor | None = None
        band_values: Tensor | None = None
        blocks_sum: Tensor | None = None
        for along_time, along_bands in cast(Iterable[Pair], self.layers):
            if blocks_sum is not None:
                x = x + blocks_sum
            x, values = along_time(rearrange(x, "n b k d -> (b k) n d"), time_values)
            time_values = values if time_values is None else time_values
            x, values = along_bands(rearrange(x, "(b k) n d -> (n b) k d", b=batch), band_values)
            band_values = values if band_values is None else band_values
            x = x.unflatten(0, (frames, batch))
            if self._skips:
                blocks_sum = x if blocks_sum is None else blocks_sum + x
        features: Tensor = self.final_norm(x)
        return features


class BSRoFormerValueResidual(_ValueResiduals, BSRoFormer):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; see RoFormer."""

    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (*BSRoFormer.KEY_PATTERNS, MIXES)
    always_adds = True
    has_int8 = False

    def __init__(self, config: BSRoFormerConfig, identity: Identity, *, attention: str = "sdpa") -> None:
        super().__init__(config, identity, attention=attention)
        self._replace_transformers(config, attention, norm_output=False, mixes=True)


class BSRoFormerExperimental(_ValueResiduals, BSRoFormer):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; see RoFormer. Only its YAML tells it."""

    Config: ClassVar[type] = BSRoFormerExperimentalConfig
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (r"(?!)",)
    has_int8 = False

    def __init__(self, config: BSRoFormerExperimentalConfig, identity: Identity, *, attention: str = "sdpa") -> None:
        super().__init__(config, identity, attention=attention)
        self._replace_transformers(config, attention, norm_output=False, mixes=config.use_value_residual_learning)


class MelBandRoFormerExperimental(_ValueResiduals, MelBandRoFormer):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; see RoFormer. Only its YAML tells it."""

    Config: ClassVar[type] = MelBandRoFormerExperimentalConfig
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (r"(?!)",)
    has_int8 = False

    def __init__(
        self, config: MelBandRoFormerExperimentalConfig, identity: Identity, *, attention: str = "sdpa"
    ) -> None:
        super().__init__(config, identity, attention=attention)
        self._replace_transformers(config, attention, norm_output=True, mixes=config.use_value_residual_learning)
