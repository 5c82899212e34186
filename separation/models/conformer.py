"""The blocks of the package conformer (Gulati et al. 2020, arXiv:2005.08100), and the two models made of them.

Both are Music-Source-Separation-Training's: a Conformer over whole frames of the magnitude spectrogram, and the first
form of its MelBand-Conformer. Positions are relative (Shaw et al. 2018, arXiv:1803.02155). Attribute names match the
keys of the checkpoints. Axes: B batch, N frame or token, D feature, H head, S stem.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.models.base import Identity, Normalisation, SeparationModel, Transform
from separation.models.conformers import MelBandConformer, MelBandConformerConfig, convolution_between_linear_layers
from separation.models.layers import MOST_TOKENS
from separation.models.mel_band_roformer import MelBandRoFormer
from separation.models.roformer import RoFormer
from separation.models.stft import Stft

MOST_DISTANCE = 512  # tokens; those that are further apart count as so far


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """The hyper-parameters, with the names that community YAML files use in `model:`, and in `stft:`."""

    n_fft: int
    hop_length: int
    win_length: int = 0  # 0 means n_fft
    in_channels: int = 2
    sources: int = 2
    freq_bins: int = 2049
    embed_dim: int = 512
    depth: int = 8
    dim_head: int = 64
    heads: int = 8
    ff_mult: int = 4
    conv_expansion_factor: int = 2
    conv_kernel_size: int = 31  # frames

    def __post_init__(self) -> None:
        if self.freq_bins != self.n_fft // 2 + 1:
            raise ValueError(f"freq_bins is {self.freq_bins} and n_fft {self.n_fft}: correct one of them")


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm, computed in float32; the result has the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


class RelativeAttention(nn.Module):
    """Multi-head self-attention with learned vectors for the distances between tokens, `[B, N, D] -> [B, N, D]`."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.to_q: nn.Linear = nn.Linear(dim, inner, bias=False)
        self.to_kv: nn.Linear = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out: nn.Linear = nn.Linear(inner, dim)
        self.rel_pos_emb: nn.Embedding = nn.Embedding(2 * MOST_DISTANCE + 1, dim_head)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(each, "b n (h d) -> b h n d", h=self.heads)
            for each in (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1))
        )
        tokens = torch.arange(x.shape[1], device=x.device)
        distances = (tokens[:, None] - tokens).clamp(-MOST_DISTANCE, MOST_DISTANCE) + MOST_DISTANCE  # [N, N]
        by_distance = q @ self.rel_pos_emb.weight.to(q.dtype).T  # [B, H, N, 2 * MOST_DISTANCE + 1]
        scores = q @ k.mT + by_distance.gather(3, distances.expand(*q.shape[:2], -1, -1))
        weights = (scores.float() * q.shape[-1] ** -0.5).softmax(dim=-1).to(v.dtype)
        projected: Tensor = self.to_out(rearrange(weights @ v, "b h n d -> b n (h d)"))
        return projected


class Sublayer(nn.Module):
    """A layer behind a norm."""

    def __init__(self, dim: int, layer: nn.Module) -> None:
        super().__init__()
        self.fn = layer
        self.norm: LayerNorm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fn(self.norm(x))
        return y


class FeedForward(nn.Module):
    """Two linear layers with SiLU between them. The identities stand for dropouts, as in the checkpoints' keys."""

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        inner = dim * expansion
        self.net: nn.Sequential = nn.Sequential(nn.Linear(dim, inner), nn.SiLU(), nn.Identity(), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class Half(nn.Module):
    """Half of a layer's output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fn = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fn(x) * 0.5
        return y


class Depthwise(nn.Module):
    """A convolution of each feature, `[B, D, N]`; for an even kernel, more tokens come before than after."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self._padding = kernel_size // 2, kernel_size // 2 - (kernel_size + 1) % 2
        self.conv: nn.Conv1d = nn.Conv1d(channels, channels, kernel_size, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pad(x, self._padding))
        return y


class Convolution(nn.Module):
    """A convolution of each feature along the tokens, between linear layers, `[B, N, D] -> [B, N, D]`."""

    def __init__(self, dim: int, expansion: int, kernel_size: int) -> None:
        super().__init__()
        inner = dim * expansion
        along = Depthwise(inner, kernel_size)
        self.net: nn.Sequential = convolution_between_linear_layers(LayerNorm(dim), along, dim=dim, inner=inner)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class Block(nn.Module):
    """Half a feed-forward layer, attention, a convolution and another half, each beside a residual; then a norm."""

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__()
        self.ff1: Half = Half(Sublayer(dim, FeedForward(dim, config.ff_mult)))
        self.attn: Sublayer = Sublayer(dim, RelativeAttention(dim, config.heads, config.dim_head))
        self.conv: Convolution = Convolution(dim, config.conv_expansion_factor, config.conv_kernel_size)
        self.ff2: Half = Half(Sublayer(dim, FeedForward(dim, config.ff_mult)))
        self.post_norm: LayerNorm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.ff1, self.attn, self.conv, self.ff2):
            x = x + layer(x)
        normed: Tensor = self.post_norm(x)
        return normed


class Blocks(nn.Module):
    """Blocks one after the other, `[B, N, D] -> [B, N, D]`."""

    def __init__(self, dim: int, depth: int, config: Any) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(Block(dim, config) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        # The scores of all sequences at once would need too much memory.
        parts = x.split(max(1, MOST_TOKENS // x.shape[1])) if x.device.type == "cpu" else (x,)
        return torch.cat([self._all_layers(part.contiguous()) for part in parts])

    def _all_layers(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


class Core(nn.Module):
    """Magnitudes `[B, C, F, N]` to the masks of all stems, `[B, 2, S, C, F, N]`: real and imaginary parts."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        inputs = config.freq_bins * config.in_channels
        self._sizes = config.sources, config.in_channels, config.freq_bins
        self.input_proj_stft: nn.Linear = nn.Linear(inputs, config.embed_dim)
        self.model: Blocks = Blocks(config.embed_dim, config.depth, config)
        self.output_proj: nn.Linear = nn.Linear(config.embed_dim, 2 * config.sources * inputs)

    def forward(self, magnitudes: Tensor) -> Tensor:
        frames = rearrange(magnitudes, "b c f n -> b n (c f)").to(self.input_proj_stft.weight.dtype)
        masks = self.output_proj(self.model(self.input_proj_stft(frames)).tanh()).float()
        parts: Tensor = masks.unflatten(2, (2, *self._sizes))
        return parts.permute(0, 2, 3, 4, 5, 1)


class Conformer(SeparationModel):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; T > n_fft // 2.

    Input and output are float32. Convolutions and linear layers may be in bfloat16 or float16 (see `to_precision`).
    """

    Config = ConformerConfig
    TRAINING_KEYS = frozenset({"attn_dropout", "ff_dropout", "conv_dropout"})
    AUDIO_KEYS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {key: key for key in ("n_fft", "hop_length", "win_length")}
    )
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"core\.input_proj_stft\.weight",
        r"core\.model\.layers\.\d+\.attn\.fn\.to_q\.weight",
    )
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv1d)
    normalisation: Normalisation = "none"  # its input is not normalised, and the masks depend on the level

    def __init__(self, config: ConformerConfig, identity: Identity) -> None:
        super().__init__(identity)
        if config.sources != len(identity.stems):
            raise ValueError(f"sources is {config.sources} and there are {len(identity.stems)} stems: correct one")
        self.channels: int = config.in_channels
        self.least_samples: int = config.n_fft // 2 + 1
        self._stft = Stft(
            n_fft=config.n_fft, hop_length=config.hop_length, win_length=config.win_length or config.n_fft
        )
        self._modules["core"] = Core(config)  # the checkpoints' name for it, which a method here has too
        self._outputs = tuple(range(config.sources))

    def forward(self, chunks: Tensor) -> Tensor:
        spectrum = self._stft.spectrogram(chunks)  # [B, C, F, N]
        core: Any = self._modules["core"]
        masks = core(spectrum.abs())
        real, imaginary = torch.stack([masks[:, :, output] for output in self._outputs], dim=2).unbind(1)
        return self._stft.waveform(torch.complex(real, imaginary) * spectrum[:, None], chunks.shape[-1])

    def transform(self, length: int) -> Transform:
        raise self._no_core()


@dataclass(frozen=True, kw_only=True)
class EarlyConfig(MelBandConformerConfig):
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    zero_dc: bool = False


class EarlyMelBandConformer(MelBandConformer):
    """The first form of MelBand-Conformer: chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; see RoFormer.

    It extends the later form, so that a YAML without weights means that one.
    """

    Config: ClassVar[type] = EarlyConfig
    TRAINING_KEYS = RoFormer.TRAINING_KEYS | {"conv_dropout", "skip_connection"}  # which it does not use
    more_mask_layers = 1
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"band_split\.to_features\..*",
        r"layers\.\d+\.\d+\.layers\.\d+\.attn\.fn\.to_q\.weight",
    )

    def __init__(self, config: EarlyConfig, identity: Identity) -> None:
        MelBandRoFormer.__init__(self, config, identity)
        self.head_size: int | None = None  # relative positions have no choice of attention backend
        depths = config.time_conformer_depth, config.freq_conformer_depth
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.ModuleList(Blocks(config.dim, depth, config) for depth in depths) for _ in range(config.depth)
        )
