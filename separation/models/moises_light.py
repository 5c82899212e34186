"""Moises-Light (Yeh et al. 2025, arXiv:2510.06785) in the form of the package moises-light 0.1.5: a small U-Net.

The spectrogram is cut into bands of equal width, which become groups of channels, each with convolutions of its own.
Steps down and up halve and double the frames only. Between them, transformers run along time and along the bins of a
band. Axes: B batch, D channel, F bin of a band, N frame.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.models.attention import LAYER_BACKENDS, use_backend
from separation.models.base import Identity, Normalisation, SeparationModel
from separation.models.kernels.native import NotFusedError
from separation.models.layers import Attention, RMSNorm, RotaryEmbedding, Transformer
from separation.models.shapes import Shapes, quotient
from separation.models.stft import Stft
from separation.models.tiger import convolved

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm": nn.BatchNorm2d,
    "InstanceNorm": partial(nn.InstanceNorm2d, affine=True),
    "LayerNorm": partial(nn.GroupNorm, 1),
}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    each.__name__: each for each in (nn.GELU, nn.ReLU, nn.LeakyReLU, nn.Softplus, nn.SiLU, nn.Mish)
}


@dataclass(frozen=True, kw_only=True)
class MoisesLightConfig:
    """The hyper-parameters, with the package's names; those in `transformer_params` follow that word."""

    sources: tuple[str, ...] = ("vocals", "drums", "bass", "other")
    audio_channels: int = 2
    n_fft: int = 6144
    hop_size: int = 1024
    win_size: int = 6144
    freq_dim: int = 2048  # bins that the network reads and masks; those above are silent
    n_bands: int = 4
    G: int = 56  # channels at the top, and how many more each step down has
    n_enc: int = 3  # steps down
    n_dec: int = 1  # steps up with a block of their own, the lowest
    n_split_enc: int = 3  # convolutions on each side of a block
    n_split_dec: int = 1
    n_rope: int = 5  # pairs of transformers
    bn_factor: int = 8  # by which a block's linear layers reduce the bins of a band
    edge_kernel_size: int = 3
    normalized: bool = True
    use_mask: bool = True
    norm_name: str = "BatchNorm"
    act_name: str = "ReLU"
    transformer_params_heads: int = 4
    transformer_params_dim_head: int = 32
    transformer_params_ff_mult: int = 2

    def __post_init__(self) -> None:
        for name, value, known in (("norm_name", self.norm_name, NORMS), ("act_name", self.act_name, ACTIVATIONS)):
            if value not in known:
                raise ValueError(f"{name} is {value}: use one of {', '.join(known)}")
        if self.G % self.n_bands or self.freq_dim % self.n_bands:
            raise ValueError(f"G {self.G} and freq_dim {self.freq_dim} must be multiples of n_bands {self.n_bands}")
        if self.freq_dim > self.n_fft // 2 + 1:
            raise ValueError(f"freq_dim is {self.freq_dim}, and n_fft {self.n_fft} has {self.n_fft // 2 + 1} bins")
        if not 0 <= self.n_dec <= self.n_enc or not 1 <= self.bn_factor <= self.freq_dim // self.n_bands:
            raise ValueError("n_dec must be at most n_enc, and bn_factor at most the bins of a band: correct one")

    @property
    def num_stems(self) -> int:
        return len(self.sources)

    @property
    def parts(self) -> int:
        """The real and imaginary parts of all channels."""
        return 2 * self.audio_channels


class MoisesLight(SeparationModel):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`, both float32; T > n_fft // 2."""

    Config: ClassVar[type] = MoisesLightConfig
    TRAINING_KEYS: ClassVar[frozenset[str]] = frozenset(
        f"transformer_params_{name}" for name in ("attn_dropout", "ff_dropout", "flash_attn", "proj_dropout")
    )
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"encoder_blocks\.0\.tdf\.fc1\.weight",
        r"bottleneck\.split_merge\.res\.conv\.weight",
    )
    UNUSED_KEYS: ClassVar[str] = "stft_window|freq_pad"  # which the Config determines
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    normalisation: Normalisation = "none"

    def __init__(self, config: MoisesLightConfig, identity: Identity) -> None:
        super().__init__(identity)
        self.channels: int = config.audio_channels
        self.head_size: int | None = config.transformer_params_dim_head
        self.least_samples: int = config.n_fft // 2 + 1
        self._stft = Stft(
            n_fft=config.n_fft, hop_length=config.hop_size, win_length=config.win_size, normalized=config.normalized
        )
        self._config = config
        step, inputs = config.G, config.parts * config.n_bands
        convolve = partial(GroupConvolution, config)
        enter = partial(Block, config, splits=config.n_split_enc)
        sizes = [step * (level + 1) for level in range(config.n_enc + 1)]
        self.first_conv: GroupConvolution = convolve(inputs, step, config.edge_kernel_size)
        self.encoder_blocks: nn.ModuleList = nn.ModuleList(enter(size) for size in sizes[:-1])
        self.ds: nn.ModuleList = nn.ModuleList(Resampling(config, size, size + step, nn.Conv2d) for size in sizes[:-1])
        self.bottleneck: nn.ModuleDict = nn.ModuleDict(
            {
                "split_merge": enter(sizes[-1]),
                "rope_blocks": nn.ModuleList(DualPath(config, sizes[-1]) for _ in range(config.n_rope)),
                "final_norm": RMSNorm(sizes[-1]),
            }
        )
        up = [Resampling(config, size, size - step, nn.ConvTranspose2d) for size in reversed(sizes[1:])]
        self.dec_heavy_us: nn.ModuleList = nn.ModuleList(up[: config.n_dec])
        self.dec_light_us: nn.ModuleList = nn.ModuleList(up[config.n_dec :])
        self.dec_heavy_blocks: nn.ModuleList = nn.ModuleList(
            Block(config, size, splits=config.n_split_dec) for size in sizes[::-1][1 : config.n_dec + 1]
        )
        kernel, stems = config.edge_kernel_size, config.num_stems
        self.final_conv: nn.Conv2d = nn.Conv2d(step, inputs, kernel, padding=kernel // 2, groups=config.n_bands)
        self.source_head: nn.Conv2d | None = nn.Conv2d(config.parts, stems * config.parts, 1) if stems > 1 else None

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        parts = shapes.size("first_conv.conv.weight", 1)
        bands = quotient(shapes.size("final_conv.weight", 0), parts)
        wide, narrow = (shapes.size("encoder_blocks.0.tdf.fc1.weight", axis) for axis in (1, 0))
        layer = "bottleneck.rope_blocks.0.time_transformer.layers.0"
        heads = shapes.size(f"{layer}.0.to_gates.weight", 0)
        size = shapes.size(f"{layer}.0.to_gates.weight", 1)
        stems = shapes.size("source_head.weight", 0)
        return {
            "sources": 1 if stems is None else quotient(stems, parts),
            "audio_channels": quotient(parts, 2),
            "freq_dim": wide and bands and wide * bands,
            "n_bands": bands,
            "G": shapes.size("first_conv.conv.weight", 0),
            "n_enc": shapes.count(r"encoder_blocks\.(\d+)\..*"),
            "n_dec": shapes.count(r"dec_heavy_blocks\.(\d+)\..*"),
            "n_split_enc": shapes.count(r"encoder_blocks\.0\.split1\.(\d+)\..*"),
            "n_split_dec": shapes.count(r"dec_heavy_blocks\.0\.split1\.(\d+)\..*") if config.n_dec else None,
            "n_rope": shapes.count(r"bottleneck\.rope_blocks\.(\d+)\..*"),
            "bn_factor": quotient(wide, narrow),
            "edge_kernel_size": shapes.size("first_conv.conv.weight", 2),
            "transformer_params_heads": heads,
            "transformer_params_dim_head": quotient(shapes.size(f"{layer}.0.to_qkv.weight", 0), heads and 3 * heads),
            "transformer_params_ff_mult": quotient(shapes.size(f"{layer}.1.net.1.weight", 0), size),
        }

    def prepare(self, dtype: torch.dtype, *, attention: str | None = None) -> None:
        if attention in LAYER_BACKENDS:
            raise NotFusedError("there are none for Moises-Light")
        if attention is not None:
            use_backend(self, attention)
        super().prepare(dtype, attention=attention)

    def forward(self, chunks: Tensor) -> Tensor:
        config, length = self._config, chunks.shape[-1]
        hop, multiple = config.hop_size, 2**config.n_enc  # of frames
        frames = -(-(length // hop + 2) // multiple) * multiple
        padded = F.pad(chunks, (0, (frames - 1) * hop - length))
        spectrum = torch.view_as_real(self._stft.spectrogram(padded)[..., : config.freq_dim, :])
        mixture = rearrange(spectrum, "b c f n ri -> b (c ri) f n")
        deviation, mean = torch.std_mean(mixture, dim=(1, 2, 3), keepdim=True)
        bands = rearrange((mixture - mean) / (1e-5 + deviation), "b c (k f) n -> b (k c) f n", k=config.n_bands)
        made = rearrange(self._network(bands), "b (k c) f n -> b c (k f) n", k=config.n_bands)
        if self.source_head is not None:
            made = convolved(self.source_head, made)
        made = made.unflatten(1, (config.num_stems, config.parts))
        # The mask of real parts is another than that of imaginary parts.
        estimates = made * mixture[:, None] if config.use_mask else made * deviation[:, None] + mean[:, None]
        estimates = rearrange(estimates, "b s (c ri) f n -> b s c f n ri", ri=2).contiguous()
        return self._stft.waveform(torch.view_as_complex(estimates), length)

    def _network(self, x: Tensor) -> Tensor:
        """`[B, 2 * C * bands, F, N]` to the same, of the mask or of the normed estimates."""
        x = self.first_conv(x)
        skips = []
        for block, down in zip(self.encoder_blocks, self.ds, strict=True):
            skips.append(block(x))
            x = down(skips[-1])
        enter, pairs, norm = cast(Iterable[Any], self.bottleneck.values())
        x = enter(x)
        for pair in pairs:
            x = pair(x)
        x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for up, block in zip(self.dec_heavy_us, self.dec_heavy_blocks, strict=True):
            x = block(up(x) * skips.pop())
        for up in self.dec_light_us:
            x = up(x) * skips.pop()
        return convolved(self.final_conv, x)


class GroupConvolution(nn.Module):
    """A convolution of each band by itself, a norm and an activation, `[B, D, F, N] -> [B, D', F, N]`."""

    def __init__(self, config: MoisesLightConfig, size_in: int, size: int, kernel: int) -> None:
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(size_in, size, kernel, padding=kernel // 2, groups=config.n_bands)
        self.bn: nn.Module = NORMS[config.norm_name](size)
        self.act: nn.Module = ACTIVATIONS[config.act_name]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(convolved(self.conv, x)))
        return y


class Resampling(nn.Module):
    """Half or twice the frames by a convolution of two, a norm and an activation, `[B, D, F, N] -> [B, D', F, N']`."""

    def __init__(
        self, config: MoisesLightConfig, size_in: int, size: int, convolution: type[nn.Conv2d | nn.ConvTranspose2d]
    ) -> None:
        super().__init__()
        self.conv: nn.Conv2d | nn.ConvTranspose2d = convolution(size_in, size, (1, 2), stride=(1, 2))
        self.bn: nn.Module = NORMS[config.norm_name](size)
        self.act: nn.Module = ACTIVATIONS[config.act_name]()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.bn(convolved(self.conv, x)))
        return y


class Block(nn.Module):
    """Convolutions, linear layers along the bins, and convolutions, `[B, D, F, N] -> [B, D, F, N]`."""

    def __init__(self, config: MoisesLightConfig, size: int, *, splits: int) -> None:
        super().__init__()
        convolve = partial(GroupConvolution, config, size, size, 3)
        self.res: GroupConvolution = convolve()
        self.split1: nn.Sequential = nn.Sequential(*(convolve() for _ in range(splits)))
        self.split2: nn.Sequential = nn.Sequential(*(convolve() for _ in range(splits)))
        self.tdf: Bottleneck = Bottleneck(config, size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.split1(x)
        z: Tensor = self.split2(y + self.tdf(y)) + self.res(x)
        return z


class Bottleneck(nn.Module):
    """Two linear layers along the bins of a band, to fewer and back, `[B, D, F, N] -> [B, D, F, N]`."""

    def __init__(self, config: MoisesLightConfig, size: int) -> None:
        super().__init__()
        bins = config.freq_dim // config.n_bands
        self.fc1: nn.Linear = nn.Linear(bins, bins // config.bn_factor)
        self.fc2: nn.Linear = nn.Linear(bins // config.bn_factor, bins)
        self.bn1: nn.Module = NORMS[config.norm_name](size)
        self.bn2: nn.Module = NORMS[config.norm_name](size)
        self.act: nn.Module = ACTIVATIONS[config.act_name]()

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(2, 3)
        for linear, norm in ((self.fc1, self.bn1), (self.fc2, self.bn2)):
            x = self.act(norm(convolved(linear, x)))
        return x.transpose(2, 3)


class DualPath(nn.Module):
    """A transformer along time, then one along the bins of a band, `[B, D, F, N] -> [B, D, F, N]`."""

    def __init__(self, config: MoisesLightConfig, size: int) -> None:
        super().__init__()
        self.time_transformer: Transformer = self._transformer(config, size)
        self.freq_transformer: Transformer = self._transformer(config, size)

    @staticmethod
    def _transformer(config: MoisesLightConfig, size: int) -> Transformer:
        heads, dim = config.transformer_params_heads, config.transformer_params_dim_head
        make_attention = partial(
            Attention, size, heads=heads, dim_head=dim, positions=RotaryEmbedding(dim), backend="sdpa"
        )
        return Transformer(size, depth=1, make_attention=make_attention, expansion=config.transformer_params_ff_mult)

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        dtype = next(weight.dtype for name, weight in self.named_parameters() if "to_qkv" in name)
        y = self.time_transformer(rearrange(x, "b d f n -> (b f) n d").to(dtype))
        y = self.freq_transformer(rearrange(y, "(b f) n d -> (b n) f d", b=batch))
        z: Tensor = rearrange(y, "(b n) f d -> b d f n", b=batch).float()
        return z
