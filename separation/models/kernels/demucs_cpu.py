"""The operations of demucs_ops.py for CPUs, computed in C++. Values are float32 or bfloat16."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from separation.models.kernels.native import check, library

# Winograd's transform of a filter of three taps, for two outputs at a time.
_FILTER = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)


def _call(name: str, *arguments: Tensor | None, sizes: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
    """Call a function of cpu/demucs.h for values of that type. Tensors are contiguous unless `sizes` hold strides."""
    assert dtype in (torch.float32, torch.bfloat16)
    pointers = (ctypes.c_void_p(None if argument is None else argument.data_ptr()) for argument in arguments)
    counts = (ctypes.c_long * len(sizes))(*sizes)
    options = ctypes.c_long(dtype == torch.bfloat16), ctypes.c_long(torch.get_num_threads())
    check(getattr(library().functions, f"demucs_{name}")(*pointers, counts, *options))


def pack(x: Tensor, stats: list[Tensor], stride: int, padding: int, rows: int, dtype: torch.dtype) -> Tensor:
    batch, channels, _, positions, parts = x.shape
    out = x.new_empty(batch, rows, positions, stride * channels * parts, dtype=dtype)
    sizes = [*x.shape, *x.stride(), stride, padding, rows]
    _call("pack", x, *stats, out, sizes=sizes, dtype=dtype)
    return out


def bias_gelu_(x: Tensor, bias: Tensor) -> None:
    assert x.is_contiguous()
    _call("bias_gelu", x, bias, sizes=[x.numel() // len(bias), len(bias)], dtype=x.dtype)


def bias_glu(x: Tensor, bias: Tensor, table: Tensor | None) -> Tensor:
    x = x.contiguous()
    *outer, width = x.shape
    out = x.new_empty(*outer, width // 2)
    _, lines, positions = outer
    sizes = [x.numel() // width, width // 2, positions, lines]
    _call("bias_glu", x, bias, table, out, sizes=sizes, dtype=x.dtype)
    return out


def dconv_(x: Tensor, layer_in: list[Tensor], layer_out: list[Tensor], hidden: int, dilation: int) -> None:
    assert x.is_contiguous()
    sizes = [*x.shape, hidden, dilation, layer_in[1].shape[1]]
    _call("dconv", x, *layer_in, *layer_out, sizes=sizes, dtype=x.dtype)


def interleave(x: Tensor, bias: Tensor, skip: Tensor | None, crop: int, length: int) -> Tensor:
    x = x.contiguous()
    batch, inputs, positions, width = x.shape
    channels = len(bias)
    out = x.new_empty(batch, length, positions, channels)
    assert skip is None or skip.stride(3) == 1
    strides = (0, 0, 0) if skip is None else skip.stride()[:3]
    sizes = [batch, inputs, positions, width // channels, channels, crop, length, *strides]
    _call("interleave", x, bias, skip, out, sizes=sizes, dtype=x.dtype)
    return out


def unpack_spectrum(x: Tensor, bias: Tensor, stats: list[Tensor], crop: int, zero_frames: int) -> Tensor:
    x = x.contiguous()
    batch, inputs, positions, width = x.shape
    channels, stride = len(bias) // 2, width // len(bias)
    bins = inputs * stride - 2 * crop + 1
    out = torch.empty(batch, channels, positions + 2 * zero_frames, bins, 2)
    sizes = [batch, inputs, positions, stride, channels, crop, zero_frames]
    _call("unpack_spectrum", x, bias, *stats, out, sizes=sizes, dtype=x.dtype)
    return out


def overlap_add(frames: Tensor, window: Tensor, hop_length: int, crop: int, length: int) -> Tensor:
    frames = frames.contiguous()
    batch, channels, n_frames, n_fft = frames.shape
    out = frames.new_empty(batch, channels, length)
    _call("overlap_add", frames, window, out, sizes=[batch * channels, n_frames, n_fft, hop_length, crop, length])
    return out


def add_waveform_(out: Tensor, x: Tensor, bias: Tensor, stats: list[Tensor], crop: int) -> None:
    x = x.contiguous()
    batch, inputs, _, width = x.shape
    assert out.stride(2) == 1
    sizes = [batch, inputs, width // len(bias), len(bias), crop, out.shape[2], *out.stride()[:2]]
    _call("add_waveform", out, x, bias, *stats, sizes=sizes, dtype=x.dtype)


def embed(x: Tensor, gain: Tensor, shift: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    sums, out = torch.empty(x.shape), torch.empty_like(x)
    _call("embed", x, gain, shift, table, sums, out, sizes=x.shape, dtype=x.dtype)
    return sums, out


def add_norm_(x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
    assert x.is_contiguous()
    y = y.contiguous()
    out = torch.empty_like(y)
    _call("add_norm", x, y, gain, out, sizes=x.shape, dtype=y.dtype)
    return out


def add_group_norm_(x: Tensor, y: Tensor, gain: Tensor, norm_gain: Tensor, norm_shift: Tensor) -> Tensor:
    assert x.is_contiguous()
    y = y.contiguous()
    out = torch.empty_like(y)
    _call("add_group_norm", x, y, gain, norm_gain, norm_shift, out, sizes=x.shape, dtype=y.dtype)
    return out


class GatedConvolution:
    """A convolution of 1 or 3 taps along both axes and a GLU in float32, `[B, L, N, C] -> [B, L, N, C]`.

    `weight` is `[2 * C, C, taps, taps]`; ends are padded with zeros. `table`, `[L, C]`, is added to the result, if any.
    """

    def __init__(self, weight: Tensor, bias: Tensor, table: Tensor | None) -> None:
        weight = weight.detach().double()
        self._taps = weight.shape[2:]
        for axis in (2, 3):
            if weight.shape[axis] == 3:
                weight = (weight.movedim(axis, -1) @ _FILTER.T).movedim(-1, axis)
        transformed = weight.flatten(2).permute(2, 1, 0).float().contiguous()  # [products, C, 2 * C]
        products, channels, _ = transformed.shape
        self._weights = torch.empty(
            library().functions.demucs_gated_values(ctypes.c_long(products), ctypes.c_long(channels))
        )
        _call("pack_gated", transformed, self._weights, sizes=[products, channels])
        self._bias = bias.detach().float().contiguous()
        self._table = None if table is None else table.detach().float().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        _call("gated", x, self._weights, self._bias, self._table, out, sizes=[*x.shape, *self._taps])
        return out
