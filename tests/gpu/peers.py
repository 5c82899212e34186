"""The networks of other programs, with the same weights as ours.

Each network is imported from the installed package without running the package's `__init__`, which often imports far
more than the network needs. The networks of pymss and Unblend need only PyTorch, NumPy and PyYAML; those of MSST and
audio-separator also need einops, beartype and rotary-embedding-torch.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from separation.checkpoints.catalogue import read_config
from separation.checkpoints.description import Checkpoint
from separation.models.limits import Uninitialised
from workloads import Workloads

# The name in the tables -> the distribution.
DISTRIBUTIONS = {
    "pymss": "pymss-core",
    "unblend": "unblend",
    "audio-separator": "audio-separator",
    "msst": "bs-roformer-infer",
}
ROFORMERS = {"bs_roformer": "BSRoformer", "mel_band_roformer": "MelBandRoformer"}
MSST_ROFORMERS = {"pymss": "pymss_core.modules.bs_roformer", "msst": "bs_roformer.bs_roformer"}


class MissingPeerError(Exception):
    """A program is not installed."""


def label(program: str) -> str:
    """The program's name and installed version. Raises MissingPeerError if it is not installed."""
    distribution = DISTRIBUTIONS[program]
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        raise MissingPeerError(f"{distribution} is not installed: see the head of measure.py") from None


class Autocast(nn.Module):
    """A network under PyTorch's autocast: chunks `[B, C, T]` to estimates in float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, chunks: Tensor) -> Tensor:
        with torch.autocast(chunks.device.type, self.dtype, enabled=self.dtype != torch.float32):
            estimates: Tensor = self.network(chunks)
        return estimates.float()


def build(program: str, name: str, work: Workloads) -> nn.Module:
    """The program's network for one of our models, with its weights, on the device in float32.

    It maps chunks `[B, C, T]` to `[B, S, C, T]`, or to `[B, C, T]` for a single stem. Raises MissingPeerError.
    """
    label(program)
    description = read_config(work.config_path(name))
    architecture = description.architecture
    assert architecture is not None
    with Uninitialised():
        if architecture in ROFORMERS:
            network = _roformer(program, architecture, description)
        else:
            network = _BUILDERS[program, architecture](description)
    network.load_state_dict(load_file(work.weights_path(name)))
    return network.eval().requires_grad_(False).to(work.device)


def _roformer(program: str, architecture: str, description: Checkpoint) -> nn.Module:
    if program == "audio-separator":
        _bare_packages("audio_separator", "audio_separator.separator", "audio_separator.separator.uvr_lib_v5")
        module = f"audio_separator.separator.uvr_lib_v5.roformer.{architecture}"
    else:
        if program == "msst":
            _bare_packages("bs_roformer")
        module = MSST_ROFORMERS[program]
    network = getattr(importlib.import_module(module), ROFORMERS[architecture])
    arguments = {
        key: tuple(value) if isinstance(value, list) else value for key, value in description.hyper_parameters.items()
    }
    arguments |= {"num_stems": len(description.stems), "zero_dc": False}  # as in ours, the lowest bin stays
    if (program, architecture) == (
        "pymss",
        "mel_band_roformer",
    ):  # otherwise it counts hidden layers as BS-RoFormer does
        arguments["mlp_hidden_layers"] = arguments["mask_estimator_depth"]
    known = inspect.signature(network.__init__).parameters
    return network(**{key: value for key, value in arguments.items() if key in known})


def unblend_apply() -> Callable[..., list[Tensor]]:
    """Separate several songs `[2, T]` with one network by Unblend's own `apply_model_multi`."""
    label("unblend")
    _bare_packages("unblend")
    return importlib.import_module("unblend.apply").apply_model_multi


def _pymss_mdx23c(description: Checkpoint) -> nn.Module:
    attributes = importlib.import_module("pymss_core.config").AttrDict
    config = attributes(
        audio=description.audio,
        model=description.hyper_parameters,
        training={"instruments": list(description.stems), "target_instrument": None},
    )
    return importlib.import_module("pymss_core.modules.mdx23c_tfc_tdf_v3").TFC_TDF_net(config)


def _pymss_scnet(description: Checkpoint) -> nn.Module:
    return importlib.import_module("pymss_core.modules.scnet").SCNet(**description.hyper_parameters)


def _pymss_htdemucs(description: Checkpoint) -> nn.Module:
    arguments = description.hyper_parameters
    segment = float(Fraction(arguments["segment"]))
    return importlib.import_module("pymss_core.modules.demucs4ht").HTDemucs(**arguments | {"segment": segment})


def _unblend_htdemucs(description: Checkpoint) -> nn.Module:
    _bare_packages("unblend")
    arguments = description.hyper_parameters
    segment = float(Fraction(arguments["segment"]))
    network = importlib.import_module("unblend.htdemucs").HTDemucs(**arguments | {"segment": segment})
    network.max_allowed_segment = segment
    return network


_BUILDERS: dict[tuple[str, str], Callable[[Checkpoint], Any]] = {
    ("pymss", "mdx23c"): _pymss_mdx23c,
    ("pymss", "scnet"): _pymss_scnet,
    ("pymss", "htdemucs"): _pymss_htdemucs,
    ("unblend", "htdemucs"): _unblend_htdemucs,
}


def _bare_packages(*names: str) -> None:
    """Make packages importable without running their `__init__`, outer packages first."""
    for name in names:
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise MissingPeerError(f"the package {name} is not installed: see the head of measure.py")
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package
