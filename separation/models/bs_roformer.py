"""Band-Split RoFormer (Lu, Wang, Kong and Hung 2023, arXiv:2309.02612), in the community's checkpoint layout.

Its bands do not overlap: each bin of the spectrogram belongs to one band.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from separation.models.base import Identity
from separation.models.layers import Attention
from separation.models.roformer import RoFormer, RoFormerConfig, band_widths, mask_layers_in
from separation.models.shapes import Shapes

BANDS_62 = (2,) * 24 + (4,) * 12 + (12,) * 8 + (24,) * 8 + (48,) * 8 + (128, 129)  # bins per band, 1025 in all


@dataclass(frozen=True, kw_only=True)
class BSRoFormerConfig(RoFormerConfig):
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    freqs_per_bands: tuple[int, ...] = BANDS_62
    mask_estimator_depth: int = 2  # linear layers
    use_shared_bias: bool = False

    def __post_init__(self) -> None:
        bins = self.stft_n_fft // 2 + 1
        if sum(self.freqs_per_bands) != bins:
            raise ValueError(
                f"freqs_per_bands adds up to {sum(self.freqs_per_bands)} bins, but stft_n_fft {self.stft_n_fft} has "
                f"{bins}: correct one of them"
            )


class BSRoFormer(RoFormer):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; see RoFormer."""

    Config: ClassVar[type] = BSRoFormerConfig
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"band_split\.to_features\..*",
        r"layers\.\d+\.\d+\.layers\.\d+\.0\.to_qkv\.weight",
        r"final_norm\.gamma",
    )

    def __init__(self, config: BSRoFormerConfig, identity: Identity, *, attention: str = "sdpa") -> None:
        super().__init__(
            config,
            identity,
            config.freqs_per_bands,
            mask_layers=config.mask_estimator_depth,
            norm_output=False,
            attention=attention,
        )
        if config.use_shared_bias:  # checkpoints store these two under these names, and a copy for every layer
            self.linear_62_bias_0: nn.Parameter = nn.Parameter(torch.zeros(config.heads * config.dim_head * 3))
            self.linear_64_bias_0: nn.Parameter = nn.Parameter(torch.zeros(config.dim))
            for module in self.modules():
                if isinstance(module, Attention):
                    module.add_biases(self.linear_62_bias_0, self.linear_64_bias_0)

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        widths = band_widths(shapes)
        stereo = not sum(widths) % 4  # the number of bins is odd, and each has two numbers per channel
        bins = tuple(width // (4 if stereo else 2) for width in widths)
        return super().sizes_in(shapes, config) | {
            "stereo": stereo,
            "freqs_per_bands": bins,
            "stft_n_fft": 2 * (sum(bins) - 1),
            "mask_estimator_depth": mask_layers_in(shapes),
            "use_shared_bias": "linear_62_bias_0" in shapes,
        }

    def _bands(self, bins: Tensor) -> Tensor:
        return bins.flatten(2)

    def _bins(self, bands: Tensor) -> Tensor:
        bins: Tensor = bands.unflatten(2, (-1, 2 * self.channels))
        return bins
