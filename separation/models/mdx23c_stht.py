"""MDX23C with a short-time Hartley transform, an experiment of Music-Source-Separation-Training.

The Hartley transform of a real frame is real: the real part of its Fourier transform minus the imaginary part, for all
frequencies, negative ones too. The network therefore takes as many bins as a frame has samples, with one number each.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from separation.models.base import Identity
from separation.models.mdx23c import MDX23C, MDX23CConfig
from separation.models.shapes import Shapes
from separation.models.stft import Stft


@dataclass(frozen=True, kw_only=True)
class MDX23CSTHTConfig(MDX23CConfig):
    """As for MDX23C. `dim_f` counts frequencies from 0 up, so it is half of `n_fft`."""

    @property
    def numbers(self) -> int:
        return 1

    @property
    def n_bins(self) -> int:
        return 2 * self.dim_f

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2 * self.dim_f != self.n_fft:
            raise ValueError(f"dim_f {self.dim_f} must be half of n_fft {self.n_fft}: correct one of them")


class MDX23CSTHT(MDX23C):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; T must be `chunk_samples`."""

    Config: ClassVar[type] = MDX23CSTHTConfig
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (r"(?!)",)  # its weights have the names of MDX23C's
    TELLING_WEIGHT: ClassVar[str] = "encoder_blocks.0.tfc_tdf.blocks.0.tdf.2.weight"  # over twice as many bins

    def __init__(self, config: MDX23CSTHTConfig, identity: Identity) -> None:
        super().__init__(config, identity)
        n_fft = config.n_fft
        self._stft = Stft(n_fft=n_fft, hop_length=config.hop_length, win_length=n_fft, window="hamming")

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        sizes = super().sizes_in(shapes, config)
        bins = sizes.pop("dim_f")
        return {**sizes, "dim_f": bins and bins // 2}

    def transform(self, length: int) -> Any:
        raise self._no_core()

    def _taken(self, spectrum: Tensor) -> Tensor:
        upper = (spectrum.real + spectrum.imag)[..., 1:-1, :].flip(-2)  # negative frequencies
        return torch.cat([spectrum.real - spectrum.imag, upper], dim=-2)[..., None]

    def _given(self, values: Tensor) -> Tensor:
        values = values.squeeze(-1)  # [..., N, n_fft]
        negative = torch.cat([values[..., :1], values.flip(-1)[..., :-1]], dim=-1)
        half = slice(0, self.config.dim_f + 1)
        return torch.complex(values + negative, negative - values)[..., half] / 2
