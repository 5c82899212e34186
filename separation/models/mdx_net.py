"""MDX-Net: TFC-TDF-UNet v2 (Kim, Choi, Chung, Lee and Jung 2021, arXiv:2111.12203), as Ultimate Vocal Remover runs it.

A U-Net over frames and bins maps the spectrogram's real and imaginary parts to those of one stem. Its blocks have
convolutions and a bottleneck of two linear layers over all bins of a frame. The batch norms are part of the weights
before them, as in the published files; those after the linear layers are a factor and a summand for each feature.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.models.base import Identity, Normalisation, Transform
from separation.models.fast_core import CpuCoreModel
from separation.models.kernels.mdx_net_cpu import CpuMDXNet
from separation.models.shapes import Shapes, quotient
from separation.models.stft import Stft

SILENT_BINS = 3  # the lowest bins, which Ultimate Vocal Remover hides from the network


@dataclass(frozen=True, kw_only=True)
class MDXNetConfig:
    """The hyper-parameters. `audio:` has the first ones."""

    n_fft: int
    hop_length: int
    dim_f: int  # how many bins are used, starting from the lowest
    chunk_size: int  # samples, without the margins of half a window at each end
    audio_channels: int = 2  # `num_channels` in `audio:`
    num_stems: int = 1
    num_channels: int  # features at the first scale, and those that each scale adds
    num_scales: int
    tfc_layers: int  # convolutions in a block
    kernel_size: int = 3
    bottleneck_factor: int
    bias: bool = False  # of the linear layers
    compensate: float = 1.0  # the factor by which the estimate is multiplied
    silent_bins: int = SILENT_BINS  # the lowest bins, which the network does not see

    def __post_init__(self) -> None:
        frames_unit = 2**self.num_scales
        if self.num_stems != 1:
            raise ValueError(f"an MDX-Net gives 1 stem, not {self.num_stems}: name one under stems")
        if self.n_fft % 2 or (self.chunk_size + self.n_fft) % self.hop_length:
            raise ValueError(
                f"chunk_size {self.chunk_size} and n_fft {self.n_fft} are not a whole number of {self.hop_length} "
                "samples: correct one of them"
            )
        if self.frames % frames_unit or self.dim_f % frames_unit or self.dim_f > self.n_fft // 2 + 1:
            raise ValueError(
                f"{self.frames} frames and dim_f {self.dim_f} must be multiples of {frames_unit} (by num_scales), and "
                f"dim_f at most {self.n_fft // 2 + 1} (by n_fft): correct chunk_size, dim_f or n_fft"
            )

    @property
    def frames(self) -> int:
        """STFT frames of a chunk and its margins."""
        return (self.chunk_size + self.n_fft) // self.hop_length + 1


class MDXNet(CpuCoreModel):
    """Chunks of waveform `[B, C, T]` to the estimate `[B, 1, C, T]`; T is `chunk_samples + n_fft`."""

    Config = MDXNetConfig
    AUDIO_KEYS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {key: key for key in ("n_fft", "hop_length", "dim_f", "chunk_size")} | {"num_channels": "audio_channels"}
    )
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"encoding_blocks\.0\.tfc\.0\.weight",
        r"bottleneck_block\.tdf\.0\.scale",
        r"final_conv\.weight",
    )
    CAST_LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    # Winograd's convolution outruns a direct one in bfloat16.
    cpu_core_precisions: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16)
    normalisation: Normalisation = "none"
    reflects_border = False
    fixed_chunk = True

    def __init__(self, config: MDXNetConfig, identity: Identity) -> None:
        super().__init__(identity)
        self.config = config
        self.channels: int = config.audio_channels
        self.least_samples = 1
        if config.bias:
            self.no_core_because = "there are none for linear layers with biases"
        self._stft = Stft(n_fft=config.n_fft, hop_length=config.hop_length, win_length=config.n_fft)
        sizes = [config.num_channels * (scale + 1) for scale in range(config.num_scales + 1)]
        bins = [config.dim_f >> scale for scale in range(config.num_scales + 1)]
        blocks = [Block(config, size, n_bins) for size, n_bins in zip(sizes, bins, strict=True)]
        pairs = list(pairwise(sizes))
        self.first_conv: nn.Conv2d = nn.Conv2d(2 * self.channels, sizes[0], 1)
        self.encoding_blocks: nn.ModuleList = nn.ModuleList(blocks[:-1])
        self.ds: nn.ModuleList = nn.ModuleList(nn.Conv2d(size, larger, 2, 2) for size, larger in pairs)
        self.bottleneck_block: Block = blocks[-1]
        self.us: nn.ModuleList = nn.ModuleList(
            nn.ConvTranspose2d(larger, size, 2, 2) for size, larger in reversed(pairs)
        )
        self.decoding_blocks: nn.ModuleList = nn.ModuleList(
            Block(config, size, n_bins) for size, n_bins in zip(sizes[-2::-1], bins[-2::-1], strict=True)
        )
        self.final_conv: nn.Conv2d = nn.Conv2d(sizes[0], 2 * self.channels, 1)

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        bottleneck = "encoding_blocks.0.tdf.0.weight"
        return {
            "num_channels": shapes.size("first_conv.weight", 0),
            "audio_channels": quotient(shapes.size("first_conv.weight", 1), 2),
            "num_scales": shapes.count(r"encoding_blocks\.(\d+)\..*"),
            "tfc_layers": shapes.count(r"encoding_blocks\.0\.tfc\.(\d+)\..*"),
            "kernel_size": shapes.size("encoding_blocks.0.tfc.0.weight", 2),
            "dim_f": shapes.size(bottleneck, 1),
            "bottleneck_factor": quotient(shapes.size(bottleneck, 1), shapes.size(bottleneck, 0)),
            "bias": "encoding_blocks.0.tdf.0.bias" in shapes,
        }

    def input_samples(self, length: int) -> int:
        return self.config.chunk_size + self.config.n_fft

    def forward(self, chunks: Tensor) -> Tensor:
        spectrum = self._stft.spectrogram(chunks)[..., : self.config.dim_f, :]
        values = torch.view_as_real(spectrum)
        spectra = self.core(values)[0] if self._core is None else self._core(values, ())
        return self._stft.waveform(torch.view_as_complex(spectra.contiguous()), chunks.shape[-1])

    def make_cpu_core(self) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
        return CpuMDXNet(self, silent_bins=self.config.silent_bins, compensate=self.config.compensate)

    def transform(self, length: int) -> Transform:
        return Transform.of(self._stft, bins=self.config.dim_f)

    def core(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        x = rearrange(inputs[0], "b c f n ri -> b (c ri) f n")
        silent = self.config.silent_bins
        x = F.pad(x[:, :, silent:], (0, 0, silent, 0))
        x = F.relu(self.first_conv(x.to(self.first_conv.weight.dtype))).transpose(-1, -2)
        skips = []
        for block, down in zip(self.encoding_blocks, self.ds, strict=True):
            x = block(x)
            skips.append(x)
            x = F.relu(down(x))
        x = self.bottleneck_block(x)
        for up, block in zip(self.us, self.decoding_blocks, strict=True):
            x = block(F.relu(up(x)) * skips.pop())
        x = self.final_conv(x.transpose(-1, -2)).float() * self.config.compensate
        return (rearrange(x, "b (c ri) f n -> b 1 c f n ri", ri=2),)


class Block(nn.Module):
    """Convolutions, then two linear layers whose result is added, `[B, size, N, F] -> [B, size, N, F]`."""

    def __init__(self, config: MDXNetConfig, size: int, bins: int) -> None:
        super().__init__()
        kernel, narrow = config.kernel_size, bins // config.bottleneck_factor
        self.tfc: nn.ModuleList = nn.ModuleList(
            nn.Conv2d(size, size, kernel, padding=kernel // 2) for _ in range(config.tfc_layers)
        )
        self.tdf: nn.Sequential = nn.Sequential(
            BinLayer(bins, narrow, size, bias=config.bias), BinLayer(narrow, bins, size, bias=config.bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in cast(Iterable[nn.Module], self.tfc):
            x = F.relu(layer(x))
        y: Tensor = x + self.tdf(x)
        return y


class BinLayer(nn.Linear):
    """A linear layer over bins, a batch norm and ReLU, `[B, size, N, bins] -> [B, size, N, outputs]`."""

    def __init__(self, bins: int, outputs: int, size: int, *, bias: bool) -> None:
        super().__init__(bins, outputs, bias=bias)
        self.scale: nn.Parameter = nn.Parameter(torch.ones(size))
        self.shift: nn.Parameter = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x) * self.scale[:, None, None] + self.shift[:, None, None])
