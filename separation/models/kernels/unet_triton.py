"""Triton kernels for the operations of unet_ops.py, which documents them. Sums are in float32.

The end of each `range` is a constant, because Triton's interpreter supports no others.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from separation.models.kernels import unet_ops as ops
from separation.models.kernels.registry import launch

SPAN = 2048  # positions per program that computes moments; a constant, so that rounding does not depend on the batch
EPS = tl.constexpr(ops.EPS)
GELU, RELU, ELU = tl.constexpr(ops.GELU), tl.constexpr(ops.RELU), tl.constexpr(ops.ELU)


@triton.jit
def _merged(count, mean, m2, n, tile_mean, tile_m2):
    """The count, mean and sum of squared deviations of the union of two sets (Chan et al. 1979)."""
    total = tl.maximum(count + n, 1.0)
    delta = tile_mean - mean
    return count + n, mean + delta * (n / total), m2 + tile_m2 + delta * delta * (count * n / total)


@triton.jit
def _gelu(y):
    return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))


@triton.jit
def _activated(y, alpha, ACTIVATION: tl.constexpr):
    if ACTIVATION == GELU:
        y = _gelu(y)
    if ACTIVATION == RELU:
        y = tl.maximum(y, 0.0)
    if ACTIVATION == ELU:
        y = tl.where(y > 0.0, y, alpha * (tl.exp(y) - 1.0))
    return y


@triton.jit
def _moments(
    x,
    parts,
    positions,
    features,
    stride_item,
    stride_position,
    stride_feature,
    SPAN: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
):
    item = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    first = tl.program_id(0) * SPAN
    mean = tl.zeros([D], tl.float32)
    m2 = tl.zeros([D], tl.float32)
    count = 0.0
    for start in range(0, SPAN, P):
        p = first + start + tl.arange(0, P)
        inside = p < positions
        at = x + item * stride_item + p[:, None] * stride_position + d[None, :] * stride_feature
        mask = inside[:, None] & (d < features)[None, :]
        values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        n = tl.sum(inside.to(tl.float32))
        tile_mean = tl.sum(values, axis=0) / tl.maximum(n, 1.0)
        deviations = tl.where(mask, values - tile_mean[None, :], 0.0)
        count, mean, m2 = _merged(count, mean, m2, n, tile_mean, tl.sum(deviations * deviations, axis=0))
    to = parts + ((item * tl.num_programs(0) + tl.program_id(0)) * 2) * features + d
    tl.store(to, mean, mask=d < features)
    tl.store(to + features, m2, mask=d < features)


@triton.jit(do_not_specialize=["positions", "spans"])
def _join(parts, out, positions, features, spans, SPAN: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    item = tl.program_id(1)
    d = tl.program_id(0) * D + tl.arange(0, D)
    s = tl.arange(0, S)
    n = tl.maximum(tl.minimum(positions - s * SPAN, SPAN), 0).to(tl.float32)[:, None]
    at = parts + (item * spans + s[:, None]) * 2 * features + d[None, :]
    mask = (s < spans)[:, None] & (d < features)[None, :]
    means = tl.load(at, mask=mask, other=0.0)
    mean = tl.sum(n * means, axis=0) / positions
    deviations = tl.where(mask, means - mean[None, :], 0.0)
    m2 = tl.sum(tl.load(at + features, mask=mask, other=0.0) + n * deviations * deviations, axis=0)
    to = out + item * 2 * features + d
    tl.store(to, mean, mask=d < features)
    tl.store(to + features, m2 / positions, mask=d < features)


@triton.jit
def _join_whole(parts, out, positions, features, SPANS: tl.constexpr, SPAN: tl.constexpr, D: tl.constexpr):
    item = tl.program_id(0)
    d = tl.arange(0, D)
    inside = d < features
    total = tl.zeros([D], tl.float32)
    for s in range(SPANS):
        n = tl.minimum(positions - s * SPAN, SPAN).to(tl.float32)
        total += n * tl.load(parts + (item * SPANS + s) * 2 * features + d, mask=inside, other=0.0)
    count = positions.to(tl.float32) * features
    mean = tl.sum(total) / count
    m2 = tl.zeros([D], tl.float32)
    for s in range(SPANS):
        n = tl.minimum(positions - s * SPAN, SPAN).to(tl.float32)
        at = parts + (item * SPANS + s) * 2 * features + d
        deviations = tl.where(inside, tl.load(at, mask=inside, other=0.0) - mean, 0.0)
        m2 += tl.load(at + features, mask=inside, other=0.0) + n * deviations * deviations
    to = out + item * 2 * features + d
    tl.store(to, tl.zeros([D], tl.float32) + mean, mask=inside)
    tl.store(to + features, tl.zeros([D], tl.float32) + tl.sum(m2) / count, mask=inside)


def moments(x: Tensor, whole: bool) -> Tensor:
    batch, positions, features = x.shape
    spans = triton.cdiv(positions, SPAN)
    parts = x.new_empty(batch, spans, 2, features, dtype=torch.float32)
    p, d = _tile(x)
    grid = (spans, triton.cdiv(features, d), batch)
    launch(_moments, grid, x, parts, positions, features, *x.stride(), SPAN=SPAN, P=p, D=d)
    out = x.new_empty(batch, 2, features, dtype=torch.float32)
    sizes = parts, out, positions, features
    if whole:
        launch(_join_whole, (batch,), *sizes, SPANS=spans, SPAN=SPAN, D=triton.next_power_of_2(features))
    else:
        s = max(32, triton.next_power_of_2(spans))  # one kernel serves all smaller sizes
        launch(_join, (triton.cdiv(features, 16), batch), *sizes, spans, SPAN=SPAN, S=s, D=16)
    return out


@triton.jit
def _normalise(
    x,
    moments,
    gain,
    bias,
    out,
    positions,
    features,
    stride_item,
    stride_position,
    stride_feature,
    stride_moments,
    alpha,
    ACTIVATION: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
):
    item = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    p = tl.program_id(0) * P + tl.arange(0, P)
    inside = d < features
    mean = tl.load(moments + item * stride_moments + d, mask=inside, other=0.0)
    variance = tl.load(moments + item * stride_moments + features + d, mask=inside, other=0.0)
    scale = tl.load(gain + d, mask=inside, other=0.0) * tl.rsqrt(variance + EPS)
    shift = tl.load(bias + d, mask=inside, other=0.0)
    at = item * stride_item + p[:, None] * stride_position + d[None, :] * stride_feature
    mask = (p < positions)[:, None] & inside[None, :]
    y = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
    tl.store(out + at, _activated(y, alpha, ACTIVATION).to(out.dtype.element_ty), mask=mask)


def normalise(x: Tensor, norm: list[Tensor], activation: int, alpha: float, dtype: torch.dtype) -> Tensor:
    moments, gain, bias = norm
    batch, positions, features = x.shape
    out = torch.empty_like(x, dtype=dtype)
    strides = zip(x.shape, x.stride(), out.stride(), strict=True)
    assert all(n == 1 or a == b for n, a, b in strides)  # `x` has no gaps
    p, d = _tile(x)
    launch(
        _normalise,
        (triton.cdiv(positions, p), triton.cdiv(features, d), batch),
        *(x, moments, gain, bias, out, positions, features, *x.stride(), moments.stride(0), alpha),
        ACTIVATION=activation,
        P=p,
        D=d,
    )
    return out


def _tile(x: Tensor) -> tuple[int, int]:
    """How many positions and features of `[B, N, D]` a program loads at once: more along the contiguous axis."""
    return (64, 64) if x.stride(2) == 1 else (512, 8)


@triton.jit
def _normalise_rows(x, gain, bias, out, features, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * LENGTH
    count, mean, m2 = 0.0, 0.0, 0.0
    for start in range(0, LENGTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(x + row + at, mask=at < LENGTH, other=0.0).to(tl.float32)
        n = tl.minimum(LENGTH - start, BLOCK) * 1.0
        tile_mean = tl.sum(values) / n
        deviations = tl.where(at < LENGTH, values - tile_mean, 0.0)
        count, mean, m2 = _merged(count, mean, m2, n, tile_mean, tl.sum(deviations * deviations))
    scale = tl.rsqrt(m2 / LENGTH + EPS)
    for start in range(0, LENGTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = (tl.load(x + row + at, mask=at < LENGTH, other=0.0).to(tl.float32) - mean) * scale
        y = y * tl.load(gain + at % features) + tl.load(bias + at % features)
        tl.store(out + row + at, y.to(out.dtype.element_ty), mask=at < LENGTH)


def normalise_rows(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    assert x.is_contiguous()
    rows, positions, features = x.shape
    out = torch.empty_like(x)
    launch(_normalise_rows, (rows,), x, gain, bias, out, features, LENGTH=positions * features, BLOCK=4096)
    return out


@triton.jit
def _convolved(gated, taps, at, positions, hidden, K: tl.constexpr, H: tl.constexpr, N: tl.constexpr):
    """GLU and the depthwise convolution at N positions from `at`: `[N, H]`."""
    c = tl.arange(0, H)
    inside = c < hidden
    y = tl.zeros([N, H], tl.float32)
    for tap in tl.static_range(K):
        n = at + tl.arange(0, N) + tap - K // 2
        mask = ((n >= 0) & (n < positions))[:, None] & inside[None, :]
        from_ = gated + n[:, None] * 2 * hidden + c[None, :]
        value = tl.load(from_, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(from_ + hidden, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(taps + tap * hidden + c, mask=inside, other=0.0).to(tl.float32)
        y += value * tl.sigmoid(gate) * weight[None, :]
    return y


@triton.jit(do_not_specialize=["rows", "activation"])  # otherwise several of their values would each compile a kernel
def _gated_branch(
    out,
    x,
    gated,
    taps,
    table,
    weight,
    bias,
    rows,
    features,
    hidden,
    stride_item,
    stride_row,
    activation,
    POSITIONS: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c, d = tl.arange(0, H), tl.arange(0, D)
    inside, within = c < hidden, d < features
    gated += row * POSITIONS * 2 * hidden
    shift = tl.load(table + c, mask=inside, other=0.0)[None, :]
    count, mean, m2 = 0.0, 0.0, 0.0
    for start in range(0, POSITIONS, N):
        h = _convolved(gated, taps, start, POSITIONS, hidden, K, H, N) + shift
        mask = (start + tl.arange(0, N) < POSITIONS)[:, None] & inside[None, :]
        n = tl.minimum(POSITIONS - start, N) * 1.0 * hidden
        tile_mean = tl.sum(tl.where(mask, h, 0.0)) / n
        deviations = tl.where(mask, h - tile_mean, 0.0)
        count, mean, m2 = _merged(count, mean, m2, n, tile_mean, tl.sum(deviations * deviations))
    scale = tl.rsqrt(m2 / count + EPS) * tl.load(table + hidden + c, mask=inside, other=0.0)[None, :]
    norm_bias = tl.load(table + 2 * hidden + c, mask=inside, other=0.0)[None, :]
    product = tl.load(weight + c[:, None] * features + d[None, :], mask=inside[:, None] & within[None, :], other=0.0)
    sums = tl.load(bias + d, mask=within, other=0.0)[None, :]
    x += row * POSITIONS * features
    out += (row // rows) * stride_item + (row % rows) * stride_row
    for start in range(0, POSITIONS, N):
        h = (_convolved(gated, taps, start, POSITIONS, hidden, K, H, N) + shift - mean) * scale + norm_bias
        h = (h * tl.sigmoid(h)).to(product.dtype)
        n = start + tl.arange(0, N)
        at = n[:, None] * features + d[None, :]
        mask = (n < POSITIONS)[:, None] & within[None, :]
        y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + sums
        y += tl.dot(h, product, input_precision="ieee")
        if activation == GELU:
            y = _gelu(y)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def gated_branch_(out: Tensor, x: Tensor, gated: Tensor, weights: list[Tensor], activation: int) -> None:
    assert x.is_contiguous() and gated.is_contiguous() and out[0, 0].is_contiguous()
    taps, table, weight, bias = weights
    batch, rows, positions, features = x.shape
    kernel, hidden = taps.shape
    launch(
        _gated_branch,
        (batch * rows,),
        *(out, x, gated, taps, table, weight, bias, rows, features, hidden),
        *(*out.stride()[:2], activation),
        POSITIONS=positions,
        K=kernel,
        H=max(16, triton.next_power_of_2(hidden)),
        D=max(16, triton.next_power_of_2(features)),
        N=32,
    )


@triton.jit(do_not_specialize=["sequences", "inner", "steps"])
def _lstm(
    gates,
    weight,
    cells,
    out,
    sequences,
    inner,
    stride_outer,
    stride_inner,
    stride_step,
    steps,
    HIDDEN: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
):
    # Each program computes S whole sequences. The strides are those of `out`; those of `gates` are four times as large.
    direction = tl.program_id(1)
    s = tl.program_id(0) * S + tl.arange(0, S)
    inside = (s < sequences)[:, None]
    begin = ((s // inner).to(tl.int64) * stride_outer + (s % inner) * stride_inner)[:, None]
    out += begin + direction * HIDDEN
    gates += 4 * begin + direction * 4 * HIDDEN
    cells += (direction * sequences + s)[:, None].to(tl.int64) * HIDDEN
    weight += direction * HIDDEN * 4 * HIDDEN
    k = tl.arange(0, K)
    step = 0
    while step < steps:
        time = tl.where(direction == 0, step, steps - 1 - step).to(tl.int64)
        before = time - 1 + 2 * direction
        for first in range(0, HIDDEN, H):
            h = first + tl.arange(0, H)[None, :]
            at = gates + 4 * time * stride_step + h
            i = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            f = tl.load(at + HIDDEN, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(at + 2 * HIDDEN, mask=inside, other=0.0).to(tl.float32)
            o = tl.load(at + 3 * HIDDEN, mask=inside, other=0.0).to(tl.float32)
            cell = tl.zeros([S, H], tl.float32)
            if step > 0:
                for start in range(0, HIDDEN, K):
                    past = tl.load(out + before * stride_step + start + k[None, :], mask=inside, other=0.0)
                    w = weight + (start + k)[:, None] * (4 * HIDDEN) + h
                    i = tl.dot(past, tl.load(w), i, input_precision="ieee")
                    f = tl.dot(past, tl.load(w + HIDDEN), f, input_precision="ieee")
                    g = tl.dot(past, tl.load(w + 2 * HIDDEN), g, input_precision="ieee")
                    o = tl.dot(past, tl.load(w + 3 * HIDDEN), o, input_precision="ieee")
                cell = tl.load(cells + h, mask=inside, other=0.0)
            cell = tl.sigmoid(f) * cell + tl.sigmoid(i) * (2.0 * tl.sigmoid(2.0 * g) - 1.0)
            tl.store(cells + h, cell, mask=inside)
            y = tl.sigmoid(o) * (2.0 * tl.sigmoid(2.0 * cell) - 1.0)
            tl.store(out + time * stride_step + h, y.to(out.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the next step reads what other threads wrote
        step += 1


def lstm(gates: Tensor, weight: Tensor, axis: int) -> Tensor:
    assert gates.is_contiguous() and weight.is_contiguous()
    batch, bins, frames, _ = gates.shape
    hidden = weight.shape[1]
    out = gates.new_empty(batch, bins, frames, 2 * hidden)
    steps, inner = (bins, frames) if axis == 1 else (frames, bins)
    sequences = batch * inner
    cells = gates.new_empty(2, sequences, hidden, dtype=torch.float32)
    # The number of sequences per program: chosen so that there are about a hundred programs.
    at_once = 64 if sequences >= 2048 else 32 if sequences >= 1024 else 16
    block = min(64, hidden & -hidden)
    launch(
        _lstm,
        (triton.cdiv(sequences, at_once), 2),
        *(gates, weight, cells, out, sequences, inner),
        *(out.stride(0), out.stride(3 - axis), out.stride(axis), steps),
        HIDDEN=hidden,
        S=at_once,
        H=block,
        K=block,
        num_warps=8 if at_once == 64 else 4,
    )
    return out
