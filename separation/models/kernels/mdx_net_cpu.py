"""MDX-Net's network for CPUs, in float32: Winograd's convolutions, and each activation within the product before it.

Axes: B batch, C channel, D feature, N frame, F bin.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from separation.models.kernels.unet_cpu import Convolution, for_cpu, over_bins
from separation.models.kernels.unet_ops import RELU


class CpuMDXNet:
    """The network on the given layers' weights. Changes the weights' memory format in place.

    Args:
        silent_bins: the lowest bins, which count as zero.
        compensate: the factor of the estimate.
    """

    def __init__(self, layers: nn.Module, *, silent_bins: int, compensate: float) -> None:
        layers = for_cpu(layers)
        self._parts: dict[str, Any] = dict(layers.named_children())
        self._silent_bins, self._compensate = silent_bins, compensate
        self._tables: dict[nn.Module, Tensor] = {}
        for layer in layers.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
            elif isinstance(layer, nn.Linear):
                scale, shift = cast(Tensor, layer.scale), cast(Tensor, layer.shift)
                self._tables[layer] = torch.stack([scale.float(), shift.float()])
            elif isinstance(layer, Convolution):
                layer.activation = RELU

    def __call__(self, spectrum: Tensor, outputs: tuple[int, ...] = ()) -> Tensor:
        """The mixture's spectrogram `[B, C, F, N, 2]` to the stem's `[B, 1, C, F, N, 2]`, both in float32."""
        batch, channels, bins, frames, _ = spectrum.shape
        first, last = self._parts["first_conv"], self._parts["final_conv"]
        x = torch.empty(batch, frames, bins, 2 * channels)
        x.unflatten(3, (channels, 2)).copy_(spectrum.permute(0, 3, 2, 1, 4))
        x[:, :, : self._silent_bins] = 0
        features = F.linear(x, first.weight.flatten(1), first.bias).relu_()  # [B, N, F, D]
        y = self._unet(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        values = F.linear(y, last.weight.flatten(1), last.bias).mul_(self._compensate)
        out = torch.empty(batch, 1, channels, bins, frames, 2)
        out[:, 0].permute(0, 3, 2, 1, 4).copy_(values.unflatten(3, (channels, 2)))
        return out

    def _unet(self, x: Tensor) -> Tensor:
        """Features `[B, D, N, F]`, last in memory, to such ones."""
        skips = []
        for block, down in zip(self._parts["encoding_blocks"], self._parts["ds"], strict=True):
            x = self._block(x, block)
            skips.append(x)
            x = down(x).relu_()
        x = self._block(x, self._parts["bottleneck_block"])
        for up, block in zip(self._parts["us"], self._parts["decoding_blocks"], strict=True):
            x = self._block(up(x).relu_().mul_(skips.pop()), block)
        return x

    def _block(self, x: Tensor, block: Any) -> Tensor:
        for layer in cast(Iterable[Any], block.tfc):
            y = layer(x)
            x = y if isinstance(layer, Convolution) else y.relu_()
        narrow, wide = block.tdf
        x = x.contiguous(memory_format=torch.channels_last)
        frames = x.permute(0, 2, 3, 1).flatten(0, 1)  # [B * N, F, D], a view
        found = over_bins(frames, narrow.weight, table=self._tables[narrow])
        over_bins(found, wide.weight, frames, table=self._tables[wide])
        return x
