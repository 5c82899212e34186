"""SCNet's network for GPUs and CPUs: features come last; on a GPU, a branch takes three kernel launches, an LSTM one.

Products take the weights' precision and accumulate in float32; the residual stream of the dual paths is float32.
Axes: B batch, S stem, C channel, F bin, N frame, D feature.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from separation.models.kernels.lstm_cpu import LSTM, AddedLinear
from separation.models.kernels.registry import ops
from separation.models.kernels.scnet_cpu import TimeBranches
from separation.models.kernels.unet_cpu import Convolution, is_winograd
from separation.models.kernels.unet_ops import ACTIVATIONS, EPS, GELU, NONE

# The most hidden features for which the LSTM is our kernel. It reads all weights once per step and 64 sequences, so
# cuDNN is faster for larger ones.
MOST_LSTM_FEATURES = 256


class SCNetCore:
    """The network on the given layers' weights, some of them rearranged.

    `fourier` are the Fourier transform along N and its inverse. With `cpu_precision`, the layers are those of
    unet_cpu.py, scnet_cpu.py and lstm_cpu.py; that is the precision of the LSTMs.
    """

    def __init__(
        self,
        layers: nn.Module,
        fourier: Sequence[Callable[[Tensor], Tensor]],
        *,
        num_stems: int,
        cpu_precision: torch.dtype | None = None,
    ) -> None:
        parts: dict[str, Any] = dict(layers.named_children())
        for_cpu = cpu_precision is not None
        self._num_stems, self._fourier = num_stems, fourier
        self._encoder = [_Encoder(each, for_cpu) for each in parts["encoder"]]
        paths = parts["separation_net"]["dp_modules"]
        make = partial(_CpuSequences, precision=cpu_precision) if cpu_precision else _Sequences
        self._dual_paths = [[make(path, i) for i in range(2)] for path in paths]
        self._decoder = [_Decoder(fuse, upsample, for_cpu) for fuse, upsample in parts["decoder"]]

    def __call__(self, spectrum: Tensor, outputs: tuple[int, ...]) -> Tensor:
        """The mixture's spectrogram `[B, C, F, N, 2]` to the stems' `[B, S, C, N, F, 2]`, both in float32."""
        x = spectrum.permute(0, 2, 3, 1, 4)
        x = torch.empty(x.shape, dtype=self._encoder[0].dtype, device=x.device).copy_(x).flatten(3)
        skips = []
        for encode in self._encoder:
            x, skip, sizes, sizes_before = encode(x)
            skips.append((skip, sizes, sizes_before))
        x = self._separate(x)
        for decode in self._decoder:
            x = decode(x, *skips.pop())
        stems = x.unflatten(3, (self._num_stems, -1, 2))  # [B, F, N, S, C, 2]
        if outputs != tuple(range(self._num_stems)):
            stems = torch.stack([stems[:, :, :, index] for index in outputs], dim=3)
        stems = stems.permute(0, 3, 4, 2, 1, 5)
        return torch.empty(stems.shape, device=x.device).copy_(stems)

    def _separate(self, x: Tensor) -> Tensor:
        """`[B, F, N, D] -> [B, F, N, D]` in float32."""
        x = x.float()
        for i, (along_bins, along_frames) in enumerate(self._dual_paths):
            along_bins.add_to(x)
            along_frames.add_to(x)
            x = self._fourier[i % 2](x).contiguous()
        return x


class _Encoder:
    """A step of the encoder."""

    def __init__(self, encoder: Any, for_cpu: bool) -> None:
        self._encoder = encoder
        self._compressions = encoder.SDlayer["convs"]
        make = TimeBranches if for_cpu else _Branches
        self._branches = [make(convolve.layers) for convolve in encoder.conv_modules]
        for layer in (*self._compressions, encoder.globalconv):
            if isinstance(layer, Convolution):
                continue
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        self.dtype: torch.dtype = self._compressions[0].weight.dtype

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, list[int], list[int]]:
        """`[B, F, N, D]` to the next step's input, the skip connection, and each band's bins after and before."""
        sizes_before = self._encoder.band_sizes(x.shape[1])
        bands = [
            _convolved(self._encoder.padded(band.permute(0, 3, 1, 2), i), compress)
            for i, (band, compress) in enumerate(zip(x.split(sizes_before, dim=1), self._compressions, strict=True))
        ]
        sizes = [band.shape[1] for band in bands]
        joined = bands[0].new_empty(len(x), sum(sizes), *bands[0].shape[2:])
        for band, to, branches in zip(bands, joined.split(sizes, dim=1), self._branches, strict=True):
            branches(to, band, GELU)
        return _convolved(joined.permute(0, 3, 1, 2), self._encoder.globalconv), joined, sizes, sizes_before


def _convolved(x: Tensor, layer: Any) -> Tensor:
    """A convolution of `[B, D, F, N]` as `[B, F', N, D']`."""
    return _features_last(layer(x.contiguous(memory_format=torch.channels_last)))


def _features_last(x: Tensor) -> Tensor:
    """`[B, D, F, N]` to a contiguous `[B, F, N, D]`. This rarely copies: cuDNN mostly returns channels last."""
    return x.permute(0, 2, 3, 1).contiguous()


class _Branches:
    """The layers of a `TimeConvolutions`."""

    def __init__(self, layers: Iterable[Any]) -> None:
        self._branches = [_Branch(layer) for layer in layers]

    def __call__(self, out: Tensor, x: Tensor, activation: int) -> None:
        """Add the branches to `x`, `[B, F, N, D]`, and write an activation of the sum into `out`."""
        if not self._branches:
            out.copy_(ACTIVATIONS[activation](x, 0.0))
        for branch in self._branches:
            last = branch is self._branches[-1]
            sums = out if last else torch.empty_like(x)
            branch(sums, x, activation if last else NONE)
            x = sums


class _Branch:
    """A layer of `TimeConvolutions`."""

    def __init__(self, layer: Any) -> None:
        norm, first, _, depthwise, second_norm, _, last = layer
        self._gain, self._shift = norm.weight, norm.bias
        self._weight = first.weight[:, :, None].contiguous(memory_format=torch.channels_last)
        self._bias, self._padding = first.bias, (0, first.padding[0])
        taps = depthwise.weight[:, 0].T.contiguous()
        table = torch.stack([depthwise.bias.float(), second_norm.weight, second_norm.bias])
        self._gated_weights = taps, table, last.weight[..., 0].T.contiguous(), last.bias.float()

    def __call__(self, out: Tensor, x: Tensor, activation: int) -> None:
        """Add the branch to `x`, `[B, F, N, D]`, and write an activation of the sum into `out`."""
        y = ops.normalise_rows(x.flatten(0, 1), self._gain, self._shift).view_as(x).permute(0, 3, 1, 2)
        gated = _features_last(F.conv2d(y, self._weight, self._bias, padding=self._padding))
        ops.gated_branch_(out, x, gated, self._gated_weights, activation)


class _CpuSequences:
    """A norm, LSTM and linear layer of a `DualPath`: along bins if `which` is 0, along frames if it is 1."""

    def __init__(self, path: Any, which: int, precision: torch.dtype) -> None:
        norm, lstm, linear = path.norm_layers[which], path.lstm_layers[which], path.linear_layers[which]
        self._axis, self._gain, self._bias = 1 + which, norm.weight, norm.bias
        self._lstm, self._linear = LSTM(lstm, precision), AddedLinear(linear, precision)

    def add_to(self, x: Tensor) -> None:
        """Add the layers' output for `x`, `[B, F, N, D]` in float32, to it in place."""
        mean, variance = ops.moments(x.flatten(1, 2), True).unbind(1)
        norms = torch.stack([mean, (variance + EPS).rsqrt() * self._gain, self._bias.expand_as(mean)], dim=1)
        self._linear.add_to(x, self._lstm(x, self._axis, norms))


class _Sequences:
    """The same on a GPU."""

    def __init__(self, path: Any, which: int) -> None:
        self._axis = 1 + which
        norm, self._lstm, self._linear = path.norm_layers[which], path.lstm_layers[which], path.linear_layers[which]
        self._gain, self._bias = norm.weight, norm.bias
        hidden = self._lstm.hidden_size
        self._uses_kernel = hidden <= MOST_LSTM_FEATURES and hidden % 16 == 0
        if self._uses_kernel:
            directions = self._lstm.all_weights
            self._inputs = torch.cat([weight for weight, _, _, _ in directions])
            self._input_biases = torch.cat([first.float() + second.float() for _, _, first, second in directions])
            self._input_biases = self._input_biases.to(self._inputs.dtype)
            self._hidden = torch.stack([weight.T.unflatten(1, (4, -1)) for _, weight, _, _ in directions])

    def add_to(self, x: Tensor) -> None:
        """Add the layers' output for `x`, `[B, F, N, D]`, to it in place."""
        flat = x.flatten(1, 2)
        norm = ops.moments(flat, True), self._gain, self._bias
        y = ops.normalise(flat, norm, NONE, 0.0, self._linear.weight.dtype).view_as(x)
        if self._uses_kernel:
            gates = F.linear(y, self._inputs, self._input_biases)
            x += self._linear(ops.lstm(gates, self._hidden, self._axis))
        else:
            steps = y.movedim(self._axis, 0)
            y = self._linear(self._lstm(steps.flatten(1, 2))[0])
            x += y.unflatten(1, steps.shape[1:3]).movedim(0, self._axis)


class _Decoder:
    """A step of the decoder."""

    def __init__(self, fuse: Any, upsample: Any, for_cpu: bool) -> None:
        layers = cast(Iterable[Any], upsample.convtrs)
        self._upsample = upsample
        weight, bias = fuse.weight.contiguous(memory_format=torch.channels_last), fuse.conv.bias
        self._fuse: Callable[[Tensor], Tensor] = partial(F.conv2d, weight=weight, bias=bias, padding=1)
        if for_cpu and is_winograd(weight.shape):
            self._fuse = Convolution(weight, bias)
        for layer in layers:
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)

    def __call__(self, x: Tensor, skip: Tensor, sizes: list[int], sizes_before: list[int]) -> Tensor:
        """`[B, F, N, D]` to the bins before the encoder's step, with the next step's features."""
        joined = torch.add(x, skip, out=torch.empty_like(skip)).permute(0, 3, 1, 2)
        y = F.glu(self._fuse(joined).permute(0, 2, 3, 1), dim=-1)
        return _features_last(self._upsample(y.permute(0, 3, 1, 2), sizes, sizes_before))
