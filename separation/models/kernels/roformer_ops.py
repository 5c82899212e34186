"""What the RoFormers compute between their products on a GPU, as operations `separation::…`, in plain PyTorch.

Each has a Triton kernel of its name in roformer_triton.py. Rows are tokens in the order in which they lie in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from separation.models.kernels.operations import operation, run

EPS = 1e-20  # the layers' norms have none to speak of


@operation("rms_norm(Tensor x, Tensor carry, Tensor gain, ScalarType dtype) -> Tensor")
def rms_norm(x: Tensor, carry: Tensor, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of `x + carry`, each of length sqrt(D), times the gain.

    Takes `[R, D]`, whose rows may lie apart, and twice `[D]` in float32; gives `[R, D]` in dtype.
    """
    return (F.rms_norm(x + carry, x.shape[-1:], eps=EPS) * gain).to(dtype)


@operation("add_product_(Tensor(a!) x, Tensor rows, Tensor weight) -> ()")
def add_product_(x: Tensor, rows: Tensor, weight: Tensor) -> None:
    """Adds `rows @ weight.T`, `[R, K]` and `[D, K]` in 16 bits, to `x`, `[R, D]` in float32."""
    x += (rows.float() @ weight.float().T).to(x.dtype)


@operation("rotate_(Tensor(a!) rows, Tensor cos, Tensor sin, int heads, int apart) -> ()")
def rotate_(rows: Tensor, cos: Tensor, sin: Tensor, heads: int, apart: int) -> None:
    """Rotary positions for the first `heads` heads of each row `[R, W]`; the tables are `[N, dim_head / 2]`.

    Rows of neighbouring tokens are `apart` rows from each other: row r is at position `r // apart % N`.
    """
    tokens, pairs = cos.shape
    part = rows[:, : heads * 2 * pairs].view(-1, tokens, apart, heads, pairs, 2)
    even, odd = part.float().unbind(-1)
    c, s = (table[:, None, None] for table in (cos, sin))
    part.copy_(torch.stack((even * c - odd * s, odd * c + even * s), dim=-1))


@operation("gate(Tensor attended, Tensor rows, int first) -> Tensor")
def gate(attended: Tensor, rows: Tensor, first: int) -> Tensor:
    """What the heads attended, `[R1, R2, H, dim_head]`, times the sigmoid of the gates: `[R1 * R2, H * dim_head]`.

    The gates of row r are `rows[r, first : first + H]`.
    """
    heads = attended.shape[2]
    gates = rows[:, first : first + heads].float().sigmoid().view(*attended.shape[:3], 1)
    return (attended.float() * gates).to(attended.dtype).reshape(len(rows), -1)


def attend(rows: Tensor, tables: tuple[Tensor, Tensor], heads: int, apart: int) -> Tensor:
    """Attention with rotary positions and gates, `[R, W]` to `[R, heads * dim_head]`; rotates q and k in place.

    A row holds q, k and v of all heads and then their gates. For `apart` and the tables see `rotate_`.
    """
    cos, sin = tables
    tokens, size = len(cos), 2 * cos.shape[1]
    run.rotate_(rows, cos, sin, 2 * heads, apart)
    by_token = rows[:, : 3 * heads * size].view(-1, tokens, apart, 3, heads, size)
    if apart == 1:
        q, k, v = by_token.squeeze(2).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    else:
        q, k, v = by_token.squeeze(0).permute(2, 1, 3, 0, 4)
        attended = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3)
    return run.gate(attended, rows, 3 * heads * size)


@operation("attend_short(Tensor(a!) rows, Tensor cos, Tensor sin, int heads) -> Tensor")
def attend_short(rows: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """`attend` of neighbouring rows; whether it rotates them is left open."""
    return attend(rows, (cos, sin), heads, 1)


@operation("glu_into_(Tensor(a!) masks, Tensor gated) -> ()")
def glu_into_(masks: Tensor, gated: Tensor) -> None:
    """Gated linear units of K bands of one width, `[K, R, 2 * width]`, into rows `[R, K * width]` in float32."""
    masks.unflatten(1, (len(gated), -1)).copy_(F.glu(gated.float(), dim=-1).transpose(0, 1))
