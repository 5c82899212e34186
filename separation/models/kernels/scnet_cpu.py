"""SCNet's residual branches along time on the CPU in float32, computed by cpu/branches.h.

Axes: B batch, F bin, N frame, D feature, H hidden feature.
"""

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from separation.models.kernels.fused import packed_weights, padded
from separation.models.kernels.native import library

ALIGNMENT = 16  # of features: a multiple of every kind's vectors of floats


class _Branch(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("norm", "convolution", "gates", "depthwise", "table", "expansion", "biases")
    ]


class TimeBranches:
    """The layers of a `TimeConvolutions`."""

    def __init__(self, layers: Iterable[Any]) -> None:
        self._memory: list[list[Tensor]] = []  # `_branches` contains pointers to it
        self._narrow = self._taps = 1
        for layer in layers:
            self._narrow, _, self._taps = layer[3].weight.shape
            assert self._taps % 2 and layer[1].padding == layer[3].padding == (self._taps // 2,)
            self._memory.append(_tensors(layer))
        branches = [_Branch(*(tensor.data_ptr() for tensor in tensors)) for tensors in self._memory]
        self._branches = (_Branch * len(branches))(*branches)

    def __call__(self, out: Tensor, x: Tensor, activation: int) -> None:
        """Add the branches to `x`, `[B, F, N, D]`, and write an activation of the sum into `out`.

        Each item of `out` is contiguous.
        """
        assert x.is_contiguous() and out[0].is_contiguous() and x.dtype == out.dtype == torch.float32
        batch, bins, frames, features = x.shape
        sizes = (ctypes.c_long * 7)(
            bins, frames, features, _padded(features), self._narrow, _padded(self._narrow), self._taps
        )
        counts = (ctypes.c_long * 4)(
            batch * bins, len(self._branches), out.stride(0) // (frames * features), activation
        )
        structures = [ctypes.addressof(each) for each in (self._branches, sizes, counts)]
        library().functions.add_time_branches(x.data_ptr(), *structures, out.data_ptr(), torch.get_num_threads())


def _padded(features: int) -> int:
    return features + -features % ALIGNMENT


def _wide(x: Tensor, axis: int = -1) -> Tensor:
    """Pad an axis with zeros."""
    x = x.detach().float()
    return F.pad(x.movedim(axis, -1), (0, -x.shape[axis] % ALIGNMENT)).movedim(-1, axis)


def _norm(norm: Any) -> Tensor:
    """Gains, biases and ones, padded."""
    return torch.stack([_wide(each) for each in (norm.weight, norm.bias, torch.ones_like(norm.bias))])


def _tensors(layer: Any) -> list[Tensor]:
    """What the fields of a `_Branch` point to."""
    norm, first, _, depthwise, second_norm, _, last = layer
    values_and_gates = first.weight.unflatten(0, (2, -1))  # [2, H, D, taps]
    convolution = _wide(_wide(values_and_gates, 1), 2).transpose(2, 3).flatten(2).flatten(0, 1)
    gates = _wide(first.bias.unflatten(0, (2, -1))).flatten()
    tensors = [
        _norm(norm),
        packed_weights([convolution], None, torch.float32)[0],
        F.pad(gates, (0, padded(len(gates)) - len(gates))),
        _wide(depthwise.weight[:, 0].T),
        torch.cat([_norm(second_norm), _wide(depthwise.bias)[None]]),
        packed_weights([_wide(last.weight[..., 0])], None, torch.float32)[0],
        F.pad(last.bias.float(), (0, padded(len(last.bias)) - len(last.bias))),
    ]
    return [tensor.detach().contiguous() for tensor in tensors]
