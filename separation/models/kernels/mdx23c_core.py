"""MDX23C's network for GPUs and CPUs: a norm with its activation is one kernel; products add residual sums.

Products take the weights' precision and accumulate in float32. Axes: B batch, S stem, C channel, D feature, N frame,
F bin.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from separation.models.kernels.registry import cpu_fault, ops
from separation.models.kernels.unet_cpu import over_bins
from separation.models.kernels.unet_ops import ELU, GELU, RELU
from separation.models.layers import GroupNorm

CHANNELS_LAST = True  # the memory format; cuDNN would transpose features-first tensors and back


class MDX23CCore:
    """The network on the given layers' weights. Changes the weights' memory format in place; copies none."""

    def __init__(self, layers: nn.Module, *, num_stems: int, num_subbands: int) -> None:
        self._parts: dict[str, Any] = dict(layers.named_children())
        self._num_stems, self._num_subbands = num_stems, num_subbands
        self._format = torch.channels_last if CHANNELS_LAST else torch.contiguous_format
        for layer in layers.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.weight.data = layer.weight.data.contiguous(memory_format=self._format)

    def __call__(self, spectrum: Tensor, outputs: tuple[int, ...]) -> Tensor:
        """The mixture's spectrogram `[B, C, F, N, R]` to the stems' `[B, S, C, N, F, R]`, both in float32.

        R is 2 for complex spectrograms and 1 for real ones.
        """
        weight = self._parts["first_conv"].weight
        channels, subbands = spectrum.shape[1], (self._num_subbands, spectrum.shape[2] // self._num_subbands)
        numbers = spectrum.shape[-1]
        inputs = numbers * channels * self._num_subbands
        # The input of the last layers: the mixture in sub-bands, then the masked features.
        joined = torch.empty(
            (len(spectrum), inputs + len(weight), spectrum.shape[3], subbands[1]),
            dtype=weight.dtype,
            device=spectrum.device,
            memory_format=self._format,
        )
        mixture, masked = joined.split([inputs, len(weight)], dim=1)
        by_channel = spectrum.unflatten(2, subbands).permute(0, 1, 5, 2, 4, 3)  # [B, C, R, K, N, F / K]
        mixture.unflatten(1, by_channel.shape[1:4]).copy_(by_channel)
        first = _pointwise(mixture, weight)
        torch.mul(self._unet(first), first, out=masked)
        before, activation, last = self._parts["final_conv"]
        features = activation(_pointwise(joined, before.weight))
        weights = last.weight.chunk(self._num_stems)
        wanted = last.weight if outputs == tuple(range(self._num_stems)) else torch.cat([weights[i] for i in outputs])
        spectra = _pointwise(features, wanted).unflatten(1, (len(outputs), channels, numbers, self._num_subbands))
        spectra = spectra.permute(0, 1, 2, 5, 4, 6, 3)  # [B, S, C, N, K, F / K, R]
        return torch.empty(spectra.shape, device=spectra.device).copy_(spectra).flatten(4, 5)

    def _unet(self, x: Tensor) -> Tensor:
        skips = []
        for scale in cast(Iterable[Any], self._parts["encoder_blocks"]):
            skips.append(_blocks(x, scale["tfc_tdf"]))
            x = _activated(skips[-1], scale["downscale"]["conv"])
        x = _blocks(x, self._parts["bottleneck_block"])
        for scale in cast(Iterable[Any], self._parts["decoder_blocks"]):
            x = torch.cat([_activated(x, scale["upscale"]["conv"]), skips.pop()], dim=1)
            x = _blocks(x, scale["tfc_tdf"])
        return x


def _blocks(x: Tensor, blocks: Any) -> Tensor:
    for block in blocks.blocks:
        y = _activated(x, block.tfc1)
        norm, activation, narrow, *widen, wide = block.tdf
        z = _over_bins(_normalised(y, norm, activation), narrow.weight)
        _add_over_bins(y, _normalised(z, *widen), wide.weight)
        y = _activated(y, block.tfc2)
        _add_pointwise(y, x, block.shortcut.weight)
        x = y
    return x


def _activated(x: Tensor, layers: Iterable[Any]) -> Tensor:
    norm, activation, convolution = layers
    y: Tensor = convolution(_normalised(x, norm, activation))
    return y


def _normalised(x: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
    """Apply the norm and the activation to `[B, D, N, F]`."""
    positions = x.flatten(2).transpose(1, 2)
    kind, alpha = _activation(activation)
    gain, bias = cast(Tensor, norm.weight), cast(Tensor, norm.bias)
    moments = _moments(positions, norm)
    y = ops.normalise(positions, (moments, gain, bias), kind, alpha, x.dtype)
    z: Tensor = y.transpose(1, 2).unflatten(2, x.shape[2:])
    return z


def _moments(positions: Tensor, norm: nn.Module) -> Tensor:
    """The means and variances by which the norm scales each feature of `[B, N * F, D]`: `[B, 2, D]`."""
    if isinstance(norm, nn.BatchNorm2d):
        known = torch.stack([cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)])
        return known.expand(len(positions), -1, -1)
    moments: Tensor = ops.moments(positions, False)
    if not isinstance(norm, GroupNorm):
        return moments
    means, variances = moments.unflatten(2, (norm.num_groups, -1)).unbind(1)
    among, mean = torch.var_mean(means, dim=-1, correction=0, keepdim=True)
    joint = torch.stack([mean, variances.mean(-1, keepdim=True) + among], dim=1)
    return joint.expand(-1, -1, -1, means.shape[-1]).flatten(2)


def _activation(layer: nn.Module) -> tuple[int, float]:
    """The activation's number in unet_ops, and ELU's alpha."""
    if isinstance(layer, nn.ELU):
        return ELU, layer.alpha
    return (GELU if isinstance(layer, nn.GELU) else RELU), 0.0


def _rows(x: Tensor) -> Tensor:
    """`[B, D, N, F]` to `[B * N * F, D]`; a view if channels are last in memory."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _frames(x: Tensor) -> Tensor:
    """`[B, D, N, F]` to `[B * N, F, D]`; a view if channels are last in memory."""
    return x.permute(0, 2, 3, 1).flatten(0, 1)


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    if not CHANNELS_LAST:
        return F.conv2d(x, weight)
    y: Tensor = F.linear(_rows(x), weight.flatten(1)).unflatten(0, (len(x), *x.shape[2:]))
    return y.permute(0, 3, 1, 2)


def _add_pointwise(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add a 1x1 convolution of `x` to `y` in place."""
    if CHANNELS_LAST:
        _rows(y).addmm_(_rows(x), weight.flatten(1).T)
    else:
        y.flatten(2).baddbmm_(weight.flatten(1).expand(len(x), -1, -1), x.flatten(2))


def _over_bins(x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer over the bins of each frame, `[B, D, N, F] -> [B, D, N, F']`."""
    if not CHANNELS_LAST:
        return F.linear(x, weight)
    frames = _frames(x)
    if _is_float_on_cpu(x) and not cpu_fault():
        summed: Tensor = over_bins(frames, weight).unflatten(0, (len(x), -1))
        return summed.permute(0, 3, 1, 2)
    y: Tensor = torch.bmm(weight.expand(len(frames), -1, -1), frames).unflatten(0, (len(x), -1))
    return y.permute(0, 3, 1, 2)


def _add_over_bins(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add a linear layer over the bins of each frame of `x` to `y` in place."""
    if CHANNELS_LAST and _is_float_on_cpu(x) and not cpu_fault():
        over_bins(_frames(x), weight, _frames(y))
    elif CHANNELS_LAST:
        frames = _frames(x)
        _frames(y).baddbmm_(weight.expand(len(frames), -1, -1), frames)
    else:
        y.flatten(0, 2).addmm_(x.flatten(0, 2), weight.T)


def _is_float_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"
