"""The RoFormers' layers for a CUDA GPU, with few kernel launches and little memory traffic.

Products take float16 or bfloat16 and accumulate in float32; norms, rotary angles and the residual stream are float32.
The operations between the products are Triton kernels (see roformer_ops.py). layers.py is the plain reference.

The bias at the end of a residual branch is the same for every token, so it is never added to the stream. Instead each
norm adds the sum of the biases before it, its `carry`.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from separation.models.kernels.registry import ops
from separation.models.kernels.roformer_ops import attend
from separation.models.layers import BandSplit, Pair, RMSNorm, Transformer, fusable_layers

ALIGNMENT = 8  # rows are padded to a multiple of so many features: attention kernels fail on rows that are not aligned
MOST_SHORT_TOKENS = 128  # the longest sequence for `attend_short`, which loads it whole


class GpuLayer(nn.Module):
    """A module whose parameters, the weights of products, are in 16 bits and whose buffers are in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype: torch.dtype = dtype
        self.weights: nn.ParameterList = nn.ParameterList()

    def add_weights(self, *weights: Tensor) -> None:
        """Append weights, cast to the layer's precision."""
        for weight in weights:
            self.weights.append(nn.Parameter(weight.to(self.dtype).contiguous(), requires_grad=False))

    def to_precision(self, dtype: torch.dtype) -> None:
        """Cast to another 16-bit precision. The norm at the end of a transformer stays in float32."""
        if self.dtype != torch.float32:
            self.dtype = dtype
            self.weights.to(dtype)


class GpuNorm(GpuLayer):
    """An RMS norm of a residual stream plus its carry, `[..., D]` in float32 to the layer's precision."""

    def __init__(self, norm: RMSNorm, carry: Tensor, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.register_buffer("gain", norm.gamma.detach().float())
        self.register_buffer("carry", carry.clone())

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = ops.rms_norm(x.reshape(-1, x.shape[-1]), self.carry, self.gain, self.dtype)
        return rows.view(x.shape)


class GpuTransformer(GpuLayer):
    """A `Transformer`, `[B, N, D]` in float32. Works in place, unless a norm comes last.

    `carry` belongs to the incoming stream and `carry_out` to the outgoing one, each `[D]`.
    Raises NotFusedError for layers that are not supported.
    """

    def __init__(self, transformer: Transformer, carry: Tensor, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.norms: nn.ModuleList = nn.ModuleList()
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        for attention, feed_forward in fusable_layers(transformer):
            norm, up, _, _, down = feed_forward.net
            out = attention.to_out[0]
            self.heads: int = attention.heads
            self.inner: int = out.weight.shape[1]
            self.register_buffer("frequencies", attention.rotary_embed.freqs.detach().float())
            self.norms.append(GpuNorm(attention.norm, carry, dtype))
            carry = carry if out.bias is None else carry + out.bias.float()
            self.norms.append(GpuNorm(norm, carry, dtype))
            carry = carry + down.bias.float()
            joined = _joined(attention.to_qkv, attention.to_gates)
            self.add_weights(*joined, out.weight, up.weight, up.bias, down.weight)
        self.output: nn.Module = nn.Identity()
        if isinstance(transformer.norm, RMSNorm):
            self.output = GpuNorm(transformer.norm, carry, torch.float32)
            carry = torch.zeros_like(carry)
        self.carry_out = carry
        size = self.inner // self.heads
        self._supports_short = size >= 16 and size & (size - 1) == 0

    def forward(self, x: Tensor) -> Tensor:
        in_order = x.is_contiguous()  # in memory, either the tokens of a sequence are neighbours or those of a position
        stream = x if in_order else x.transpose(0, 1)
        assert stream.is_contiguous() and x.dtype == torch.float32
        rows = stream.flatten(0, 1)
        tables = self._angles(x.shape[1])
        for i in range(len(self.norms) // 2):
            project, project_bias, out, up, up_bias, down = self.weights[6 * i : 6 * i + 6]
            projected = F.linear(self.norms[2 * i](rows), project, project_bias)
            ops.add_product_(rows, self._attend(projected, tables, 1 if in_order else len(x)), out)
            # cuBLAS approximates GELU by tanh; the error is 72 dB below the result.
            hidden = torch._addmm_activation(up_bias, self.norms[2 * i + 1](rows), up.T, use_gelu=True)
            ops.add_product_(rows, hidden, down)
        output: Tensor = self.output(stream if in_order else stream.transpose(0, 1))
        return output

    def _attend(self, rows: Tensor, tables: tuple[Tensor, Tensor], token_stride: int) -> Tensor:
        """Attention on rows of q, k, v and gates, `[R, W]` to `[R, heads * dim_head]`. Overwrites the rows."""
        tokens = len(tables[0])
        if token_stride == 1 and tokens <= MOST_SHORT_TOKENS and self._supports_short:
            attended: Tensor = ops.attend_short(rows, *tables, self.heads)
            return attended
        return attend(rows, tables, self.heads, token_stride)

    def _angles(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each `[tokens, dim_head / 2]`. Cached for one length, since all chunks have the same."""
        frequencies = cast(Tensor, self.frequencies)
        key = tokens, frequencies.device
        if key not in self._tables:
            angles = torch.outer(torch.arange(tokens, device=frequencies.device, dtype=torch.float32), frequencies)
            self._tables = {key: (angles.cos(), angles.sin())}
        return self._tables[key]


def _joined(*layers: Any) -> tuple[Tensor, Tensor]:
    """The weight `[W, D]` and bias `[W]` of several linear layers as one layer, padded with zeros to ALIGNMENT."""
    weight = torch.cat([layer.weight.float() for layer in layers])
    biases = [torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.float() for layer in layers]
    missing = -len(weight) % ALIGNMENT
    return F.pad(weight, (0, 0, 0, missing)), F.pad(torch.cat(biases), (0, missing))


def _runs(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The start and stop of each run of equal sizes."""
    start = 0
    for _, equal in groupby(sizes):
        stop = start + len(list(equal))
        yield start, stop
        start = stop


def _stacked(layers: Sequence[Any], gains: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The weights `[n, size_in, size_out]` and biases `[n, 1, size_out]` of equal layers, for a batched product.

    `gains` are those of the norms before the layers; they are folded into the weights.
    """
    weights = [layer.weight.float() for layer in layers]
    if gains is not None:
        weights = [weight * gain.float() for weight, gain in zip(weights, gains, strict=True)]
    return torch.stack([weight.T for weight in weights]), torch.stack([layer.bias for layer in layers])[:, None]


class GpuBandSplit(GpuLayer):
    """A `BandSplit`, `[..., sum(widths)]` to `[..., K, D]` in float32. Adjacent bands of one width are one product."""

    def __init__(self, split: BandSplit, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self._widths = split.widths
        self._bands = list(_runs(split.widths))
        pairs = list(cast(Iterable[Pair], split.to_features))
        for start, stop in self._bands:
            norms, linears = zip(*pairs[start:stop], strict=True)
            self.add_weights(*_stacked(linears, [norm.gamma for norm in norms]))
        self.register_buffer("ones", torch.ones(max(split.widths)))
        self.register_buffer("zeros", torch.zeros(max(split.widths)))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        features = rows.new_empty(len(rows), len(self._widths), self.weights[0].shape[-1])
        zeros, ones = self.get_buffer("zeros"), self.get_buffer("ones")
        at = 0
        for i, (start, stop) in enumerate(self._bands):
            count, width = stop - start, self._widths[start]
            bands = rows[:, at : at + count * width].reshape(-1, width)
            at += count * width
            normed = ops.rms_norm(bands, zeros[:width], ones[:width], self.dtype).view(-1, count, width)
            weight, bias = self.weights[2 * i : 2 * i + 2]
            features[:, start:stop] = torch.baddbmm(bias, normed.transpose(0, 1), weight).transpose(0, 1)
        by_position: Tensor = features.unflatten(0, x.shape[:-1])
        return by_position


class GpuMaskEstimator(GpuLayer):
    """The MLPs in `to_freqs` of a `MaskEstimator`, `[..., K, D]` to `[..., sum(widths)]` in float32.

    A hidden layer of all bands is one batched product. So is the last layer of adjacent bands of one width.
    """

    def __init__(self, estimator: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        networks = [
            [module for module in network[0] if isinstance(module, nn.Linear)]
            for network in cast(Iterable[Any], estimator.to_freqs)
        ]
        self._hidden_layers = len(networks[0]) - 1
        for depth in range(self._hidden_layers):
            self.add_weights(*_stacked([network[depth] for network in networks]))
        self._widths = [network[-1].weight.shape[0] // 2 for network in networks]
        self._bands = list(_runs(self._widths))
        for start, stop in self._bands:
            self.add_weights(*_stacked([network[-1] for network in networks[start:stop]]))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(self.dtype).flatten(0, -3).transpose(0, 1)  # [K, R, D]
        masks = torch.empty(y.shape[1], sum(self._widths), device=x.device)
        layers = [self.weights[i : i + 2] for i in range(0, len(self.weights), 2)]
        for weight, bias in layers[: self._hidden_layers]:
            y = torch.baddbmm(bias, y, weight).tanh_()
        at = 0
        for (start, stop), (weight, bias) in zip(self._bands, layers[self._hidden_layers :], strict=True):
            columns = (stop - start) * self._widths[start]
            ops.glu_into_(masks[:, at : at + columns], torch.baddbmm(bias, y[start:stop], weight))
            at += columns
        by_position: Tensor = masks.unflatten(0, x.shape[:-2])
        return by_position
