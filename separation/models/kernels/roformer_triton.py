"""Triton kernels for the operations of roformer_ops.py, which documents them. Sums are in float32."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from separation.models.kernels.registry import launch
from separation.models.kernels.roformer_ops import attend

ELEMENTS = 4096  # elements per program, in kernels without products
LEAST_COLUMNS = 64  # columns per program; narrower bands share the kernels compiled for this width


def _unit(size: int) -> int:
    """The largest power of two that divides `size`, at most 8: the widest load holds eight 16-bit numbers."""
    return min(8, size & -size)


def _blocks(width: int, stride: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The width and stride of rows in units, and the constants of a kernel that processes them.

    Each set of constants compiles another kernel, so the sizes themselves are arguments. The code only knows that they
    are multiples of UNIT, which permits wide loads and stores, and whether a row fills its block and needs no mask.
    """
    block = max(LEAST_COLUMNS, triton.next_power_of_2(width))
    unit = _unit(width | stride)
    constants = {"UNIT": unit, "WHOLE": width == block, "BLOCK": block, "ROWS": max(1, ELEMENTS // block)}
    return (width // unit, stride // unit), constants


@triton.jit(do_not_specialize=["total", "width", "stride"])
def _rms_norm(
    x,
    carry,
    gain,
    out,
    total,
    width,
    stride,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    dim = BLOCK if WHOLE else width * UNIT
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    mask = (rows < total)[:, None] & inside[None, :]
    values = tl.load(x + rows[:, None] * (stride * UNIT) + columns[None, :], mask=mask, other=0.0)
    values += tl.load(carry + columns, mask=inside, other=0.0)[None, :]
    scales = tl.rsqrt(tl.sum(values * values, axis=1) / dim + 1e-20)
    values = values * scales[:, None] * tl.load(gain + columns, mask=inside, other=0.0)[None, :]
    tl.store(out + rows[:, None] * dim + columns[None, :], values.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, carry: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    assert x.stride(1) == 1 or x.shape[1] == 1
    total, dim = x.shape
    out = x.new_empty(total, dim, dtype=dtype)
    sizes, constants = _blocks(dim, x.stride(0))
    grid = (triton.cdiv(total, constants["ROWS"]),)
    launch(_rms_norm, grid, x, carry, gain, out, total, *sizes, **constants)
    return out


def add_product_(x: Tensor, rows: Tensor, weight: Tensor) -> None:
    torch.addmm(x, rows, weight.T, torch.float32, out=x)  # cuBLAS adds to x in place


@triton.jit(do_not_specialize=["total", "tokens", "token_stride", "stride"])
def _rotate(
    rows,
    cos,
    sin,
    total,
    tokens,
    token_stride,
    stride,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < total)[:, None] & (column < WIDTH)[None, :]
    at = rows + row[:, None] * (stride * UNIT) + column[None, :]
    even, odd = tl.split(tl.load(at, mask=mask, other=0.0).to(tl.float32).reshape(ROWS, BLOCK // 2, 2))
    position = ((row // token_stride) % tokens)[:, None] * PAIRS + (tl.arange(0, BLOCK // 2) % PAIRS)[None, :]
    c, s = tl.load(cos + position), tl.load(sin + position)
    rotated = tl.join(even * c - odd * s, odd * c + even * s).reshape(ROWS, BLOCK)
    tl.store(at, rotated.to(rows.dtype.element_ty), mask=mask)


def rotate_(rows: Tensor, cos: Tensor, sin: Tensor, heads: int, token_stride: int) -> None:
    tokens, pairs = cos.shape
    width = heads * 2 * pairs
    block = triton.next_power_of_2(width)
    at_once = max(1, ELEMENTS // block)
    unit = _unit(rows.stride(0))
    launch(
        _rotate,
        (triton.cdiv(len(rows), at_once),),
        *(rows, cos, sin, len(rows), tokens, token_stride, rows.stride(0) // unit),
        UNIT=unit,
        WIDTH=width,
        PAIRS=pairs,
        BLOCK=block,
        ROWS=at_once,
    )


@triton.jit(do_not_specialize=["total", "second"])
def _gate(
    attended,
    gates,
    out,
    total,
    second,
    stride_first,
    stride_second,
    stride_head,
    stride_gates,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < total)[:, None] & (column < WIDTH)[None, :]
    head = column // SIZE
    first = (row // second) * stride_first + (row % second) * stride_second
    values = tl.load(
        attended + first[:, None] + (head * stride_head + column % SIZE)[None, :], mask=mask, other=0.0
    ).to(tl.float32)
    closed = tl.load(gates + row[:, None] * stride_gates + head[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(
        out + row[:, None] * WIDTH + column[None, :], (values * tl.sigmoid(closed)).to(out.dtype.element_ty), mask=mask
    )


def gate(attended: Tensor, rows: Tensor, first: int) -> Tensor:
    assert attended.stride(3) == rows.stride(1) == 1
    _, second, heads, size = attended.shape
    width = heads * size
    out = attended.new_empty(len(rows), width)
    block = triton.next_power_of_2(width)
    at_once = max(1, ELEMENTS // block)
    launch(
        _gate,
        (triton.cdiv(len(rows), at_once),),
        *(attended, rows[:, first:], out, len(rows), second, *attended.stride()[:3], rows.stride(0)),
        WIDTH=width,
        SIZE=size,
        BLOCK=block,
        ROWS=at_once,
    )
    return out


@triton.jit
def _rotated(x, c, s, N: tl.constexpr, SIZE: tl.constexpr):
    even, odd = tl.split(x.to(tl.float32).reshape(N, SIZE // 2, 2))
    return tl.join(even * c - odd * s, odd * c + even * s).reshape(N, SIZE).to(x.dtype)


@triton.jit(do_not_specialize=["tokens", "stride"])
def _attend_short(
    rows,
    cos,
    sin,
    out,
    tokens,
    stride,
    scale,
    UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    N: tl.constexpr,
):
    token, feature, pair = tl.arange(0, N), tl.arange(0, SIZE), tl.arange(0, SIZE // 2)
    inside = token < tokens
    table = token[:, None] * (SIZE // 2) + pair[None, :]
    c = tl.load(cos + table, mask=inside[:, None], other=0.0)
    s = tl.load(sin + table, mask=inside[:, None], other=0.0)
    row = tl.program_id(0).to(tl.int64) * tokens + token
    at = rows + row[:, None] * (stride * UNIT) + feature[None, :]
    to = out + row[:, None] * (HEADS * SIZE) + feature[None, :]
    for head in range(HEADS):
        q = _rotated(tl.load(at + head * SIZE, mask=inside[:, None], other=0.0), c, s, N, SIZE)
        k = _rotated(tl.load(at + (HEADS + head) * SIZE, mask=inside[:, None], other=0.0), c, s, N, SIZE)
        v = tl.load(at + (2 * HEADS + head) * SIZE, mask=inside[:, None], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        gates = tl.load(rows + row * (stride * UNIT) + 3 * HEADS * SIZE + head, mask=inside, other=0.0)
        opened = tl.sigmoid(gates.to(tl.float32)) / tl.sum(weights, axis=1)
        values = tl.dot(weights.to(v.dtype), v) * opened[:, None]
        tl.store(to + head * SIZE, values.to(out.dtype.element_ty), mask=inside[:, None])


def attend_short(rows: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    # Below compute capability 8.0, Triton's products do not use tensor cores.
    if rows.is_cuda and torch.cuda.get_device_capability(rows.device) < (8, 0):
        return attend(rows, (cos, sin), heads, 1)
    tokens, pairs = cos.shape
    out = rows.new_empty(len(rows), heads * 2 * pairs)
    unit = _unit(rows.stride(0))
    scale = (2 * pairs) ** -0.5 * 1.4426950408889634  # log2(e), because the kernel computes powers of 2
    launch(
        _attend_short,
        (len(rows) // tokens,),
        *(rows, cos, sin, out, tokens, rows.stride(0) // unit, scale),
        num_stages=1,  # prefetching heads takes so much shared memory that fewer programs fit
        maxnreg=168,  # three programs then share a multiprocessor
        UNIT=unit,
        HEADS=heads,
        SIZE=2 * pairs,
        N=max(16, triton.next_power_of_2(tokens)),
    )
    return out


@triton.jit(do_not_specialize=["total", "width", "stride"])
def _glu_into_(
    masks,
    gated,
    total,
    width,
    stride,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    dim = BLOCK if WHOLE else width * UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    band = tl.program_id(1).to(tl.int64)
    mask = (row < total)[:, None] & (column < dim)[None, :]
    at = gated + (band * total + row)[:, None] * (2 * dim) + column[None, :]
    values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    gates = tl.load(at + dim, mask=mask, other=0.0).to(tl.float32)
    to = masks + row[:, None] * (stride * UNIT) + band * dim + column[None, :]
    tl.store(to, values * tl.sigmoid(gates), mask=mask)


def glu_into_(masks: Tensor, gated: Tensor) -> None:
    assert gated.is_contiguous() and (masks.stride(1) == 1 or masks.shape[1] == 1)
    bands, total, width = gated.shape[0], gated.shape[1], gated.shape[2] // 2
    sizes, constants = _blocks(width, masks.stride(0))
    grid = triton.cdiv(total, constants["ROWS"]), bands
    launch(_glu_into_, grid, masks, gated, total, *sizes, **constants)
