"""The state dict in a weights file, read without running any code that the file contains.

The file is a safetensors file or one of PyTorch's, such as Demucs' own, whose pickles refer to classes. `pickles` reads
pickles, `torch_file` the files around them.
"""

import contextlib
import functools
import json
import logging
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from separation.checkpoints.foreign import refuse_suffix
from separation.checkpoints.mdx_graph import open_mdx_net
from separation.checkpoints.mdx_training import arguments_in, is_in_training, trained_mdx_net
from separation.checkpoints.pickles import Ignored, Name, check_plain
from separation.checkpoints.torch_file import Storage, check_total, read_tensor, read_torch_file
from separation.checkpoints.unwrap import state_dict_in
from separation.documents import DocumentError, escaped, first_line, quoted, read_json, read_safetensors_header
from separation.errors import CheckpointError, EstimateError
from separation.models.base import Blueprint
from separation.models.demucs_networks import dequantised, description_of, network_of
from separation.models.htdemucs import DemucsV2
from separation.models.limits import Uninitialised
from separation.models.shapes import Shapes
from separation.system.memory import enough_memory
from separation.system.places import size_bytes

logger: logging.Logger = logging.getLogger("separation")

SOURCES = ("drums", "bass", "other", "vocals")  # of all networks of Demucs 1 and 2
MOST_NAME = 500  # characters in a weight's name
READERS = 4  # threads: one is too slow for a fast disk
# Types by their name in the header of a safetensors file.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@contextlib.contextmanager
def building(path: Path, most_weights: int) -> Iterator[None]:
    """For a block that builds the network that a file describes, with at most this many weights.

    Whatever goes wrong becomes a CheckpointError that names the file.
    """
    try:
        with enough_memory(str(path)), Uninitialised(most_weights, "the file"):
            yield
    except EstimateError:
        raise
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    except Exception as e:  # arguments can be anything
        raise CheckpointError(
            f"{path} describes a network that cannot be built ({first_line(e)}): use its publisher's file"
        ) from e


@dataclass(frozen=True)
class Stored:
    """An opened weights file: a function to read each tensor, and the file's description of its network, if any.

    The description is a blueprint or, of an MDX-Net, what the file says about it, as a YAML states that.
    """

    path: Path
    tensors: dict[str, Callable[[], Tensor]]
    blueprint: Blueprint | None
    sizes: dict[str, Any] | None = None

    @property
    def description(self) -> dict[str, Any] | None:
        """The file's description of its network, in the form of a YAML's content; None if it has none.

        Raises CheckpointError for an unknown network.
        """
        if self.blueprint is None:
            return None
        with building(self.path, 0):
            return description_of(self.blueprint)


def open_weights(path: Path) -> Stored:
    """Open a weights file and find the state dict in what a trainer saved. The tensors are not read yet."""
    with _reading(path):
        if not path.is_file():
            raise CheckpointError(
                f"there is no file {path}: give a checkpoint's path (.ckpt, .pth, .th, .onnx, .safetensors)"
            )
        refuse_suffix(path)
        if path.suffix == ".onnx":
            weights, sizes = open_mdx_net(path)
            return Stored(path, weights, None, sizes)
        saved, blueprint = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
        tensors, choices = state_dict_in(saved)
        blueprint = blueprint or _of_demucs_2(tensors)
        check_total(tensors, size_bytes(path))
        if is_in_training(tensors):
            weights, sizes = trained_mdx_net(path, tensors, _shapes_of(tensors), arguments_in(saved))
            return Stored(path, weights, None, sizes)
    if not tensors:
        raise CheckpointError(f"{path} has no state dict (names and tensors): give a model's checkpoint")
    if odd := next((name for name in tensors if len(name) > MOST_NAME or not name.isprintable()), None):
        raise CheckpointError(f"{path} has a weight with the name {quoted(odd)}: give a model's checkpoint")
    for choice in choices:
        _warn_of_choice(path, choice)
    return Stored(path, tensors, blueprint)


@functools.cache  # one warning, however often a file is opened
def _warn_of_choice(path: Path, choice: str) -> None:
    logger.warning(f"{path}: {escaped(choice, most=500)}")


def read_weights(stored: Stored, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Read the state dict, each tensor in the type that `dtypes` gives for it, else in its own.

    Threads read and cast tensor by tensor, so that no tensor is in memory twice for long.
    """

    def read(value: Callable[[], Tensor], dtype: torch.dtype | None) -> Tensor:
        tensor = value()
        return tensor.to(dtype or tensor.dtype)

    with _reading(stored.path), ThreadPoolExecutor(READERS) as readers:
        tensors = readers.map(read, stored.tensors.values(), map(dtypes.get, stored.tensors))
        return dict(zip(stored.tensors, tensors, strict=True))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """For a block that reads the file: whatever goes wrong becomes a CheckpointError that names it."""
    try:
        with enough_memory(str(path)):
            yield
    except (CheckpointError, EstimateError):
        raise
    except pickle.UnpicklingError as e:
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise CheckpointError(
                f"{path} is refused, because loading it would run code ({code[1]}): use a .safetensors file, or one "
                "with nothing but a state dict"
            ) from e
        raise _unreadable(path, str(e)) from e
    except DocumentError as e:
        raise _unreadable(path, f"it {e}") from e
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read ({e.strerror or e}): make it readable, or give another") from e
    except Exception as e:  # damaged files lead to almost any exception
        raise _unreadable(path) from e


def _fraction(*parts: Any) -> Fraction:
    """A fraction from a pickle's arguments, `"39/5"` or `39, 5`. Others are refused: they could take hours."""
    text = "/".join(map(str, parts)) if all(isinstance(part, str | int) for part in parts) else ""
    if not re.fullmatch(r"\d{1,9}(/[1-9]\d{0,8})?", text):
        raise pickle.UnpicklingError("GLOBAL fractions.Fraction is called")
    return Fraction(text)


def _dictionary(*arguments: Any) -> dict[Any, Any]:
    """An empty dictionary, in place of a class of dictionaries with code of its own."""
    return {}


def _ignored(*arguments: Any) -> Ignored:
    return Ignored()


# The classes and functions in Demucs' own files. Each gets a harmless stand-in; the real ones are not imported.
_CLASSES = (
    "demucs.model.Demucs",
    "demucs.demucs.Demucs",
    "demucs.hdemucs.HDemucs",
    "demucs.htdemucs.HTDemucs",
    "diffq.diffq.DiffQuantizer",
    "diffq.uniform.UniformQuantizer",
)
_IN_METRICS = ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "_codecs.encode")
STAND_INS = {
    **{name: Name(name) for name in _CLASSES},
    **{name: Name(name, _ignored) for name in _IN_METRICS},
    "demucs.wdemucs.WDemucs": Name("demucs.hdemucs.HDemucs"),  # its earlier name
    "fractions.Fraction": Name("fractions.Fraction", _fraction),
}

# Trainers save objects of these packages with the weights. The packages are not imported.
BESIDE = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|torchmetrics|hydra|omegaconf|ml_collections|argparse|pathlib|typing"
    r"|torch\.optim|collections|neuralop)\..*"
    r"|torch\._C\._nn\.gelu|builtins\.(dict|list|int|float|str|bool|tuple|frozenset|set|bytearray|complex)|torch\.(device|Tensor)"
)


def _find(name: str) -> Name:
    """The stand-in for a class or a function outside PyTorch. Raises UnpicklingError for an unknown one."""
    if name in STAND_INS:
        return STAND_INS[name]
    if name == "collections.defaultdict" or name.endswith(".AttributeDict"):
        return Name(name, _dictionary)
    if BESIDE.fullmatch(name):
        return Name(name, _ignored)
    raise pickle.UnpicklingError(f"GLOBAL {name}")


def _open_pickle(path: Path) -> tuple[Any, Blueprint | None]:
    """The saved value, and the file's description of its network, if any."""
    saved = read_torch_file(path, _find)
    if isinstance(saved, tuple) and len(saved) == 4 and isinstance(saved[0], Name):  # Demucs 1
        saved = dict(zip(("klass", "args", "kwargs", "state"), saved, strict=True))
        check_plain(saved["kwargs"])
        saved["kwargs"] = _of_demucs_1(saved["kwargs"])
    if not isinstance(saved, Mapping) or not isinstance(saved.get("klass"), Name):
        return saved, None
    check_plain([saved["args"], saved["kwargs"]])
    blueprint = Blueprint(saved["klass"].name, tuple(saved["args"]), dict(saved["kwargs"]))
    state = saved["state"]
    if "__quantized" not in state:
        return state, blueprint
    check_total(state, size_bytes(path))
    with building(path, 8 * size_bytes(path)):  # a weight takes at least one bit
        network = network_of(blueprint)
    try:
        unpacked = dequantised(network, _read_within(state))
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    return {name: partial(torch.clone, tensor) for name, tensor in unpacked.items()}, blueprint


def _of_demucs_1(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a network of Demucs 1, as version 2 names them. Chunks have 10 seconds, as in that program."""
    return {**arguments, "sources": list(SOURCES), "resample": False, "is_scaled": False, "segment": 10}


def _shapes_of(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that are in the file as they are."""
    return {name: value.args[3] for name, value in weights.items() if value.func is read_tensor}


def _of_demucs_2(weights: Mapping[str, Any]) -> Blueprint | None:
    """The network that bare weights of Demucs 2 are for, by their names and shapes; None for other weights."""
    shapes = Shapes(_shapes_of(weights))
    if "encoder.0.2.weight" not in shapes or "lstm.linear.weight" not in shapes:
        return None
    sizes = DemucsV2.sizes_in(shapes, None)
    if sizes.pop("sources") != len(SOURCES):
        return None
    return Blueprint("demucs.model.Demucs", (), {"sources": list(SOURCES), "samplerate": 44100, "segment": 40, **sizes})


def _read_within(value: Any) -> Any:
    """The value with its tensors read, and with names in place of classes."""
    if isinstance(value, Mapping):
        return {key: _read_within(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_read_within, value))
    if isinstance(value, Name):
        return value.name
    return value() if isinstance(value, partial) else value


def _blueprint_of(metadata: Mapping[str, str]) -> Blueprint | None:
    """The description in the metadata that demucs 4.1 writes: the class's name, and its arguments in JSON."""
    if "klass" not in metadata:
        return None
    args, kwargs = (read_json(metadata[key], hook=_fraction_of) for key in ("args", "kwargs"))
    return Blueprint(metadata["klass"], tuple(args), kwargs)


def _fraction_of(node: dict[str, Any]) -> Any:
    return Fraction(node["numerator"], node["denominator"]) if node.get("_type") == "fraction" else node


def metadata_of(blueprint: Blueprint) -> dict[str, str]:
    """The metadata that demucs 4.1 writes for this description."""

    def plain(value: Any) -> Any:
        if isinstance(value, Fraction):
            return {"_type": "fraction", "numerator": value.numerator, "denominator": value.denominator}
        return str(value)

    args, kwargs = (json.dumps(value, default=plain) for value in (blueprint.args, blueprint.kwargs))
    return {"klass": blueprint.class_name, "args": args, "kwargs": kwargs}


def _open_safetensors(path: Path) -> tuple[dict[str, Any], Blueprint | None]:
    """A function to read each tensor, and the file's description of its network, if any."""
    header, header_bytes = read_safetensors_header(path)
    with safe_open(path, framework="pt"):  # checks the header, and compares it with the file's size
        pass
    metadata = header.pop("__metadata__", {})
    if "structure" in metadata:
        raise CheckpointError(f"{path} has weights quantised by demucs: use the publisher's .th file")
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {escaped(name)} is of type {entry['dtype']}: convert it to one of {', '.join(DTYPES)}"
            )
    tensors = {name: _tensor_of(path, 8 + header_bytes, entry) for name, entry in header.items()}
    return tensors, _blueprint_of(metadata)


def _tensor_of(path: Path, data_start: int, entry: Mapping[str, Any]) -> Callable[[], Tensor]:
    """A function that reads a tensor of a safetensors file."""
    dtype, shape, start = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"][0]
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return partial(read_tensor, path, Storage(dtype, math.prod(shape), data_start + start), 0, shape, strides)


def _unreadable(path: Path, reason: str = "") -> CheckpointError:
    kind = {".safetensors": "safetensors", ".onnx": "ONNX"}.get(path.suffix, "PyTorch")
    return CheckpointError(
        f"{path} ({size_bytes(path):,} bytes) is damaged, incomplete or not a {kind} checkpoint"
        f"{f' ({reason})' if reason else ''}: delete it and get it again"
    )
