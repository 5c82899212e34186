"""What BS-RoFormer and MelBand-RoFormer share: all but the way from the spectrogram's bins to bands and back.

Each band of the spectrogram becomes a token, transformers run along time and along bands in turn, and an MLP a band
and a stem gives a complex mask for the mixture's spectrogram.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.models.attention import BACKENDS
from separation.models.base import Identity, SeparationModel, Transform
from separation.models.kernels.fused import FusedBandSplit, FusedMaskEstimator, FusedTransformer
from separation.models.kernels.native import NotFusedError
from separation.models.kernels.roformer_gpu import GpuBandSplit, GpuLayer, GpuMaskEstimator, GpuNorm, GpuTransformer
from separation.models.layers import (
    Attention,
    BandSplit,
    MaskEstimator,
    PolarEmbedding,
    RMSNorm,
    RotaryEmbedding,
    Transformer,
)
from separation.models.shapes import Shapes, quotient
from separation.models.stft import istft, stft


@dataclass(frozen=True, kw_only=True)
class RoFormerConfig:
    """The hyper-parameters, under the names that community YAML files give them in their `model:` section."""

    dim: int
    depth: int
    stereo: bool = False
    num_stems: int = 1
    time_transformer_depth: int = 1
    freq_transformer_depth: int = 1
    linear_transformer_depth: int = 0  # of linear attention over all tokens, before each of the above
    dim_head: int = 64
    heads: int = 8
    stft_n_fft: int = 2048
    stft_hop_length: int = 512
    stft_win_length: int = 2048
    stft_normalized: bool = False
    mlp_expansion_factor: int = 4
    skip_connection: bool = False  # each block is given the sum of what all before it gave
    use_pope: bool = False  # polar positions in place of rotary ones
    zero_dc: bool = False


class RoFormer(SeparationModel):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; C is 2 if stereo, else 1; T > stft_n_fft // 2.

    Samples are float32 in and out. The linear layers may be in bfloat16 or float16 (see `to_precision`).
    A subclass gives each band's number of bins, and the way from bins to bands and back.
    """

    # Keys that training scripts read from the same `model:` section, or that choose how to compute the same; an
    # estimate here always has the length of its input.
    TRAINING_KEYS = frozenset(
        {
            "attn_dropout",
            "dim_freqs_in",
            "ff_dropout",
            "flash_attn",
            "match_input_audio_length",
            "multi_stft_hop_size",
            "multi_stft_normalized",
            "multi_stft_resolution_loss_weight",
            "multi_stft_resolutions_window_sizes",
            "multi_stft_window_fn",
            "sage_attention",
            "use_torch_checkpoint",
        }
    )

    has_int8 = True

    def __init__(
        self,
        config: RoFormerConfig,
        identity: Identity,
        band_bins: Iterable[int],
        *,
        mask_layers: int,
        norm_output: bool,
        attention: str,
    ) -> None:
        super().__init__(identity)
        self.channels = 2 if config.stereo else 1
        self.head_size = config.dim_head
        self.least_samples = config.stft_n_fft // 2 + 1
        self._features_a_token = config.dim
        self._skips, self._zero_dc = config.skip_connection, config.zero_dc
        self._stft: dict[str, Any] = {
            "n_fft": config.stft_n_fft,
            "hop_length": config.stft_hop_length,
            "win_length": config.stft_win_length,
            "normalized": config.stft_normalized,
        }
        widths = tuple(2 * self.channels * bins for bins in band_bins)  # real and imaginary part
        embedding = (
            PolarEmbedding(config.dim_head, config.heads) if config.use_pope else RotaryEmbedding(config.dim_head)
        )
        time_positions, freq_positions = embedding, copy.deepcopy(embedding)

        def transformers() -> Iterator[Transformer]:
            for depth, positions in (
                (config.linear_transformer_depth, None),
                (config.time_transformer_depth, time_positions),
                (config.freq_transformer_depth, freq_positions),
            ):
                if depth or positions is not None:
                    yield Transformer(
                        config.dim,
                        depth=depth,
                        heads=config.heads,
                        dim_head=config.dim_head,
                        positions=positions,
                        backend=attention,
                        norm_output=norm_output,
                    )

        self.layers = nn.ModuleList(nn.ModuleList(transformers()) for _ in range(config.depth))
        self.final_norm: nn.Module = nn.Identity() if norm_output else RMSNorm(config.dim)
        self.band_split: nn.Module = BandSplit(config.dim, widths)
        self.mask_estimators = nn.ModuleList(
            MaskEstimator(config.dim, widths, linear_layers=mask_layers, expansion=config.mlp_expansion_factor)
            for _ in range(config.num_stems)
        )
        self._outputs = tuple(range(config.num_stems))  # those that are computed, in the order of the estimates

    @abstractmethod
    def _bands(self, bins: Tensor) -> Tensor:
        """The spectrogram's values `[N, B, F, 2 * C]` band by band, `[N, B, sum(widths)]`."""

    @abstractmethod
    def _bins(self, bands: Tensor) -> Tensor:
        """A mask `[N, B, sum(widths)]` bin by bin, `[N, B, F, 2 * C]`."""

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        parts = shapes.count(r"layers\.0\.(\d+)\..*")
        linear, time, freq = (None, 0, 1) if parts < 3 else (0, 1, 2)
        dim = shapes.size("band_split.to_features.0.1.weight", 0)
        heads = shapes.size(f"layers.0.{time}.layers.0.0.to_gates.weight", 0)
        qkv = shapes.size(f"layers.0.{time}.layers.0.0.to_qkv.weight", 0)
        hidden = shapes.size("mask_estimators.0.to_freqs.0.0.0.weight", 0)
        return {
            "dim": dim,
            "depth": shapes.count(r"layers\.(\d+)\..*"),
            "num_stems": shapes.count(r"mask_estimators\.(\d+)\..*"),
            "linear_transformer_depth": 0 if linear is None else shapes.count(r"layers\.0\.0\.layers\.(\d+)\..*"),
            "time_transformer_depth": shapes.count(rf"layers\.0\.{time}\.layers\.(\d+)\..*"),
            "freq_transformer_depth": shapes.count(rf"layers\.0\.{freq}\.layers\.(\d+)\..*"),
            "heads": heads,
            "dim_head": quotient(qkv, heads and 3 * heads),
            "mlp_expansion_factor": quotient(hidden, dim) if mask_layers_in(shapes) > 1 else None,
            "use_pope": shapes.has(r".*\.pope_embed\..*"),
        }

    def prepare(self, dtype: torch.dtype, *, attention: str | None = None) -> None:
        if attention == "fused":
            self.fuse(int8=dtype == torch.int8)
            self.precision, self.attention = dtype, attention
            return
        if attention == "triton":
            self.fuse_for_gpu(dtype)
            self.attention = attention
            return
        if attention is not None:
            for module in self.modules():
                if isinstance(module, Attention):
                    module.attend = BACKENDS[attention]
        super().prepare(dtype, attention=attention)

    def fuse(self, *, int8: bool = False) -> None:
        """Replace the layers by their fused twins, which compute in bfloat16 and, if asked, in bytes on the CPU.

        Raises NotFusedError for sizes and layers that those do not know; the model is then as before.
        """
        layers = [
            nn.ModuleList(FusedTransformer(transformer, int8=int8) for transformer in block)
            for block in cast(Iterable[Iterable[Transformer]], self.layers)
        ]
        split = FusedBandSplit(cast(BandSplit, self.band_split))
        estimators = [
            FusedMaskEstimator(self.final_norm, each) for each in cast(Iterable[MaskEstimator], self.mask_estimators)
        ]
        self.band_split, self.layers, self.mask_estimators = split, nn.ModuleList(layers), nn.ModuleList(estimators)
        self.final_norm = nn.Identity()  # it is within the mask estimators

    def fuse_for_gpu(self, dtype: torch.dtype) -> None:
        """Replace the layers by their twins for a CUDA GPU, which compute in float16 or bfloat16.

        Raises NotFusedError for layers that those do not know; the model is then as before.
        """
        if self._skips:
            raise NotFusedError("it does not know skip connections")
        carry = torch.zeros(self._features_a_token)
        layers = []
        for block in cast(Iterable[Iterable[Transformer]], self.layers):
            fused = []
            for transformer in block:
                fused.append(GpuTransformer(transformer, carry, dtype))
                carry = fused[-1].carry_out
            layers.append(nn.ModuleList(fused))
        self.layers = nn.ModuleList(layers)
        if isinstance(self.final_norm, RMSNorm):
            self.final_norm = GpuNorm(self.final_norm, carry, dtype)
        self.band_split = GpuBandSplit(cast(BandSplit, self.band_split), dtype)
        self.mask_estimators = nn.ModuleList(
            GpuMaskEstimator(each, dtype) for each in cast(Iterable[MaskEstimator], self.mask_estimators)
        )
        self.precision = dtype

    def to_precision(self, dtype: torch.dtype) -> None:
        super().to_precision(dtype)
        for module in self.modules():
            if isinstance(module, GpuLayer):
                module.to_precision(dtype)

    def forward(self, chunks: Tensor) -> Tensor:
        spectrum = stft(chunks, **self._stft)  # [B, C, F, N]
        features = self._features(torch.view_as_real(spectrum))
        # Stem by stem, for masks and spectrograms of all stems at once would be the largest tensors by far: beyond the
        # 32 MiB from which on glibc gives memory back at once, only to have it zeroed again for the next chunk.
        return torch.stack([self._estimate(index, features, spectrum, chunks.shape[-1]) for index in self._outputs], 1)

    def _features(self, spectrum: Tensor) -> Tensor:
        """Spectrogram `[B, C, F, N, 2]` to `[N, B, K, D]`."""
        # Frames before the batch, so that the transformers of both axes get views.
        x = self.band_split(self._bands(rearrange(spectrum, "b c f n ri -> n b f (c ri)")))
        frames, batch = x.shape[:2]
        given: Tensor | None = None
        for *linear, time_transformer, freq_transformer in cast(Iterable[Any], self.layers):
            for transformer in linear:
                x = rearrange(transformer(rearrange(x, "n b k d -> b (n k) d")), "b (n k) d -> n b k d", n=frames)
            if given is not None:
                x = x + given
            x = time_transformer(rearrange(x, "n b k d -> (b k) n d"))
            x = freq_transformer(rearrange(x, "(b k) n d -> (n b) k d", b=batch))
            x = x.unflatten(0, (frames, batch))
            if self._skips:
                given = x if given is None else given + x
        return self.final_norm(x)

    def _estimate(self, index: int, features: Tensor, spectrum: Tensor, length: int) -> Tensor:
        """One stem's estimate `[B, C, length]`: its complex mask times the mixture's spectrogram `[B, C, F, N]`."""
        estimate = spectrum * torch.view_as_complex(self._mask(index, features))
        if self._zero_dc:
            estimate[..., 0, :] = 0
        return istft(estimate, length=length, **self._stft)

    def _mask(self, index: int, features: Tensor) -> Tensor:
        """One stem's mask `[B, C, F, N, 2]`, a view."""
        mask = self._bins(self.mask_estimators[index](features).float())
        return rearrange(mask, "n b f (c ri) -> b c f n ri", ri=2)

    def transform(self, length: int) -> Transform:
        return Transform.centred(**self._stft)

    def core(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        (spectrum,) = inputs
        features = self._features(spectrum)
        real, imaginary = spectrum.unbind(-1)
        estimates = []
        for index in self._outputs:
            mask_real, mask_imaginary = self._mask(index, features).unbind(-1)
            product = real * mask_real - imaginary * mask_imaginary, real * mask_imaginary + imaginary * mask_real
            estimates.append(torch.stack(product, dim=-1))
        result = torch.stack(estimates, dim=1)
        if self._zero_dc:
            result = F.pad(result[..., 1:, :, :], (0, 0, 0, 0, 1, 0))
        return (result,)


def mask_layers_in(shapes: Shapes) -> int:
    """The linear layers of a mask estimator's MLP."""
    return shapes.count(r"mask_estimators\.0\.to_freqs\.0\.0\.(\d+)\.weight")


def band_widths(shapes: Shapes) -> tuple[int, ...]:
    """The features of each band: real and imaginary parts of its bins in each channel."""
    count = shapes.count(r"band_split\.to_features\.(\d+)\..*")
    return shapes.sizes((f"band_split.to_features.{band}.1.weight" for band in range(count)), 1) or ()
