"""Apollo restores music that lossy compression has damaged (Li and Luo 2024, arXiv:2409.08514), in its authors'
checkpoint layout.

The spectrogram is split into bands, each scaled to unit power. Attention runs along the bands of each frame,
convolutions along the frames of each band. The network gives the restored spectrogram itself, one channel at a time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.models.base import Identity, Normalisation, SeparationModel
from separation.models.layers import rotated
from separation.models.limits import check_frames
from separation.models.shapes import Shapes
from separation.models.stft import Stft

BANDS, HEADS, KERNEL = 80, 8, 7
THETA = 10000.0  # of the rotary embedding
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True)
class ApolloConfig:
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    sr: int = 44100  # hertz
    win: int = 20  # milliseconds in a frame
    feature_dim: int = 256
    layer: int = 6

    def __post_init__(self) -> None:
        if not self.band_width:
            raise ValueError(f"win is {self.win} ms, too short for {BANDS} bands: correct it")
        if self.feature_dim % (2 * HEADS):
            raise ValueError(f"feature_dim is {self.feature_dim}, no multiple of {2 * HEADS}: correct it")

    @property
    def n_fft(self) -> int:
        return self.sr * self.win // 1000

    @property
    def band_width(self) -> int:
        """The number of bins of each band but the last, which has the rest."""
        return self.n_fft // (2 * BANDS)

    @property
    def num_stems(self) -> int:
        return 1


class Apollo(SeparationModel):
    """Chunks of waveform `[B, 1, T]` to restored ones `[B, 1, 1, T]`, both float32; T > n_fft // 2."""

    Config = ApolloConfig
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"BN\.0\.0\.weight",
        r"net\.0\.band_net\.weight\.weight",
        r"output\.0\.0\.weight",
    )
    UNUSED_KEYS: ClassVar[str] = r"net\.\d+\.band_net\.(cos|sin)_freq"
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d,)
    normalisation: Normalisation = "none"  # the power of each band is a feature
    restores = True

    def __init__(self, config: ApolloConfig, identity: Identity) -> None:
        super().__init__(identity)
        self.channels = 1
        self.least_samples: int = config.n_fft // 2 + 1
        hop = config.n_fft // 2
        check_frames(identity.chunk_samples, {"n_fft": config.n_fft, "hop_length": hop})
        self._stft = Stft(n_fft=config.n_fft, hop_length=hop, win_length=config.n_fft)
        bins, width, size = config.n_fft // 2 + 1, config.band_width, config.feature_dim
        self._widths = [width] * (BANDS - 1) + [bins - width * (BANDS - 1)]
        # A band's features are its real and imaginary parts, and its power.
        self.BN = nn.ModuleList(
            nn.Sequential(RMSNorm(2 * width + 1), nn.Conv1d(2 * width + 1, size, 1)) for width in self._widths
        )
        self.net: nn.ModuleList = nn.ModuleList(
            nn.ModuleDict({"band_net": BandAttention(size), "seq_net": FrameConvolutions(size)})
            for _ in range(config.layer)
        )
        self.output: nn.ModuleList = nn.ModuleList(
            nn.Sequential(RMSNorm(size), nn.Conv1d(size, 4 * width, 1), nn.GLU(dim=-1)) for width in self._widths
        )

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        return {"feature_dim": shapes.size("BN.0.1.weight", 0), "layer": shapes.count(r"net\.(\d+)\..*")}

    def forward(self, chunks: Tensor) -> Tensor:
        spectrum = self._stft.spectrogram(chunks)[:, 0]  # [B, F, N]
        x = self._features(rearrange(torch.view_as_real(spectrum), "b f n ri -> b n ri f"))
        for layers in cast(Iterable[Any], self.net):
            x = layers["seq_net"](layers["band_net"](x))
        bands = []
        for features, (norm, linear, gate) in zip(x.unbind(2), cast(Iterable[Any], self.output), strict=True):
            bands.append(rearrange(gate(pointwise(linear, norm(features))), "b n (ri f) -> b f n ri", ri=2))
        restored = torch.view_as_complex(torch.cat(bands, dim=1).contiguous())
        return self._stft.waveform(restored, chunks.shape[-1])[:, None, None]

    def _features(self, spectrum: Tensor) -> Tensor:
        """Spectrogram `[B, N, 2, F]` to `[B, N, K, D]` in float32."""
        features = []
        bands = spectrum.split(self._widths, dim=-1)
        for band, (norm, linear) in zip(bands, cast(Iterable[Any], self.BN), strict=True):
            root = (band.square().sum((2, 3)) + EPS).sqrt()[..., None]  # [B, N, 1]
            features.append(pointwise(linear, norm(torch.cat([band.flatten(2) / root, root.log()], dim=-1))))
        return torch.stack(features, dim=2)


def pointwise(layer: Any, x: Tensor) -> Tensor:
    """A convolution of length 1 over `[..., D]`, in the layer's precision; the result is float32."""
    return F.linear(x.to(layer.weight.dtype), layer.weight[..., 0], layer.bias).float()


class RMSNorm(nn.Module):
    """Scales each feature vector to a mean square of 1, then by a learned gain. Computes in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, 1e-5)


@cache
def _angles(size: int, device: torch.device) -> Tensor:
    """The angle of each feature of a head at each band, `[K, size]`."""
    with torch.inference_mode(False):
        frequencies = 1.0 / (THETA ** (torch.arange(0, size, 2, device=device) / size))
        positions = torch.arange(BANDS, device=device, dtype=torch.float32)
        return torch.outer(positions, frequencies).repeat_interleave(2, dim=-1)


class BandAttention(nn.Module):
    """Attention along bands, then a gated MLP, `[B, N, K, D] -> [B, N, K, D]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input_norm: RMSNorm = RMSNorm(size)
        self.weight: nn.Conv1d = nn.Conv1d(size, 3 * size, 1, bias=False)
        self.output: nn.Conv1d = nn.Conv1d(size, size, 1, bias=False)
        self.MLP = nn.Sequential(RMSNorm(size), nn.Conv1d(size, 8 * size, 1, bias=False))
        self.MLP_output: nn.Conv1d = nn.Conv1d(4 * size, size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        heads = rearrange(pointwise(self.weight, self.input_norm(x)), "b n k (h d) -> (b n) h k d", h=HEADS)
        q, k, v = heads.chunk(3, dim=-1)
        angles = _angles(q.shape[-1], q.device)
        dtype = self.weight.weight.dtype
        q, k, v = (each.to(dtype) for each in (rotated(angles, q), rotated(angles, k), v))
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + pointwise(self.output, rearrange(attended, "(b n) h k d -> b n k (h d)", b=batch))
        norm, linear = cast(Iterable[Any], self.MLP)
        gates, values = F.silu(pointwise(linear, norm(x))).chunk(2, dim=-1)
        return x + pointwise(self.MLP_output, F.silu(gates) * values)


class FrameConvolutions(nn.Module):
    """Residual convolutions along frames, `[B, N, K, D] -> [B, N, K, D]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.blocks: nn.ModuleList = nn.ModuleList(nn.ModuleDict({"conv": _convolution(size)}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        for block in cast(Iterable[Any], self.blocks):
            along, norm, wide, activation, narrow = block["conv"]
            y = along(rearrange(x, "b n k d -> (b k) d n").to(along.weight.dtype))
            y = norm(rearrange(y, "(b k) d n -> b n k d", b=batch))
            x = x + pointwise(narrow, activation(pointwise(wide, y)))
        return x


def _convolution(size: int) -> nn.Sequential:
    """A convolution along frames, separate for each feature, then an MLP."""
    return nn.Sequential(
        nn.Conv1d(size, size, KERNEL, padding=KERNEL // 2, groups=size),
        RMSNorm(size),
        nn.Conv1d(size, 4 * size, 1),
        nn.SiLU(),
        nn.Conv1d(4 * size, size, 1),
    )
