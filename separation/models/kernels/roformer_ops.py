"""The operations between the matrix products of the RoFormers on a GPU: references in plain PyTorch.

The Triton kernels of the same names are in roformer_triton.py. Axes: R rows (tokens in memory order), N tokens of a
sequence, H heads, D feature, K band.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from separation.models.kernels.registry import operation, ops

EPS = 1e-20  # layers.RMSNorm adds none; this only prevents a division by zero


@operation("rms_norm(Tensor x, Tensor carry, Tensor gain, ScalarType dtype) -> Tensor")
def rms_norm(x: Tensor, carry: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale the rows of `x + carry` to the length sqrt(D), then multiply by the gain.

    `x` is `[R, D]` with any distance between rows, `carry` and `gain` are `[D]`; all are float32. Returns `[R, D]` in
    `dtype`.
    """
    return (F.rms_norm(x + carry, x.shape[-1:], eps=EPS) * gain).to(dtype)


@operation("add_product_(Tensor(a!) x, Tensor rows, Tensor weight) -> ()")
def add_product_(x: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Add `rows @ weight.T` to `x`: `[R, K]` and `[D, K]` in 16 bits to `[R, D]` in float32."""
    x += (rows.float() @ weight.float().T).to(x.dtype)


@operation("rotate_(Tensor(a!) rows, Tensor cos, Tensor sin, int heads, int token_stride) -> ()")
def rotate_(rows: Tensor, cos: Tensor, sin: Tensor, heads: int, token_stride: int) -> None:
    """Apply rotary positions in place to the first `heads` heads of each row of `[R, W]`.

    The tables are `[N, dim_head / 2]`. Neighbouring tokens are `token_stride` rows from each other, so row r is at
    position `r // token_stride % N`.
    """
    tokens, pairs = cos.shape
    part = rows[:, : heads * 2 * pairs].view(-1, tokens, token_stride, heads, pairs, 2)
    even, odd = part.float().unbind(-1)
    c, s = (table[:, None, None] for table in (cos, sin))
    part.copy_(torch.stack((even * c - odd * s, odd * c + even * s), dim=-1))


@operation("gate(Tensor attended, Tensor rows, int first) -> Tensor")
def gate(attended: Tensor, rows: Tensor, first: int) -> Tensor:
    """Multiply the output of attention by the sigmoid of the gates.

    `[R1, R2, H, dim_head]` becomes `[R1 * R2, H * dim_head]`. The gates of row r are `rows[r, first : first + H]`.
    """
    heads = attended.shape[2]
    gates = rows[:, first : first + heads].float().sigmoid().view(*attended.shape[:3], 1)
    return (attended.float() * gates).to(attended.dtype).reshape(len(rows), -1)


def attend(rows: Tensor, tables: tuple[Tensor, Tensor], heads: int, token_stride: int) -> Tensor:
    """Attention with rotary positions and gates, `[R, W]` to `[R, H * dim_head]`. Rotates q and k in place.

    A row holds q, k and v of all heads, then the heads' gates. See `rotate_` for the tables and `token_stride`.
    """
    cos, sin = tables
    tokens, size = len(cos), 2 * cos.shape[1]
    ops.rotate_(rows, cos, sin, 2 * heads, token_stride)
    by_token = rows[:, : 3 * heads * size].view(-1, tokens, token_stride, 3, heads, size)
    if token_stride == 1:
        q, k, v = by_token.squeeze(2).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    else:
        q, k, v = by_token.squeeze(0).permute(2, 1, 3, 0, 4)
        attended = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3)
    gated: Tensor = ops.gate(attended, rows, 3 * heads * size)
    return gated


@operation("attend_short(Tensor(a!) rows, Tensor cos, Tensor sin, int heads) -> Tensor")
def attend_short(rows: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """`attend` for sequences of neighbouring rows. May or may not rotate the rows in place."""
    return attend(rows, (cos, sin), heads, 1)


@operation("glu_into_(Tensor(a!) masks, Tensor gated) -> ()")
def glu_into_(masks: Tensor, gated: Tensor) -> None:
    """Write the gated linear units of K bands of one width, `[K, R, 2 * width]`, into float32 rows `[R, K * width]`."""
    masks.unflatten(1, (len(gated), -1)).copy_(F.glu(gated.float(), dim=-1).transpose(0, 1))
