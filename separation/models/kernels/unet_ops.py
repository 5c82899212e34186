"""The operations between the matrix products of MDX23C and SCNet on GPUs and CPUs: references in plain PyTorch.

The Triton kernels of the same names are in unet_triton.py, those for CPUs in unet_cpu.py. Norms and sums are in
float32; results are rounded once.
Axes: B batch, R rows that are normalised separately, N positions, F bin, D feature, H hidden feature.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from separation.models.kernels.registry import operation

CPU = "separation.models.kernels.unet_cpu"
EPS = 1e-5  # of all norms
NONE, GELU, RELU, ELU = range(4)
ACTIVATIONS: dict[int, Callable[[Tensor, float], Tensor]] = {
    NONE: lambda x, alpha: x,
    GELU: lambda x, alpha: F.gelu(x),
    RELU: lambda x, alpha: F.relu(x),
    ELU: F.elu,
}


@operation("moments(Tensor x, bool whole) -> Tensor", cpu=CPU)
def moments(x: Tensor, whole: bool) -> Tensor:
    """Mean and variance of each feature of `[B, N, D]`, or if `whole` of all together: `[B, 2, D]` in float32."""
    axes = (1, 2) if whole else (1,)
    variance, mean = torch.var_mean(x.float(), dim=axes, correction=0, keepdim=True)
    return torch.cat([mean, variance], dim=1).expand(-1, -1, x.shape[2]).contiguous()


@operation("normalise(Tensor x, Tensor[] norm, int activation, float alpha, ScalarType dtype) -> Tensor", cpu=CPU)
def normalise(x: Tensor, norm: list[Tensor], activation: int, alpha: float, dtype: torch.dtype) -> Tensor:
    """Apply a norm and an activation to `[B, N, D]`. The result has the strides of `x`.

    `norm` holds the moments `[B, 2, D]`, the gain `[D]` and the bias `[D]`. `alpha` is ELU's.
    """
    moments, gain, bias = norm
    mean, variance = moments[:, None, 0], moments[:, None, 1]
    y = (x.float() - mean) * ((variance + EPS).rsqrt() * gain) + bias
    return ACTIVATIONS[activation](y, alpha).to(dtype)


@operation("normalise_rows(Tensor x, Tensor gain, Tensor bias) -> Tensor")
def normalise_rows(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Normalise each row of `[R, N, D]` to mean 0 and variance 1, then apply gains and biases `[D]`."""
    return (_normalised(x.float()) * gain + bias).to(x.dtype)


def _normalised(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(1, 2), correction=0, keepdim=True)
    return (x - mean) * (variance + EPS).rsqrt()


@operation("gated_branch_(Tensor(a!) out, Tensor x, Tensor gated, Tensor[] weights, int activation) -> ()")
def gated_branch_(out: Tensor, x: Tensor, gated: Tensor, weights: list[Tensor], activation: int) -> None:
    """Compute the end of a residual branch of SCNet, add it to `x`, and write an activation of the sum into `out`.

    The branch is a GLU of `gated`, `[B, F, N, 2 * H]`, then a depthwise convolution along N, a norm over each
    `[N, H]`, SiLU, and a linear layer. `x` and `out` are `[B, F, N, D]`; each `[N, D]` of `out` is contiguous.

    `weights` are those of the convolution, `[K, H]`; a table `[3, H]` of its bias and the norm's gain and bias; and the
    linear layer's weight `[H, D]` and bias `[D]`.
    """
    taps, table, weight, bias = weights
    batch, kernel, hidden = len(x), *taps.shape
    h = F.glu(gated.float(), dim=-1).flatten(0, 1).transpose(1, 2)
    h = F.conv1d(h, taps.float().T[:, None], table[0], padding=kernel // 2, groups=hidden).transpose(1, 2)
    h = F.silu(_normalised(h) * table[1] + table[2]).to(weight.dtype)
    h = (h.float() @ weight.float() + bias).unflatten(0, (batch, -1))
    out.copy_(ACTIVATIONS[activation](x.float() + h, 0.0))


@operation("lstm(Tensor gates, Tensor weight, int axis) -> Tensor")
def lstm(gates: Tensor, weight: Tensor, axis: int) -> Tensor:
    """A bidirectional LSTM along axis 1 or 2 of `[B, F, N, 2 * 4 * H]`; returns `[B, F, N, 2 * H]`.

    `gates` holds what the inputs and biases contribute to each direction's gates i, f, g and o. The hidden state is
    multiplied by `weight`, `[2, H, 4, H]`.
    """
    hidden = weight.shape[1]
    inputs = gates.float().unflatten(-1, (2, 4, hidden)).movedim(axis, 0)  # [steps, B, sequences, 2, 4, H]
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
