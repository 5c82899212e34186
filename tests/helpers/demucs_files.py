"""Small networks of the demucs package, and their files as it writes them."""

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demucs.apply import apply_model
from demucs.demucs import Demucs
from demucs.hdemucs import HDemucs
from demucs.htdemucs import HTDemucs
from demucs.states import get_state, save_with_checksum
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.small_model import write_yaml
from separation import Separator
from separation.engine.options import EngineOptions

SOURCES = ["drums", "bass"]
CHUNK_SAMPLES = 11024  # divisible by 4
ARGUMENTS: dict[str, Any] = {"channels": 8, "segment": Fraction(CHUNK_SAMPLES, 44100), "dconv_init": 0.5}
TRANSFORMER = ARGUMENTS | {"t_layers": 1, "t_heads": 2, "t_dropout": 0.02}
CLASSES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "demucs": (Demucs, ARGUMENTS),
    "hdemucs": (HDemucs, ARGUMENTS),
    "htdemucs": (HTDemucs, TRANSFORMER),
}


def network(name: str, seed: int = 0, **changes: Any) -> Any:
    """A network with its weights rounded to half precision, as its file stores them."""
    network_class, arguments = CLASSES[name]
    torch.manual_seed(seed)
    net = network_class(SOURCES, **(arguments | changes)).eval()
    net.load_state_dict({key: value.half().float() for key, value in net.state_dict().items()})
    return net


def package(net: Any) -> dict[str, Any]:
    """The value that demucs' serialize_model and tools.export save."""
    args, kwargs = net._init_args_kwargs
    training_args = {"dset": {"sources": SOURCES}, "optim": {"lr": 3e-4}, "quant": {"diffq": None}}
    metrics = ({"sdr": 7.5}, {"sdr": np.float64(7.25), "sdr_med": np.float32(7.5)})
    state = get_state(net, None, half=True)
    saved = {"klass": type(net), "args": args, "kwargs": kwargs, "state": state, "training_args": training_args}
    return saved | {"metrics": metrics}


def save(net: Any, folder: Path, name: str = "0123abcd") -> Path:
    """The network's file, written by demucs: its name is `0123abcd-` and the start of its sha256."""
    folder.mkdir(exist_ok=True)
    save_with_checksum(package(net), folder / f"{name}.th")
    (path,) = folder.glob(f"{name}-*.th")
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem.rpartition("-")[2])
    return path


def config(folder: Path, name: str, files: int = 1, **changes: Any) -> Path:
    """A YAML of that architecture, with the weights files `x0.th`, …"""
    arguments = ARGUMENTS | (TRANSFORMER if name == "htdemucs" else {}) | changes
    return write_yaml(
        folder,
        architecture=name,
        stems=SOURCES,
        files=[{"name": f"x{number}.th"} for number in range(files)],
        model=arguments | {"sources": SOURCES, "segment": str(arguments["segment"])},
        audio={"sample_rate": 44100, "chunk_size": CHUNK_SAMPLES},
    )


def song(length: int = 30_000) -> Tensor:
    """Noise with a mean of 0: behind the end of a song, demucs pads with the mean and this engine with zeros."""
    noise = torch.randn(2, length, generator=torch.Generator().manual_seed(0)) * 0.2
    return noise - noise.mean()


def by_demucs(net: nn.Module, mixture: Tensor) -> Tensor:
    """The stems that demucs itself gives, with its normalisation."""
    mono = mixture.mean(dim=0)
    mean, std = mono.mean(), mono.std() + 1e-8
    with torch.no_grad():
        return apply_model(net, ((mixture - mean) / std)[None], shifts=0, overlap=0.25)[0] * std + mean


def assert_separates_as(model: Any, net: nn.Module) -> None:
    mixture = song()
    got = Separator.from_model(model, options=EngineOptions(chunk_seconds=8, overlap_seconds=2)).separate(mixture)
    expected = by_demucs(net, mixture)
    assert (torch.stack(list(got.values())) - expected).abs().max() <= 1e-4 * expected.abs().max()


def demucs_file(path: Path, **changes: Any) -> HTDemucs:
    """Write a network as demucs 4.1 does, with these changes in the description of its arguments."""
    arguments = {"sources": ["drums", "bass"], "channels": 8, "bottom_channels": 0, "t_layers": 1, "t_heads": 2}
    arguments |= {"nfft": 2048, "samplerate": 44100}
    network = HTDemucs(**arguments, segment=Fraction(1, 4)).eval()
    kwargs = json.dumps(arguments | {"segment": {"_type": "fraction", "numerator": 1, "denominator": 4}} | changes)
    metadata = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": kwargs}
    save_file(network.state_dict(), path, metadata)
    return network
