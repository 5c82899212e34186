"""The hybrid networks of the Demucs family for a GPU: the package's weights, cast and folded once, in other layers.

A forward of the package casts each weight on its way and waits for the GPU several times. This one does neither, so
that it can be captured as a CUDA graph. Tensors are channels last, `[B, F, N, C]` in the spectrogram's branch and
`[B, 1, T, C]` in the waveform's, products are cuDNN's and cuBLAS', and what lies between them is in hybrid_ops.py.
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
from separation.models.kernels import hybrid_ops as ops
from separation.models.kernels.native import NotFusedError
from separation.models.kernels.operations import run
from separation.models.layers import make_one_piece

ALIGNMENT = 8  # features: rows of 16 bytes, as tensor cores want them
SIMPLE_BRANCH = 7  # modules of a DConv's layer without LSTM and attention


@dataclass(frozen=True)
class Inputs:
    """Chunks as all networks of a model take them; statistics are `[B]` in float32, of everything in a chunk."""

    spectrum: Tensor  # [B, C, F, N, 2], float32
    spectrum_stats: tuple[Tensor, Tensor]  # mean and deviation
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
    return _parameter(torch.stack([row.detach().float() for row in rows]), torch.float32)


class _Convolution(nn.Module):
    """A convolution without bias, `[B, L, N, C] -> [B, L', N', C']`; the weight is `[C', C, kernel, kernel]`."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, **options: tuple[int, int]) -> None:
        super().__init__()
        weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._options: Any = options

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight, **self._options)
        return y.permute(0, 2, 3, 1).contiguous()


def _weight_2d(conv: Any) -> Tensor:
    """A convolution's weight with two axes, the first of one element where it has only one."""
    weight: Tensor = conv.weight
    return weight if weight.ndim == 4 else weight[:, :, None]


class _Linear(nn.Module):
    """A product on the last axis. A norm's gain and shift before it can be folded in."""

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
    """A bias and the group norm behind it, which the deepest layers have; `[B, L, N, C]`, the result in float32."""

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
        return ((grouped - mean) * (variance + ops.EPS).rsqrt()).flatten(3) * gain + shift


class _Branch(nn.Module):
    """A layer of DConv: see `separation::dconv_`."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        conv, norm, *_, back, back_norm, _, scale = layer
        self._hidden, self._dilation = conv.out_channels, conv.dilation[0]
        pad = (0, -self._hidden % ALIGNMENT)
        self.w_in = _parameter(F.pad(conv.weight.detach().permute(2, 1, 0), pad), dtype)
        self.in_table = _table(*(F.pad(row.detach(), pad) for row in (conv.bias, norm.weight, norm.bias)))
        self.w_out = _parameter(F.pad(back.weight.detach()[..., 0].T, (0, 0, *pad)), dtype)
        # Values come before gates: what scales the branch scales the values, whose norm's gain is in float32.
        scales = torch.cat([scale.scale.detach().float(), torch.ones_like(scale.scale)])
        self.out_table = _table(back.bias, back_norm.weight * scales, back_norm.bias * scales)

    def forward(self, x: Tensor) -> None:
        tables = self.w_in, self.in_table, self.w_out, self.out_table
        run.dconv_(x.flatten(0, 1), *tables, self._hidden, self._dilation)


class _DeepBranch(nn.Module):
    """A layer of DConv that has an LSTM or attention over time: on few positions, so in plain operations."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        conv, norm, _, *middle, back, back_norm, _, scale = layer
        options = {"padding": (0, conv.padding[0]), "dilation": (1, conv.dilation[0])}
        self.conv = _Convolution(_weight_2d(conv), dtype, **options)
        self.norm = _GroupNorm(conv.bias, norm)
        self.middle = nn.ModuleList(
            _Memory(module, dtype) if _is(module, "BLSTM") else _LocalAttention(module, dtype) for module in middle
        )
        self.back = _Linear(back.weight, None, dtype)
        self.back_norm = _GroupNorm(back.bias, back_norm)
        self.scale = _parameter(scale.scale, torch.float32)

    def forward(self, x: Tensor) -> None:
        """Adds to `[R, 1, T, C]`."""
        h = F.gelu(self.norm(self.conv(x))).to(x.dtype)[:, 0]
        for module in self.middle:
            h = module(h)
        x += F.glu(self.back_norm(self.back(h[:, None])), dim=-1) * self.scale


class _Memory(nn.Module):
    """The package's BLSTM on `[R, T, C]`: long sequences in half overlapped frames, of which the middles are used."""

    def __init__(self, plain: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.lstm = copy.deepcopy(plain.lstm).to(dtype)
        make_one_piece(self.lstm)
        self.linear = _Linear(plain.linear.weight, plain.linear.bias, dtype)
        self._frame = plain.max_steps

    def forward(self, x: Tensor) -> Tensor:
        length, frame = x.shape[1], self._frame
        if frame is None or length <= frame:
            return x + self.linear(self.lstm(x.transpose(0, 1))[0]).transpose(0, 1)
        hop = frame // 2
        frames = F.pad(x, (0, 0, 0, -length % hop + frame - hop)).unfold(1, frame, hop)  # [R, frames, C, frame]
        n = frames.shape[1]
        y = self.linear(self.lstm(frames.permute(3, 0, 1, 2).flatten(1, 2))[0]).unflatten(1, (-1, n))
        y = y.permute(1, 2, 0, 3)  # [R, frames, frame, C]
        cut = hop // 2
        parts = [y[:, 0, :cut], y[:, :, cut : frame - cut].flatten(1, 2), y[:, -1, frame - cut :]]
        return x + torch.cat(parts, dim=1)[:, :length]


class _LocalAttention(nn.Module):
    """The package's LocalState on `[R, T, C]`: attention that each query makes fade with the distance, itself left out.

    Its decays are all proportional to the distance, so they add up to one slope a query.
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
        return x + self.project_out(mixed.transpose(1, 2).flatten(2))


def _branches(dconv: Any, dtype: torch.dtype) -> nn.ModuleList:
    layers: Iterable[Any] = () if dconv is None else dconv.layers
    return nn.ModuleList((_Branch if len(layer) == SIMPLE_BRANCH else _DeepBranch)(layer, dtype) for layer in layers)


class _Gated(nn.Module):
    """What follows a product that doubles the features: its bias, a norm in deep layers, a GLU, and a table."""

    def __init__(self, bias: Tensor, norm: Any, table: Tensor | None = None) -> None:
        super().__init__()
        self.norm = _GroupNorm(bias, norm) if isinstance(norm, nn.GroupNorm) else None
        self.bias = _parameter(bias, torch.float32)
        self.table = None if table is None else _parameter(table, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return run.bias_glu(x, self.bias, self.table)
        y = F.glu(self.norm(x), dim=-1)
        return (y if self.table is None else y + self.table[:, None]).to(x.dtype)


class _Encoder(nn.Module):
    """An HEncLayer. The first one's input is what `separation::pack` gives. A table `[F, C]` is added to the result."""

    def __init__(self, layer: Any, dtype: torch.dtype, *, first: bool = False, table: Tensor | None = None) -> None:
        super().__init__()
        weight, along = _weight_2d(layer.conv), 0 if layer.freq else 1
        stride, padding = [1, 1], [0, 0]
        if first:  # neighbours are features there, and two steps make a kernel
            weight = weight.flatten(2).unflatten(2, (2, layer.stride)).permute(0, 3, 1, 2).flatten(1, 2)
            weight = weight.unsqueeze(3 - along)
        else:
            stride[along], padding[along] = layer.stride, layer.pad
        self.conv = _Convolution(weight, dtype, stride=(stride[0], stride[1]), padding=(padding[0], padding[1]))
        self.bias = _parameter(layer.conv.bias, torch.float32)
        self.empty = layer.empty
        self._multiple = 1 if layer.freq or first else layer.stride  # of the length along time
        if layer.empty:
            return
        self.norm = _GroupNorm(layer.conv.bias, layer.norm1) if isinstance(layer.norm1, nn.GroupNorm) else None
        self.branches = _branches(layer.dconv, dtype)
        self.rewrite = _Linear(layer.rewrite.weight, None, dtype)
        self.gate = _Gated(layer.rewrite.bias, layer.norm2, table)

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        if missing := -x.shape[2] % self._multiple:
            x = F.pad(x, (0, 0, 0, missing))
        y = self.conv(x)
        if self.empty:
            return y + self.bias.to(y.dtype)
        if self.norm is not None:
            y = F.gelu(self.norm(y, inject)).to(y.dtype)
        else:
            run.bias_gelu_(y if inject is None else y.add_(inject), self.bias)
        for branch in self.branches:
            branch(y)
        return self.gate(self.rewrite(y))


class _Upsampling(nn.Module):
    """A transposed convolution of twice as many taps as its stride: a convolution of two taps, then interleaving.

    Each pair of neighbours gives the `stride` values that lie between them. `channels` are those that are wanted.
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
        """`[B, L, N, C]` to `[B, L + 1, N, stride * C']`; along time `[B, 1, L, C]` to `[B, L + 1, 1, stride * C']`."""
        y = self.conv(x)
        return y.transpose(1, 2) if self._along else y


class _Decoder(nn.Module):
    """An HDecLayer behind the sum with its skip connection."""

    def __init__(self, layer: Any, dtype: torch.dtype, channels: slice) -> None:
        super().__init__()
        self.last, self.empty, self.crop = layer.last, layer.empty, layer.pad
        self._freq = layer.freq
        if not layer.empty:
            padding = layer.rewrite.padding
            padding = padding if len(padding) == 2 else (0, *padding)
            self.rewrite = _Convolution(_weight_2d(layer.rewrite), dtype, padding=padding)
            self.gate = _Gated(layer.rewrite.bias, layer.norm1)
            self.branches = _branches(layer.dconv, dtype)
        self.up = _Upsampling(layer, dtype, channels if layer.last else slice(None))
        self.norm = _GroupNorm(self.up.bias, layer.norm2) if isinstance(layer.norm2, nn.GroupNorm) else None

    def before(self, x: Tensor) -> Tensor:
        """All before the transposed convolution, `[B, L, N, C]` to the same."""
        if self.empty:
            return x
        y = self.gate(self.rewrite(x))
        for branch in self.branches:
            branch(y)
        return y

    def after(self, y: Tensor, skip: Tensor | None, length: int) -> Tensor:
        """The transposed convolution, GELU, and the sum with the next layer's skip connection; `length` is of time."""
        z = self.up(y)
        if self._freq:
            length = z.shape[1] * self.up.stride - 2 * self.crop
        elif skip is not None:
            skip = skip.transpose(1, 2)
        if self.norm is None:
            z = run.interleave(z, self.up.bias, skip, self.up.stride, self.crop, length, True)
        else:
            z = self.norm(ops.interleaved(z, self.up.stride))[:, self.crop : self.crop + length]
            z = (F.gelu(z) if skip is None else F.gelu(z) + skip).to(y.dtype)
        return z if self._freq else z.transpose(1, 2)


class _Attention(nn.Module):
    """Attention on normalised tokens `[B, N, D]`, with the norms' gains and shifts folded in."""

    def __init__(self, plain: Any, norms: Sequence[Any], dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias, dim = plain.in_proj_weight, plain.in_proj_bias, plain.in_proj_weight.shape[1]
        parts = [slice(None)] if len(norms) == 1 else [slice(dim), slice(dim, None)]  # queries are of other tokens
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
        return self.project_out(self._attend(q, k, v).transpose(1, 2).flatten(2))


class _TransformerLayer(nn.Module):
    """A layer of one branch, with attention to its own tokens or to the other branch's."""

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
        """Changes the sum `x`, `[B, N, D]` in float32, of which `tokens` are the normalised form; gives that anew."""
        tokens = run.add_norm_(x, self.attention(tokens, other), self.gain)
        return run.add_group_norm_(x, self.down(F.gelu(self.up(tokens))), *self.table)


@lru_cache(maxsize=8)
def _positions(bins: int, frames: int, dim: int, max_period: float, device: torch.device) -> Tensor:
    """Positions in a spectrogram, `[bins * frames, dim]`, or in time if there are no bins, `[frames, dim]`."""
    with torch.inference_mode(False):
        if not bins:
            features = torch.arange(dim // 2) / (dim // 2 - 1)
            return _waves(frames, max_period**-features).transpose(1, 2).flatten(1).to(device)
        waves = max_period ** -(torch.arange(0, dim // 2, 2) / (dim // 2))
        along_time, along_bins = (_waves(n, waves).flip(-1).flatten(1) for n in (frames, bins))
        both = along_time.expand(bins, -1, -1), along_bins[:, None].expand(-1, frames, -1)
        return torch.cat(both, dim=-1).flatten(0, 1).to(device)


def _waves(places: int, frequencies: Tensor) -> Tensor:
    """Cosines and sines, `[places, frequencies, 2]`."""
    phases = torch.arange(places)[:, None] * frequencies
    return torch.stack([phases.cos(), phases.sin()], dim=-1)


class _Transformer(nn.Module):
    """The package's CrossTransformerEncoder, and the products around it that give it more features."""

    def __init__(self, network: Any, dtype: torch.dtype) -> None:
        super().__init__()
        plain = network.crosstransformer
        self.tables = nn.ParameterList(_table(norm.weight, norm.bias) for norm in (plain.norm_in, plain.norm_in_t))
        self.layers: Any = nn.ModuleList(
            nn.ModuleList(_TransformerLayer(layer, dtype) for layer in pair)
            for pair in zip(plain.layers, plain.layers_t, strict=True)
        )
        self._max_period = plain.max_period
        ways = "channel_upsampler", "channel_upsampler_t", "channel_downsampler", "channel_downsampler_t"
        linears = [getattr(network, way) for way in ways] if network.bottom_channels else []
        self.ways = nn.ModuleList(_Linear(linear.weight, linear.bias, dtype) for linear in linears)

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, F, N, C]` and `[B, 1, T, C]` to the same."""
        sums, tokens = [], []
        for i, (branch, bins) in enumerate(((x, x.shape[1]), (xt, 0))):
            wide = self.ways[i](branch) if self.ways else branch
            positions = _positions(bins, branch.shape[2], wide.shape[-1], self._max_period, x.device)
            total, normalised = run.embed(wide.flatten(1, 2), *self.tables[i], positions)
            sums.append(total)
            tokens.append(normalised)
        for layer, layer_t in self.layers:
            tokens = [layer(sums[0], *tokens), layer_t(sums[1], *reversed(tokens))]
        outputs = []
        for i, branch in enumerate((x, xt)):
            output = sums[i].to(x.dtype).unflatten(1, branch.shape[1:3])
            outputs.append(self.ways[2 + i](output) if self.ways else output)
        return outputs[0], outputs[1]


class HybridNetwork(nn.Module):
    """An HTDemucs or HDemucs of the package in these layers, for all its sources or for one of them.

    Raises NotFusedError for a network of another structure than the published ones.
    """

    def __init__(self, network: Any, dtype: torch.dtype, *, source: int | None = None) -> None:
        super().__init__()
        if fault := _fault(network):
            raise NotFusedError(f"it does not know {fault}")
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
        channels = network.audio_channels  # of a source in the waveform; in the spectrogram each is two
        decoders = (
            nn.ModuleList(_Decoder(layer, dtype, _of_source(source, width)) for layer in branch)
            for branch, width in ((network.decoder, 2 * channels), (network.tdecoder, channels))
        )
        self.encoder: Any
        self.tencoder: Any
        self.decoder: Any
        self.tdecoder: Any
        self.encoder, self.tencoder = encoders
        self.decoder, self.tdecoder = decoders
        self.transformer = _Transformer(network, dtype) if _has_transformer(network) else None

    def to_precision(self, dtype: torch.dtype) -> None:
        """Cast what products take, which is in 16 bits, to others."""
        for module in self.modules():
            if isinstance(module, _Convolution | _Linear | nn.LSTM):
                module.to(dtype)
                if isinstance(module, nn.LSTM):
                    make_one_piece(module)
            elif isinstance(module, _Branch):
                module.w_in.data, module.w_out.data = module.w_in.to(dtype), module.w_out.to(dtype)
        self._dtype = dtype

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """What the last layers give before interleaving, which `spectra` and `add_waveforms` do."""
        x = self._packed(inputs.spectrum, inputs.spectrum_stats)
        xt = self._packed(inputs.waveform[..., None, None], inputs.waveform_stats).transpose(1, 2)
        skips, skips_t = [], []
        lengths, lengths_t = [0], [inputs.waveform.shape[-1]]  # of time, before each layer; the first is not asked for
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
        x, xt = self._bottom(skips.pop(), skips_t[-1])
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

    def _packed(self, x: Tensor, stats: tuple[Tensor, Tensor]) -> Tensor:
        up = self.decoder[-1].up
        rows = -(-x.shape[2] // up.stride) + 1
        return run.pack(x, *stats, up.stride, self.decoder[-1].crop, rows, self._dtype)

    def _bottom(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """From the last encoders' outputs to the first decoders' inputs, which contain them as skip connections."""
        if self.transformer is None:
            return x, xt
        y, yt = self.transformer(x, xt)
        return x + y, xt + yt

    def spectra(self, x: Tensor, inputs: Inputs, zero_frames: int) -> Tensor:
        """The spectrogram's branch as `[B, S * C, N + 2 * zero_frames, F + 1, 2]` in float32."""
        decode, bins = self.decoder[-1], inputs.spectrum.shape[2] + 1
        tables = decode.up.bias, *inputs.spectrum_stats
        return run.unpack_spectrum(x, *tables, decode.up.stride, decode.crop, zero_frames, bins)

    def add_waveforms(self, xt: Tensor, inputs: Inputs, out: Tensor) -> None:
        """Adds the waveform's branch to `[B, S * C, T]` in float32."""
        decode = self.tdecoder[-1]
        tables = decode.up.bias, *inputs.waveform_stats
        run.add_waveform_(out, xt, *tables, decode.up.stride, decode.crop)


def _of_source(source: int | None, width: int) -> slice:
    return slice(None) if source is None else slice(source * width, (source + 1) * width)


def _is(module: Any, name: str) -> bool:
    """Whether it is of that class of the demucs package, which only htdemucs.py imports."""
    return type(module).__name__ == name


def _has_transformer(network: Any) -> bool:
    return getattr(network, "crosstransformer", None) is not None


def _fault(network: Any) -> str:
    """Why a network cannot be computed in these layers, empty if it can."""
    if not (network.cac and getattr(network, "hybrid", True)):
        return "networks that mask amplitudes or have one branch"
    layers = [*network.encoder, *network.tencoder, *network.decoder, *network.tdecoder]
    if any(_is(layer, "MultiWrap") for layer in layers):
        return "layers split into bands"
    first = network.encoder[0], network.tencoder[0], network.decoder[-1], network.tdecoder[-1]
    if any(layer.pad != layer.stride // 2 or layer.empty for layer in first):
        return "an outermost layer without padding"
    if any(layer.kernel_size != 2 * layer.stride for layer in (*first, *network.decoder, *network.tdecoder)):
        return "kernels that are not twice their stride"
    whole = [layer for layer in layers if not layer.empty]
    if any(layer.rewrite is None for layer in whole):
        return "layers without a rewrite"
    if any(set(layer.rewrite.kernel_size) != {1} for layer in whole if layer in [*network.encoder, *network.tencoder]):
        return "encoders whose rewrite has a context"
    branches = [branch for layer in whole if layer.dconv for branch in layer.dconv.layers]
    if not all(map(_is_known_branch, branches)):
        return "such residual branches"
    if _has_transformer(network) and not _is_known_transformer(network.crosstransformer):
        return "such a transformer"
    return ""


def _is_known_branch(branch: Any) -> bool:
    conv, norm, _, *middle, _back, back_norm, _, _ = branch
    norms = isinstance(norm, nn.GroupNorm) and isinstance(back_norm, nn.GroupNorm)
    known = all(
        _is(module, "BLSTM") or (_is(module, "LocalState") and module.ndecay and not module.nfreqs) for module in middle
    )
    return norms and known and conv.kernel_size == (3,)


def _is_known_transformer(plain: Any) -> bool:
    layers = [*plain.layers, *plain.layers_t]
    norms = [plain.norm_in, plain.norm_in_t, *(layer.norm1 for layer in layers)]
    return (
        (plain.emb, plain.sin_random_shift, plain.weight_pos_embed) == ("sin", 0, 1.0)
        and all(isinstance(norm, nn.LayerNorm) for norm in norms)
        and all(layer.norm_first and not layer.sparse and layer.activation is F.gelu for layer in layers)
        and all(layer.norm_out is not None and layer.norm_out.num_groups == 1 for layer in layers)
        and all(hasattr(layer.gamma_1, "scale") for layer in layers)
    )
