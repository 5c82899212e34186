"""Bidirectional LSTMs on the CPU, computed by cpu/lstm.h.

Products take float32 or bfloat16; sums, gates and cells are float32. PyTorch's `nn.LSTM` is the reference.
Axes: B batch, F bin, N frame, D feature, H hidden feature.
"""

import ctypes
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from separation.models.kernels.fused import float_precision, packed_weights, padded, padded_bias
from separation.models.kernels.native import CODES, PANEL, library


class _Layer(ctypes.Structure):
    _fields_ = [
        ("inputs", ctypes.c_long),
        ("hidden", ctypes.c_long),
        ("weights", ctypes.c_void_p * 2),
        ("biases", ctypes.c_void_p * 2),
    ]


class LSTM:
    """The layers of a bidirectional `nn.LSTM`. Products are in `precision`, or in float32 if the kind lacks it."""

    def __init__(self, lstm: nn.LSTM, precision: torch.dtype) -> None:
        assert lstm.bidirectional and lstm.bias and not lstm.proj_size
        self.precision: torch.dtype = float_precision(precision)
        self._memory: list[Tensor] = []  # `_layers` contains pointers to it
        directions = [self._direction(*weights) for weights in cast(Any, lstm.all_weights)]
        self._layers: list[Any] = []
        for forwards, backwards in zip(directions[::2], directions[1::2], strict=True):
            weights, biases = zip(forwards, backwards, strict=True)
            inputs = 2 * lstm.hidden_size if self._layers else lstm.input_size
            pointers = (ctypes.c_void_p * 2)(*weights), (ctypes.c_void_p * 2)(*biases)
            self._layers.append(_Layer(inputs, lstm.hidden_size, *pointers))

    def _direction(self, inputs: Tensor, hidden: Tensor, *biases: Tensor) -> tuple[int, int]:
        """Pointers to the packed weights and the biases of a layer in one direction."""
        weights = _in_panels(torch.cat([inputs.detach(), hidden.detach()], dim=1).float())
        bias = _in_panels(torch.stack(biases).detach().float().sum(0))
        packed, *_ = packed_weights([weights], None, self.precision)
        self._memory += [packed, bias]
        return packed.data_ptr(), bias.data_ptr()

    def __call__(self, x: Tensor, axis: int, norms: Tensor | None = None) -> Tensor:
        """`[B, F, N, D]` to hidden states `[B, F, N, 2 * H]` in the LSTM's precision. The steps are along axis 1 or 2.

        `x` is in that precision, too, unless there are `norms`, `[B, 3, D]`. These are the mean, the scale and the bias
        with which `x` in float32 is normalised first.
        """
        x = x.contiguous()
        assert x.dtype == (self.precision if norms is None else torch.float32)
        assert norms is None or norms.is_contiguous()
        batch, bins, frames, _ = x.shape
        size = bins * frames
        along = (batch, frames, bins, size, 1, frames) if axis == 1 else (batch, bins, frames, size, frames, 1)
        sequences = (ctypes.c_long * 6)(*along)
        for layer in self._layers:
            out = torch.empty(batch, bins, frames, 2 * layer.hidden, dtype=self.precision)
            library().functions.lstm(
                x.data_ptr(),
                None if norms is None else norms.data_ptr(),
                ctypes.addressof(layer),
                ctypes.addressof(sequences),
                out.data_ptr(),
                CODES[self.precision],
                torch.get_num_threads(),
            )
            x, norms = out, None
        return x


def _in_panels(gates: Tensor) -> Tensor:
    """`[4 * H, ...]` to `[4 * H', ...]`: for each PANEL of hidden features, their four gates. H' are whole panels."""
    by_gate = gates.unflatten(0, (4, -1))
    missing = padded(by_gate.shape[1]) - by_gate.shape[1]
    whole = F.pad(by_gate.movedim(1, -1), (0, missing)).movedim(-1, 1)
    panels: Tensor = whole.unflatten(1, (-1, PANEL)).transpose(0, 1).flatten(0, 2).contiguous()
    return panels


class AddedLinear:
    """A linear layer whose output is added to a residual stream. Its precision is as that of `LSTM`."""

    def __init__(self, linear: nn.Linear, precision: torch.dtype) -> None:
        self.precision: torch.dtype = float_precision(precision)
        self._shape = linear.weight.shape
        self._weights, *_ = packed_weights([linear.weight.detach()], None, self.precision)
        self._bias = padded_bias(linear).detach()

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """Add the layer's output for `y`, `[..., H]` in the layer's precision, to `x`, `[..., D]` in float32."""
        assert x.is_contiguous() and y.is_contiguous() and y.dtype == self.precision
        sizes = (ctypes.c_long * 3)(y[..., 0].numel(), *self._shape)
        pointers = x.data_ptr(), y.data_ptr(), self._weights.data_ptr(), self._bias.data_ptr()
        library().functions.add_linear(
            *pointers, ctypes.addressof(sizes), CODES[self.precision], torch.get_num_threads()
        )
