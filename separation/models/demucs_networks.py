"""The demucs package's networks: built from a file's own description, and adapted to this program's GPU and exports."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import field, make_dataclass
from typing import Any

import demucs.demucs
import demucs.hdemucs
import demucs.htdemucs
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from separation.documents import escaped
from separation.errors import CheckpointError
from separation.models.attention import BACKENDS, AttentionBackend
from separation.models.base import Blueprint
from separation.models.limits import check_arguments
from separation.models.old_demucs import OldDemucs
from separation.models.stft import hermitian


class _OwnSpectrograms:
    """Overrides the four methods of the package's hybrid networks that compute with complex spectrograms.

    On a CUDA GPU, spectrograms are made Hermitian before the inverse transform. While `branches` runs, the network
    takes a given spectrogram and computes in real numbers.
    """

    nfft: int
    _given: Tensor | None = None  # the spectrogram for `branches`, [B, C, F, N, 2]
    _spectra: Tensor | None = None  # the spectrogram branch's result, [B, S, C, F, N, 2]

    def branches(self, spectrum: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """The estimates of both branches, `[B, S, C, F, N, 2]` and `[B, S, C, T]`, before they are added.

        Takes the spectrogram `[B, C, F, N, 2]` and the chunks `[B, C, T]`.
        """
        network: Any = copy.copy(self)  # shares the layers
        network._given = spectrum
        waveforms: Tensor = network(chunks)
        spectra: Tensor = network._spectra
        return spectra, waveforms

    def _spec(self, x: Tensor) -> Tensor:
        if self._given is not None:
            return self._given
        z: Tensor = super()._spec(x)  # type: ignore[misc]
        return z

    def _magnitude(self, z: Tensor) -> Tensor:
        if self._given is not None:
            return rearrange(z, "b c f n ri -> b (c ri) f n")
        x: Tensor = super()._magnitude(z)  # type: ignore[misc]
        return x

    def _mask(self, z: Tensor, m: Tensor) -> Tensor:
        if self._given is not None:
            return rearrange(m, "b s (c ri) f n -> b s c f n ri", ri=2)
        spectra: Tensor = super()._mask(z, m)  # type: ignore[misc]
        return spectra

    def _ispec(self, z: Tensor, length: int) -> Tensor | float:
        if self._given is not None:
            self._spectra = z
            return 0.0  # the network adds this to the other branch's estimate
        waveforms: Tensor = super()._ispec(hermitian(z, self.nfft) if z.is_cuda else z, length)  # type: ignore[misc]
        return waveforms


class HDemucs(_OwnSpectrograms, demucs.hdemucs.HDemucs):  # type: ignore[misc]  # the package is untyped
    """The package's Hybrid Demucs."""


class HTDemucs(_OwnSpectrograms, demucs.htdemucs.HTDemucs):  # type: ignore[misc]  # the package is untyped
    """The package's Hybrid Transformer Demucs."""


Demucs: type[nn.Module] = demucs.demucs.Demucs
CLASSES: dict[str, type[nn.Module]] = {
    "demucs.model.Demucs": OldDemucs,
    "demucs.demucs.Demucs": Demucs,
    "demucs.hdemucs.HDemucs": HDemucs,
    "demucs.htdemucs.HTDemucs": HTDemucs,
}


def config_of(network: type[nn.Module]) -> type:
    """A dataclass of the arguments of a network's class, with their names and defaults."""
    parameters = inspect.signature(network).parameters.values()
    return make_dataclass(f"{network.__name__}Config", map(_field, parameters), frozen=True, kw_only=True)


def _field(parameter: inspect.Parameter) -> tuple[str, Any, Any]:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return parameter.name, Any, field()
    return parameter.name, Any, field(default=tuple(default) if isinstance(default, list) else default)


def network_of(blueprint: Blueprint) -> nn.Module:
    """Build the network that a file describes. Like the package, ignore arguments that its class does not have.

    Raises CheckpointError for an unknown class, and ValueError or TypeError for invalid arguments.
    """
    network, bound = _bound(blueprint)
    return network(**(bound.arguments | {"rescale": 0}))  # rescaling is for a training's random weights


def description_of(blueprint: Blueprint) -> dict[str, Any]:
    """A file's description of its network, in the form of a YAML's content. Raises what `network_of` raises.

    It leaves out the network's sizes, since `DemucsModel.rebuild` builds the network from the file.
    """
    network, bound = _bound(blueprint)
    bound.apply_defaults()
    model = {name: bound.arguments[name] for name in ("sources", "audio_channels", "samplerate", "segment")}
    rate = model["samplerate"]
    return {
        "architecture": getattr(network, "architecture", network.__name__.lower()),
        "audio": {"sample_rate": rate, "chunk_size": int(rate * model["segment"])},
        "model": model | {"sources": list(model["sources"])},
    }


def _bound(blueprint: Blueprint) -> tuple[type[nn.Module], inspect.BoundArguments]:
    """The network's class and its arguments."""
    network = CLASSES.get(blueprint.class_name)
    if network is None:
        raise CheckpointError(
            f"it describes the class {escaped(blueprint.class_name)}: use a file of one of {', '.join(CLASSES)}"
        )
    signature = inspect.signature(network)
    known = {name: value for name, value in blueprint.kwargs.items() if name in signature.parameters}
    bound = signature.bind(*blueprint.args, **known)
    check_arguments(bound.arguments, {})  # a malicious file could otherwise keep the program busy for hours
    return network, bound


def dequantised(network: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Unpack weights that were quantised by DiffQ (Défossez, Adi and Synnaeve 2021, arXiv:2104.09987).

    Returns the network's state dict. Raises CheckpointError if the package diffq is not installed, if the weights were
    quantised in another way, or if some are missing.
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
    quantizer.restore_quantized_state(state)  # silently skips weights that are missing
    quantizer.detach()
    if any(parameter.isnan().any() for parameter in network.parameters()):
        raise CheckpointError("some of its weights are missing: get the file again")
    return network.state_dict()


def valid_length(networks: Iterable[nn.Module], length: int) -> int:
    """The length, from `length` up, at which the convolutions of each plain Demucs use every sample.

    Networks with a spectrogram accept any length.
    """
    plain: list[Any] = [network for network in networks if isinstance(network, demucs.demucs.Demucs | OldDemucs)]
    return max((network.valid_length(length) for network in plain), default=length)


def set_attention(networks: nn.Module, backend: str) -> None:
    """Replace each `nn.MultiheadAttention` in the networks by one that uses the backend and the same weights."""
    for module in list(networks.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, MultiheadAttention(child, backend))


class MultiheadAttention(nn.Module):
    """The weights of an `nn.MultiheadAttention` with one of our backends. Batch first, without masks."""

    def __init__(self, plain: nn.MultiheadAttention, backend: str) -> None:
        super().__init__()
        assert plain.batch_first and plain.in_proj_weight is not None and plain.bias_k is None
        self.in_proj_weight: nn.Parameter = plain.in_proj_weight
        self.in_proj_bias: nn.Parameter = plain.in_proj_bias
        self.out_proj: nn.Linear = plain.out_proj
        self.num_heads = plain.num_heads
        self.attend: AttentionBackend = BACKENDS[backend]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        """`[B, N, D]` and twice the same `[B, M, D]` to `[B, N, D]`; returns no attention weights.

        Supports none of the options of `nn.MultiheadAttention`: they must be None or False.
        """
        assert key is value and all(option is None or option is False for option in options.values())
        dim = query.shape[-1]
        if query is key:
            q, k, v = self._heads(query, 0, 3 * dim).chunk(3, dim=1)
        else:
            q = self._heads(query, 0, dim)
            k, v = self._heads(key, dim, 3 * dim).chunk(2, dim=1)
        with torch.autocast(q.device.type, enabled=False):  # autocast would compute the softmax in float32
            out = self.attend(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None

    def _heads(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Apply these rows of the input projection, `[B, N, D] -> [B, heads, N, dim_head]`."""
        projected = F.linear(x, self.in_proj_weight[start:stop], self.in_proj_bias[start:stop])
        heads: Tensor = projected.unflatten(-1, (-1, x.shape[-1] // self.num_heads))
        return heads.transpose(1, 2)
