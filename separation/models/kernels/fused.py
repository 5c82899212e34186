"""The RoFormers' layers on the CPU, computed by cpu/fused.cpp.

A layer is one call. Products take float32, bfloat16 or integers; sums, norms, rotary angles and the residual stream are
float32. layers.py is the reference in PyTorch.
"""

import ctypes
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from separation.models.kernels.native import CODES, PANEL, NotFusedError, library
from separation.models.kernels.thread_choice import ThreadChoice
from separation.models.layers import BandSplit, Pair, RMSNorm, Transformer, fusable_layers

_THREADS = ThreadChoice()


class _Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("packed", "bias", "scales", "starts")]


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("dim", "heads", "head_size", "hidden")]
    _fields_ += [(name, _Linear) for name in ("qkv_gates", "out", "up", "down")]
    _fields_ += [("norm_gains", ctypes.c_void_p)]


class _BandNetwork(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.c_long),
        ("sizes", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("first", ctypes.c_long),
    ]


def float_precision(precision: torch.dtype) -> torch.dtype:
    """The precision of the layers that have no integer kernel: float32 if the kind has none for bfloat16 either."""
    has_bf16 = precision != torch.float32 and "bf16" in library().kind.precisions
    return torch.bfloat16 if has_bf16 else torch.float32


def padded(count: int) -> int:
    return -(-count // PANEL) * PANEL


def packed_weights(
    weights: Sequence[Tensor], gain: Tensor | None, precision: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Concatenate linear layers' weights `[columns, depth]`, times the gain `[depth]`, in the order of fused.cpp.

    All but the last have a multiple of PANEL columns. Returns the packed bytes and, for int8, the scale and the start
    of each column.
    """
    functions, code = library().functions, CODES[precision]
    sizes = [functions.packed_bytes(*weight.shape, code) for weight in weights]
    columns = sum(padded(len(weight)) for weight in weights) if precision == torch.int8 else 0
    packed = torch.empty(sum(sizes), dtype=torch.uint8)  # PyTorch aligns memory to cache lines
    scales, starts = torch.empty(columns), torch.empty(columns, dtype=torch.int32)
    gain = None if gain is None else gain.float().contiguous()
    byte = column = 0
    for weight, size in zip(weights, sizes, strict=True):
        weight = weight.float().contiguous()
        functions.pack(
            weight.data_ptr(),
            *weight.shape,
            None if gain is None else gain.data_ptr(),
            packed[byte:].data_ptr(),
            scales[column:].data_ptr(),
            starts[column:].data_ptr(),
            code,
            torch.get_num_threads(),
        )
        byte, column = byte + size, column + (padded(len(weight)) if columns else 0)
    return packed, scales, starts


def padded_bias(*linears: Any) -> Tensor:
    """The layers' biases, concatenated and padded to whole panels. A layer without a bias has zeros."""
    biases = [torch.zeros(linear.out_features) if linear.bias is None else linear.bias.float() for linear in linears]
    bias = torch.cat(biases)
    return nn.functional.pad(bias, (0, padded(len(bias)) - len(bias)))


class FusedTransformer(nn.Module):
    """A `Transformer`, `[B, N, D]` in float32 on the CPU. Works in place.

    In int8, the linear layers take integers: weights have a scale per column, values a scale per token.
    Raises NotFusedError for sizes and layers that fused.cpp does not support.
    """

    def __init__(self, transformer: Transformer, precision: torch.dtype) -> None:
        super().__init__()
        self._precision = precision
        self._tensors: list[Tensor] = []  # `_layers` contains pointers to them
        self._layers: list[Any] = []
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}  # for the last length only, since all chunks have the same
        for attention, feed_forward in fusable_layers(transformer):
            norm, up, _, _, down = feed_forward.net
            heads, dim = attention.to_gates.weight.shape
            self._head_size = attention.to_out[0].weight.shape[1] // heads
            hidden = up.weight.shape[0]
            if hidden % PANEL or self._head_size % PANEL or heads > PANEL:
                raise NotFusedError(
                    f"it does not support {heads} heads of {self._head_size} on {dim} features ({hidden} hidden)"
                )
            linears = (
                self._linear(attention.to_qkv, attention.to_gates, gain=attention.norm.gamma),
                self._linear(attention.to_out[0]),
                self._linear(up, gain=norm.gamma),
                self._linear(down),
            )
            self._layers.append(_Layer(dim, heads, self._head_size, hidden, *linears))
            self._frequencies = attention.rotary_embed.freqs.float()
        if isinstance(transformer.norm, RMSNorm):
            self._tensors.append(transformer.norm.gamma.float().contiguous())
            self._layers[-1].norm_gains = self._tensors[-1].data_ptr()

    def _linear(self, *layers: Any, gain: Tensor | None = None) -> _Linear:
        """Several linear layers as one. `gain` is that of the norm before them."""
        packed, scales, starts = packed_weights([layer.weight for layer in layers], gain, self._precision)
        tensors = [packed, padded_bias(*layers), scales, starts]
        self._tensors += tensors
        return _Linear(*(tensor.data_ptr() for tensor in tensors))

    def _angles(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each `[tokens, head_size]`, for fused.cpp: the sines of even features are negated."""
        table = self._tables.get(tokens)
        if table is None:
            angles = torch.outer(torch.arange(tokens, dtype=torch.float32), self._frequencies).repeat_interleave(2, -1)
            signs = torch.tensor([-1.0, 1.0]).repeat(self._head_size // 2)
            table = angles.cos().contiguous(), (angles.sin() * signs).contiguous()
            self._tables = {tokens: table}
        return table

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and x.device.type == "cpu" and x.stride(-1) == 1
        cosines, sines = self._angles(x.shape[1])
        functions = library().functions
        for layer in self._layers:
            arguments = (
                x.data_ptr(),
                *x.shape[:2],
                *x.stride()[:2],
                ctypes.addressof(layer),
                cosines.data_ptr(),
                sines.data_ptr(),
                CODES[self._precision],
            )
            key = (*x.shape, *x.stride(), self._precision)
            _THREADS.run(key, torch.get_num_threads(), partial(functions.transformer_layer, *arguments))
        return x


class _BandNetworks(nn.Module):
    """The networks of all bands.

    `bands` holds for each one its norm, if any, its linear layers, and its width in a row of the spectrogram.
    """

    def __init__(self, bands: Iterable[tuple[Any, list[nn.Linear], int]], precision: torch.dtype) -> None:
        super().__init__()
        self._code = CODES[float_precision(precision)]
        self._memory: list[Any] = []  # `_networks` contains pointers to it
        networks: list[_BandNetwork] = []
        self._width = 0
        for norm, linears, width in bands:
            sizes = [linears[0].weight.shape[1], *(linear.weight.shape[0] for linear in linears)]
            gain = norm.gamma if isinstance(norm, RMSNorm) else None
            weights = [
                packed_weights([linear.weight], None if i else gain, float_precision(precision))[0]
                for i, linear in enumerate(linears)
            ]
            biases = [padded_bias(linear) for linear in linears]
            lists = (
                (ctypes.c_long * len(sizes))(*sizes),
                (ctypes.c_void_p * len(weights))(*(tensor.data_ptr() for tensor in weights)),
                (ctypes.c_void_p * len(biases))(*(tensor.data_ptr() for tensor in biases)),
            )
            self._memory += [weights, biases, lists]
            networks.append(_BandNetwork(len(linears), *(ctypes.addressof(each) for each in lists), self._width))
            self._width += width
            self._dim = sizes[-1]
        self._networks = (_BandNetwork * len(networks))(*networks)


class FusedBandSplit(_BandNetworks):
    """A `BandSplit`, `[B, N, sum(widths)] -> [B, N, K, D]`, both in float32 on the CPU."""

    def __init__(self, split: BandSplit, precision: torch.dtype) -> None:
        bands = zip(cast(Iterable[Pair], split.to_features), split.widths, strict=True)
        super().__init__(((norm, [linear], width) for (norm, linear), width in bands), precision)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        assert x.dtype == torch.float32 and x.device.type == "cpu"
        features = torch.empty(*x.shape[:2], len(self._networks), self._dim)
        rows = x.shape[0] * x.shape[1]
        networks = ctypes.addressof(self._networks), features.data_ptr()
        library().functions.split_bands(
            x.data_ptr(), self._width, rows, len(self._networks), *networks, self._code, torch.get_num_threads()
        )
        return features


class FusedMaskEstimator(_BandNetworks):
    """The MLPs in `to_freqs` of a `MaskEstimator`, `[B, N, K, D] -> [B, N, sum(widths)]`, both in float32 on the CPU.

    `norm` comes before it; it is an RMSNorm or an Identity.
    """

    def __init__(self, norm: nn.Module, estimator: nn.Module, precision: torch.dtype) -> None:
        networks = [
            [module for module in network[0] if isinstance(module, nn.Linear)]
            for network in cast(Iterable[Any], estimator.to_freqs)
        ]
        super().__init__(((norm, linears, linears[-1].weight.shape[0] // 2) for linears in networks), precision)
        self._normed = isinstance(norm, RMSNorm)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        assert x.dtype == torch.float32 and x.device.type == "cpu"
        masks = torch.empty(*x.shape[:2], self._width)
        rows = x.shape[0] * x.shape[1]
        networks = ctypes.addressof(self._networks), self._normed, masks.data_ptr()
        library().functions.estimate_masks(
            x.data_ptr(),
            rows,
            len(self._networks),
            *networks,
            self._width,
            self._code,
            torch.get_num_threads(),
        )
        return masks
