"""Band-Split RoFormer (Lu, Wang, Kong and Hung 2023, arXiv:2309.02612), in the community's checkpoint layout.

The spectrogram is cut into bands, each band becomes a token, transformers run along time and along bands in turn,
and an MLP a band and a stem gives a complex mask for the mixture's spectrogram.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from separation.models.base import SeparationModel
from separation.models.layers import BandSplit, MaskEstimator, Pair, RMSNorm, RotaryEmbedding, Transformer
from separation.stft import istft, stft

BANDS_62 = (2,) * 24 + (4,) * 12 + (12,) * 8 + (24,) * 8 + (48,) * 8 + (128, 129)  # bins a band; sum 1025


@dataclass(frozen=True, kw_only=True)
class BSRoFormerConfig:
    """The hyper-parameters, under the names that community YAML files give them in their `model:` section."""

    dim: int
    depth: int
    stereo: bool = False
    num_stems: int = 1
    time_transformer_depth: int = 1
    freq_transformer_depth: int = 1
    freqs_per_bands: tuple[int, ...] = BANDS_62
    dim_head: int = 64
    heads: int = 8
    stft_n_fft: int = 2048
    stft_hop_length: int = 512
    stft_win_length: int = 2048
    stft_normalized: bool = False
    mask_estimator_depth: int = 2
    mlp_expansion_factor: int = 4
    zero_dc: bool = False

    def __post_init__(self) -> None:
        bins = self.stft_n_fft // 2 + 1
        if sum(self.freqs_per_bands) != bins:
            raise ValueError(
                f"freqs_per_bands adds up to {sum(self.freqs_per_bands)} bins, stft_n_fft {self.stft_n_fft} has {bins}"
            )


class BSRoFormer(SeparationModel):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; C is 2 if stereo, else 1; T > stft_n_fft // 2.

    Samples are float32 in and out. The linear layers may be in bfloat16 or float16 (see `to_precision`).
    """

    Config = BSRoFormerConfig
    # Keys that training scripts read from the same `model:` section; they do not change inference.
    TRAINING_KEYS = frozenset(
        {
            "attn_dropout",
            "dim_freqs_in",
            "ff_dropout",
            "flash_attn",
            "multi_stft_hop_size",
            "multi_stft_normalized",
            "multi_stft_resolution_loss_weight",
            "multi_stft_resolutions_window_sizes",
            "multi_stft_window_fn",
            "use_torch_checkpoint",
        }
    )

    def __init__(self, config: BSRoFormerConfig, *, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.channels = 2 if config.stereo else 1
        self._stft: dict[str, Any] = {
            "n_fft": config.stft_n_fft,
            "hop_length": config.stft_hop_length,
            "win_length": config.stft_win_length,
            "normalized": config.stft_normalized,
        }
        widths = tuple(2 * self.channels * bins for bins in config.freqs_per_bands)  # real and imaginary part
        time_rotary, freq_rotary = RotaryEmbedding(config.dim_head), RotaryEmbedding(config.dim_head)

        def transformer(depth: int, rotary: RotaryEmbedding) -> Transformer:
            return Transformer(
                config.dim,
                depth=depth,
                heads=config.heads,
                dim_head=config.dim_head,
                rotary_embed=rotary,
                backend=attention,
            )

        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    transformer(config.time_transformer_depth, time_rotary),
                    transformer(config.freq_transformer_depth, freq_rotary),
                ]
            )
            for _ in range(config.depth)
        )
        self.final_norm = RMSNorm(config.dim)
        self.band_split = BandSplit(config.dim, widths)
        self.mask_estimators = nn.ModuleList(
            MaskEstimator(
                config.dim,
                widths,
                linear_layers=config.mask_estimator_depth,
                expansion=config.mlp_expansion_factor,
            )
            for _ in range(config.num_stems)
        )

    def forward(self, chunks: Tensor) -> Tensor:
        spectrum = stft(chunks, **self._stft)  # [B, C, F, N]
        masks = self.masks(spectrum)  # [B, S, C, F, N]
        estimates = spectrum.unsqueeze(1) * masks
        if self.config.zero_dc:
            estimates[..., 0, :] = 0
        return istft(estimates, length=chunks.shape[-1], **self._stft)

    def masks(self, spectrum: Tensor) -> Tensor:
        """Complex spectrogram `[B, C, F, N]` to complex masks `[B, S, C, F, N]`, both in complex64."""
        x = rearrange(torch.view_as_real(spectrum), "b c f n ri -> b n (f c ri)")
        x = self.band_split(x)  # [B, N, K, D]
        frames = x.shape[1]
        for time_transformer, freq_transformer in cast(Iterable[Pair], self.layers):
            x = time_transformer(rearrange(x, "b n k d -> (b k) n d"))
            x = freq_transformer(rearrange(x, "(b k) n d -> (b n) k d", b=spectrum.shape[0]))
            x = rearrange(x, "(b n) k d -> b n k d", n=frames)
        x = self.final_norm(x)
        masks = torch.stack([estimator(x) for estimator in self.mask_estimators], dim=1).float()
        masks = rearrange(masks, "b s n (f c ri) -> b s c f n ri", c=self.channels, ri=2)
        return torch.view_as_complex(masks.contiguous())
