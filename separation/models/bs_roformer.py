"""Band-Split RoFormer (Lu, Wang, Kong and Hung 2023, arXiv:2309.02612), in the community's checkpoint layout.

The spectrogram is cut into bands, each band becomes a token, transformers run along time and along bands in turn,
and an MLP a band and a stem gives a complex mask for the mixture's spectrogram.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from separation.models.attention import BACKENDS
from separation.models.base import SeparationModel
from separation.models.fused import FusedBandSplit, FusedMaskEstimator, FusedTransformer
from separation.models.layers import Attention, BandSplit, MaskEstimator, Pair, RMSNorm, RotaryEmbedding, Transformer
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
        self.head_size = config.dim_head
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
        self.final_norm: nn.Module = RMSNorm(config.dim)
        self.band_split: nn.Module = BandSplit(config.dim, widths)
        self.mask_estimators = nn.ModuleList(
            MaskEstimator(
                config.dim,
                widths,
                linear_layers=config.mask_estimator_depth,
                expansion=config.mlp_expansion_factor,
            )
            for _ in range(config.num_stems)
        )
        self._outputs = tuple(range(config.num_stems))  # those that are computed, in the order of the estimates

    def prepare(self, dtype: torch.dtype, *, attention: str | None = None) -> None:
        if attention == "fused":
            self.fuse()
            return
        if attention is not None:
            for module in self.modules():
                if isinstance(module, Attention):
                    module.attend = BACKENDS[attention]
        super().prepare(dtype)

    def fuse(self) -> None:
        """Replace the layers by their fused twins, which compute in bfloat16 on the CPU.

        Raises NotFusedError for sizes that those do not know; the model is then as before.
        """
        layers = [
            nn.ModuleList(FusedTransformer(transformer) for transformer in pair)
            for pair in cast(Iterable[Iterable[Transformer]], self.layers)
        ]
        split = FusedBandSplit(cast(BandSplit, self.band_split))
        estimators = [
            FusedMaskEstimator(self.final_norm, each) for each in cast(Iterable[MaskEstimator], self.mask_estimators)
        ]
        self.band_split, self.layers, self.mask_estimators = split, nn.ModuleList(layers), nn.ModuleList(estimators)
        self.final_norm = nn.Identity()  # it is within the mask estimators

    def only(self, stems: tuple[str, ...]) -> "BSRoFormer":
        fewer = copy.copy(self)  # shares the layers; the mask estimators of other stems do not run
        fewer._outputs = tuple(self._outputs[self.stems.index(stem)] for stem in stems)
        fewer.stems = stems
        return fewer

    def forward(self, chunks: Tensor) -> Tensor:
        spectrum = stft(chunks, **self._stft)  # [B, C, F, N]
        features = self._features(spectrum)
        # Stem by stem, for masks and spectrograms of all stems at once would be the largest tensors by far: beyond the
        # 32 MiB from which on glibc gives memory back at once, only to have it zeroed again for the next chunk.
        return torch.stack([self._estimate(index, features, spectrum, chunks.shape[-1]) for index in self._outputs], 1)

    def _features(self, spectrum: Tensor) -> Tensor:
        """Complex spectrogram `[B, C, F, N]` to `[B, N, K, D]`."""
        x = rearrange(torch.view_as_real(spectrum), "b c f n ri -> b n (f c ri)")
        x = self.band_split(x)
        frames = x.shape[1]
        for time_transformer, freq_transformer in cast(Iterable[Pair], self.layers):
            x = time_transformer(rearrange(x, "b n k d -> (b k) n d"))
            x = freq_transformer(rearrange(x, "(b k) n d -> (b n) k d", b=spectrum.shape[0]))
            x = rearrange(x, "(b n) k d -> b n k d", n=frames)
        return self.final_norm(x)

    def _estimate(self, index: int, features: Tensor, spectrum: Tensor, length: int) -> Tensor:
        """One stem's estimate `[B, C, length]`: its complex mask times the mixture's spectrogram `[B, C, F, N]`."""
        mask = self.mask_estimators[index](features).float()
        mask = rearrange(mask, "b n (f c ri) -> b c f n ri", c=self.channels, ri=2)  # a view
        estimate = spectrum * torch.view_as_complex(mask)
        if self.config.zero_dc:
            estimate[..., 0, :] = 0
        return istft(estimate, length=length, **self._stft)
