"""The operations between the matrix products of the Demucs family on GPUs and CPUs: references in plain PyTorch.

The Triton kernels of the same names are in demucs_triton.py, those for CPUs in demucs_cpu.py. Channels come last: in
`[B, L, N, C]` convolutions stride along L, and each of the N positions is convolved separately. Norms, biases and sums
are in float32; results are rounded once, to the type of the products. `stats` are the mean and the standard deviation
of each item's input, `[B]` each, to which the last layers scale their output back. Other axes: R rows, T sample, J
input of a transposed convolution, D and H features.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from separation.models.kernels import registry

_operation = partial(registry.operation, cpu="separation.models.kernels.demucs_cpu")
EPS = 1e-5  # of all norms, and added to the standard deviation of the input


@_operation("pack(Tensor x, Tensor[] stats, int stride, int padding, int rows, ScalarType dtype) -> Tensor")
def pack(x: Tensor, stats: list[Tensor], stride: int, padding: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Normalise `x` and join `stride` neighbours along L, which makes the first convolution a matrix product.

    `x` is `[B, C, L, N, P]` in float32 with any strides. The result is `[B, rows, N, stride * C * P]`: L is padded
    with `padding` zeros at the front and as many as needed at the end.
    """
    batch, channels, length, positions, parts = x.shape
    mean, std = (each[:, None, None, None, None] for each in stats)
    scale = 1 / (EPS + std)
    values = ((x - mean) * scale).permute(0, 2, 3, 1, 4).reshape(batch, length, positions, channels * parts)
    padded = F.pad(values, (0, 0, 0, 0, padding, rows * stride - padding - length))
    by_row: Tensor = padded.unflatten(1, (rows, stride))
    return by_row.transpose(2, 3).flatten(3).to(dtype)


@_operation("bias_gelu_(Tensor(a!) x, Tensor bias) -> ()")
def bias_gelu_(x: Tensor, bias: Tensor) -> None:
    """Replace `x`, `[..., C]`, by `gelu(x + bias)`."""
    x.copy_(F.gelu(x.float() + bias))


@_operation("bias_glu(Tensor x, Tensor bias, Tensor? table) -> Tensor")
def bias_glu(x: Tensor, bias: Tensor, table: Tensor | None) -> Tensor:
    """Add a bias, apply a gated linear unit, and add a table `[L, C]`, if any: `[B, L, N, 2 * C]` to `[B, L, N, C]`."""
    values, gates = (x.float() + bias).chunk(2, dim=-1)
    gated = values * gates.sigmoid()
    return (gated if table is None else gated + table[:, None]).to(x.dtype)


@_operation("dconv_(Tensor(a!) x, Tensor[] layer_in, Tensor[] layer_out, int hidden, int dilation) -> ()")
def dconv_(x: Tensor, layer_in: list[Tensor], layer_out: list[Tensor], hidden: int, dilation: int) -> None:
    """Compute a residual branch of a DConv and add it to `x`, `[R, T, C]`.

    The branch is a dilated convolution of three taps to few features, a norm and GELU, then a matrix product back to
    twice the features, a norm and a GLU. The norms are over a whole row.

    `layer_in` and `layer_out` are the weight of each product and a float32 table of its bias and the norm's gain and
    bias: `[3, C, H]` and `[3, H]`, then `[H, 2 * C]` and `[3, 2 * C]`. Only `hidden` of the H features are used; the
    others are zero.
    """
    (w_in, in_table), (w_out, out_table) = layer_in, layer_out
    bias, gain, shift = in_table[:, :hidden]
    w_in, w_out = w_in[..., :hidden].float(), w_out[:hidden].float()
    h = F.conv1d(x.float().transpose(1, 2), w_in.permute(2, 1, 0), bias, padding=dilation, dilation=dilation)
    h = h.transpose(1, 2).to(x.dtype).float()
    h = F.gelu(_normed(h) * gain + shift).to(x.dtype).float()
    bias, gain, shift = out_table
    values, gates = (_normed(h @ w_out + bias) * gain + shift).chunk(2, dim=-1)
    x.copy_(x.float() + values * gates.sigmoid())


def _normed(x: Tensor) -> Tensor:
    """Normalise each row of `[R, T, C]` to mean 0 and variance 1."""
    variance, mean = torch.var_mean(x, dim=(1, 2), correction=0, keepdim=True)
    return (x - mean) * (variance + EPS).rsqrt()


@_operation("interleave(Tensor x, Tensor bias, Tensor? skip, int crop, int length) -> Tensor")
def interleave(x: Tensor, bias: Tensor, skip: Tensor | None, crop: int, length: int) -> Tensor:
    """Finish a transposed convolution along L, then add the bias, apply GELU, and add the skip connection, if any.

    `x` is `[B, J, N, stride * C]`: the `stride` values between two inputs. The first `crop` values are dropped; the
    result is `[B, length, N, C]`. `skip` has that shape too, with any distance between its items.
    """
    y = interleaved(x, x.shape[3] // len(bias))[:, crop : crop + length].float() + bias
    y = F.gelu(y)
    return (y if skip is None else y + skip.float()).to(x.dtype)


def interleaved(x: Tensor, stride: int) -> Tensor:
    """`[B, J, N, stride * C]` to `[B, J * stride, N, C]`."""
    by_input: Tensor = x.unflatten(3, (stride, -1))
    return by_input.transpose(2, 3).flatten(1, 2)


@_operation("unpack_spectrum(Tensor x, Tensor bias, Tensor[] stats, int crop, int zero_frames) -> Tensor")
def unpack_spectrum(x: Tensor, bias: Tensor, stats: list[Tensor], crop: int, zero_frames: int) -> Tensor:
    """Finish the last layer of the spectrogram's branch: `[B, J, N, stride * C * 2]` to a float32 spectrogram.

    The result is `[B, C, zero_frames + N + zero_frames, J * stride - 2 * crop + 1, 2]`. Its last bin is zero, and its
    first one is real: cuFFT, unlike a CPU, would not ignore an imaginary part there.
    """
    mean, std = (each[:, None, None, None] for each in stats)
    y = interleaved(x, x.shape[3] // len(bias))
    y = y[:, crop : y.shape[1] - crop].float() + bias
    y = y * std + mean
    y = y.unflatten(3, (-1, 2)).permute(0, 3, 2, 1, 4)
    y[..., 0, 1] = 0
    return F.pad(y, (0, 0, 0, 1, zero_frames, zero_frames))


@_operation("overlap_add(Tensor frames, Tensor window, int hop_length, int crop, int length) -> Tensor")
def overlap_add(frames: Tensor, window: Tensor, hop_length: int, crop: int, length: int) -> Tensor:
    """Windowed overlap-add of frames `[B, C, N, n_fft]`, `hop_length` apart, to waveforms `[B, C, length]`.

    Drops the first `crop` samples, and divides by the sum of the squared windows `[n_fft]`.
    """
    n_frames, n = frames.shape[2:]
    options: Any = {"output_size": (1, (n_frames - 1) * hop_length + n), "kernel_size": (1, n), "stride": hop_length}
    summed = F.fold((frames * window).flatten(0, 1).mT, **options)
    squares = F.fold(window.square().expand(1, n_frames, n).mT, **options)
    kept = slice(crop, crop + length)
    waveforms: Tensor = (summed[..., kept] / squares[..., kept]).flatten(1).unflatten(0, frames.shape[:2])
    return waveforms


@_operation("add_waveform_(Tensor(a!) out, Tensor x, Tensor bias, Tensor[] stats, int crop) -> ()")
def add_waveform_(out: Tensor, x: Tensor, bias: Tensor, stats: list[Tensor], crop: int) -> None:
    """Finish the last layer of the waveform's branch, `[B, J, 1, stride * C]`, and add it to `out`, `[B, C, T]`."""
    mean, std = (each[:, None, None] for each in stats)
    y = interleaved(x, x.shape[3] // len(bias))[:, crop : crop + out.shape[2], 0].float() + bias
    out += (y * std + mean).transpose(1, 2)


@_operation("embed(Tensor x, Tensor gain, Tensor shift, Tensor table) -> (Tensor, Tensor)")
def embed(x: Tensor, gain: Tensor, shift: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise tokens `[B, N, D]` and add positions `[N, D]`; return the sum in float32 and its norm in `x`'s type.

    `gain` and `shift` belong to the first norm. The gain of the second is part of the layers that follow.
    """
    y = F.layer_norm(x.float(), x.shape[-1:], gain, shift, EPS) + table
    return y, F.layer_norm(y, y.shape[-1:], None, None, EPS).to(x.dtype)


@_operation("add_norm_(Tensor(a!) x, Tensor y, Tensor gain) -> Tensor")
def add_norm_(x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
    """Add `y * gain`, `[B, N, D]`, to `x` in float32, and return the sum's tokens, each normalised, in `y`'s type."""
    x += y.float() * gain
    return F.layer_norm(x, x.shape[-1:], None, None, EPS).to(y.dtype)


@_operation("add_group_norm_(Tensor(a!) x, Tensor y, Tensor gain, Tensor norm_gain, Tensor norm_shift) -> Tensor")
def add_group_norm_(x: Tensor, y: Tensor, gain: Tensor, norm_gain: Tensor, norm_shift: Tensor) -> Tensor:
    """Like `add_norm_`, but `x` becomes the sum normalised over all tokens of an item, with gains and biases `[D]`."""
    x += y.float() * gain
    x.copy_(_normed(x) * norm_gain + norm_shift)
    return F.layer_norm(x, x.shape[-1:], None, None, EPS).to(y.dtype)
