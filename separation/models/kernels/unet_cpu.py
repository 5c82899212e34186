"""MDX23C's and SCNet's layers for CPUs, computed in C++ in float32. Features come last in memory.

Convolutions of 3 x 3 are Winograd's, which have a quarter of the multiplications of the direct sum. Axes: B batch,
N positions, D feature, H height, W width.
"""

import copy
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from separation.models.kernels import unet_ops
from separation.models.kernels.native import library

# The most weights of a feature map for which Winograd's convolution is used. It needs four times their memory, and the
# larger ones have few positions, so that they would gain little.
MOST_WEIGHTS = 2**19


def moments(x: Tensor, whole: bool) -> Tensor:
    x = x.float().contiguous()
    batch, rows, features = x.shape
    found = x.new_empty(batch, 2, features)
    for item, to in zip(x, found, strict=True):
        library().functions.unet_moments(item.data_ptr(), rows, features, to.data_ptr(), torch.get_num_threads())
    if not whole:
        return found
    among, mean = torch.var_mean(found[:, 0], dim=1, correction=0, keepdim=True)
    joint = torch.stack([mean, found[:, 1].mean(1, keepdim=True) + among], dim=1)
    return joint.expand(-1, -1, features).contiguous()


def normalise(x: Tensor, norm: list[Tensor], activation: int, alpha: float, dtype: torch.dtype) -> Tensor:
    moments, gain, bias = norm
    like, x = x, x.float().contiguous()
    scales = (moments[:, 1] + unet_ops.EPS).rsqrt() * gain
    tables = torch.stack([moments[:, 0], scales, bias.expand_as(scales)], dim=1).contiguous()
    out = torch.empty_like(x)
    for item, table, to in zip(x, tables, out, strict=True):
        pointers = item.data_ptr(), table.data_ptr()
        library().functions.unet_normalise(
            *pointers, *item.shape, activation, alpha, to.data_ptr(), torch.get_num_threads()
        )
    if like.is_contiguous() and dtype == torch.float32:
        return out
    return torch.empty_like(like, dtype=dtype).copy_(out)  # with the strides of x


def over_bins(x: Tensor, weight: Tensor, out: Tensor | None = None, *, table: Tensor | None = None) -> Tensor:
    """`weight`, `[F', F]`, times each of `x`, `[B, F, D]`; added to `out`, `[B, F', D]`, if that is given.

    With a table `[2, D]` of scales and biases, the product is first scaled, biased and passed through ReLU.
    """
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(len(x), len(weight), x.shape[2]) if out is None else out
    assert y.is_contiguous() and x.dtype == weight.dtype == y.dtype == torch.float32
    assert table is None or (table.is_contiguous() and table.dtype == torch.float32)
    sizes = (ctypes.c_long * 5)(len(x), *weight.shape, x.shape[2], out is not None)
    scales = None if table is None else table.data_ptr()
    pointers = x.data_ptr(), weight.data_ptr(), scales, y.data_ptr(), ctypes.addressof(sizes)
    library().functions.unet_over_bins(*pointers, torch.get_num_threads())
    return y


class Convolution(nn.Module):
    """A convolution of 3 x 3 with zeros around, `[B, D, H, W] -> [B, D', H, W]`, both channels last in memory.

    Attributes:
        activation: what follows it, by the numbers of unet_ops.py, but for ELU.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.activation: int = unet_ops.NONE
        self._features = weight.shape[:2]
        weight = weight.detach().float().contiguous()
        functions, sizes = library().functions, self._features[::-1]
        self._packed = torch.empty(functions.unet_packed_size(*sizes))
        functions.unet_pack(weight.data_ptr(), *sizes, self._packed.data_ptr(), torch.get_num_threads())
        self._bias = None if bias is None else bias.detach().float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        x = x.float().contiguous(memory_format=torch.channels_last)
        batch, features, height, width = x.shape
        features_out = self._features[0]
        y = torch.empty((batch, features_out, height, width), memory_format=torch.channels_last)
        sizes = (ctypes.c_long * 7)(batch, height, width, features, features_out, False, self.activation)
        bias = None if self._bias is None else self._bias.data_ptr()
        pointers = x.data_ptr(), self._packed.data_ptr(), bias, y.data_ptr(), ctypes.addressof(sizes)
        library().functions.unet_convolve(*pointers, torch.get_num_threads())
        return y


def for_cpu(layers: nn.Module, *, but: type[nn.Module] | tuple[()] = ()) -> nn.Module:
    """A copy of the layers in float32 whose convolutions of 3 x 3 are Winograd's. It shares weights in float32.

    Convolutions within modules of the type `but` stay.
    """
    shared: dict[int, Any] = {id(weight): _as_float(weight) for weight in layers.parameters()}
    copied: nn.Module = copy.deepcopy(layers, shared)
    for parent in copied.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d) and is_winograd(layer.weight.shape) and not isinstance(parent, but):
                setattr(parent, name, Convolution(layer.weight, layer.bias))
    return copied


def _as_float(weight: nn.Parameter) -> nn.Parameter:
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float(), requires_grad=False)


def is_winograd(shape: Sequence[int]) -> bool:
    """Whether a convolution with weights of that shape is to be Winograd's."""
    return tuple(shape[2:]) == (3, 3) and shape[0] * shape[1] <= MOST_WEIGHTS
