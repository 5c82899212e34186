"""What MDX23C and SCNet compute between their products on a GPU, as operations `separation::…`, in plain PyTorch.

Each has a Triton kernel of its name in unet_triton.py, which CUDA tensors get. Norms and sums are in float32; what is
returned is rounded once. Axes: R rows, which are normalised and convolved alone, N positions, D features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from separation.models.kernels.operations import operation

EPS = 1e-5  # of all norms
ACTIVATIONS: tuple[Callable[[Tensor, float], Tensor], ...] = (  # by their number
    lambda x, alpha: x,
    lambda x, alpha: F.gelu(x),
    lambda x, alpha: F.relu(x),
    lambda x, alpha: F.elu(x, alpha),
)
NONE, GELU, RELU, ELU = range(4)


@operation("moments(Tensor x, bool whole) -> Tensor")
def moments(x: Tensor, whole: bool) -> Tensor:
    """Mean and variance of each feature of `[B, N, D]`, or if `whole` of all together: `[B, 2, D]` in float32."""
    axes = (1, 2) if whole else (1,)
    variance, mean = torch.var_mean(x.float(), dim=axes, correction=0, keepdim=True)
    return torch.cat([mean, variance], dim=1).expand(-1, -1, x.shape[2]).contiguous()


@operation(
    "normalise(Tensor x, Tensor moments, Tensor gain, Tensor bias, int activation, float alpha, ScalarType dtype) "
    "-> Tensor"
)
def normalise(
    x: Tensor, moments: Tensor, gain: Tensor, bias: Tensor, activation: int, alpha: float, dtype: torch.dtype
) -> Tensor:
    """`[B, N, D]` with those moments `[B, 2, D]` taken out, times gains, plus biases `[D]`, and an activation of it.

    The result has the strides of `x`.
    """
    mean, variance = moments[:, None, 0], moments[:, None, 1]
    y = (x.float() - mean) * ((variance + EPS).rsqrt() * gain) + bias
    return ACTIVATIONS[activation](y, alpha).to(dtype)


@operation("normalise_rows(Tensor x, Tensor gain, Tensor bias) -> Tensor")
def normalise_rows(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Each row of `[R, N, D]` with mean 0 and variance 1, times gains, plus biases `[D]`."""
    return (_normalised(x.float()) * gain + bias).to(x.dtype)


def _normalised(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(1, 2), correction=0, keepdim=True)
    return (x - mean) * (variance + EPS).rsqrt()


@operation(
    "gated_branch_(Tensor(a!) out, Tensor x, Tensor gated, Tensor taps, Tensor table, Tensor weight, Tensor bias, "
    "int activation) -> ()"
)
def gated_branch_(
    out: Tensor,
    x: Tensor,
    gated: Tensor,
    taps: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: int,
) -> None:
    """The end of a residual branch of SCNet, added to `x`, and an activation of the sum into `out`.

    `gated` is `[B, F, N, 2 * H]`: GLU, a convolution of each feature along N by `taps`, `[K, H]`, a norm over each
    `[N, H]`, SiLU, and a product with `weight`, `[H, D]`. `table` is `[3, H]`: the convolution's bias, and the norm's
    gain and bias. `x` and `out` are `[B, F, N, D]`; of `out` only `[N, D]` must lie in one piece.
    """
    batch, kernel, hidden = len(x), *taps.shape
    h = F.glu(gated.float(), dim=-1).flatten(0, 1).transpose(1, 2)
    h = F.conv1d(h, taps.float().T[:, None], table[0], padding=kernel // 2, groups=hidden).transpose(1, 2)
    h = F.silu(_normalised(h) * table[1] + table[2]).to(weight.dtype)
    h = (h.float() @ weight.float() + bias).unflatten(0, (batch, -1))
    out.copy_(ACTIVATIONS[activation](x.float() + h, 0.0))


@operation("lstm(Tensor gates, Tensor weight, int axis) -> Tensor")
def lstm(gates: Tensor, weight: Tensor, axis: int) -> Tensor:
    """A bidirectional LSTM along an axis, 1 or 2, of `[B, F, N, 2 * 4 * H]` to `[B, F, N, 2 * H]`.

    `gates` are what the input gives to each direction's gates i, f, g and o, biases included; `weight`, `[2, H, 4, H]`,
    is for what the hidden features before add to them.
    """
    hidden = weight.shape[1]
    inputs = gates.float().unflatten(-1, (2, 4, hidden)).movedim(axis, 0)  # [T, B, L, 2, 4, H]
    steps = len(inputs)
    out = gates.new_empty(steps, *inputs.shape[1:4], hidden)
    for direction, order in enumerate((range(steps), range(steps - 1, -1, -1))):
        cell = h = inputs.new_zeros(*inputs.shape[1:3], hidden)
        for step in order:
            sums = inputs[step, ..., direction, :, :] + (h @ weight[direction].float().flatten(1)).unflatten(
                -1, (4, -1)
            )
            i, f, g, o = sums.unbind(-2)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            out[step, ..., direction, :] = o.sigmoid() * cell.tanh()
            h = out[step, ..., direction, :].float()
    return out.flatten(-2).movedim(0, axis).contiguous()
