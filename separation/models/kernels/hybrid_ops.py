"""What the Demucs family computes between its products, as torch operations `separation::…`, in plain PyTorch.

Each has a Triton kernel of its name in hybrid_triton.py. Shapes are channels last: `[B, L, N, C]`, where a
convolution strides along L, and each of the N positions is convolved alone. Norms, biases and sums are in float32;
results are in the type of the products' inputs, rounded once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from separation.models.kernels.operations import operation

EPS = 1e-5  # of all norms, and added to the deviation of the input


@operation("pack(Tensor x, Tensor mean, Tensor std, int stride, int padding, int rows, ScalarType dtype) -> Tensor")
def pack(x: Tensor, mean: Tensor, std: Tensor, stride: int, padding: int, rows: int, dtype: torch.dtype) -> Tensor:
    """`(x - mean) / std` with `stride` neighbours along L side by side: what the first convolution is a product with.

    `x` is `[B, C, L, N, P]` in float32 with any strides, its mean and deviation `[B]`. The result is
    `[B, rows, N, stride * C * P]`, with `padding` zeros before L and as many as it takes behind it.
    """
    batch, channels, length, positions, parts = x.shape
    mean, scale = mean[:, None, None, None, None], 1 / (EPS + std[:, None, None, None, None])
    values = ((x - mean) * scale).permute(0, 2, 3, 1, 4).reshape(batch, length, positions, channels * parts)
    padded = F.pad(values, (0, 0, 0, 0, padding, rows * stride - padding - length))
    return padded.unflatten(1, (rows, stride)).transpose(2, 3).flatten(3).to(dtype)


@operation("bias_gelu_(Tensor(a!) x, Tensor bias) -> ()")
def bias_gelu_(x: Tensor, bias: Tensor) -> None:
    """`gelu(x + bias)` in place of `x`, `[..., C]`."""
    x.copy_(F.gelu(x.float() + bias))


@operation("bias_glu(Tensor x, Tensor bias, Tensor? table) -> Tensor")
def bias_glu(x: Tensor, bias: Tensor, table: Tensor | None) -> Tensor:
    """Values times the sigmoid of gates, `[B, L, N, 2 * C]` to `[B, L, N, C]`; a table `[L, C]` is added."""
    values, gates = (x.float() + bias).chunk(2, dim=-1)
    gated = values * gates.sigmoid()
    return (gated if table is None else gated + table[:, None]).to(x.dtype)


@operation(
    "dconv_(Tensor(a!) x, Tensor w_in, Tensor in_table, Tensor w_out, Tensor out_table, int hidden, int dilation) -> ()"
)
def dconv_(
    x: Tensor, w_in: Tensor, in_table: Tensor, w_out: Tensor, out_table: Tensor, hidden: int, dilation: int
) -> None:
    """A residual branch of Demucs, added to `x`, `[R, T, C]`: a dilated convolution to few features and a product back.

    `w_in` is `[3, C, H]`, of which `hidden` features are used and the others are zeros, `w_out` `[H, 2 * C]`. The
    tables in float32, `[3, H]` and `[3, 2 * C]`, hold each one's bias, and gain and bias of the norm behind it, over
    all of a row's positions and features. Then come GELU and GLU.
    """
    bias, gain, shift = in_table[:, :hidden]
    w_in, w_out = w_in[..., :hidden].float(), w_out[:hidden].float()
    h = F.conv1d(x.float().transpose(1, 2), w_in.permute(2, 1, 0), bias, padding=dilation, dilation=dilation)
    h = h.transpose(1, 2).to(x.dtype).float()
    h = F.gelu(_normed(h) * gain + shift).to(x.dtype).float()
    bias, gain, shift = out_table
    values, gates = (_normed(h @ w_out + bias) * gain + shift).chunk(2, dim=-1)
    x.copy_(x.float() + values * gates.sigmoid())


def _normed(x: Tensor) -> Tensor:
    """Each row of `[R, T, C]` with mean 0 and variance 1."""
    variance, mean = torch.var_mean(x, dim=(1, 2), correction=0, keepdim=True)
    return (x - mean) * (variance + EPS).rsqrt()


@operation("interleave(Tensor x, Tensor bias, Tensor? skip, int stride, int crop, int length, bool gelu) -> Tensor")
def interleave(x: Tensor, bias: Tensor, skip: Tensor | None, stride: int, crop: int, length: int, gelu: bool) -> Tensor:
    """The last step of a transposed convolution along L, plus bias, GELU if asked for, and a skip connection.

    `x` is `[B, J, N, stride * C]`: for each J the `stride` values that lie between two inputs. The result is
    `[B, length, N, C]`, without the first `crop` values; so is `skip`, with any distance between batch items.
    """
    y = interleaved(x, stride)[:, crop : crop + length].float() + bias
    y = F.gelu(y) if gelu else y
    return (y if skip is None else y + skip.float()).to(x.dtype)


def interleaved(x: Tensor, stride: int) -> Tensor:
    """`[B, J, N, stride * C]` to `[B, J * stride, N, C]`."""
    return x.unflatten(3, (stride, -1)).transpose(2, 3).flatten(1, 2)


@operation(
    "unpack_spectrum(Tensor x, Tensor bias, Tensor mean, Tensor std, int stride, int crop, int zeros, int bins) "
    "-> Tensor"
)
def unpack_spectrum(
    x: Tensor, bias: Tensor, mean: Tensor, std: Tensor, stride: int, crop: int, zeros: int, bins: int
) -> Tensor:
    """The last layer's `[B, J, N, stride * C * 2]` to a spectrogram in float32, `[B, C, zeros + N + zeros, bins, 2]`.

    It is interleaved along the bins, which are zeros from J * stride - 2 * crop up, and put back to the input's mean
    and deviation `[B]`. The first bin is made real: what is imaginary in it, only CPUs ignore behind `overlap_add`.
    """
    y = interleaved(x, stride)
    y = y[:, crop : y.shape[1] - crop].float() + bias
    y = y * std[:, None, None, None] + mean[:, None, None, None]
    y = y.unflatten(3, (-1, 2)).permute(0, 3, 2, 1, 4)
    y[..., 0, 1] = 0
    return F.pad(y, (0, 0, 0, bins - y.shape[3], zeros, zeros))


@operation("overlap_add(Tensor frames, Tensor window, int hop_length, int crop, int length) -> Tensor")
def overlap_add(frames: Tensor, window: Tensor, hop_length: int, crop: int, length: int) -> Tensor:
    """Frames `[B, C, N, n]` times the window `[n]`, `hop_length` apart, as waveforms `[B, C, length]`.

    They begin after `crop` samples, and are divided by the sum of the squared windows.
    """
    n_frames, n = frames.shape[2:]
    options: Any = {"output_size": (1, (n_frames - 1) * hop_length + n), "kernel_size": (1, n), "stride": hop_length}
    summed = F.fold((frames * window).flatten(0, 1).mT, **options)
    squares = F.fold(window.square().expand(1, n_frames, n).mT, **options)
    kept = slice(crop, crop + length)
    return (summed[..., kept] / squares[..., kept]).flatten(1).unflatten(0, frames.shape[:2])


@operation("add_waveform_(Tensor(a!) out, Tensor x, Tensor bias, Tensor mean, Tensor std, int stride, int crop) -> ()")
def add_waveform_(out: Tensor, x: Tensor, bias: Tensor, mean: Tensor, std: Tensor, stride: int, crop: int) -> None:
    """Adds the last layer's `[B, J, 1, stride * C]`, put back to the input's mean and deviation, to `[B, C, T]`."""
    y = interleaved(x, stride)[:, crop : crop + out.shape[2], 0].float() + bias
    out += (y * std[:, None, None] + mean[:, None, None]).transpose(1, 2)


@operation("embed(Tensor x, Tensor gain, Tensor shift, Tensor table) -> (Tensor, Tensor)")
def embed(x: Tensor, gain: Tensor, shift: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[B, N, D]`, normalised, plus positions `[N, D]`: in float32, and normalised once more in their type."""
    y = F.layer_norm(x.float(), x.shape[-1:], gain, shift, EPS) + table
    return y, F.layer_norm(y, y.shape[-1:], None, None, EPS).to(x.dtype)


@operation("add_norm_(Tensor(a!) x, Tensor y, Tensor gain) -> Tensor")
def add_norm_(x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
    """Adds `y * gain`, `[B, N, D]`, to `x` in float32, and gives each token of the sum normalised, in `y`'s type."""
    x += y.float() * gain
    return F.layer_norm(x, x.shape[-1:], None, None, EPS).to(y.dtype)


@operation("add_group_norm_(Tensor(a!) x, Tensor y, Tensor gain, Tensor norm_gain, Tensor norm_shift) -> Tensor")
def add_group_norm_(x: Tensor, y: Tensor, gain: Tensor, norm_gain: Tensor, norm_shift: Tensor) -> Tensor:
    """As `add_norm_`, but `x` becomes the sum normalised over all of an item's tokens, with gains and shifts `[D]`."""
    x += y.float() * gain
    x.copy_(_normed(x) * norm_gain + norm_shift)
    return F.layer_norm(x, x.shape[-1:], None, None, EPS).to(y.dtype)
