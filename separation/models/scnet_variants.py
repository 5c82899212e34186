"""Two variants of SCNet in Music-Source-Separation-Training: with masks, and with transformers in place of LSTMs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from separation.models.attention import LAYER_BACKENDS, use_backend
from separation.models.base import Identity
from separation.models.kernels.native import NotFusedError
from separation.models.layers import Attention, GroupNorm, RotaryEmbedding, Transformer, chosen
from separation.models.scnet import Network, SCNet, SCNetConfig
from separation.models.shapes import Shapes, quotient
from separation.models.stft import Window

MASK_FEATURES = 64


class SCNetMasked(SCNet):
    """SCNet whose output is made a complex mask for the mixture; see SCNet.

    Each bin has a learned embedding, which is added to the spectrogram before the encoder.
    """

    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (*SCNet.KEY_PATTERNS, r"pos_embed_f", r"mask_layer\.0\.weight")
    WINDOW: ClassVar[Window] = "hann"

    def __init__(self, config: SCNetConfig, identity: Identity) -> None:
        super().__init__(config, identity)
        features = 2 * self.channels * config.num_stems  # real and imaginary parts
        self.pos_embed_f: nn.Parameter = nn.Parameter(torch.zeros(1, 2 * self.channels, config.nfft // 2 + 1, 1))
        self.mask_layer: nn.Sequential = nn.Sequential(
            nn.Conv2d(features, MASK_FEATURES, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(MASK_FEATURES, features, 1),
            nn.Tanh(),
        )

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        bins = shapes.size("pos_embed_f", 2)
        return super().sizes_in(shapes, config) | {"nfft": None if bins is None else 2 * (bins - 1)}

    def _spectra(self, spectrum: Tensor, network: Network) -> Tensor:
        embedding = rearrange(self.pos_embed_f, "1 (c ri) f n -> c f n ri", ri=2)
        features = network(spectrum + embedding, tuple(range(self.config.num_stems)))
        sizes = {"c": self.channels, "ri": 2}
        x = rearrange(features, "b s c n f ri -> b (s c ri) f n")
        first = cast(nn.Conv2d, self.mask_layer[0])
        mask = self.mask_layer(x.to(first.weight.dtype)).float()
        mask = chosen(rearrange(mask, "b (s c ri) f n -> b s c n f ri", **sizes), self._outputs)
        real, imaginary = rearrange(spectrum, "b c f n ri -> b 1 c n f ri").unbind(-1)
        mask_real, mask_imaginary = mask.unbind(-1)
        product = real * mask_real - imaginary * mask_imaginary, real * mask_imaginary + imaginary * mask_real
        return torch.stack(product, dim=-1)


@dataclass(frozen=True, kw_only=True)
class SCNetTranConfig(SCNetConfig):
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    tran_rotary_embedding_dim: int = 64
    tran_depth: int = 1
    tran_heads: int = 8
    tran_dim_head: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tran_rotary_embedding_dim > self.tran_dim_head:
            raise ValueError(
                f"tran_rotary_embedding_dim is {self.tran_rotary_embedding_dim}, more than tran_dim_head: correct it"
            )


class SCNetTran(SCNet):
    """SCNet with transformers in place of LSTMs; see SCNet."""

    Config: ClassVar[type] = SCNetTranConfig
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        SCNet.KEY_PATTERNS[0],
        r"separation_net\.dp_modules\.0\.time_layer\.layers\.0\.0\.to_qkv\.weight",
    )
    TRAINING_KEYS = frozenset({"tran_attn_dropout", "tran_ff_dropout", "tran_flash_attn"})
    UNUSED_KEYS: ClassVar[str] = r"first_conv\.weight"  # its authors' program never applies it
    no_core_because = "there are none for an SCNet with transformers"

    def __init__(self, config: SCNetTranConfig, identity: Identity) -> None:
        super().__init__(config, identity)
        self.head_size: int | None = config.tran_dim_head

    @classmethod
    def _dual_paths(cls, config: Any) -> Iterator[nn.Module]:
        positions = [RotaryEmbedding(config.tran_rotary_embedding_dim) for _ in range(2)]  # shared by all layers
        heads = {"heads": config.tran_heads, "dim_head": config.tran_dim_head}
        for i in range(config.num_dplayer):
            size = config.dims[-1] * (1 + i % 2)
            along_time, along_bins = (
                Transformer(
                    size,
                    depth=config.tran_depth,
                    make_attention=partial(Attention, size, **heads, positions=each, backend="sdpa"),
                    norm_output=True,
                )
                for each in positions
            )
            yield TransformerPath(size, along_time=along_time, along_bins=along_bins)

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        layers = "separation_net.dp_modules.0.time_layer.layers"
        heads = shapes.size(f"{layers}.0.0.to_gates.weight", 0)
        frequencies = shapes.size(f"{layers}.0.0.rotary_embed.freqs", 0)
        return super().sizes_in(shapes, config) | {
            "tran_depth": shapes.count(re.escape(layers) + r"\.(\d+)\..*"),
            "tran_heads": heads,
            "tran_dim_head": quotient(shapes.size(f"{layers}.0.0.to_qkv.weight", 0), heads and 3 * heads),
            "tran_rotary_embedding_dim": frequencies and 2 * frequencies,
        }

    def prepare(self, dtype: torch.dtype, *, attention: str | None = None) -> None:
        if attention in LAYER_BACKENDS:
            raise NotFusedError(self.no_core_because)
        if attention is not None:
            use_backend(self, attention)
        super().prepare(dtype, attention=attention)


class TransformerPath(nn.Module):
    """A transformer along bins, then one along frames, `[B, F, N, D] -> [B, F, N, D]`."""

    def __init__(self, size: int, *, along_time: nn.Module, along_bins: nn.Module) -> None:
        super().__init__()
        self.norm_layers: nn.ModuleList = nn.ModuleList(GroupNorm(1, size) for _ in range(2))
        self.time_layer: nn.Module = along_time
        self.freq_layer: nn.Module = along_bins

    def forward(self, x: Tensor) -> Tensor:
        dtype = next(weight.dtype for name, weight in self.time_layer.named_parameters() if "to_qkv" in name)
        steps = zip(self.norm_layers, (self.freq_layer, self.time_layer), ("(b n) f d", "(b f) n d"), strict=True)
        sizes = {"b": x.shape[0], "f": x.shape[1], "n": x.shape[2]}
        for norm, transformer, sequences in steps:
            y = rearrange(norm(x.permute(0, 3, 1, 2)), f"b d f n -> {sequences}").to(dtype)
            x = x + rearrange(transformer(y), f"{sequences} -> b f n d", **sizes)
        return x
