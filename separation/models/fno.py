"""BS-RoFormer FNO (unwa 2025), whose mask estimators are Fourier neural operators along time.

A band's operator (Li et al. 2021, arXiv:2010.08895; in the layout of the package neuraloperator) multiplies the lowest
frequencies of each feature's course over the whole chunk. It computes in float32. Attribute names match the keys of the
published checkpoint. Axes: B batch, D feature, N frame, K band.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from separation.models.base import Transform
from separation.models.bs_roformer import BSRoFormer
from separation.models.layers import VariantEstimator
from separation.models.shapes import Shapes

LAYERS = 3
MODES = 33  # frequencies along time that are kept


class BSRoFormerFNO(BSRoFormer):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; see RoFormer."""

    TRAINING_KEYS = BSRoFormer.TRAINING_KEYS | {"fno", "use_mask_estimator_fno"}
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        *BSRoFormer.KEY_PATTERNS,
        r"mask_estimators\.\d+\.to_freqs\.\d+\.0\.fno_blocks\..*",
    )

    def _mask_estimator(self, config: Any, widths: tuple[int, ...], linear_layers: int, attention: str) -> nn.Module:
        return OperatorEstimator(config.dim, widths)

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        unused = {"mask_estimator_depth": None, "mlp_expansion_factor": None}  # there are no such MLPs
        return super().sizes_in(shapes, config) | unused

    def transform(self, length: int) -> Transform:
        raise self._no_core()

    def core(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        raise self._no_core()


class OperatorEstimator(VariantEstimator):
    """A Fourier neural operator and a GLU for each band, `[N, B, K, D] -> [N, B, sum(widths)]` in float32."""

    def __init__(self, dim: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.to_freqs: nn.ModuleList = nn.ModuleList(
            nn.Sequential(Operator(dim, 2 * width), nn.GLU(dim=-2)) for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        courses = x.float().permute(1, 3, 2, 0)  # [B, D, K, N]
        # Convolutions round differently for other batch sizes.
        items = courses.split(1) if x.device.type == "cpu" else (courses,)
        return torch.cat([self._masks(item) for item in items]).permute(2, 0, 1).contiguous()

    def _masks(self, courses: Tensor) -> Tensor:
        """`[B, D, K, N] -> [B, sum(widths), N]`."""
        bands = zip(courses.unbind(dim=2), self.to_freqs, strict=True)
        return torch.cat([network(band) for band, network in bands], dim=1)


class Operator(nn.Module):
    """A Fourier neural operator along time, `[B, D, N] -> [B, outputs, N]`."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.lifting: Pointwise = Pointwise(dim + 1, 2 * dim, dim)
        self.fno_blocks: Blocks = Blocks(dim)
        self.projection: Pointwise = Pointwise(dim, 2 * dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[2]
        positions = torch.linspace(0, 1, frames + 1, device=x.device)[:-1]  # in the chunk
        x = self.lifting(torch.cat((x, positions.expand(len(x), 1, frames)), dim=1))
        projected: Tensor = self.projection(self.fno_blocks(x))
        return projected


class Pointwise(nn.Module):
    """Two linear layers on the features of each frame, with a GELU between them, `[B, D, N] -> [B, outputs, N]`."""

    def __init__(self, dim: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fcs: nn.ModuleList = nn.ModuleList([nn.Conv1d(dim, hidden, 1), nn.Conv1d(hidden, outputs, 1)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fcs
        y: Tensor = second(F.gelu(first(x)))
        return y


class Spectral(nn.Module):
    """Multiplies the lowest frequencies of each feature by learned numbers and drops the others, `[B, D, N]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight: nn.ParameterDict = nn.ParameterDict(
            {"tensor": nn.Parameter(torch.zeros(dim, MODES, dtype=torch.complex64))}
        )
        self.bias: nn.Parameter = nn.Parameter(torch.zeros(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, norm="forward")
        kept = spectrum[..., :MODES] * self.weight["tensor"][:, : spectrum.shape[-1]]
        y: Tensor = torch.fft.irfft(kept, n=x.shape[-1], norm="forward") + self.bias
        return y


class Skip(nn.Module):
    """A linear layer without a bias on the features of each frame, `[B, D, N]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv: nn.Conv1d = nn.Conv1d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class Gain(nn.Module):
    """A learned gain for each feature, `[B, D, N]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.ones(1, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Blocks(nn.Module):
    """The operator's layers: a spectral and a pointwise step each, both beside a skip connection, `[B, D, N]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convs: nn.ModuleList = nn.ModuleList(Spectral(dim) for _ in range(LAYERS))
        self.fno_skips: nn.ModuleList = nn.ModuleList(Skip(dim) for _ in range(LAYERS))
        self.channel_mlp: nn.ModuleList = nn.ModuleList(Pointwise(dim, dim // 2, dim) for _ in range(LAYERS))
        self.channel_mlp_skips: nn.ModuleList = nn.ModuleList(Gain(dim) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        lists = (self.convs, self.fno_skips, self.channel_mlp, self.channel_mlp_skips)
        for index, (spectral, skip, pointwise, gain) in enumerate(cast(Iterable[Any], zip(*lists, strict=True))):
            activation = F.gelu if index < LAYERS - 1 else nn.Identity()
            gained = gain(x)
            x = activation(spectral(x) + skip(x))
            x = activation(pointwise(x) + gained)
        return x
