"""BS-RoFormer HyperACE v2 (unwa 2025), whose mask estimators have a second branch, a network for image segmentation.

The branch takes the features as an image of frames and bands and adds a mask of its own. Its encoder halves the image
step by step; adaptive correlation (YOLOv13's HyperACE, Lei et al. 2025, arXiv:2506.17733) relates all places of all
scales through hyperedges; its decoder and its head give the image the height and width of the spectrogram. Attribute
names match the keys of the published checkpoints. Axes: B batch, D channel, N frame, K band or bin.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig
from separation.models.kernels.roformer_gpu import GpuMaskEstimator
from separation.models.layers import Transformer, VariantEstimator, band_masks, band_mlps

CHANNELS = (256, 384, 512, 768)  # of the encoder's scales
BASE_CHANNELS = 64  # before the first scale
HEADS = 8
HYPEREDGES = 32
BINS_PER_BAND = 16  # after the head's four doublings


@dataclass(frozen=True, kw_only=True)
class HyperACEConfig(BSRoFormerConfig):
    """The hyper-parameters, with the names that community YAML files use in their `model:` section."""

    hyperace_version: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stereo:
            raise ValueError("stereo must be true: the segmentation branch gives the masks of two channels")
        if self.hyperace_version != 2:
            raise ValueError(f"hyperace_version {self.hyperace_version} is not supported: use a model of version 2")


class BSRoFormerHyperACE(BSRoFormer):
    """Chunks of waveform `[B, 2, T]` to estimates `[B, S, 2, T]`; see RoFormer."""

    Config: ClassVar[type] = HyperACEConfig
    TRAINING_KEYS = BSRoFormer.TRAINING_KEYS | {"use_mask_estimator_hyper_ace"}
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        *BSRoFormer.KEY_PATTERNS,
        r"mask_estimators\.\d+\.segm\.upsample_head\.block1\.out_conv\..*",
    )

    def to_precision(self, dtype: torch.dtype) -> None:
        """As in SeparationModel, but the segmentation branches stay in float32: their norms enlarge rounding."""
        super().to_precision(dtype)
        for module in self.modules():
            if isinstance(module, Segmentation):
                module.float()

    def _mask_estimator(self, config: Any, widths: tuple[int, ...], linear_layers: int, attention: str) -> nn.Module:
        return SegmentationEstimator(config, widths, linear_layers)


class SegmentationEstimator(VariantEstimator):
    """The MLPs of a MaskEstimator plus the segmentation branch, `[N, B, K, D] -> [N, B, sum(widths)]`."""

    def __init__(self, config: HyperACEConfig, widths: tuple[int, ...], linear_layers: int) -> None:
        super().__init__()
        expansion = config.mlp_expansion_factor
        self.to_freqs: nn.ModuleList = band_mlps(config.dim, widths, linear_layers=linear_layers, expansion=expansion)
        self.segm: Segmentation = Segmentation(config.dim, len(widths), sum(widths) // 4)

    def forward(self, x: Tensor) -> Tensor:
        masks: Tensor = band_masks(self.to_freqs, x) + self.segm(x.float())
        return masks

    def fused(self, fuse: Callable[[Transformer], nn.Module], fuse_mlps: Callable[[nn.Module], nn.Module]) -> nn.Module:
        return _Sum(fuse_mlps(self), self.segm)

    def for_gpu(self, dtype: torch.dtype) -> nn.Module:
        return _Sum(GpuMaskEstimator(self, dtype), self.segm)


class _Sum(nn.Module):
    """The sum of both branches, in float32."""

    def __init__(self, mlps: nn.Module, segm: nn.Module) -> None:
        super().__init__()
        self.mlps, self.segm = mlps, segm

    def forward(self, x: Tensor) -> Tensor:
        masks: Tensor = self.mlps(x) + self.segm(x.float())
        return masks


class InstanceNorm(nn.InstanceNorm2d):
    """PyTorch's InstanceNorm2d with a gain and a bias, computed in float32; the result has the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-8, affine=True)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


class Convolution(nn.Module):
    """A 1x1 convolution, a norm and SiLU."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv: nn.Conv2d = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn: InstanceNorm = InstanceNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class SeparableConvolution(nn.Module):
    """A 3x3 convolution of each channel, a 1x1 convolution, a norm and SiLU."""

    def __init__(self, channels: int, outputs: int, stride: tuple[int, int] = (1, 1)) -> None:
        super().__init__()
        self.dwconv: nn.Conv2d = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.pwconv: nn.Conv2d = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn: InstanceNorm = InstanceNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.pwconv(self.dwconv(x))))


class Bottleneck(nn.Module):
    """Two separable convolutions beside a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dsconv1: SeparableConvolution = SeparableConvolution(channels, channels)
        self.dsconv2: SeparableConvolution = SeparableConvolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.dsconv2(self.dsconv1(x))
        return y


class PartialBlock(nn.Module):
    """Bottlenecks on one projection of the input beside another projection, then a fusion of both."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.cv1: Convolution = Convolution(channels, channels)
        self.cv2: Convolution = Convolution(channels, channels)
        self.cv3: Convolution = Convolution(2 * channels, channels)
        self.m: nn.Sequential = nn.Sequential(*(Bottleneck(channels) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        fused: Tensor = self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))
        return fused


class NarrowBlock(nn.Module):
    """A PartialBlock on half of the output channels, between 1x1 convolutions."""

    def __init__(self, channels: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.cv1: Convolution = Convolution(channels, outputs // 2)
        self.m: PartialBlock = PartialBlock(outputs // 2, depth)
        self.cv2: Convolution = Convolution(outputs // 2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cv2(self.m(self.cv1(x)))
        return y


class Encoder(nn.Module):
    """Images of four scales, `[B, D, N, K]` each; the last two have fewer bands as well."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stem: SeparableConvolution = SeparableConvolution(dim, BASE_CHANNELS, (2, 1))
        sizes = pairwise((BASE_CHANNELS, *CHANNELS))
        strides, depths = ((2, 1), (2, 1), (2, 2), (2, 2)), (2, 4, 4, 2)
        self.p2: nn.Sequential
        self.p3: nn.Sequential
        self.p4: nn.Sequential
        self.p5: nn.Sequential
        self.p2, self.p3, self.p4, self.p5 = (
            nn.Sequential(SeparableConvolution(channels, outputs, stride), NarrowBlock(outputs, outputs, depth))
            for (channels, outputs), stride, depth in zip(sizes, strides, depths, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        scales = []
        for scale in (self.p2, self.p3, self.p4, self.p5):
            x = scale(x)
            scales.append(x)
        return scales


class Hyperedges(nn.Module):
    """How much each place belongs to each hyperedge, `[B, places, D] -> [B, hyperedges, places]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.global_proto: nn.Parameter = nn.Parameter(torch.randn(HYPEREDGES, channels))
        self.context_mapper: nn.Linear = nn.Linear(2 * channels, HYPEREDGES * channels, bias=False)
        self.query_proj: nn.Linear = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[-1]
        context = torch.cat((x.mean(dim=1), x.amax(dim=1)), dim=1)
        prototypes = self.global_proto + self.context_mapper(context).unflatten(1, (HYPEREDGES, channels)).float()
        places = self.query_proj(x).float()
        # The mean of the heads' products is the product of all features.
        scale = (channels // HEADS) ** -0.5 / HEADS
        edges: Tensor = (prototypes @ places.mT * scale).softmax(dim=-1)
        return edges.to(x.dtype)


class HypergraphConvolution(nn.Module):
    """Each hyperedge collects the features of its places, then each place those of its hyperedges."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.W_e: nn.Linear = nn.Linear(channels, channels, bias=False)
        self.W_v: nn.Linear = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        collected = F.silu(self.W_e(edges @ x))
        return x + F.silu(self.W_v(edges.mT @ collected))


class Hypergraph(nn.Module):
    """Hyperedges over all places of an image `[B, D, N, K]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.adaptive_hyperedge_gen: Hyperedges = Hyperedges(channels)
        self.hypergraph_conv: HypergraphConvolution = HypergraphConvolution(channels)

    def forward(self, x: Tensor) -> Tensor:
        places = x.flatten(2).mT
        related: Tensor = self.hypergraph_conv(places, self.adaptive_hyperedge_gen(places))
        image: Tensor = related.mT.unflatten(2, x.shape[2:])
        return image


class HypergraphBlock(nn.Module):
    """A hypergraph on one projection of the input beside another projection, then a fusion of both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1: Convolution = Convolution(channels, channels)
        self.cv2: Convolution = Convolution(channels, channels)
        self.ahc: Hypergraph = Hypergraph(channels)
        self.cv3: Convolution = Convolution(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        fused: Tensor = self.cv3(torch.cat((self.ahc(self.cv2(x)), self.cv1(x)), dim=1))
        return fused


class Correlation(nn.Module):
    """Four scales to one image of the third scale's size, `[B, D, N, K]`."""

    def __init__(self) -> None:
        super().__init__()
        channels = CHANNELS[2]
        half, quarter = channels // 2, channels // 4
        self._parts = (half, quarter, channels - half - quarter)
        self.fuse_conv: Convolution = Convolution(sum(CHANNELS), channels)
        self.high_order_branch: nn.ModuleList = nn.ModuleList(HypergraphBlock(half) for _ in range(2))
        self.high_order_fuse: Convolution = Convolution(2 * half, half)
        self.low_order_branch: nn.Sequential = nn.Sequential(PartialBlock(quarter, 1))
        self.final_fuse: Convolution = Convolution(channels, channels)

    def forward(self, scales: list[Tensor]) -> Tensor:
        size = scales[2].shape[2:]
        high, low, rest = self.fuse_conv(torch.cat([_resized(x, size) for x in scales], dim=1)).split(self._parts, 1)
        high = self.high_order_fuse(torch.cat([branch(high) for branch in self.high_order_branch], dim=1))
        fused: Tensor = self.final_fuse(torch.cat((high, self.low_order_branch(low), rest), dim=1))
        return fused


class Gate(nn.Module):
    """Adds a second image with a learned gain for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma: nn.Parameter = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + self.gamma.to(x.dtype) * other


class Decoder(nn.Module):
    """Four scales and their correlation to one image of the first scale's size."""

    def __init__(self) -> None:
        super().__init__()
        for name, channels in zip(("2", "3", "4", "5"), CHANNELS, strict=True):
            self.add_module(f"h_to_d{name}", Convolution(CHANNELS[2], channels))
            self.add_module(f"fusion_d{name}", Gate(channels))
            self.add_module(f"skip_p{name}", Convolution(channels, channels))
        for name, channels, outputs in zip(("3", "4", "5"), CHANNELS[1:], CHANNELS, strict=False):
            self.add_module(f"up_d{name}", NarrowBlock(channels, outputs, 1))
        self.final_d2: NarrowBlock = NarrowBlock(CHANNELS[0], CHANNELS[0], 1)

    def forward(self, scales: list[Tensor], correlation: Tensor) -> Tensor:
        x: Tensor | None = None
        for name, scale in zip(("5", "4", "3", "2"), reversed(scales), strict=True):
            skip = self.get_submodule(f"skip_p{name}")(scale)
            below = None if x is None else self.get_submodule(f"up_d{int(name) + 1}")(_resized(x, scale.shape[2:]))
            x = skip if below is None else below + skip
            context = self.get_submodule(f"h_to_d{name}")(_resized(correlation, scale.shape[2:]))
            x = self.get_submodule(f"fusion_d{name}")(x, context)
        image: Tensor = self.final_d2(x)
        return image


class FrequencyBlock(nn.Module):
    """Two residual blocks of 3x3 convolutions and a bottleneck of linear layers over all bands (TFC-TDF)."""

    def __init__(self, channels: int, bands: int) -> None:
        super().__init__()
        self.blocks: nn.ModuleList = nn.ModuleList()
        for _ in range(2):
            convolutions = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
            narrow, wide = (nn.Linear(*sizes, bias=False) for sizes in ((bands, bands // 4), (bands // 4, bands)))
            block = {
                "tfc1": _normed(channels, convolutions[0]),
                "tdf": nn.Sequential(*_normed(channels, narrow), *_normed(channels, wide)),
                "tfc2": _normed(channels, convolutions[1]),
                "shortcut": nn.Conv2d(channels, channels, 1, bias=False),
            }
            self.blocks.append(nn.ModuleDict(block))

    def forward(self, x: Tensor) -> Tensor:
        for block in cast(Iterable[Any], self.blocks):
            y = block["tfc1"](x)
            x = block["tfc2"](y + block["tdf"](y)) + block["shortcut"](x)
        return x


def _normed(channels: int, layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(InstanceNorm(channels), nn.SiLU(), layer)


class DoubleBands(nn.Module):
    """Half as many channels and twice as many bands."""

    def __init__(self, channels: int, bands: int) -> None:
        super().__init__()
        self.conv: SeparableConvolution = SeparableConvolution(channels, channels)
        self.out_conv: FrequencyBlock = FrequencyBlock(channels // 2, 2 * bands)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.conv(x).unflatten(1, (-1, 2))  # [B, D / 2, 2, N, K]
        doubled: Tensor = self.out_conv(pairs.permute(0, 1, 3, 4, 2).flatten(3))
        return doubled


class Head(nn.Module):
    """The decoder's image to masks of all bins, `[B, D, N, K] -> [B, 2 * C, N, bins]`."""

    def __init__(self, bands: int, bins: int) -> None:
        super().__init__()
        self._bins = bins
        self.block1: DoubleBands = DoubleBands(CHANNELS[0], bands)
        self.block2: DoubleBands = DoubleBands(CHANNELS[0] >> 1, bands << 1)
        self.block3: DoubleBands = DoubleBands(CHANNELS[0] >> 2, bands << 2)
        self.block4: DoubleBands = DoubleBands(CHANNELS[0] >> 3, bands << 3)
        self.final_conv: nn.Conv2d = nn.Conv2d(CHANNELS[0] // BINS_PER_BAND, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block4(self.block3(self.block2(self.block1(x))))
        masks: Tensor = self.final_conv(_resized(x, (x.shape[2], self._bins)))
        return masks


class Segmentation(nn.Module):
    """The branch: features `[N, B, K, D]` to the bands of masks `[N, B, bins * 4]`."""

    def __init__(self, dim: int, bands: int, bins: int) -> None:
        super().__init__()
        self.backbone: Encoder = Encoder(dim)
        self.hyperace: Correlation = Correlation()
        self.decoder: Decoder = Decoder()
        self.upsample_head: Head = Head(bands, bins)

    def forward(self, x: Tensor) -> Tensor:
        images = x.permute(1, 3, 0, 2).to(self.upsample_head.final_conv.weight.dtype)
        # Convolutions round differently for other batch sizes.
        items = images.split(1) if x.device.type == "cpu" else (images,)
        masks = torch.cat([self._masks(item.contiguous()) for item in items])
        return masks.permute(2, 0, 3, 1).flatten(2)

    def _masks(self, image: Tensor) -> Tensor:
        """`[B, D, N, K] -> [B, 4, N, bins]`."""
        scales = self.backbone(image)
        decoded = self.decoder(scales, self.hyperace(scales))
        masks: Tensor = self.upsample_head(_resized(decoded, (image.shape[2], decoded.shape[3])))
        return masks


def _resized(image: Tensor, size: tuple[int, ...]) -> Tensor:
    """The image interpolated to this height and width."""
    return image if image.shape[2:] == size else F.interpolate(image, size=size, mode="bilinear", align_corners=False)
