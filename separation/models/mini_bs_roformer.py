"""Mini-BS-RoFormer v2 (HiDolen 2025), a BS-RoFormer of 47 M parameters, in its author's checkpoint layout.

It reads a finer spectrogram than the one that its masks are for. Four frames become one token before the transformers
and four again after them; pairs of heads share keys and values. Register tokens are appended along both axes: their
corner is learned, the rest is zero at first. Each band's mask has a gate. Axes: B batch, N frame or token of it, K band
or token of it, D feature, H head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.models.attention import BACKENDS, LAYER_BACKENDS, AttentionBackend, use_backend
from separation.models.base import Identity, Normalisation, SeparationModel
from separation.models.kernels.native import NotFusedError
from separation.models.layers import MOST_TOKENS
from separation.models.shapes import Shapes, quotient
from separation.models.stft import Stft

ROOT = "freq_domain_model."
Turn = tuple[Tensor, Tensor]  # the cosines and sines of a sequence's positions, each [N, dim_head]


@dataclass(frozen=True, kw_only=True)
class MiniBSRoFormerConfig:
    """The hyper-parameters, with the names of the `config.json` that the weights were published with."""

    hidden_size: int
    num_hidden_layers: int  # pairs of transformers
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    freqs_per_bands: tuple[int, ...]  # bins of each band of the spectrogram that the model reads
    freqs_per_bands_out: tuple[int, ...]  # bins of each band of the masks
    band_proj_size: int  # features of a frame of a band
    time_conv_length: int  # frames that become one token
    num_stems: int = 1
    num_input_channels: int = 2
    register_token_num: int = 4  # on each axis
    time_transformer_depth: int = 1
    freq_transformer_depth: int = 1
    stft_n_fft: int = 4096
    stft_n_fft_out: int = 2048
    stft_hop_length: int = 512
    rms_norm_eps: float = 1e-6
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        for name, n_fft in (("freqs_per_bands", "stft_n_fft"), ("freqs_per_bands_out", "stft_n_fft_out")):
            bins, size = sum(getattr(self, name)), getattr(self, n_fft)
            if bins != size // 2 + 1:
                raise ValueError(
                    f"{name} adds up to {bins} bins, but {n_fft} {size} has {size // 2 + 1}: correct one of them"
                )
        if len(self.freqs_per_bands) != len(self.freqs_per_bands_out):
            raise ValueError("freqs_per_bands and freqs_per_bands_out must have as many bands: correct one of them")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads is no multiple of num_key_value_heads: correct one of them")
        if self.num_input_channels not in (1, 2):
            raise ValueError(f"num_input_channels is {self.num_input_channels}: use 1 or 2")


class MiniBSRoFormer(SeparationModel):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`, both float32; T > stft_n_fft // 2."""

    Config: ClassVar[type] = MiniBSRoFormerConfig
    TRAINING_KEYS: ClassVar[frozenset[str]] = frozenset(
        {"attention_dropout", "initializer_range", "dtype", "wave_chunk_size", "wave_sample_rate"}
    )
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"freq_domain_model\.band_split\.to_features\.0\.1\.weight",
        r"freq_domain_model\.mask_estimators\.0\.to_gate_mlps\.0\.weight",
        r"freq_domain_model\.time_conv\.1\.gate_proj\.weight",
    )
    normalisation: Normalisation = "none"

    def __init__(self, config: MiniBSRoFormerConfig, identity: Identity) -> None:
        super().__init__(identity)
        self.channels: int = config.num_input_channels
        self.head_size: int | None = config.head_dim
        self.least_samples: int = max(config.stft_n_fft, config.stft_n_fft_out) // 2 + 1
        self._stft, self._stft_out = (
            Stft(n_fft=n_fft, hop_length=config.stft_hop_length, win_length=n_fft)
            for n_fft in (config.stft_n_fft, config.stft_n_fft_out)
        )
        self.freq_domain_model: Network = Network(config)
        self._outputs = tuple(range(config.num_stems))

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        root = ROOT.replace(".", r"\.")
        bands = range(shapes.count(root + r"band_split\.to_features\.(\d+)\..*"))
        inputs = shapes.sizes((f"{ROOT}band_split.to_features.{band}.1.weight" for band in bands), 1) or ()
        outputs = shapes.sizes((f"{ROOT}mask_estimators.0.to_freq_mlps.{band}.weight" for band in bands), 0) or ()
        channels = 1 if sum(inputs) % 4 else 2  # the number of bins is odd, and each has two numbers per channel
        read, made = ([size // (2 * channels) for size in sizes] for sizes in (inputs, outputs))
        frequencies = shapes.size(f"{ROOT}rotary_emb.inv_freq", 0)
        head_dim, layer = frequencies and 2 * frequencies, f"{ROOT}layers.0.0.layers.0"
        projected = shapes.size(f"{ROOT}band_split.to_features.0.1.weight", 0)
        return {
            "hidden_size": shapes.size(f"{ROOT}final_norm.weight", 0),
            "num_hidden_layers": shapes.count(root + r"layers\.(\d+)\..*"),
            "num_attention_heads": quotient(shapes.size(f"{layer}.self_attn.q_proj.weight", 0), head_dim),
            "num_key_value_heads": quotient(shapes.size(f"{layer}.self_attn.k_proj.weight", 0), head_dim),
            "head_dim": head_dim,
            "intermediate_size": shapes.size(f"{layer}.mlp.up_proj.weight", 0),
            "freqs_per_bands": tuple(read),
            "freqs_per_bands_out": tuple(made),
            "band_proj_size": projected,
            "time_conv_length": quotient(shapes.size(f"{ROOT}time_conv.0.weight", 0), projected),
            "num_stems": shapes.count(root + r"mask_estimators\.(\d+)\..*"),
            "num_input_channels": channels,
            "register_token_num": shapes.size(f"{ROOT}register_tokens", 0),
            "time_transformer_depth": shapes.count(root + r"layers\.0\.0\.layers\.(\d+)\..*"),
            "freq_transformer_depth": shapes.count(root + r"layers\.0\.1\.layers\.(\d+)\..*"),
            "stft_n_fft": 2 * (sum(read) - 1),
            "stft_n_fft_out": 2 * (sum(made) - 1),
        }

    def prepare(self, dtype: torch.dtype, *, attention: str | None = None) -> None:
        if attention in LAYER_BACKENDS:
            raise NotFusedError("it has no layers of gated MLPs and shared keys")
        if attention is not None:
            use_backend(self, attention)
        super().prepare(dtype, attention=attention)

    def forward(self, chunks: Tensor) -> Tensor:
        read = torch.view_as_real(self._stft.spectrogram(chunks))
        features = self.freq_domain_model(rearrange(read, "b c f n ri -> n b (f c ri)"))
        mixture = self._stft_out.spectrogram(chunks)
        estimates = []
        for index in self._outputs:
            mask = rearrange(
                self.freq_domain_model.mask(index, features), "n b (f c ri) -> b c f n ri", c=self.channels, ri=2
            )
            estimates.append(self._stft_out.waveform(mixture * torch.view_as_complex(mask), chunks.shape[-1]))
        return torch.stack(estimates, dim=1)


class Network(nn.Module):
    """A spectrogram's bins `[N, B, F * C * 2]` to features `[N, B, K, D]`, of which `mask` makes a stem's mask."""

    def __init__(self, config: MiniBSRoFormerConfig) -> None:
        super().__init__()
        size, frames, eps = config.band_proj_size, config.time_conv_length, config.rms_norm_eps
        self._frames, self._registers = frames, config.register_token_num
        self.rotary_emb: Angles = Angles(config.head_dim, config.rope_base)
        widths = tuple(2 * config.num_input_channels * bins for bins in config.freqs_per_bands)
        self.band_split: Bands = Bands(widths, size, eps)
        joined, inner = size * frames, config.hidden_size * frames
        self.time_conv: nn.Sequential = nn.Sequential(
            nn.RMSNorm(joined, eps=eps), GatedMLP(joined, inner, config.hidden_size, bias=True)
        )
        self.layers: nn.ModuleList = nn.ModuleList(
            nn.ModuleList(
                AxialTransformer(config, depth)
                for depth in (config.time_transformer_depth, config.freq_transformer_depth)
            )
            for _ in range(config.num_hidden_layers)
        )
        self.final_norm: nn.RMSNorm = nn.RMSNorm(config.hidden_size, eps=eps)
        self.time_deconv: nn.Sequential = nn.Sequential(
            GatedMLP(config.hidden_size, inner, joined, bias=True), nn.RMSNorm(joined, eps=eps)
        )
        outputs = tuple(2 * config.num_input_channels * bins for bins in config.freqs_per_bands_out)
        self.mask_estimators: nn.ModuleList = nn.ModuleList(GatedMasks(size, outputs) for _ in range(config.num_stems))
        self.register_tokens: nn.Parameter = nn.Parameter(
            torch.zeros(config.register_token_num, config.register_token_num, config.hidden_size)
        )

    def forward(self, bins: Tensor) -> Tensor:
        n_frames = len(bins)
        bins = F.pad(bins, (0, 0, 0, 0, 0, -n_frames % self._frames))
        x = self.time_conv(rearrange(self.band_split(bins), "(n t) b k d -> n b k (d t)", t=self._frames))
        tokens, batch, bands, _ = x.shape
        x = F.pad(x, (0, 0, 0, self._registers, 0, 0, 0, self._registers))
        x[tokens:, :, bands:] = self.register_tokens[:, None]
        over_time, over_bands = (self.rotary_emb(count, self._registers) for count in (tokens, bands))
        for along_time, along_bands in cast(Iterable[Any], self.layers):
            x = along_time(rearrange(x, "n b k d -> (b k) n d"), over_time)
            x = along_bands(rearrange(x, "(b k) n d -> (n b) k d", b=batch), over_bands)
            x = rearrange(x, "(n b) k d -> n b k d", b=batch)
        x = self.time_deconv(self.final_norm(x[:tokens, :, :bands]))
        features: Tensor = rearrange(x, "n b k (d t) -> (n t) b k d", t=self._frames)[:n_frames]
        return features

    def mask(self, index: int, features: Tensor) -> Tensor:
        """One stem's mask `[N, B, F * C * 2]`."""
        found: Tensor = self.mask_estimators[index](features)
        return found


class Angles(nn.Module):
    """Rotary position embedding (RoFormer, Su et al. 2021) of the halves of a head, for positions and register tokens.

    The file has the frequencies, which training rounded.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", base ** -(torch.arange(0, dim, 2).float() / dim))

    def forward(self, count: int, registers: int) -> Turn:
        """The turn of positions 0 to `count`, and none for the register tokens after them."""
        positions = torch.arange(count, device=self.inv_freq.device, dtype=torch.float32)
        angles = torch.outer(F.pad(positions, (0, registers)), self.inv_freq.float()).repeat(1, 2)
        return angles.cos(), angles.sin()


def turned(x: Tensor, turn: Turn) -> Tensor:
    """Heads `[B, H, N, dim_head]` whose halves are the two coordinates of points, rotated by `turn`."""
    cosines, sines = turn
    first, second = x.float().chunk(2, dim=-1)
    rotated = x.float() * cosines + torch.cat((-second, first), dim=-1) * sines
    return rotated.to(x.dtype)


class Bands(nn.Module):
    """A norm and a linear layer for each band, `[N, B, sum(widths)] -> [N, B, K, D]` in float32."""

    def __init__(self, widths: tuple[int, ...], size: int, eps: float) -> None:
        super().__init__()
        self._widths = widths
        self.to_features: nn.ModuleList = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width, eps=eps), nn.Linear(width, size)) for width in widths
        )

    def forward(self, bins: Tensor) -> Tensor:
        bands = zip(bins.split(self._widths, dim=-1), cast(Iterable[Any], self.to_features), strict=True)
        return torch.stack([projected(linear, norm(band)) for band, (norm, linear) in bands], dim=-2)


class GatedMasks(nn.Module):
    """A linear layer for each band, and a gate for each bin, `[N, B, K, D] -> [N, B, sum(widths)]` in float32."""

    def __init__(self, size: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.to_freq_mlps: nn.ModuleList = nn.ModuleList(nn.Linear(size, width) for width in widths)
        self.to_gate_mlps: nn.ModuleList = nn.ModuleList(nn.Linear(size, width // 2) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(x.unbind(dim=-2), self.to_freq_mlps, self.to_gate_mlps, strict=True)
        masks = [
            projected(mask, band) * projected(gate, band).sigmoid().repeat_interleave(2, dim=-1)
            for band, mask, gate in parts
        ]
        return torch.cat(masks, dim=-1)


class AxialTransformer(nn.Module):
    """Pre-norm layers over one axis, `[B, N, D] -> [B, N, D]` in float32."""

    def __init__(self, config: MiniBSRoFormerConfig, depth: int) -> None:
        super().__init__()
        self.layers: nn.ModuleList = nn.ModuleList(Layer(config) for _ in range(depth))

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        # As in layers.Transformer, the intermediate results of a few sequences fit into a CPU's caches.
        rows = max(1, MOST_TOKENS // x.shape[1]) if x.device.type == "cpu" else len(x)
        parts = []
        for part in x.split(rows):
            for layer in self.layers:
                part = layer(part, turn)
            parts.append(part)
        return torch.cat(parts)


class Layer(nn.Module):
    """Attention, then a gated MLP, each after a norm and added to its input."""

    def __init__(self, config: MiniBSRoFormerConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm: nn.RMSNorm = nn.RMSNorm(size, eps=eps)
        self.post_attention_layernorm: nn.RMSNorm = nn.RMSNorm(size, eps=eps)
        self.self_attn: GroupedAttention = GroupedAttention(config)
        self.mlp: GatedMLP = GatedMLP(size, config.intermediate_size, size, bias=False)

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn)
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class GroupedAttention(nn.Module):
    """Self-attention where groups of heads share keys and values (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: MiniBSRoFormerConfig) -> None:
        super().__init__()
        size, dim = config.hidden_size, config.head_dim
        self.attend: AttentionBackend = BACKENDS["sdpa"]
        self._dim, self._group = dim, config.num_attention_heads // config.num_key_value_heads
        self.q_proj: nn.Linear = nn.Linear(size, config.num_attention_heads * dim)
        self.k_proj: nn.Linear = nn.Linear(size, config.num_key_value_heads * dim)
        self.v_proj: nn.Linear = nn.Linear(size, config.num_key_value_heads * dim)
        self.o_proj: nn.Linear = nn.Linear(config.num_attention_heads * dim, size)

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        """`[B, N, D] -> [B, N, D]` in float32."""
        x = x.to(self.q_proj.weight.dtype)
        q, k, v = (
            rearrange(project(x), "b n (h d) -> b h n d", d=self._dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (each.repeat_interleave(self._group, dim=1) for each in (turned(k, turn), v))
        y: Tensor = self.o_proj(rearrange(self.attend(turned(q, turn), k, v), "b h n d -> b n (h d)"))
        return y.float()


class GatedMLP(nn.Module):
    """Two linear layers side by side, GELU of one times the other, and a linear layer; the result is float32."""

    def __init__(self, size_in: int, inner: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj: nn.Linear = nn.Linear(size_in, inner, bias=bias)
        self.up_proj: nn.Linear = nn.Linear(size_in, inner, bias=bias)
        self.down_proj: nn.Linear = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.gate_proj.weight.dtype)
        y: Tensor = self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))
        return y.float()


def projected(linear: Any, x: Tensor) -> Tensor:
    """A linear layer in its own precision; the result is float32."""
    y: Tensor = linear(x.to(linear.weight.dtype))
    return y.float()
