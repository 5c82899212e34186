"""MDX-Nets (models/mdx_net.py) as kuielab/mdx-net trains them: checkpoints of its ConvTDFNet, not exported to ONNX.

Each layer's batch norm becomes part of the layer, as in ONNX files. The file itself says almost all that the network
needs: its window is as long as n_fft, its padding has the frames of a chunk, and PyTorch Lightning adds the arguments.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from separation.checkpoints.mdx_graph import (
    HOP_LENGTH,
    SAMPLE_RATE,
    Weights,
    moved,
    norm_scale,
    norm_shift,
    scaled,
)
from separation.documents import escaped
from separation.errors import CheckpointError
from separation.models.mdx_net import MDXNet
from separation.models.shapes import Shapes

EPSILON = 1e-5  # of PyTorch's batch norms
CONVOLUTION = re.compile(r"(first_conv|(?:ds|us)\.\d+|\w+(?:\.\d+)?\.tfc\.H\.\d+)\.0")
LINEAR = re.compile(r"(\w+(?:\.\d+)?\.tdf)\.([03])")
NORM = ("weight", "bias", "running_mean", "running_var")
BESIDE = re.compile(r"window|freq_pad|.*\.num_batches_tracked")


def is_in_training(names: Iterable[str]) -> bool:
    """Whether these are names of weights of a ConvTDFNet."""
    return any(re.fullmatch(r"encoding_blocks\.\d+\.tfc\.H\..*", name) for name in names)


def trained_mdx_net(
    path: Path,
    tensors: Mapping[str, Callable[[], Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    arguments: Mapping[str, Any],
) -> tuple[Weights, dict[str, Any]]:
    """A function to read each weight, by its name in the model, and what a YAML says about the network.

    `arguments` are those of the ConvTDFNet, as far as they are known.

    Raises CheckpointError for a ConvTDFNet that is no MDX-Net.
    """
    left = {name for name in tensors if not BESIDE.fullmatch(name)}
    found: Weights = {}
    named: dict[str, tuple[int, ...]] = {}

    def take(source: str, name: str) -> None:
        found[name], named[name] = tensors[source], shapes[source]
        left.discard(source)

    def norm_after(layer: str, norm: str) -> tuple[partial[Tensor], partial[Tensor]]:
        names = [f"{norm}.{each}" for each in NORM]
        if missing := next((name for name in names if name not in tensors), None):
            raise _other_network(path, f"{layer} is not followed by a batch norm, which would have {missing}")
        left.difference_update(names)
        gain, bias, mean, variance = (tensors[name] for name in names)
        scale = partial(norm_scale, gain, variance, EPSILON)
        return scale, partial(norm_shift, bias, mean, scale)

    for layer in sorted({name.rpartition(".")[0] for name in left}):
        if match := CONVOLUTION.fullmatch(layer):
            name = match[1].replace(".tfc.H.", ".tfc.")
            take(f"{layer}.weight", f"{name}.weight")
            take(f"{layer}.bias", f"{name}.bias")
            scale, shift = norm_after(layer, f"{match[1]}.1")
            axis = 1 if name.startswith("us.") else 0
            found[f"{name}.weight"] = partial(scaled, found[f"{name}.weight"], scale, axis)
            found[f"{name}.bias"] = partial(moved, found[f"{name}.bias"], scale, shift)
        elif match := LINEAR.fullmatch(layer):
            name = f"{match[1]}.{int(match[2]) // 3}"
            take(f"{layer}.weight", f"{name}.weight")
            if f"{layer}.bias" in left:
                take(f"{layer}.bias", f"{name}.bias")
            found[f"{name}.scale"], found[f"{name}.shift"] = norm_after(layer, f"{match[1]}.{int(match[2]) + 1}")
        elif layer == "final_conv.0":
            take(f"{layer}.weight", "final_conv.weight")
            take(f"{layer}.bias", "final_conv.bias")
    if left:
        raise _other_network(path, f"it has {escaped(min(left))}")
    if any(re.fullmatch(r".*\.tdf\.0\.weight", name) and name.replace("tdf.0", "tdf.1") not in named for name in named):
        raise _other_network(path, "its linear layers do not narrow the bins and widen them again")
    sizes = MDXNet.sizes_in(Shapes(named), None)
    if unknown := next((name for name, size in sizes.items() if not size and name != "bias"), None):
        raise _other_network(path, f"its weights do not determine {unknown}")
    audio = {
        "sample_rate": SAMPLE_RATE,
        "hop_length": arguments.get("hop_length", HOP_LENGTH),
        "dim_f": sizes.pop("dim_f"),
        "num_channels": sizes.pop("audio_channels"),
    }
    for key, tensor, axis in (("n_fft", "window", 0), ("dim_t", "freq_pad", 3)):
        size = Shapes(shapes).size(tensor, axis) or arguments.get(key)
        audio |= {} if size is None else {key: size}
    # Ultimate Vocal Remover also clears the lowest three bins, of ONNX files and of these. Their training does not.
    document = {"architecture": "mdx_net", "audio": audio, "model": sizes | {"silent_bins": 0}}
    target = arguments.get("target_name")
    return found, document | ({"stems": [target]} if isinstance(target, str) else {})


def arguments_in(saved: Any) -> dict[str, Any]:
    """The arguments of the network that PyTorch Lightning saved with it."""
    found = saved.get("hyper_parameters") if isinstance(saved, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def _other_network(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a ConvTDFNet of kuielab/mdx-net, but not an MDX-Net ({escaped(reason, most=200)}): use the program "
        "that it was made for"
    )
