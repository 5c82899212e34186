"""The hybrid networks of the Demucs family for GPUs and CPUs: faster layers that use the demucs package's weights.

The package's forward casts every weight each time and waits for the GPU several times. These layers cast and fold the
weights once and never wait, so a forward can be captured as a CUDA graph. Tensors are channels last: `[B, F, N, C]` in
the spectrogram's branch and `[B, 1, T, C]` in the waveform's. Products are those of cuDNN, cuBLAS and oneDNN, except
for some in float32 on CPUs (demucs_cpu.py); the operations between them are in demucs_ops.py.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from separation.models.attention import sdpa_attention
from separation.models.kernels.demucs_cpu import GatedConvolution
from separation.models.kernels.demucs_ops import EPS, interleaved
from separation.models.kernels.native import NotFusedError
from separation.models.kernels.registry import cpu_fault, ops
from separation.models.layers import join_weights

ALIGNMENT = 8  # features are padded to a multiple of this: tensor cores work on rows of 16 bytes
SIMPLE_BRANCH_MODULES = 7  # in a layer of DConv without LSTM and attention


@dataclass(frozen=True)
class Inputs:
    """The chunks that all networks of a model process. The statistics are `[B]` in float32, over a whole chunk."""

    spectrum: Tensor  # [B, C, F, N, 2], float32
    spectrum_stats: tuple[Tensor, Tensor]  # mean and standard deviation
    waveform: Tensor  # [B, C, T], float32
    waveform_stats: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, spectrum: Tensor, waveform: Tensor) -> "Inputs":
        return cls(spectrum, _stats(spectrum), waveform, _stats(waveform))


def _stats(x: Tensor) -> tuple[Tensor, Tensor]:
    std, mean = torch.std_mean(x, dim=tuple(range(1, x.ndim)))
    return mean, std


def _parameter(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype).contiguous(), requires_grad=False)


def _table(*rows: Tensor) -> nn.Parameter:
    """Vectors such as a bias and a norm's gain, stacked in float32."""
    return _parameter(torch.stack([row.detach().float() for row in rows]), torch.float32)


class _Convolution(nn.Module):
    """A convolution without a bias, `[B, L, N, C] -> [B, L', N', C']`, with a weight `[C', C, kernel, kernel]`."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, **options: tuple[int, int]) -> None:
        super().__init__()
        weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._options: Any = options

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight, **self._options)
        return y.permute(0, 2, 3, 1).contiguous()


def _weight_2d(conv: Any) -> Tensor:
    """A convolution's weight with two kernel axes. A 1-D convolution gets a first axis of size 1."""
    weight: Tensor = conv.weight
    return weight if weight.ndim == 4 else weight[:, :, None]


class _Linear(nn.Module):
    """A linear layer. The gain and bias of a norm before it can be folded into the weights."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, norm: Any = None) -> None:
        super().__init__()
        weight = weight.detach().flatten(1).float()
        if norm is not None:
            folded = weight @ norm.bias.detach().float()
            bias = folded if bias is None else folded + bias.float()
            weight = weight * norm.weight.detach().float()
        self.weight = _parameter(weight, dtype)
        self.bias = None if bias is None else _parameter(bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _GroupNorm(nn.Module):
    """A bias and the group norm that follows it in the deepest layers, `[B, L, N, C]`; the result is float32.

    `inject` is the waveform branch's output, which the two branches' common layer adds before the norm.
    """

    def __init__(self, bias: Tensor, norm: Any) -> None:
        super().__init__()
        self.table = _table(bias, norm.weight, norm.bias)
        self._groups = norm.num_groups

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        bias, gain, shift = self.table
        x = x.float() + bias
        if inject is not None:
            x = x + inject
        grouped = x.unflatten(-1, (self._groups, -1))
        variance, mean = torch.var_mean(grouped, dim=(1, 2, 4), correction=0, keepdim=True)
        y: Tensor = ((grouped - mean) * (variance + EPS).rsqrt()).flatten(3) * gain + shift
        return y


class _ResidualBranch(nn.Module):
    """A layer of DConv, computed by `dconv_` of demucs_ops.py."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        conv, norm, *_, back, back_norm, _, scale = layer
        self._hidden, self._dilation = conv.out_channels, conv.dilation[0]
        pad = (0, -self._hidden % ALIGNMENT)
        self.w_in = _parameter(F.pad(conv.weight.detach().permute(2, 1, 0), pad), dtype)
        self.in_table = _table(*(F.pad(row.detach(), pad) for row in (conv.bias, norm.weight, norm.bias)))
        self.w_out = _parameter(F.pad(back.weight.detach()[..., 0].T, (0, 0, *pad)), dtype)
        # The layer's scale multiplies the GLU's output. It is folded into the norm of the values, the GLU's first half.
        scales = torch.cat([scale.scale.detach().float(), torch.ones_like(scale.scale)])
        self.out_table = _table(back.bias, back_norm.weight * scales, back_norm.bias * scales)

    def forward(self, x: Tensor) -> None:
        """Add the branch to `[B, L, N, C]` in place."""
        layers = (self.w_in, self.in_table), (self.w_out, self.out_table)
        ops.dconv_(x.flatten(0, 1), *layers, self._hidden, self._dilation)


class _DeepResidualBranch(nn.Module):
    """A layer of DConv with an LSTM or attention over time. It has few positions, so it uses plain operations."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        conv, norm, _, *middle, back, back_norm, _, scale = layer
        options = {"padding": (0, conv.padding[0]), "dilation": (1, conv.dilation[0])}
        self.conv = _Convolution(_weight_2d(conv), dtype, **options)
        self.norm = _GroupNorm(conv.bias, norm)
        self.middle = nn.ModuleList(
            _FramedLSTM(module, dtype) if _is(module, "BLSTM") else _LocalAttention(module, dtype) for module in middle
        )
        self.back = _Linear(back.weight, None, dtype)
        self.back_norm = _GroupNorm(back.bias, back_norm)
        self.scale = _parameter(scale.scale, torch.float32)

    def forward(self, x: Tensor) -> None:
        """Add the branch to `[R, 1, T, C]` in place."""
        h = F.gelu(self.norm(self.conv(x))).to(x.dtype)[:, 0]
        for module in self.middle:
            h = module(h)
        x += F.glu(self.back_norm(self.back(h[:, None])), dim=-1) * self.scale


class _FramedLSTM(nn.Module):
    """The package's BLSTM on `[R, T, C]`. Uses the middles of half-overlapping frames if the sequence is long."""

    def __init__(self, plain: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.lstm = copy.deepcopy(plain.lstm).to(dtype)
        join_weights(self.lstm)
        self.linear = _Linear(plain.linear.weight, plain.linear.bias, dtype)
        self._frame = plain.max_steps

    def forward(self, x: Tensor) -> Tensor:
        length, frame = x.shape[1], self._frame
        if frame is None or length <= frame:
            whole: Tensor = self.linear(self.lstm(x.transpose(0, 1))[0])
            return x + whole.transpose(0, 1)
        hop = frame // 2
        frames = F.pad(x, (0, 0, 0, -length % hop + frame - hop)).unfold(1, frame, hop)  # [R, frames, C, frame]
        n = frames.shape[1]
        y = self.linear(self.lstm(frames.permute(3, 0, 1, 2).flatten(1, 2))[0]).unflatten(1, (-1, n))
        y = y.permute(1, 2, 0, 3)  # [R, frames, frame, C]
        cut = hop // 2
        parts = [y[:, 0, :cut], y[:, :, cut : frame - cut].flatten(1, 2), y[:, -1, frame - cut :]]
        return x + torch.cat(parts, dim=1)[:, :length]


class _LocalAttention(nn.Module):
    """The package's LocalState on `[R, T, C]`: attention that fades with the distance and excludes the query itself.

    Each query has several decays, all proportional to the distance. They add up to one slope per query.
    """

    def __init__(self, plain: Any, dtype: torch.dtype) -> None:
        super().__init__()
        layers = plain.query, plain.key, plain.content, plain.query_decay
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        self.project_in = _Linear(weight, bias, dtype)
        self.project_out = _Linear(plain.proj.weight, plain.proj.bias, dtype)
        self._heads, self._decays = plain.heads, plain.ndecay

    def forward(self, x: Tensor) -> Tensor:
        length, dim = x.shape[1:]
        *qkv, decays = self.project_in(x).split([dim, dim, dim, self._heads * self._decays], dim=-1)
        q, k, v = (part.unflatten(-1, (self._heads, -1)).transpose(1, 2) for part in qkv)
        ranks = torch.arange(1, self._decays + 1, device=x.device)
        slopes = (decays.unflatten(-1, (self._heads, -1)).float().sigmoid() * ranks).sum(dim=-1)
        places = torch.arange(length, device=x.device)
        distances = (places[:, None] - places).abs()
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        scores -= slopes.transpose(1, 2)[..., None] * distances * (0.5 * self._decays**-0.5)
        scores.masked_fill_(distances == 0, -100)
        mixed = scores.softmax(dim=-1).to(v.dtype) @ v
        projected: Tensor = self.project_out(mixed.transpose(1, 2).flatten(2))
        return x + projected


def _residual_branches(dconv: Any, dtype: torch.dtype) -> nn.ModuleList:
    """The layers of a DConv, or none."""
    layers: Iterable[Any] = () if dconv is None else dconv.layers
    return nn.ModuleList(
        _ResidualBranch(layer, dtype) if len(layer) == SIMPLE_BRANCH_MODULES else _DeepResidualBranch(layer, dtype)
        for layer in layers
    )


class _Gate(nn.Module):
    """A product's bias, in deep layers a norm, a GLU, and in the first encoder the addition of a table `[F, C]`."""

    def __init__(self, bias: Tensor, norm: Any, table: Tensor | None = None) -> None:
        super().__init__()
        self.norm = _GroupNorm(bias, norm) if isinstance(norm, nn.GroupNorm) else None
        self.bias = _parameter(bias, torch.float32)
        self.table = None if table is None else _parameter(table, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, N, 2 * C] -> [B, L, N, C]`."""
        if self.norm is None:
            gated: Tensor = ops.bias_glu(x, self.bias, self.table)
            return gated
        y = F.glu(self.norm(x), dim=-1)
        return (y if self.table is None else y + self.table[:, None]).to(x.dtype)


class _Rewrite(nn.Module):
    """A convolution that keeps the size, and the gate that follows it. On CPUs in float32, one kernel computes both."""

    def __init__(self, layer: Any, dtype: torch.dtype, norm: Any, table: Tensor | None = None) -> None:
        super().__init__()
        weight, bias = _weight_2d(layer), layer.bias
        taps = weight.shape[2:]
        if set(taps) == {1}:
            self.conv: nn.Module = _Linear(weight, None, dtype)
        else:
            self.conv = _Convolution(weight, dtype, padding=(taps[0] // 2, taps[1] // 2))
        self.gate = _Gate(bias, norm, table)
        known = taps in ((1, 1), (1, 3), (3, 3)) and self.gate.norm is None
        whole = known and weight.is_cpu and dtype == torch.float32
        self._whole = GatedConvolution(weight, bias, table) if whole and not cpu_fault() else None

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, N, C] -> [B, L, N, C]`."""
        if self._whole is not None and x.is_cpu and x.dtype == torch.float32:
            return self._whole(x)
        gated: Tensor = self.gate(self.conv(x))
        return gated


class _Encoder(nn.Module):
    """An HEncLayer. The first one takes the output of demucs_ops.pack. `table`, `[F, C]`, is added to the result."""

    def __init__(self, layer: Any, dtype: torch.dtype, *, first: bool = False, table: Tensor | None = None) -> None:
        super().__init__()
        weight, along = _weight_2d(layer.conv), 0 if layer.freq else 1
        stride, padding = [1, 1], [0, 0]
        if first:  # `pack` joined `stride` neighbours, so the kernel has two taps of `stride` times the features
            weight = weight.flatten(2).unflatten(2, (2, layer.stride)).permute(0, 3, 1, 2).flatten(1, 2)
            weight = weight.unsqueeze(3 - along)
        else:
            stride[along], padding[along] = layer.stride, layer.pad
        self.conv = _Convolution(weight, dtype, stride=(stride[0], stride[1]), padding=(padding[0], padding[1]))
        self.bias = _parameter(layer.conv.bias, torch.float32)
        self.empty = layer.empty
        self._multiple = 1 if layer.freq or first else layer.stride  # to which the length in time is padded
        if layer.empty:
            return
        self.norm = _GroupNorm(layer.conv.bias, layer.norm1) if isinstance(layer.norm1, nn.GroupNorm) else None
        self.branches = _residual_branches(layer.dconv, dtype)
        self.rewrite = _Rewrite(layer.rewrite, dtype, layer.norm2, table)

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        if missing := -x.shape[2] % self._multiple:
            x = F.pad(x, (0, 0, 0, missing))
        y: Tensor = self.conv(x)
        if self.empty:
            return y + self.bias.to(y.dtype)
        if self.norm is not None:
            y = F.gelu(self.norm(y, inject)).to(y.dtype)
        else:
            ops.bias_gelu_(y if inject is None else y.add_(inject), self.bias)
        for branch in self.branches:
            branch(y)
        gated: Tensor = self.rewrite(y)
        return gated


class _Upsampling(nn.Module):
    """A transposed convolution whose kernel is twice its stride, as a convolution of two taps and interleaving.

    Each pair of neighbours yields the `stride` values between them. Only the wanted `channels` are computed.
    """

    def __init__(self, layer: Any, dtype: torch.dtype, channels: slice) -> None:
        super().__init__()
        self.stride = layer.stride
        self._along = 0 if layer.freq else 1
        weight = _weight_2d(layer.conv_tr)[:, channels].flatten(2)
        weight = weight.unflatten(2, (2, layer.stride)).flip(2).permute(3, 1, 0, 2).flatten(0, 1)
        padding = (1 - self._along, self._along)
        self.conv = _Convolution(weight.unsqueeze(3 - self._along), dtype, padding=padding)
        self.bias = _parameter(layer.conv_tr.bias[channels], torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, L, N, C]` to `[B, L + 1, N, stride * C']`; in time, `[B, 1, L, C]` to `[B, L + 1, 1, stride * C']`."""
        y: Tensor = self.conv(x)
        return y.transpose(1, 2) if self._along else y


class _Decoder(nn.Module):
    """An HDecLayer, without the addition of the skip connection that comes first there."""

    def __init__(self, layer: Any, dtype: torch.dtype, channels: slice) -> None:
        super().__init__()
        self.last, self.empty, self.crop = layer.last, layer.empty, layer.pad
        self._freq = layer.freq
        if not layer.empty:
            self.rewrite = _Rewrite(layer.rewrite, dtype, layer.norm1)
            self.branches = _residual_branches(layer.dconv, dtype)
        self.up = _Upsampling(layer, dtype, channels if layer.last else slice(None))
        self.norm = _GroupNorm(self.up.bias, layer.norm2) if isinstance(layer.norm2, nn.GroupNorm) else None

    def before(self, x: Tensor) -> Tensor:
        """Everything before the transposed convolution, `[B, L, N, C] -> [B, L, N, C]`."""
        if self.empty:
            return x
        y: Tensor = self.rewrite(x)
        for branch in self.branches:
            branch(y)
        return y

    def after(self, y: Tensor, skip: Tensor | None, length: int) -> Tensor:
        """The transposed convolution, GELU, and the addition of the next layer's skip connection.

        `length` is that of the result in time; the spectrogram's branch ignores it.
        """
        z: Tensor = self.up(y)
        if self._freq:
            length = z.shape[1] * self.up.stride - 2 * self.crop
        elif skip is not None:
            skip = skip.transpose(1, 2)
        if self.norm is None:
            z = ops.interleave(z, self.up.bias, skip, self.crop, length)
        else:
            z = self.norm(interleaved(z, self.up.stride))[:, self.crop : self.crop + length]
            z = (F.gelu(z) if skip is None else F.gelu(z) + skip).to(y.dtype)
        return z if self._freq else z.transpose(1, 2)


class _Attention(nn.Module):
    """Attention on normalised tokens `[B, N, D]`; the norms' gains and biases are folded into the projections.

    With one norm it is self-attention, with two it is cross-attention: a norm for the queries, one for keys and values.
    """

    def __init__(self, plain: Any, norms: Sequence[Any], dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias, dim = plain.in_proj_weight, plain.in_proj_bias, plain.in_proj_weight.shape[1]
        parts = [slice(None)] if len(norms) == 1 else [slice(dim), slice(dim, None)]
        self.project_in = nn.ModuleList(
            _Linear(weight[part], bias[part], dtype, norm=norm) for part, norm in zip(parts, norms, strict=True)
        )
        self.project_out = _Linear(plain.out_proj.weight, plain.out_proj.bias, dtype)
        self._heads = plain.num_heads
        self._attend = getattr(plain, "attend", sdpa_attention)

    def forward(self, tokens: Tensor, other: Tensor) -> Tensor:
        projected = [linear(x) for linear, x in zip(self.project_in, (tokens, other), strict=False)]
        parts = [part for each in projected for part in each.split(tokens.shape[-1], dim=-1)]
        q, k, v = (part.unflatten(-1, (self._heads, -1)).transpose(1, 2) for part in parts)
        attended: Tensor = self.project_out(self._attend(q, k, v).transpose(1, 2).flatten(2))
        return attended


class _TransformerLayer(nn.Module):
    """A layer of one branch that attends to the branch's own tokens or to the other branch's."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        if hasattr(layer, "cross_attn"):
            plain, norms, norm = layer.cross_attn, [layer.norm1, layer.norm2], layer.norm3
        else:
            plain, norms, norm = layer.self_attn, [layer.norm1], layer.norm2
        self.attention = _Attention(plain, norms, dtype)
        self.up = _Linear(layer.linear1.weight, layer.linear1.bias, dtype, norm=norm)
        self.down = _Linear(layer.linear2.weight, layer.linear2.bias, dtype)
        self.gain = _parameter(layer.gamma_1.scale, torch.float32)
        self.table = _table(layer.gamma_2.scale, layer.norm_out.weight, layer.norm_out.bias)

    def forward(self, x: Tensor, tokens: Tensor, other: Tensor) -> Tensor:
        """Update the residual stream `x`, `[B, N, D]` in float32, in place, and return its normalised tokens.

        `tokens` are the normalised tokens of `x` so far, `other` those of the other branch.
        """
        tokens = ops.add_norm_(x, self.attention(tokens, other), self.gain)
        normalised: Tensor = ops.add_group_norm_(x, self.down(F.gelu(self.up(tokens))), *self.table)
        return normalised


@lru_cache(maxsize=8)
def _positions(bins: int, frames: int, dim: int, max_period: float, device: torch.device) -> Tensor:
    """Position embeddings of a spectrogram, `[bins * frames, dim]`, or without bins of a waveform, `[frames, dim]`."""
    with torch.inference_mode(False):
        if not bins:
            features = torch.arange(dim // 2) / (dim // 2 - 1)
            return _waves(frames, max_period**-features).transpose(1, 2).flatten(1).to(device)
        waves = max_period ** -(torch.arange(0, dim // 2, 2) / (dim // 2))
        along_time, along_bins = (_waves(n, waves).flip(-1).flatten(1) for n in (frames, bins))
        both = along_time.expand(bins, -1, -1), along_bins[:, None].expand(-1, frames, -1)
        return torch.cat(both, dim=-1).flatten(0, 1).to(device)


def _waves(positions: int, frequencies: Tensor) -> Tensor:
    """Cosines and sines, `[positions, frequencies, 2]`."""
    phases = torch.arange(positions)[:, None] * frequencies
    return torch.stack([phases.cos(), phases.sin()], dim=-1)


class _Transformer(nn.Module):
    """The package's CrossTransformerEncoder, with the linear layers around it that change the number of features."""

    def __init__(self, network: Any, dtype: torch.dtype) -> None:
        super().__init__()
        plain = network.crosstransformer
        self.tables: nn.ParameterList = nn.ParameterList(
            _table(norm.weight, norm.bias) for norm in (plain.norm_in, plain.norm_in_t)
        )
        self.layers: Any = nn.ModuleList(
            nn.ModuleList(_TransformerLayer(layer, dtype) for layer in pair)
            for pair in zip(plain.layers, plain.layers_t, strict=True)
        )
        self._max_period = plain.max_period
        names = "channel_upsampler", "channel_upsampler_t", "channel_downsampler", "channel_downsampler_t"
        layers = [getattr(network, name) for name in names] if network.bottom_channels else []
        self.resamplers: nn.ModuleList = nn.ModuleList(_Linear(layer.weight, layer.bias, dtype) for layer in layers)

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, F, N, C]` and `[B, 1, T, C]` to the same shapes."""
        streams, tokens = [], []
        for i, (branch, bins) in enumerate(((x, x.shape[1]), (xt, 0))):
            wide = self.resamplers[i](branch) if self.resamplers else branch
            positions = _positions(bins, branch.shape[2], wide.shape[-1], self._max_period, x.device)
            stream, normalised = ops.embed(wide.flatten(1, 2), *self.tables[i], positions)
            streams.append(stream)
            tokens.append(normalised)
        for layer, layer_t in self.layers:
            tokens = [layer(streams[0], *tokens), layer_t(streams[1], *reversed(tokens))]
        outputs = []
        for i, branch in enumerate((x, xt)):
            output = streams[i].to(x.dtype).unflatten(1, branch.shape[1:3])
            outputs.append(self.resamplers[2 + i](output) if self.resamplers else output)
        return outputs[0], outputs[1]


class HybridNetwork(nn.Module):
    """An HTDemucs or HDemucs of the package in these layers, for all its sources or for one.

    Raises NotFusedError for a network whose structure differs from the published ones.
    """

    def __init__(self, network: Any, dtype: torch.dtype, *, source: int | None = None) -> None:
        super().__init__()
        if fault := _unsupported(network):
            raise NotFusedError(f"it does not support {fault}")
        self._dtype = dtype
        emb, table = network.freq_emb, None
        if emb is not None:
            table = network.freq_emb_scale * emb.scale * emb.embedding.weight.detach()
        tables = [table] + [None] * network.depth
        encoders = (
            nn.ModuleList(
                _Encoder(layer, dtype, first=i == 0, table=tables[i] if branch is network.encoder else None)
                for i, layer in enumerate(branch)
            )
            for branch in (network.encoder, network.tencoder)
        )
        channels = network.audio_channels  # the spectrogram has twice as many, real and imaginary parts
        decoders = (
            nn.ModuleList(_Decoder(layer, dtype, _channels_of(source, width)) for layer in branch)
            for branch, width in ((network.decoder, 2 * channels), (network.tdecoder, channels))
        )
        self.encoder: Any
        self.tencoder: Any
        self.decoder: Any
        self.tdecoder: Any
        self.encoder, self.tencoder = encoders
        self.decoder, self.tdecoder = decoders
        self.transformer: _Transformer | None = _Transformer(network, dtype) if _has_transformer(network) else None

    def to_precision(self, dtype: torch.dtype) -> None:
        """Cast the weights of products. Norms and biases of convolutions stay in float32."""
        for module in self.modules():
            if isinstance(module, _Convolution | _Linear | nn.LSTM):
                module.to(dtype)
                if isinstance(module, nn.LSTM):
                    join_weights(module)
            elif isinstance(module, _ResidualBranch):
                module.w_in.data, module.w_out.data = module.w_in.to(dtype), module.w_out.to(dtype)
        self._dtype = dtype

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The outputs of both branches' last layers, which `spectra` and `add_waveforms` finish."""
        x = self._pack(inputs.spectrum, inputs.spectrum_stats)
        xt = self._pack(inputs.waveform[..., None, None], inputs.waveform_stats).transpose(1, 2)
        skips, skips_t = [], []
        # The lengths in time before each layer. The spectrogram's first one is never used.
        lengths, lengths_t = [0], [inputs.waveform.shape[-1]]
        for i, encode in enumerate(self.encoder):
            inject = None
            if i < len(self.tencoder):
                xt = self.tencoder[i](xt)
                if self.tencoder[i].empty:
                    inject = xt
                else:
                    skips_t.append(xt)
                    lengths_t.append(xt.shape[2])
            x = encode(x, inject)
            skips.append(x)
            lengths.append(x.shape[2])
        x, xt = self._bottleneck(skips.pop(), skips_t[-1])
        if len(skips_t) == len(self.tdecoder):
            skips_t.pop()
        offset = len(self.decoder) - len(self.tdecoder)
        for i, (decode, length) in enumerate(zip(self.decoder, reversed(lengths[:-1]), strict=True)):
            y = decode.before(x)
            if i >= offset:
                decode_t = self.tdecoder[i - offset]
                y_t = decode_t.before(y if decode_t.empty else xt)
                before = lengths_t[len(self.tdecoder) - 1 - (i - offset)]
                xt = decode_t.up(y_t) if decode_t.last else decode_t.after(y_t, skips_t.pop(), before)
            x = decode.up(y) if decode.last else decode.after(y, skips.pop(), length)
        return x, xt

    def _pack(self, x: Tensor, stats: tuple[Tensor, Tensor]) -> Tensor:
        stride = self.decoder[-1].up.stride
        rows = -(-x.shape[2] // stride) + 1
        packed: Tensor = ops.pack(x, stats, stride, self.decoder[-1].crop, rows, self._dtype)
        return packed

    def _bottleneck(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """The last encoders' outputs to the first decoders' inputs, including their skip connections."""
        if self.transformer is None:
            return x, xt
        y, yt = self.transformer(x, xt)
        return x + y, xt + yt

    def spectra(self, x: Tensor, inputs: Inputs, zero_frames: int) -> Tensor:
        """The spectrogram's branch, `[B, S * C, N + 2 * zero_frames, F + 1, 2]` in float32."""
        last = self.decoder[-1]
        spectra: Tensor = ops.unpack_spectrum(x, last.up.bias, inputs.spectrum_stats, last.crop, zero_frames)
        return spectra

    def add_waveforms(self, xt: Tensor, inputs: Inputs, out: Tensor) -> None:
        """Add the waveform's branch to `out`, `[B, S * C, T]` in float32."""
        last = self.tdecoder[-1]
        ops.add_waveform_(out, xt, last.up.bias, inputs.waveform_stats, last.crop)


def _channels_of(source: int | None, width: int) -> slice:
    return slice(None) if source is None else slice(source * width, (source + 1) * width)


def _is(module: Any, name: str) -> bool:
    """Whether a module has that class of the demucs package, which only demucs_networks.py imports."""
    return type(module).__name__ == name


def _has_transformer(network: Any) -> bool:
    return getattr(network, "crosstransformer", None) is not None


def _unsupported(network: Any) -> str:
    """What these layers do not support in a network, or an empty string if they support all of it."""
    if not (network.cac and getattr(network, "hybrid", True)):
        return "networks that mask amplitudes or have only one branch"
    layers = [*network.encoder, *network.tencoder, *network.decoder, *network.tdecoder]
    if any(_is(layer, "MultiWrap") for layer in layers):
        return "layers that are split into bands"
    first = network.encoder[0], network.tencoder[0], network.decoder[-1], network.tdecoder[-1]
    if any(layer.pad != layer.stride // 2 or layer.empty for layer in first):
        return "an outermost layer without padding"
    if any(layer.kernel_size != 2 * layer.stride for layer in (*first, *network.decoder, *network.tdecoder)):
        return "kernels whose size is not twice the stride"
    whole = [layer for layer in layers if not layer.empty]
    if any(layer.rewrite is None for layer in whole):
        return "layers without a rewrite"
    if any(set(layer.rewrite.kernel_size) != {1} for layer in whole if layer in [*network.encoder, *network.tencoder]):
        return "encoders whose rewrite has a context"
    branches = [branch for layer in whole if layer.dconv for branch in layer.dconv.layers]
    if not all(map(_supports_branch, branches)):
        return "the structure of its residual branches"
    if _has_transformer(network) and not _supports_transformer(network.crosstransformer):
        return "the structure of its transformer"
    return ""


def _supports_branch(branch: Any) -> bool:
    conv, norm, _, *middle, _back, back_norm, _, _ = branch
    norms = isinstance(norm, nn.GroupNorm) and isinstance(back_norm, nn.GroupNorm)
    known = all(
        _is(module, "BLSTM") or (_is(module, "LocalState") and module.ndecay and not module.nfreqs) for module in middle
    )
    return norms and known and conv.kernel_size == (3,)


def _supports_transformer(plain: Any) -> bool:
    layers = [*plain.layers, *plain.layers_t]
    norms = [plain.norm_in, plain.norm_in_t, *(layer.norm1 for layer in layers)]
    return (
        (plain.emb, plain.sin_random_shift, plain.weight_pos_embed) == ("sin", 0, 1.0)
        and all(isinstance(norm, nn.LayerNorm) for norm in norms)
        and all(layer.norm_first and not layer.sparse and layer.activation is F.gelu for layer in layers)
        and all(layer.norm_out is not None and layer.norm_out.num_groups == 1 for layer in layers)
        and all(hasattr(layer.gamma_1, "scale") for layer in layers)
    )
