"""The Demucs family; the networks are the demucs package's.

`htdemucs` is Hybrid Transformer Demucs (Rouard, Massa and Défossez 2023, arXiv:2211.08553), `hdemucs` Hybrid Demucs
(Défossez 2021, arXiv:2111.03600) and `demucs` the same without its spectrogram branch. A checkpoint is one network that
gives every stem, several whose estimates are averaged (mdx_extra), or one fine-tuned specialist a stem (htdemucs_ft),
of which only the stem that it was tuned for is used.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, field, make_dataclass, replace
from fractions import Fraction
from functools import reduce
from typing import Any, ClassVar, Self, cast

import demucs.demucs
import demucs.hdemucs
import demucs.htdemucs
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.documents import escaped
from separation.errors import CheckpointError, InputError
from separation.models.attention import BACKENDS
from separation.models.base import Blueprint, Identity, SeparationModel, Transform
from separation.models.kernels.hybrid_gpu import HybridNetwork, Inputs
from separation.models.kernels.native import NotFusedError
from separation.models.kernels.operations import run
from separation.models.limits import check_arguments
from separation.models.shapes import Shapes, quotient
from separation.models.stft import hermitian, make_window, stft

logger = logging.getLogger("separation")

CLASSES: dict[str, type[nn.Module]] = {
    "demucs.demucs.Demucs": demucs.demucs.Demucs,
    "demucs.hdemucs.HDemucs": demucs.hdemucs.HDemucs,
    "demucs.htdemucs.HTDemucs": demucs.htdemucs.HTDemucs,
}
MIXED = {demucs.demucs.Demucs, demucs.hdemucs.HDemucs}  # of which a bag may have both


def _config(network: type[nn.Module]) -> type:
    """A dataclass whose fields are the arguments of the package's class, under their names and with their defaults."""
    parameters = inspect.signature(network).parameters.values()
    return make_dataclass(f"{network.__name__}Config", map(_field, parameters), frozen=True, kw_only=True)


def _field(parameter: inspect.Parameter) -> tuple[str, Any, Any]:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return parameter.name, Any, field()
    return parameter.name, Any, field(default=tuple(default) if isinstance(default, list) else default)


def network_of(blueprint: Blueprint) -> nn.Module:
    """The network that a file describes. Arguments that the package's class does not know are dropped, as there.

    Raises CheckpointError for another class, ValueError or TypeError for arguments that it cannot be built with.
    """
    network, bound = _bound(blueprint)
    return network(**(bound.arguments | {"rescale": 0}))  # of random weights, with which a training begins


def description_of(blueprint: Blueprint) -> dict[str, Any]:
    """What a file says of its network, in the form of a YAML's content; raises what `network_of` does.

    Sizes are not in it: `follow` builds the network as the file says.
    """
    network, bound = _bound(blueprint)
    bound.apply_defaults()
    model = {name: bound.arguments[name] for name in ("sources", "audio_channels", "samplerate", "segment")}
    rate = model["samplerate"]
    return {
        "architecture": network.__name__.lower(),
        "audio": {"sample_rate": rate, "chunk_size": int(rate * model["segment"])},
        "model": model | {"sources": list(model["sources"])},
    }


def _bound(blueprint: Blueprint) -> tuple[type[nn.Module], inspect.BoundArguments]:
    """The package's class and its arguments."""
    network = CLASSES.get(blueprint.class_name)
    if network is None:
        raise CheckpointError(
            f"it describes a {escaped(blueprint.class_name)}: use a file of one of {', '.join(CLASSES)}"
        )
    signature = inspect.signature(network)
    known = {name: value for name, value in blueprint.kwargs.items() if name in signature.parameters}
    bound = signature.bind(*blueprint.args, **known)
    check_arguments(bound.arguments, {})  # a file of weights must not be able to keep the program busy for hours
    return network, bound


def dequantised(network: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's state dict from weights that DiffQ (Défossez, Adi and Synnaeve 2021, arXiv:2104.09987) packed.

    Raises CheckpointError where the package diffq is missing, for another kind of quantisation, or for weights that are
    not there.
    """
    try:
        import diffq
    except ImportError as e:
        raise CheckpointError("its weights are quantised: `pip install diffq`, which unpacks them") from e
    meta = state["meta"]
    if meta["klass"] != "diffq.diffq.DiffQuantizer":
        raise CheckpointError(f"its weights are quantised by {meta['klass']}: only DiffQuantizer's can be read")
    for parameter in network.parameters():
        parameter.data.fill_(float("nan"))
    check_arguments(meta["init_kwargs"], {})
    quantizer = diffq.DiffQuantizer(network, **meta["init_kwargs"])
    quantizer.restore_quantized_state(state)  # fills as many as there are
    quantizer.detach()
    if any(parameter.isnan().any() for parameter in network.parameters()):
        raise CheckpointError("some of its weights are missing: get the file again")
    return network.state_dict()


class DemucsModel(SeparationModel):
    """Chunks `[B, 2, T]` to estimates `[B, S, 2, T]`, by `members` networks or by one for each of `specialists`."""

    Network: ClassVar[type[nn.Module]]
    normalisation = "standard"
    reflects_border = False
    fixed_chunk = True
    core_takes_waveform = True
    channels = 2

    def __init__(
        self,
        config: Any,
        identity: Identity,
        *,
        specialists: Sequence[str] = (),
        members: int = 1,
        shares: Sequence[Sequence[float]] = (),
    ) -> None:
        super().__init__(identity)
        arguments = asdict(config) | {"sources": list(config.sources), "segment": Fraction(config.segment)}
        parts = specialists or [str(number) for number in range(members)]
        self.networks = nn.ModuleDict({part: self.Network(**arguments) for part in parts})
        self._sources = tuple(config.sources)
        self._specialised = bool(specialists)
        self._shares = shares  # for each member, of each source; without, they are alike
        plain = (module for module in self.modules() if isinstance(module, nn.MultiheadAttention))
        self.head_size = next((module.head_dim for module in plain), None)

    @classmethod
    def key_prefix(cls, part: str) -> str:
        return f"networks.{part}."

    def follow(self, part: str, blueprint: Blueprint) -> None:
        network: Any = network_of(blueprint)
        before: Any = self.networks[part]
        is_alike = isinstance(network, self.Network) or (
            {type(network), self.Network} <= MIXED and len(self.networks) > 1
        )
        if not is_alike or tuple(network.sources) != self._sources:
            found = f"{type(network).__name__} for {', '.join(network.sources)}"
            wanted = f"{self.Network.__name__} for {', '.join(self._sources)}"
            raise CheckpointError(f"it describes a {found}, the configuration a {wanted}: correct the configuration")
        network.segment, network.samplerate = before.segment, before.samplerate  # a chunk's length is the YAML's
        self.networks[part] = network

    def only(self, stems: tuple[str, ...]) -> Self:
        if not self._specialised:
            return self
        fewer = copy.copy(self)  # shares the networks
        fewer.stems = stems
        return fewer

    def to_precision(self, dtype: torch.dtype) -> None:
        self.precision = dtype

    def prepare(self, dtype: torch.dtype, *, attention: str | None = None) -> None:
        if attention is not None:
            for module in list(self.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.MultiheadAttention):
                        setattr(module, name, MultiheadAttention(child, attention))
        super().prepare(dtype, attention=attention)

    def forward(self, chunks: Tensor) -> Tensor:
        # Weights stay in float32 and are cast in passing: norms, STFT and residual sums choose their own precision.
        with torch.autocast(chunks.device.type, self.precision, enabled=self.precision != torch.float32):
            return self._joined(lambda network: _for_device(network, chunks.device)(chunks))

    def _joined(self, estimate: Callable[[nn.Module], Tensor]) -> Tensor:
        """`[B, S, ...]` of what a network gives for its sources: each stem's by its specialist, or the mean."""
        if self._specialised:
            estimates = [estimate(self.networks[stem])[:, self._sources.index(stem)] for stem in self.stems]
            return torch.stack(estimates, dim=1).float()
        everyones = [estimate(network).float() for network in self.networks.values()]
        if not self._shares:
            return reduce(torch.add, everyones) / len(self.networks)
        shares = everyones[0].new_tensor(self._shares).unflatten(1, (-1, *[1] * (everyones[0].ndim - 2)))
        return reduce(torch.add, (share * each for share, each in zip(shares, everyones, strict=True)))


def _for_device(network: Any, device: torch.device) -> nn.Module:
    """The network itself or, on a CUDA GPU, one whose spectrograms are such as the inverse transform needs there."""
    if device.type != "cuda" or not hasattr(network, "_ispec"):
        return network
    inverse = network._ispec
    network = copy.copy(network)  # shares the layers
    network.__dict__["_ispec"] = lambda z, *arguments: inverse(hermitian(z, network.nfft), *arguments)
    return network


class HybridDemucs(DemucsModel):
    """A network of two branches: one works on the spectrogram, one on the waveform, and their estimates are added.

    In 16 bits on a GPU the package's networks are replaced by the layers of kernels/hybrid_gpu.py; see `fuse`.
    """

    _fused: Transform | None = None  # that of a chunk without samples, once the networks are replaced
    _least_samples = 0  # a shorter chunk is extended by zeros

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # all ways to another device come through here
        if next(self.parameters()).is_cuda and self.precision != torch.float32:
            self.fuse()
        return self

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        channels, depth = shapes.size("encoder.0.conv.weight", 0), shapes.count(r"encoder\.(\d+)\..*")
        audio_channels = shapes.size("tencoder.0.conv.weight", 1)
        last = shapes.count(r"tdecoder\.(\d+)\..*") - 1
        bins = shapes.size("freq_emb.embedding.weight", 0)  # behind the first layer
        return {
            "channels": channels,
            "audio_channels": audio_channels,
            "depth": depth,
            "growth": quotient(shapes.size("encoder.1.conv.weight", 0), channels),
            "sources": quotient(shapes.size(f"tdecoder.{last}.conv_tr.bias", 0), audio_channels),
            "nfft": None if bins is None else 2 * bins * config.stride,
        }

    def fuse_for_gpu(self, dtype: torch.dtype) -> None:
        self.to_precision(dtype)
        self.fuse()

    def fuse(self) -> None:
        """Replace the package's networks by layers that compute the same in the precision of `prepare`, for a GPU.

        They read the weights once, wait for nothing, and share what they have in common: Fourier transforms and
        normalisation. A network that they do not know stays as it is, and the log says why.
        """
        if self._fused is not None:
            return
        each: Any = next(iter(self.networks.values()))
        try:
            if self._shares or not all(isinstance(network, self.Network) for network in self.networks.values()):
                raise NotFusedError("its networks differ")
            fused = self.transform(0)
            replaced = {
                part: HybridNetwork(
                    network, self.precision, source=self._sources.index(part) if self._specialised else None
                )
                for part, network in self.networks.items()
            }
        except (InputError, NotFusedError) as e:
            logger.info(f"{self.name} is computed by the demucs package's own layers: {e}")
            return
        if getattr(each, "use_train_segment", False):
            self._least_samples = int(each.segment * each.samplerate)
        self.networks, self._fused = nn.ModuleDict(replaced), fused

    def to_precision(self, dtype: torch.dtype) -> None:
        super().to_precision(dtype)
        if self._fused is not None:
            for network in self.networks.values():
                cast(HybridNetwork, network).to_precision(dtype)

    def forward(self, chunks: Tensor) -> Tensor:
        if self._fused is None:
            return super().forward(chunks)
        length = chunks.shape[-1]
        if length < self._least_samples:
            chunks = F.pad(chunks, (0, self._least_samples - length))
        hop, (before, after) = self._fused.hop_length, self._fused.padding
        transform = replace(self._fused, padding=(before, after + -chunks.shape[-1] % hop))
        inputs = Inputs.of(torch.view_as_real(_spectrum(chunks, transform)), chunks)
        parts = self.stems if self._specialised else tuple(self.networks)
        networks = [cast(HybridNetwork, self.networks[part]) for part in parts]
        branches = [network(inputs) for network in networks]
        spectra = [
            network.spectra(x, inputs, transform.zero_frames)
            for network, (x, _) in zip(networks, branches, strict=True)
        ]
        joined = torch.cat(spectra, dim=1) if self._specialised else reduce(torch.add, spectra)
        frames = torch.fft.irfft(torch.view_as_complex(joined), transform.n_fft, norm="ortho")
        window = make_window(transform.window, transform.win_length, chunks.device)
        estimates = run.overlap_add(frames, window, hop, transform.crop, chunks.shape[-1])
        for i, (network, (_, xt)) in enumerate(zip(networks, branches, strict=True)):
            own = slice(i * self.channels, (i + 1) * self.channels) if self._specialised else slice(None)
            network.add_waveforms(xt, inputs, estimates[:, own])
        if not self._specialised and len(networks) > 1:
            estimates /= len(networks)
        return estimates[..., :length].unflatten(1, (len(self.stems), self.channels))

    def transform(self, length: int) -> Transform:
        network: Any
        found = set()
        for network in self.networks.values():
            if not (getattr(network, "hybrid", True) and network.cac):
                raise InputError(f"{self.name} cannot be exported: a network of it masks amplitudes or has one branch")
            hop, old = network.hop_length, getattr(network, "hybrid_old", False)
            around = hop // 2 * 3
            found.add(
                Transform(
                    n_fft=network.nfft,
                    hop_length=hop,
                    win_length=network.nfft,
                    scale=network.nfft**-0.5,
                    bins=network.nfft // 2,
                    padding=(around, around + -length % hop),
                    padding_mode="constant" if old else "reflect",
                    zero_frames=2,
                    crop=network.nfft // 2 + (0 if old else around),
                )
            )
        if len(found) > 1:
            raise InputError(f"{self.name} cannot be exported: its networks take different spectrograms")
        return found.pop()

    def core(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        pairs = {network: _branches(network, *inputs) for network in self.networks.values()}
        spectra = self._joined(lambda network: pairs[network][0])
        return spectra, self._joined(lambda network: pairs[network][1])


def _spectrum(chunks: Tensor, transform: Transform) -> Tensor:
    """`[B, C, T]` to the complex spectrogram `[B, C, F, N]`."""
    before, after = transform.padding
    missing = max(before, after) - chunks.shape[-1] + 1
    if transform.padding_mode == "reflect" and missing > 0:
        # As in the package: a chunk that is too short for its reflection gets zeros, behind it as far as they go.
        zeros = min(after, missing)
        chunks = F.pad(chunks, (missing - zeros, zeros))
        before, after = before - (missing - zeros), after - zeros
    padded = F.pad(chunks, (before, after), transform.padding_mode)
    options: Any = {"n_fft": transform.n_fft, "hop_length": transform.hop_length, "win_length": transform.win_length}
    frames = stft(padded, normalized=True, **options)
    return frames[..., : transform.bins, transform.zero_frames : -transform.zero_frames]


def _branches(network: Any, spectrum: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Spectrogram `[B, C, F, N, 2]` and chunks `[B, C, T]` to what each branch gives for the network's sources."""
    spectra = []

    def note(spectrum: Tensor, _: int) -> float:
        spectra.append(spectrum)
        return 0.0  # what is added to the other branch's estimate

    # The steps of the package's forward that hold complex numbers, of which this network now has its own.
    own = {
        "_spec": lambda _: spectrum,
        "_magnitude": lambda z: rearrange(z, "b c f n ri -> b (c ri) f n"),
        "_mask": lambda _, m: rearrange(m, "b s (c ri) f n -> b s c f n ri", ri=2),
        "_ispec": note,
    }
    network = copy.copy(network)  # shares the layers
    network.__dict__.update(own)
    waveforms = network(chunks)
    return spectra[0], waveforms


class HTDemucs(HybridDemucs):
    """T is `chunk_samples` exactly, as the transformer was trained."""

    Network = demucs.htdemucs.HTDemucs
    Config = _config(Network)
    KEY_PATTERNS = (r"tencoder\.\d+\.conv\.weight", r"crosstransformer\.layers\.\d+\..*")

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        return super().sizes_in(shapes, config) | {
            "t_layers": shapes.count(r"crosstransformer\.layers\.(\d+)\..*"),
            "bottom_channels": shapes.size("channel_upsampler.weight", 0) or 0,
        }


class HDemucs(HybridDemucs):
    """T is what is left of the song, `chunk_samples` at most: a short chunk is not extended."""

    Network = demucs.hdemucs.HDemucs
    Config = _config(Network)
    KEY_PATTERNS = (r"tencoder\.\d+\.conv\.weight", r"encoder\.\d+\.dconv\.layers\.\d+\.\d+\.lstm\.weight_ih_l0")

    def input_samples(self, length: int) -> int:
        return valid_length(self.networks.values(), length)


class Demucs(DemucsModel):
    """T is such that its convolutions leave no sample over: a chunk and a little of what is around it."""

    Network = demucs.demucs.Demucs
    Config = _config(Network)
    KEY_PATTERNS = (r"encoder\.0\.0\.weight", r"decoder\.0\.0\.weight", r"(.*\.)?lstm\..*")

    def transform(self, length: int) -> None:
        return None

    def core(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self._joined(lambda network: network(*inputs)),)

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        channels, depth = shapes.size("encoder.0.0.weight", 0), shapes.count(r"encoder\.(\d+)\..*")
        audio_channels = shapes.size("encoder.0.0.weight", 1)
        return {
            "channels": channels,
            "audio_channels": audio_channels,
            "depth": depth,
            "growth": quotient(shapes.size("encoder.1.0.weight", 0), channels),
            "sources": quotient(shapes.size(f"decoder.{depth - 1}.3.bias", 0), audio_channels),
        }

    def input_samples(self, length: int) -> int:
        return valid_length(self.networks.values(), length)


def valid_length(networks: Iterable[nn.Module], length: int) -> int:
    """The length of which the convolutions of each network that has no spectrogram leave no sample over."""
    plain = (network for network in networks if isinstance(network, demucs.demucs.Demucs))
    return max((network.valid_length(length) for network in plain), default=length)


class MultiheadAttention(nn.Module):
    """An `nn.MultiheadAttention` on its weights by one of our backends; batch first, no masks, no attention weights."""

    def __init__(self, plain: nn.MultiheadAttention, backend: str) -> None:
        super().__init__()
        assert plain.batch_first and plain.in_proj_weight is not None and plain.bias_k is None
        self.in_proj_weight, self.in_proj_bias, self.out_proj = plain.in_proj_weight, plain.in_proj_bias, plain.out_proj
        self.num_heads = plain.num_heads
        self.attend = BACKENDS[backend]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """`[B, N, D]` and twice `[B, M, D]` to `[B, N, D]`; key and value are the same."""
        assert attn_mask is None and key_padding_mask is None and not need_weights and key is value
        dim = query.shape[-1]
        if query is key:
            q, k, v = self._heads(query, 0, 3 * dim).chunk(3, dim=1)
        else:
            q = self._heads(query, 0, dim)
            k, v = self._heads(key, dim, 3 * dim).chunk(2, dim=1)
        with torch.autocast(q.device.type, enabled=False):  # it would compute the softmax in float32
            out = self.attend(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    def _heads(self, x: Tensor, start: int, stop: int) -> Tensor:
        """These rows of the input projection, `[B, heads of all, tokens, dim_head]`."""
        projected = F.linear(x, self.in_proj_weight[start:stop], self.in_proj_bias[start:stop])
        return projected.unflatten(-1, (-1, x.shape[-1] // self.num_heads)).transpose(1, 2)
