"""The common part of BS-RoFormer and MelBand-RoFormer, which differ only in how bins map to bands and back.

Each band of the spectrogram becomes a token. Transformers run along time and along bands in turn. For each stem and
band, an MLP estimates a complex mask for the mixture's spectrogram.
"""

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.models.attention import use_backend
from separation.models.base import Identity, SeparationModel, Transform
from separation.models.kernels.fused import FusedBandSplit, FusedMaskEstimator, FusedTransformer
from separation.models.kernels.native import NotFusedError
from separation.models.kernels.roformer_gpu import GpuBandSplit, GpuLayer, GpuMaskEstimator, GpuNorm, GpuTransformer
from separation.models.kernels.rotation import rotated_estimator, rotated_split, rotated_transformer
from separation.models.layers import (
    Attention,
    BandSplit,
    LinearAttention,
    MaskEstimator,
    PolarEmbedding,
    RMSNorm,
    RotaryEmbedding,
    Transformer,
    VariantEstimator,
)
from separation.models.shapes import Shapes, quotient
from separation.models.stft import Stft


@dataclass(frozen=True, kw_only=True)
class RoFormerConfig:
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    dim: int
    depth: int
    stereo: bool = False
    num_stems: int = 1
    time_transformer_depth: int = 1
    freq_transformer_depth: int = 1
    linear_transformer_depth: int = 0  # of a transformer with linear attention over all tokens, first in each block
    dim_head: int = 64
    heads: int = 8
    stft_n_fft: int = 2048
    stft_hop_length: int = 512
    stft_win_length: int = 2048
    stft_normalized: bool = False
    mlp_expansion_factor: int = 4
    skip_connection: bool = False  # add the outputs of all blocks so far to each block's input
    use_pope: bool = False  # polar position embeddings instead of rotary ones
    zero_dc: bool = False  # set the lowest bin of the estimates to zero


class RoFormer(SeparationModel):
    """Chunks of waveform `[B, C, T]` to estimates `[B, S, C, T]`; C is 2 if stereo, else 1; T > stft_n_fft // 2.

    Input and output are float32. The linear layers may be in bfloat16 or float16 (see `to_precision`).
    A subclass defines the number of bins of each band, and the mapping from bins to bands and back.
    """

    # Keys of the `model:` section that only training uses, that choose between equal implementations, or that do not
    # matter here: an estimate always has the length of its input.
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
        self.head_size: int | None = config.dim_head
        self.least_samples: int = config.stft_n_fft // 2 + 1
        self._dim = config.dim
        self._skips, self._zero_dc = config.skip_connection, config.zero_dc
        self._stft = Stft(
            n_fft=config.stft_n_fft,
            hop_length=config.stft_hop_length,
            win_length=config.stft_win_length,
            normalized=config.stft_normalized,
        )
        widths = tuple(2 * self.channels * bins for bins in band_bins)  # real and imaginary parts
        embedding = (
            PolarEmbedding(config.dim_head, config.heads) if config.use_pope else RotaryEmbedding(config.dim_head)
        )
        time_positions, freq_positions = embedding, copy.deepcopy(embedding)
        heads = {"heads": config.heads, "dim_head": config.dim_head}
        linear = partial(LinearAttention, config.dim, **heads)
        along_time, along_bands = (
            partial(Attention, config.dim, **heads, positions=positions, backend=attention)
            for positions in (time_positions, freq_positions)
        )

        def transformers() -> Iterator[Transformer]:
            make = partial(Transformer, config.dim, norm_output=norm_output)
            if config.linear_transformer_depth:
                yield make(depth=config.linear_transformer_depth, make_attention=linear)
            yield make(depth=config.time_transformer_depth, make_attention=along_time)
            yield make(depth=config.freq_transformer_depth, make_attention=along_bands)

        self.layers: nn.ModuleList = nn.ModuleList(nn.ModuleList(transformers()) for _ in range(config.depth))
        self.final_norm: nn.Module = nn.Identity() if norm_output else RMSNorm(config.dim)
        self.band_split: nn.Module = BandSplit(config.dim, widths)
        self.mask_estimators: nn.ModuleList = nn.ModuleList(
            self._mask_estimator(config, widths, mask_layers, attention) for _ in range(config.num_stems)
        )
        self._outputs = tuple(range(config.num_stems))

    def _mask_estimator(self, config: Any, widths: tuple[int, ...], linear_layers: int, attention: str) -> nn.Module:
        """A mask estimator without weights, for bands of so many features: a MaskEstimator or a VariantEstimator."""
        expansion = config.mlp_expansion_factor
        return MaskEstimator(config.dim, widths, linear_layers=linear_layers, expansion=expansion)

    @abstractmethod
    def _bands(self, bins: Tensor) -> Tensor:
        """The spectrogram's bins `[N, B, F, 2 * C]` to bands `[N, B, sum(widths)]`."""

    @abstractmethod
    def _bins(self, bands: Tensor) -> Tensor:
        """A mask's bands `[N, B, sum(widths)]` to bins `[N, B, F, 2 * C]`."""

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
            self.fuse(dtype)
            self.precision: torch.dtype = dtype
            self.attention: str | None = attention
            return
        if attention == "triton":
            self.fuse_for_gpu(dtype)
            self.attention = attention
            return
        if attention is not None:
            use_backend(self, attention)
        super().prepare(dtype, attention=attention)

    def fuse(self, precision: torch.dtype) -> None:
        """Replace the layers by those of kernels/fused.py, which compute in float32, bfloat16 or int8 on the CPU.

        For int8, features are rotated so that none is an outlier; see kernels/rotation.py.
        Raises NotFusedError for unsupported sizes and layers; the model is then unchanged.
        """
        is_variant = any(isinstance(estimator, VariantEstimator) for estimator in self.mask_estimators)
        # Gains at the end of a transformer, as in MelBand-RoFormer, do not commute with a rotation of all features. The
        # layers of a variant's mask estimators may not either.
        all_features = precision == torch.int8 and isinstance(self.final_norm, RMSNorm) and not is_variant

        def fused(transformer: Transformer) -> FusedTransformer:
            if precision == torch.int8:
                transformer = rotated_transformer(transformer, features=all_features)
            return FusedTransformer(transformer, precision)

        def fused_estimator(estimator: nn.Module) -> nn.Module:
            if isinstance(estimator, VariantEstimator):
                return estimator.fused(fused, lambda mlps: FusedMaskEstimator(nn.Identity(), mlps, precision))
            assert isinstance(estimator, MaskEstimator)
            norm = self.final_norm
            if all_features:
                norm, estimator = rotated_estimator(cast(RMSNorm, norm), estimator)
            return FusedMaskEstimator(norm, estimator, precision)

        blocks = cast(Iterable[Iterable[Transformer]], self.layers)
        layers = [nn.ModuleList(map(fused, block)) for block in blocks]
        split = cast(BandSplit, self.band_split)
        fused_split = FusedBandSplit(rotated_split(split) if all_features else split, precision)
        estimators = list(map(fused_estimator, self.mask_estimators))
        self.band_split, self.layers, self.mask_estimators = (
            fused_split,
            nn.ModuleList(layers),
            nn.ModuleList(estimators),
        )
        if not is_variant:
            self.final_norm = nn.Identity()  # the mask estimators include it

    def fuse_for_gpu(self, dtype: torch.dtype) -> None:
        """Replace the layers by those of kernels/roformer_gpu.py, which compute in float16 or bfloat16 on a CUDA GPU.

        Raises NotFusedError for unsupported layers; the model is then unchanged.
        """
        if self._skips:
            raise NotFusedError("it does not support skip connections")
        carry = torch.zeros(self._dim)
        layers = []
        for block in cast(Iterable[Iterable[Transformer]], self.layers):
            fused = []
            for transformer in block:
                fused.append(GpuTransformer(transformer, carry, dtype))
                carry = fused[-1].carry_out
            layers.append(nn.ModuleList(fused))
        self.layers = nn.ModuleList(layers)
        is_variant = any(isinstance(estimator, VariantEstimator) for estimator in self.mask_estimators)
        if isinstance(self.final_norm, RMSNorm):
            self.final_norm = GpuNorm(self.final_norm, carry, torch.float32 if is_variant else dtype)
        self.band_split = GpuBandSplit(cast(BandSplit, self.band_split), dtype)
        self.mask_estimators = nn.ModuleList(
            each.for_gpu(dtype) if isinstance(each, VariantEstimator) else GpuMaskEstimator(each, dtype)
            for each in self.mask_estimators
        )
        self.precision = dtype

    def to_precision(self, dtype: torch.dtype) -> None:
        super().to_precision(dtype)
        for module in self.modules():
            if isinstance(module, GpuLayer):
                module.to_precision(dtype)

    def forward(self, chunks: Tensor) -> Tensor:
        spectrum = self._stft.spectrogram(chunks)  # [B, C, F, N]
        features = self._features(torch.view_as_real(spectrum))
        # One stem at a time: the masks of all stems would exceed 32 MiB, above which glibc returns memory to the
        # system immediately, and the system would zero it again for every chunk.
        return torch.stack([self._estimate(index, features, spectrum, chunks.shape[-1]) for index in self._outputs], 1)

    def _features(self, spectrum: Tensor) -> Tensor:
        """Spectrogram `[B, C, F, N, 2]` to `[N, B, K, D]`."""
        # Frames come before the batch, so that the input of the transformers is a view along either axis.
        x = self.band_split(self._bands(rearrange(spectrum, "b c f n ri -> n b f (c ri)")))
        frames = len(x)
        blocks_sum: Tensor | None = None
        for *linear, time_transformer, freq_transformer in cast(Iterable[Any], self.layers):
            for transformer in linear:
                x = rearrange(transformer(rearrange(x, "n b k d -> b (n k) d")), "b (n k) d -> n b k d", n=frames)
            if blocks_sum is not None:
                x = x + blocks_sum
            x = axial(x, time_transformer, freq_transformer)
            if self._skips:
                blocks_sum = x if blocks_sum is None else blocks_sum + x
        features: Tensor = self.final_norm(x)
        return features

    def _estimate(self, index: int, features: Tensor, spectrum: Tensor, length: int) -> Tensor:
        """One stem's estimate `[B, C, length]`: its complex mask times the mixture's spectrogram `[B, C, F, N]`."""
        estimate = spectrum * torch.view_as_complex(self._mask(index, features))
        if self._zero_dc:
            estimate[..., 0, :] = 0
        return self._stft.waveform(estimate, length)

    def _mask(self, index: int, features: Tensor) -> Tensor:
        """One stem's mask `[B, C, F, N, 2]`, a view."""
        mask = self._bins(self.mask_estimators[index](features).float())
        return rearrange(mask, "n b f (c ri) -> b c f n ri", ri=2)

    def transform(self, length: int) -> Transform:
        return Transform.of(self._stft)

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


def axial(x: Tensor, along_time: nn.Module, along_bands: nn.Module) -> Tensor:
    """Features `[N, B, K, D]` after a transformer along time and one along bands."""
    frames, batch = x.shape[:2]
    x = along_time(rearrange(x, "n b k d -> (b k) n d"))
    x = along_bands(rearrange(x, "(b k) n d -> (n b) k d", b=batch))
    features: Tensor = x.unflatten(0, (frames, batch))
    return features


def mask_layers_in(shapes: Shapes) -> int:
    """The number of linear layers of a mask estimator's MLP."""
    return shapes.count(r"mask_estimators\.0\.to_freqs\.0\.0\.(\d+)\.weight")


def band_widths(shapes: Shapes) -> tuple[int, ...]:
    """The number of features of each band: the real and imaginary parts of its bins in each channel."""
    count = shapes.count(r"band_split\.to_features\.(\d+)\..*")
    return shapes.sizes((f"band_split.to_features.{band}.1.weight" for band in range(count)), 1) or ()
