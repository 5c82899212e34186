"""The Demucs family, built on the demucs package's networks.

`htdemucs` is Hybrid Transformer Demucs (Rouard, Massa and Défossez 2023, arXiv:2211.08553), `hdemucs` is Hybrid Demucs
(Défossez 2021, arXiv:2111.03600), and `demucs` has no spectrogram branch. A checkpoint is one network for all stems,
several networks whose estimates are averaged (mdx_extra), or one specialist for each stem (htdemucs_ft), which is used
only for the stem that it was fine-tuned for.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from functools import reduce
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from separation.errors import CheckpointError, InputError
from separation.models import demucs_networks
from separation.models.base import Blueprint, Identity, Normalisation, SeparationModel, Transform
from separation.models.kernels.demucs_core import HybridNetwork, Inputs
from separation.models.kernels.native import NotFusedError
from separation.models.kernels.registry import cpu_fault, ops
from separation.models.old_demucs import OldDemucs
from separation.models.shapes import Shapes, quotient
from separation.models.stft import Stft, make_window

# One bag may contain both.
MIXED_IN_BAGS: frozenset[type[nn.Module]] = frozenset({demucs_networks.Demucs, demucs_networks.HDemucs})

logger: logging.Logger = logging.getLogger("separation")


class DemucsModel(SeparationModel):
    """Chunks `[B, 2, T]` to estimates `[B, S, 2, T]`.

    Has a network for each stem of `specialists`, or else `members` networks, whose estimates are averaged. `shares`
    are the weights of that average, for each member and source; by default all are equal.
    """

    Network: ClassVar[type[nn.Module]]
    normalisation: Normalisation = "standard"
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
        self.networks: nn.ModuleDict = nn.ModuleDict({part: self.Network(**arguments) for part in parts})
        self._sources = tuple(config.sources)
        self._specialised = bool(specialists)
        self._shares = shares
        plain = (module for module in self.modules() if isinstance(module, nn.MultiheadAttention))
        self.head_size: int | None = next((module.head_dim for module in plain), None)

    @classmethod
    def key_prefix(cls, part: str) -> str:
        return f"networks.{part}."

    def rebuild(self, part: str, blueprint: Blueprint) -> None:
        network: Any = demucs_networks.network_of(blueprint)
        before: Any = self.networks[part]
        fits = isinstance(network, self.Network) or (
            {type(network), self.Network} <= MIXED_IN_BAGS and len(self.networks) > 1
        )
        if not fits or tuple(network.sources) != self._sources:
            found = f"{type(network).__name__} for {', '.join(network.sources)}"
            wanted = f"{self.Network.__name__} for {', '.join(self._sources)}"
            raise CheckpointError(f"it describes a {found}, the configuration a {wanted}: correct the configuration")
        network.segment, network.samplerate = before.segment, before.samplerate  # the YAML sets the chunk's length
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
            demucs_networks.set_attention(self.networks, attention)
        super().prepare(dtype, attention=attention)

    def forward(self, chunks: Tensor) -> Tensor:
        # Weights stay in float32 and are cast when used: norms, STFT and residual sums choose their own precision.
        with torch.autocast(chunks.device.type, self.precision, enabled=self.precision != torch.float32):
            return self._combined(lambda network: network(chunks))

    def _combined(self, estimate: Callable[[Any], Tensor]) -> Tensor:
        """Combine the networks' estimates `[B, sources, ...]` to `[B, S, ...]`: select from specialists, or average."""
        if self._specialised:
            estimates = [estimate(self.networks[stem])[:, self._sources.index(stem)] for stem in self.stems]
            return torch.stack(estimates, dim=1).float()
        estimates = [estimate(network).float() for network in self.networks.values()]
        if not self._shares:
            return reduce(torch.add, estimates) / len(self.networks)
        shares: Tensor = estimates[0].new_tensor(self._shares).unflatten(1, (-1, *[1] * (estimates[0].ndim - 2)))
        weighted: list[Tensor] = [share * each for share, each in zip(shares, estimates, strict=True)]
        return reduce(torch.add, weighted)


class HybridDemucs(DemucsModel):
    """Networks of two branches, one for the spectrogram and one for the waveform, whose estimates are added.

    On CPUs, and in 16 bits on a GPU, the layers of kernels/demucs_core.py replace the package's networks; see `fuse`.
    """

    # After `fuse`: the STFT of a chunk of length 0, and the length to which shorter chunks are padded with zeros.
    _fused: Transform | None = None
    _least_samples = 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        cast(Any, super())._apply(fn, recurse)  # every move to another device calls this
        if next(self.parameters()).is_cuda and self.precision != torch.float32:
            self.fuse()
        return self

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        channels, depth = shapes.size("encoder.0.conv.weight", 0), shapes.count(r"encoder\.(\d+)\..*")
        audio_channels = shapes.size("tencoder.0.conv.weight", 1)
        last = shapes.count(r"tdecoder\.(\d+)\..*") - 1
        bins = shapes.size("freq_emb.embedding.weight", 0)  # after the first layer
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

    def fuse_for_cpu(self) -> None:
        if self.precision == torch.float16:
            return
        if fault := cpu_fault():
            logger.info(f"{self.name}: using the demucs package's own layers ({fault})")
        elif len(self.networks) == 1 or self._specialised:
            self.fuse()
        else:
            self._fuse_each()

    def _fuse_each(self) -> None:
        """Replace those networks of a bag that have faster ones. They may take different spectrograms."""
        for part, network in self.networks.items():
            try:
                if not isinstance(network, self.Network):
                    raise NotFusedError("it has only one branch")
                self.networks[part] = _FusedNetwork(network, self.precision)
            except NotFusedError as e:
                logger.info(f"{self.name}: using the demucs package's own layers for network {part} ({e})")

    def fuse(self) -> None:
        """Replace the package's networks by faster ones, in the model's precision.

        They cast the weights once, never wait for a GPU, and share Fourier transforms and normalisation. Networks that
        are not supported stay as they are, and the log says why.
        """
        if self._fused is not None:
            return
        each: Any = next(iter(self.networks.values()))
        try:
            if self._shares or not all(isinstance(network, self.Network) for network in self.networks.values()):
                raise NotFusedError("its networks differ")
            if fault := self._spectrogram_fault():
                raise NotFusedError(fault)
            replaced = {
                part: HybridNetwork(
                    network, self.precision, source=self._sources.index(part) if self._specialised else None
                )
                for part, network in self.networks.items()
            }
        except NotFusedError as e:
            logger.info(f"{self.name}: using the demucs package's own layers ({e})")
            return
        fused = self.transform(0)
        self._least_samples = _least_samples(each)
        self.networks: nn.ModuleDict = nn.ModuleDict(replaced)
        self._fused = fused

    def to_precision(self, dtype: torch.dtype) -> None:
        super().to_precision(dtype)
        if self._fused is not None:
            for network in self.networks.values():
                cast(HybridNetwork, network).to_precision(dtype)

    def forward(self, chunks: Tensor) -> Tensor:
        if self._fused is None:
            return super().forward(chunks)
        parts = self.stems if self._specialised else tuple(self.networks)
        networks = [cast(HybridNetwork, self.networks[part]) for part in parts]
        padded = _extended(chunks, self._least_samples)
        estimates = _estimates(networks, padded, self._fused, specialised=self._specialised)
        if not self._specialised and len(networks) > 1:
            estimates /= len(networks)
        by_stem: Tensor = estimates[..., : chunks.shape[-1]].unflatten(1, (len(self.stems), self.channels))
        return by_stem

    def transform(self, length: int) -> Transform:
        if fault := self._spectrogram_fault():
            raise InputError(f"{self.name} cannot be exported ({fault}): choose another model")
        return _transform_of(next(iter(self.networks.values())), length)

    def _spectrogram_fault(self) -> str:
        """Why the networks do not share one spectrogram of real and imaginary parts, or an empty string if they do."""
        networks: list[Any] = list(self.networks.values())
        if not all(getattr(network, "hybrid", True) and getattr(network, "cac", False) for network in networks):
            return "one of its networks masks amplitudes or has one branch"
        sizes = {(each.nfft, each.hop_length, getattr(each, "hybrid_old", False)) for each in networks}
        return "its networks take different spectrograms" if len(sizes) > 1 else ""

    def core(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        branches = {network: cast(Any, network).branches(*inputs) for network in self.networks.values()}
        spectra = self._combined(lambda network: branches[network][0])
        return spectra, self._combined(lambda network: branches[network][1])


class _FusedNetwork(nn.Module):
    """A network of the package in the layers of kernels/demucs_core.py: chunks `[B, C, T]` to estimates `[B, S, C, T]`.

    Raises NotFusedError if they do not support it.
    """

    def __init__(self, network: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = HybridNetwork(network, dtype)
        self._transform, self._least_samples = _transform_of(network, 0), _least_samples(network)
        self._sources = len(network.sources)

    def forward(self, chunks: Tensor) -> Tensor:
        padded = _extended(chunks, self._least_samples)
        with torch.autocast(chunks.device.type, enabled=False):
            estimates = _estimates([self.network], padded, self._transform, specialised=False)
        by_source: Tensor = estimates[..., : chunks.shape[-1]].unflatten(1, (self._sources, -1))
        return by_source


def _least_samples(network: Any) -> int:
    """The length of the chunks on which a network was trained, if it needs that length, else 0."""
    return int(network.segment * network.samplerate) if getattr(network, "use_train_segment", False) else 0


def _extended(chunks: Tensor, samples: int) -> Tensor:
    """Pad chunks with zeros to at least so many samples."""
    missing = samples - chunks.shape[-1]
    return F.pad(chunks, (0, missing)) if missing > 0 else chunks


def _estimates(networks: Sequence[HybridNetwork], chunks: Tensor, transform: Transform, *, specialised: bool) -> Tensor:
    """The specialists' estimates for chunks `[B, C, T]`, concatenated, or the sum of the networks': `[B, S * C, T]`.

    `transform` is that of a chunk of length 0.
    """
    hop, (before, after) = transform.hop_length, transform.padding
    transform = replace(transform, padding=(before, after + -chunks.shape[-1] % hop))
    inputs = Inputs.of(torch.view_as_real(_spectrum(chunks, transform)), chunks)
    branches = [network(inputs) for network in networks]
    spectra = [
        network.spectra(x, inputs, transform.zero_frames) for network, (x, _) in zip(networks, branches, strict=True)
    ]
    joined = torch.cat(spectra, dim=1) if specialised else reduce(torch.add, spectra)
    frames = torch.fft.irfft(torch.view_as_complex(joined), transform.n_fft, norm="ortho")
    window = make_window(transform.window, transform.win_length, chunks.device)
    estimates: Tensor = ops.overlap_add(frames, window, hop, transform.crop, chunks.shape[-1])
    channels = chunks.shape[1]
    for i, (network, (_, xt)) in enumerate(zip(networks, branches, strict=True)):
        own = slice(i * channels, (i + 1) * channels) if specialised else slice(None)
        network.add_waveforms(xt, inputs, estimates[:, own])
    return estimates


def _transform_of(network: Any, length: int) -> Transform:
    """The STFT of a hybrid network for chunks of `length` samples."""
    hop, old = network.hop_length, getattr(network, "hybrid_old", False)
    padding = hop // 2 * 3
    return Transform(
        n_fft=network.nfft,
        hop_length=hop,
        win_length=network.nfft,
        scale=network.nfft**-0.5,
        bins=network.nfft // 2,
        padding=(padding, padding + -length % hop),
        padding_mode="constant" if old else "reflect",
        zero_frames=2,
        crop=network.nfft // 2 + (0 if old else padding),
    )


def _spectrum(chunks: Tensor, transform: Transform) -> Tensor:
    """`[B, C, T]` to the complex spectrogram `[B, C, F, N]`."""
    before, after = transform.padding
    missing = max(before, after) - chunks.shape[-1] + 1
    if transform.padding_mode == "reflect" and missing > 0:
        # Like the package, pad a chunk that is too short for its reflection with zeros, preferably at its end.
        zeros = min(after, missing)
        chunks = F.pad(chunks, (missing - zeros, zeros))
        before, after = before - (missing - zeros), after - zeros
    padded = F.pad(chunks, (before, after), transform.padding_mode)
    n_fft, hop_length, win_length = transform.n_fft, transform.hop_length, transform.win_length
    stft = Stft(n_fft=n_fft, hop_length=hop_length, win_length=win_length, normalized=True)
    frames = stft.spectrogram(padded)
    return frames[..., : transform.bins, transform.zero_frames : -transform.zero_frames]


class HTDemucs(HybridDemucs):
    """T must be `chunk_samples`, the length on which the transformer was trained."""

    Network: ClassVar[type[nn.Module]] = demucs_networks.HTDemucs
    Config: ClassVar[type] = demucs_networks.config_of(Network)
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (r"tencoder\.\d+\.conv\.weight", r"crosstransformer\.layers\.\d+\..*")

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        return super().sizes_in(shapes, config) | {
            "t_layers": shapes.count(r"crosstransformer\.layers\.(\d+)\..*"),
            "bottom_channels": shapes.size("channel_upsampler.weight", 0) or 0,
        }


class HDemucs(HybridDemucs):
    """T is at most `chunk_samples`: the last chunk of a song is not extended."""

    Network: ClassVar[type[nn.Module]] = demucs_networks.HDemucs
    Config: ClassVar[type] = demucs_networks.config_of(Network)
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"tencoder\.\d+\.conv\.weight",
        r"encoder\.\d+\.dconv\.layers\.\d+\.\d+\.lstm\.weight_ih_l0",
    )

    def input_samples(self, length: int) -> int:
        return demucs_networks.valid_length(self.networks.values(), length)


class Demucs(DemucsModel):
    """T is a chunk and a little of its surroundings, so that the convolutions use every sample."""

    Network = demucs_networks.Demucs
    Config: ClassVar[type] = demucs_networks.config_of(Network)
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (r"encoder\.0\.[3-9]\..*", r"decoder\.0\.0\.weight", r"(.*\.)?lstm\..*")

    def transform(self, length: int) -> None:
        return None

    def core(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self._combined(lambda network: network(*inputs)),)

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
        return demucs_networks.valid_length(self.networks.values(), length)


class DemucsV2(Demucs):
    """Demucs 1 and 2. Their files describe their network, or their weights do."""

    Network: ClassVar[type[nn.Module]] = OldDemucs
    Config: ClassVar[type] = demucs_networks.config_of(Network)
    KEY_PATTERNS: ClassVar[tuple[str, ...]] = (
        r"encoder\.0\.2\.weight",
        r"decoder\.0\.0\.weight",
        r"lstm\.linear\.weight",
    )

    @classmethod
    def sizes_in(cls, shapes: Shapes, config: Any) -> dict[str, Any]:
        sizes = super().sizes_in(shapes, config)
        last = f"decoder.{sizes['depth'] - 1}.2.bias"
        return sizes | {
            "sources": quotient(shapes.size(last, 0), sizes["audio_channels"]),
            "context": shapes.size("decoder.0.0.weight", 2),
            "kernel_size": shapes.size("encoder.0.0.weight", 2),
            "lstm_layers": shapes.count(r"lstm\.lstm\.weight_ih_l(\d+)"),
        }
