"""Triton kernels for the operations of demucs_ops.py, which documents them.

Sums and products are in float32. A row is divided into programs independently of the batch, so rounding does not depend
on it either.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from separation.models.kernels import demucs_ops

BLOCK = 1024  # elements per program, in elementwise kernels
TILE = 64  # positions that a product processes at once
ROWS = 4  # tokens per program
MOST_PARTS = 128  # the most programs that share a row; each contributes a partial sum
EPS = tl.constexpr(demucs_ops.EPS)
# Arguments that do not specialise a kernel: they have many values, and compiling a kernel takes a second.
SIZES = ["length", "tokens", "parts"]


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _load_moments(sums, row, part_size, size, parts, P: tl.constexpr):
    """The mean and 1 / standard deviation of a row of `size` values, from the sums of its parts (Chan et al. 1979).

    Each part has `part_size` values, the last one those that remain.
    """
    p = tl.arange(0, P)
    at = sums + (row * parts + p) * 2
    total = tl.load(at, mask=p < parts, other=0.0)
    squares = tl.load(at + 1, mask=p < parts, other=0.0)
    count = tl.maximum(tl.minimum(size - p * part_size, part_size), 1).to(tl.float32)
    mean = tl.sum(total) / size
    delta = total / count - mean
    variance = (tl.sum(squares) + tl.sum(tl.where(p < parts, count * delta * delta, 0.0))) / size
    return mean, 1.0 / tl.sqrt(variance + EPS)


@triton.jit
def _store_sums(sums, index, total, squares, count):
    """Store the sum of a part and its sum of squared deviations from the part's mean."""
    tl.store(sums + index * 2, total)
    tl.store(sums + index * 2 + 1, tl.maximum(squares - total * total / tl.maximum(count, 1).to(tl.float32), 0.0))


@triton.jit
def _pack(
    x, mean, std, out, lengths, item, channel, step, position, part, padding,
    positions, CHANNELS: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, rows, B: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * B + tl.arange(0, B)
    inside = e < rows * positions * (STRIDE * CHANNELS * PARTS)
    p = e % PARTS
    c = e // PARTS % CHANNELS
    r = e // (PARTS * CHANNELS) % STRIDE
    n = e // (PARTS * CHANNELS * STRIDE) % positions
    at = e // (PARTS * CHANNELS * STRIDE * positions) * STRIDE + r - padding
    there = inside & (at >= 0) & (at < lengths)
    from_ = x + batch * item + c.to(tl.int64) * channel + at.to(tl.int64) * step + n.to(tl.int64) * position + p * part
    scale = 1.0 / (EPS + tl.load(std + batch))
    values = (tl.load(from_, mask=there, other=0.0) - tl.load(mean + batch)) * scale
    to = out + batch * rows * positions * (STRIDE * CHANNELS * PARTS) + e
    tl.store(to, tl.where(there, values, 0.0), mask=inside)


def pack(x: Tensor, stats: list[Tensor], stride: int, padding: int, rows: int, dtype: torch.dtype) -> Tensor:
    batch, channels, length, positions, parts = x.shape
    out = x.new_empty(batch, rows, positions, stride * channels * parts, dtype=dtype)
    grid = (triton.cdiv(out[0].numel(), BLOCK), batch)
    sizes = positions, channels, parts, stride, rows, BLOCK
    _pack[grid](x, *stats, out, length, *x.stride(), padding, *sizes)
    return out


@triton.jit
def _bias_gelu(x, bias, size, C: tl.constexpr, B: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    values = tl.load(x + e, mask=e < size, other=0.0).to(tl.float32)
    tl.store(x + e, _gelu(values + tl.load(bias + e % C)), mask=e < size)


def bias_gelu_(x: Tensor, bias: Tensor) -> None:
    assert x.is_contiguous()
    _bias_gelu[(triton.cdiv(x.numel(), BLOCK),)](x, bias, x.numel(), len(bias), BLOCK)


@triton.jit(do_not_specialize=["length", "positions"])
def _bias_glu(x, bias, table, out, size, length, positions, C: tl.constexpr, TABLE: tl.constexpr, B: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    c = e % C
    at = x + e // C * (2 * C) + c
    values = tl.load(at, mask=e < size, other=0.0).to(tl.float32) + tl.load(bias + c)
    gates = tl.load(at + C, mask=e < size, other=0.0).to(tl.float32) + tl.load(bias + C + c)
    y = values * _sigmoid(gates)
    if TABLE:
        y += tl.load(table + e // (C * positions) % length * C + c, mask=e < size, other=0.0)
    tl.store(out + e, y, mask=e < size)


def bias_glu(x: Tensor, bias: Tensor, table: Tensor | None) -> Tensor:
    assert x.is_contiguous()
    _, length, positions, features = x.shape
    out = x.new_empty(*x.shape[:3], features // 2)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    pointer = bias if table is None else table  # Triton needs a tensor; without a table the kernel does not read it
    _bias_glu[grid](x, bias, pointer, out, out.numel(), length, positions, features // 2, table is not None, BLOCK)
    return out


@triton.jit(do_not_specialize=[*SIZES, "dilation"])
def _dconv_in(
    x, w, table, h, sums, length, parts, dilation, C: tl.constexpr, H: tl.constexpr, USED: tl.constexpr,
    TILES: tl.constexpr, T: tl.constexpr, CB: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    """Store the first convolution's output in `h`, and its sums."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    i = tl.arange(0, HB)
    bias = tl.load(table + i, mask=i < H, other=0.0)
    total = tl.zeros([T], tl.float32)
    squares = tl.zeros([T], tl.float32)
    for tile in range(TILES):
        t = (part * TILES + tile) * T + tl.arange(0, T)
        product = tl.zeros([T, HB], tl.float32)
        for tap in tl.static_range(3):
            at = t + (tap - 1) * dilation
            for first in range(0, C, CB):
                c = first + tl.arange(0, CB)
                from_ = x + (row * length + at[:, None]) * C + c[None, :]
                mask = ((at >= 0) & (at < length))[:, None] & (c < C)[None, :]
                there = (c < C)[:, None] & (i < H)[None, :]
                weights = tl.load(w + (tap * C + c[:, None]) * H + i[None, :], mask=there, other=0.0)
                product = tl.dot(tl.load(from_, mask=mask, other=0.0), weights, product, input_precision="ieee")
        values = (product + bias[None, :]).to(h.dtype.element_ty)
        mask = (t < length)[:, None] & (i < H)[None, :]
        tl.store(h + (row * length + t[:, None]) * H + i[None, :], values, mask=mask)
        values = tl.where(mask, values.to(tl.float32), 0.0)
        total += tl.sum(values, axis=1)
        squares += tl.sum(values * values, axis=1)
    count = tl.maximum(tl.minimum(length - part * TILES * T, TILES * T), 0) * USED
    _store_sums(sums, row * parts + part, tl.sum(total), tl.sum(squares), count)


@triton.jit
def _hidden(h, table, row, t, mean, scale, length, H: tl.constexpr, HB: tl.constexpr):
    """The second product's input: the norm of `h`, then GELU."""
    i = tl.arange(0, HB)
    from_ = h + (row * length + t[:, None]) * H + i[None, :]
    values = tl.load(from_, mask=(t < length)[:, None] & (i < H)[None, :], other=0.0).to(tl.float32)
    gain = tl.load(table + H + i, mask=i < H, other=0.0)
    shift = tl.load(table + 2 * H + i, mask=i < H, other=0.0)
    return _gelu((values - mean) * scale * gain[None, :] + shift[None, :]).to(h.dtype.element_ty)


@triton.jit
def _product(hidden, w, table, c, C: tl.constexpr, H: tl.constexpr, HB: tl.constexpr):
    """The columns `c` of the second product plus its bias. Columns from C on are zero."""
    i = tl.arange(0, HB)
    mask = (i < H)[:, None] & (c < C)[None, :]
    weights = tl.load(w + i[:, None] * C + c[None, :], mask=mask, other=0.0)
    bias = tl.load(table + c, mask=c < C, other=0.0)
    return tl.dot(hidden, weights, input_precision="ieee") + bias[None, :]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["in_sums", "out_sums"])
def _dconv_sums(
    h, w, in_table, out_table, in_sums, out_sums, length, parts, C: tl.constexpr, H: tl.constexpr,
    USED: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr, T: tl.constexpr, CB: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    """Store the sums of the second product. `_dconv_out` computes the product again, which saves memory traffic."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    mean, scale = _load_moments(in_sums, row, TILES * T * USED, length * USED, parts, P)
    total = tl.zeros([T], tl.float32)
    squares = tl.zeros([T], tl.float32)
    for tile in range(TILES):
        t = (part * TILES + tile) * T + tl.arange(0, T)
        hidden = _hidden(h, in_table, row, t, mean, scale, length, H, HB)
        for first in range(0, 2 * C, CB):
            y = _product(hidden, w, out_table, first + tl.arange(0, CB), 2 * C, H, HB)
            y = tl.where((t < length)[:, None], y, 0.0)
            total += tl.sum(y, axis=1)
            squares += tl.sum(y * y, axis=1)
    count = tl.maximum(tl.minimum(length - part * TILES * T, TILES * T), 0) * (2 * C)
    _store_sums(out_sums, row * parts + part, tl.sum(total), tl.sum(squares), count)


@triton.jit
def _normed_product(hidden, w, table, c, mean, scale, C: tl.constexpr, H: tl.constexpr, HB: tl.constexpr):
    y = (_product(hidden, w, table, c, C, H, HB) - mean) * scale
    gain = tl.load(table + C + c, mask=c < C, other=0.0)
    shift = tl.load(table + 2 * C + c, mask=c < C, other=0.0)
    return y * gain[None, :] + shift[None, :]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["in_sums", "out_sums"])
def _dconv_out(
    x, h, w, in_table, out_table, in_sums, out_sums, length, parts, C: tl.constexpr, H: tl.constexpr,
    USED: tl.constexpr, P: tl.constexpr, TILES: tl.constexpr, T: tl.constexpr, CB: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    """Add the second product, after its norm and GLU, to `x`."""
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    mean, scale = _load_moments(in_sums, row, TILES * T * USED, length * USED, parts, P)
    out_mean, out_scale = _load_moments(out_sums, row, TILES * T * (2 * C), length * (2 * C), parts, P)
    for tile in range(TILES):
        t = (part * TILES + tile) * T + tl.arange(0, T)
        hidden = _hidden(h, in_table, row, t, mean, scale, length, H, HB)
        for first in range(0, C, CB):
            c = first + tl.arange(0, CB)
            values = _normed_product(hidden, w, out_table, c, out_mean, out_scale, 2 * C, H, HB)
            gates = _normed_product(hidden, w, out_table, C + c, out_mean, out_scale, 2 * C, H, HB)
            at = x + (row * length + t[:, None]) * C + c[None, :]
            mask = (t < length)[:, None] & (c < C)[None, :]
            before = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tl.store(at, before + values * _sigmoid(gates), mask=mask)


def _columns(features: int, most: int) -> int:
    """The number of features that a product processes at once: if possible one that divides them."""
    return next((size for size in (64, 32, 16) if size <= most and features % size == 0), 16)


def _divide(length: int, tile: int) -> tuple[int, int]:
    """The number of programs that share a row, and the number of tiles that each processes."""
    tiles = triton.cdiv(triton.cdiv(length, tile), MOST_PARTS)
    return triton.cdiv(length, tile * tiles), tiles


def dconv_(x: Tensor, layer_in: list[Tensor], layer_out: list[Tensor], hidden: int, dilation: int) -> None:
    assert x.is_contiguous()
    (w_in, in_table), (w_out, out_table) = layer_in, layer_out
    rows, length, features = x.shape
    width = w_in.shape[2]
    parts, tiles = _divide(length, TILE)
    h = x.new_empty(rows, length, width)
    in_sums, out_sums = x.new_empty(2, rows, parts, 2, dtype=torch.float32)
    blocks: dict[str, Any] = {"TILES": tiles, "T": TILE, "CB": _columns(features, 64)}
    blocks["HB"] = max(16, triton.next_power_of_2(width))
    sizes = features, width, hidden
    _dconv_in[(rows * parts,)](x, w_in, in_table, h, in_sums, length, parts, dilation, *sizes, **blocks)
    tables = w_out, in_table, out_table, in_sums, out_sums, length, parts
    blocks["P"] = triton.next_power_of_2(MOST_PARTS)
    _dconv_sums[(rows * parts,)](h, *tables, *sizes, **blocks)
    blocks["CB"] = _columns(features, 32)  # more values and gates would not fit into the registers
    _dconv_out[(rows * parts,)](x, h, *tables, *sizes, **blocks)


@triton.jit(do_not_specialize=["rows", "length", "positions", "crop"])
def _interleave(
    x, bias, skip, out, skip_item, rows, length, positions, crop,
    STRIDE: tl.constexpr, C: tl.constexpr, SKIP: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * B + tl.arange(0, B)
    mask = e < length * positions * C
    c = e % C
    n = e // C % positions
    at = e // (C * positions) + crop
    from_ = x + ((batch * rows + at // STRIDE) * positions + n) * (STRIDE * C) + at % STRIDE * C + c
    y = _gelu(tl.load(from_, mask=mask, other=0.0).to(tl.float32) + tl.load(bias + c))
    if SKIP:
        y += tl.load(skip + batch * skip_item + e, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + batch * length * positions * C + e, y, mask=mask)


def interleave(x: Tensor, bias: Tensor, skip: Tensor | None, crop: int, length: int) -> Tensor:
    assert x.is_contiguous() and (skip is None or skip[0].is_contiguous())
    batch, rows, positions, features = x.shape
    out = x.new_empty(batch, length, positions, len(bias))
    pointer, item = (out, 0) if skip is None else (skip, skip.stride(0))
    grid = (triton.cdiv(out[0].numel(), BLOCK), batch)
    options = features // len(bias), len(bias), skip is not None, BLOCK
    _interleave[grid](x, bias, pointer, out, item, rows, length, positions, crop, *options)
    return out


@triton.jit
def _unpack_spectrum(
    x, bias, mean, std, out, rows, positions, crop, zeros, bins,
    STRIDE: tl.constexpr, C: tl.constexpr, F: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    frame = tl.program_id(1)
    first = tl.program_id(0) * F
    f = first + tl.arange(0, F)
    c = tl.arange(0, CB)
    n = frame - zeros
    there = (f < rows * STRIDE - 2 * crop) & (n >= 0) & (n < positions)
    at = f + crop
    from_ = x + ((batch * rows + at // STRIDE) * positions + n) * (STRIDE * C) + at % STRIDE * C
    mask = there[:, None] & (c < C)[None, :]
    y = tl.load(from_[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias + c, mask=c < C, other=0.0)[None, :]
    imaginary = (f == 0)[:, None] & (c % 2 == 1)[None, :]
    y = tl.where(mask & (imaginary == 0), y * tl.load(std + batch) + tl.load(mean + batch), 0.0)
    # In the result, the real and the imaginary part are neighbours and the channel comes first.
    y = tl.reshape(tl.permute(tl.reshape(y, [F, CB // 2, 2]), (1, 0, 2)), [CB // 2, F * 2])
    channel = tl.arange(0, CB // 2)
    inner = first * 2 + tl.arange(0, F * 2)
    frames = positions + 2 * zeros
    to = out + ((batch * (C // 2) + channel[:, None]) * frames + frame) * (bins * 2) + inner[None, :]
    tl.store(to, y, mask=(channel < C // 2)[:, None] & (inner < bins * 2)[None, :])


def unpack_spectrum(x: Tensor, bias: Tensor, stats: list[Tensor], crop: int, zero_frames: int) -> Tensor:
    assert x.is_contiguous()
    batch, rows, positions, features = x.shape
    channels, block = len(bias), 64
    stride, frames = features // channels, positions + 2 * zero_frames
    bins = rows * stride - 2 * crop + 1
    out = x.new_empty(batch, channels // 2, frames, bins, 2, dtype=torch.float32)
    sizes = rows, positions, crop, zero_frames, bins, stride, channels, block, triton.next_power_of_2(channels)
    _unpack_spectrum[(triton.cdiv(bins, block), frames, batch)](x, bias, *stats, out, *sizes)
    return out


@triton.jit
def _overlap_add(
    frames, window, out, n_frames, crop, length, N: tl.constexpr, HOP: tl.constexpr, APART: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * B + tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    squares = tl.zeros([B], tl.float32)
    for back in tl.static_range(APART):
        frame = (t + crop) // HOP - back
        at = (t + crop) % HOP + back * HOP
        mask = (t < length) & (frame >= 0) & (frame < n_frames) & (at < N)
        weight = tl.load(window + at, mask=mask, other=0.0)
        total += tl.load(frames + (row * n_frames + frame) * N + at, mask=mask, other=0.0) * weight
        squares += weight * weight
    tl.store(out + row * length + t, total / tl.where(t < length, squares, 1.0), mask=t < length)


def overlap_add(frames: Tensor, window: Tensor, hop_length: int, crop: int, length: int) -> Tensor:
    frames = frames.contiguous()
    *rows, n_frames, n = frames.shape
    out = frames.new_empty(*rows, length)
    grid = (triton.cdiv(length, BLOCK), rows[0] * rows[1])
    sizes = n_frames, crop, length, n, hop_length, triton.cdiv(n, hop_length), BLOCK
    _overlap_add[grid](frames, window, out, *sizes)
    return out


@triton.jit
def _add_waveform(
    out, x, bias, mean, std, item, channel, x_item, crop, length, C: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * B + tl.arange(0, B)
    scale = tl.load(std + batch)
    offset = tl.load(mean + batch)
    for c in range(C):
        y = tl.load(x + batch * x_item + (t + crop) * C + c, mask=t < length, other=0.0).to(tl.float32)
        to = out + batch * item + c * channel + t
        y = (y + tl.load(bias + c)) * scale + offset
        tl.store(to, tl.load(to, mask=t < length, other=0.0) + y, mask=t < length)


def add_waveform_(out: Tensor, x: Tensor, bias: Tensor, stats: list[Tensor], crop: int) -> None:
    assert x.is_contiguous() and out.stride(2) == 1
    batch, channels, length = out.shape
    sizes = *out.stride()[:2], x[0].numel(), crop, length, channels, BLOCK
    _add_waveform[(triton.cdiv(length, BLOCK), batch)](out, x, bias, *stats, *sizes)


@triton.jit
def _normed(x, inside, D: tl.constexpr):
    """Normalise each row of a tile to mean 0 and variance 1. `inside` marks its D columns."""
    deviations = tl.where(inside, x - (tl.sum(tl.where(inside, x, 0.0), axis=1) / D)[:, None], 0.0)
    return deviations * (1.0 / tl.sqrt(tl.sum(deviations * deviations, axis=1) / D + EPS))[:, None]


@triton.jit
def _embed(x, gain, shift, table, sums, out, rows, tokens, D: tl.constexpr, R: tl.constexpr, DB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    d = tl.arange(0, DB)
    mask = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    y = _normed(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), (d < D)[None, :], D)
    y = y * tl.load(gain + d, mask=d < D, other=0.0)[None, :] + tl.load(shift + d, mask=d < D, other=0.0)[None, :]
    y += tl.load(table + (row % tokens)[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(sums + at, y, mask=mask)
    tl.store(out + at, _normed(y, (d < D)[None, :], D), mask=mask)


def embed(x: Tensor, gain: Tensor, shift: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    batch, tokens, dim = x.shape
    sums, out = torch.empty_like(x, dtype=torch.float32), torch.empty_like(x)
    sizes = batch * tokens, tokens, dim, ROWS, triton.next_power_of_2(dim)
    _embed[(triton.cdiv(batch * tokens, ROWS),)](x, gain, shift, table, sums, out, *sizes)
    return sums, out


@triton.jit
def _add_norm(x, y, gain, out, rows, D: tl.constexpr, R: tl.constexpr, DB: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    d = tl.arange(0, DB)
    mask = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    added = tl.load(y + at, mask=mask, other=0.0).to(tl.float32) * tl.load(gain + d, mask=d < D, other=0.0)[None, :]
    total = tl.load(x + at, mask=mask, other=0.0) + added
    tl.store(x + at, total, mask=mask)
    tl.store(out + at, _normed(total, (d < D)[None, :], D), mask=mask)


def add_norm_(x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
    assert x.is_contiguous() and y.is_contiguous()
    out = torch.empty_like(y)
    rows, dim = x.shape[0] * x.shape[1], x.shape[2]
    _add_norm[(triton.cdiv(rows, ROWS),)](x, y, gain, out, rows, dim, ROWS, triton.next_power_of_2(dim))
    return out


@triton.jit(do_not_specialize=SIZES)
def _add_sums(
    x, y, gain, sums, tokens, parts, D: tl.constexpr, TILES: tl.constexpr, R: tl.constexpr,
    DB: tl.constexpr,
):  # fmt: skip
    """Add `y * gain` to `x`, and store the sums of the result."""
    item = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    d = tl.arange(0, DB)
    scale = tl.load(gain + d, mask=d < D, other=0.0)[None, :]
    total = tl.zeros([R, DB], tl.float32)
    squares = tl.zeros([R, DB], tl.float32)
    for tile in range(TILES):
        n = (part * TILES + tile) * R + tl.arange(0, R)
        mask = (n < tokens)[:, None] & (d < D)[None, :]
        at = (item * tokens + n[:, None]) * D + d[None, :]
        values = tl.load(x + at, mask=mask, other=0.0) + tl.load(y + at, mask=mask, other=0.0).to(tl.float32) * scale
        tl.store(x + at, values, mask=mask)
        total += values
        squares += values * values
    count = tl.maximum(tl.minimum(tokens - part * TILES * R, TILES * R), 0) * D
    _store_sums(sums, item * parts + part, tl.sum(total), tl.sum(squares), count)


@triton.jit(do_not_specialize=SIZES)
def _group_norm(
    x, norm_gain, norm_shift, sums, out, tokens, parts, D: tl.constexpr, P: tl.constexpr,
    TILES: tl.constexpr, R: tl.constexpr, DB: tl.constexpr,
):  # fmt: skip
    item = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    d = tl.arange(0, DB)
    gain = tl.load(norm_gain + d, mask=d < D, other=0.0)[None, :]
    shift = tl.load(norm_shift + d, mask=d < D, other=0.0)[None, :]
    mean, scale = _load_moments(sums, item, TILES * R * D, tokens * D, parts, P)
    for tile in range(TILES):
        n = (part * TILES + tile) * R + tl.arange(0, R)
        mask = (n < tokens)[:, None] & (d < D)[None, :]
        at = (item * tokens + n[:, None]) * D + d[None, :]
        values = (tl.load(x + at, mask=mask, other=0.0) - mean) * scale * gain + shift
        tl.store(x + at, values, mask=mask)
        tl.store(out + at, _normed(values, (d < D)[None, :], D), mask=mask)


def add_group_norm_(x: Tensor, y: Tensor, gain: Tensor, norm_gain: Tensor, norm_shift: Tensor) -> Tensor:
    assert x.is_contiguous() and y.is_contiguous()
    batch, tokens, dim = x.shape
    out = torch.empty_like(y)
    parts, tiles = _divide(tokens, ROWS)
    sums = x.new_empty(batch, parts, 2)
    blocks: dict[str, Any] = {"TILES": tiles, "R": ROWS, "DB": triton.next_power_of_2(dim)}
    _add_sums[(batch * parts,)](x, y, gain, sums, tokens, parts, dim, **blocks)
    blocks["P"] = triton.next_power_of_2(MOST_PARTS)
    _group_norm[(batch * parts,)](x, norm_gain, norm_shift, sums, out, tokens, parts, dim, **blocks)
    return out
