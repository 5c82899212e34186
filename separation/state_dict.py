"""What a file of weights holds, read without running any code that it may contain.

PyTorch's pickles, those of Demucs with the classes that they name, and safetensors. This module alone unpickles, with
`weights_only=True`.
"""

import contextlib
import functools
import json
import logging
import pickle
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from separation.catalogue import size_bytes
from separation.documents import first_line, read_json, read_safetensors_header
from separation.errors import CheckpointError
from separation.models.base import Blueprint
from separation.models.htdemucs import dequantised, network_of
from separation.models.limits import Uninitialised
from separation.unwrap import state_dict_in

logger = logging.getLogger("separation")

READERS = 4  # threads that read a file of weights: one does not fill a fast disk
# What the header of a safetensors file calls the types that weights have.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
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
    """Building a network as a file says: of no more weights than it can hold, and with one sentence if that fails."""
    try:
        with Uninitialised(most_weights, "the file"):
            yield
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    except Exception as e:  # arguments may be anything
        raise CheckpointError(f"{path}: the network that it describes cannot be built: {first_line(e)}") from e


@dataclass(frozen=True)
class Stored:
    """What a file holds: for each name a tensor or a function that reads it, and what it says of its network."""

    path: Path
    tensors: dict[str, Any]
    blueprint: Blueprint | None


def open_weights(path: Path) -> Stored:
    """The state dict in a file, taken out of what trainers wrap it in, and not read yet."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: give a checkpoint's path (.ckpt, .pth, .th, .safetensors)")
    with _damaged(path):
        saved, blueprint = _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
        tensors, choices = state_dict_in(saved)
    if not tensors:
        raise CheckpointError(f"{path} holds no state dict (names and tensors): it is not a checkpoint of a model")
    for choice in choices:
        _warn_of_choice(path, choice)
    return Stored(path, tensors, blueprint)


@functools.cache  # once, however often a file is opened
def _warn_of_choice(path: Path, choice: str) -> None:
    logger.warning(f"{path} {choice}")


def read_weights(stored: Stored, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The state dict, in these types, others in the file's own.

    The file is read and cast by several threads, tensor by tensor, so that its memory is needed once.
    """

    def read(value: Any, dtype: torch.dtype | None) -> Tensor:
        tensor = value if isinstance(value, Tensor) else value()
        # A tensor of a pickle is mapped memory, which the copy reads.
        return tensor.to(dtype or tensor.dtype, copy=isinstance(value, Tensor))

    with _damaged(stored.path), ThreadPoolExecutor(READERS) as readers:
        tensors = readers.map(read, stored.tensors.values(), map(dtypes.get, stored.tensors))
        return dict(zip(stored.tensors, tensors, strict=True))


@contextlib.contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Whatever fails within becomes one sentence about the file."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as e:
        if code := re.search(r"GLOBAL (\S+)", str(e)):
            raise CheckpointError(
                f"{path} is refused: loading it would run code ({code[1]}), which a file of weights must not need; "
                "use a .safetensors file or one that holds a state dict alone"
            ) from e
        raise _unreadable(path) from e
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from e
    except Exception as e:  # of a damaged file, PyTorch's readers raise almost any type
        raise _unreadable(path) from e


class _Name(str):
    """A class that a pickle refers to, as its name alone: no object can be made of it."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> None:
        raise pickle.UnpicklingError(f"GLOBAL {self} is called")


class _Ignored:
    """What a pickle makes of NumPy's numbers, such as its author's figures of quality: no model needs them."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _mapping(*arguments: Any) -> OrderedDict[Any, Any]:
    """An empty dictionary in place of one that makes its own values."""
    return OrderedDict()


def _fraction(*parts: Any) -> Fraction:
    """A fraction as a pickle spells it, `"39/5"` or `39, 5`; nothing that would take long to compute."""
    text = "/".join(map(str, parts))
    if not re.fullmatch(r"\d{1,9}(/[1-9]\d{0,8})?", text):
        raise pickle.UnpicklingError("GLOBAL fractions.Fraction is called")
    return Fraction(text)


# What Demucs' own files refer to beside tensors. Each gets something harmless: the classes themselves stay unknown.
STAND_INS: list[Any] = [
    (_Name("demucs.demucs.Demucs"), "demucs.demucs.Demucs"),
    (_Name("demucs.hdemucs.HDemucs"), "demucs.hdemucs.HDemucs"),
    (_Name("demucs.hdemucs.HDemucs"), "demucs.wdemucs.WDemucs"),  # its first name
    (_Name("demucs.htdemucs.HTDemucs"), "demucs.htdemucs.HTDemucs"),
    (_Name("diffq.diffq.DiffQuantizer"), "diffq.diffq.DiffQuantizer"),
    (_Name("diffq.uniform.UniformQuantizer"), "diffq.uniform.UniformQuantizer"),
    (_fraction, "fractions.Fraction"),
    (_Ignored, "numpy.dtype"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
]
# What trainers save beside the weights: objects of these packages, which are not imported.
BESIDE = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|torchmetrics|hydra|omegaconf|ml_collections|argparse|pathlib|typing"
    r"|torch\.optim)\..*"
    r"|builtins\.(dict|list|int|float|str|bool|tuple|frozenset)"
)
_unpickling = threading.Lock()  # PyTorch keeps them for all threads


def _open_pickle(path: Path) -> tuple[Any, Blueprint | None]:
    """What was saved, its tensors mapped from the file where the format allows it."""
    with path.open("rb") as stream:
        is_zip = stream.read(4) == b"PK\x03\x04"  # older formats cannot be mapped
    with _unpickling, torch.serialization.safe_globals([*_stand_ins_beside(path, is_zip), *STAND_INS]):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(saved, Mapping) or not isinstance(saved.get("klass"), _Name):
        return saved, None
    blueprint = Blueprint(str(saved["klass"]), tuple(saved["args"]), dict(saved["kwargs"]))
    state = saved["state"]
    if "__quantized" not in state:
        return state, blueprint
    with building(path, 8 * size_bytes(path)):  # a weight has a bit at least
        network = network_of(blueprint)
    try:
        return dequantised(network, state), blueprint
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e


def _stand_ins_beside(path: Path, is_zip: bool) -> list[Any]:
    """Stand-ins for what trainers save beside the weights, of a format that tells what it refers to."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
    return [(stand_in, name) for name in names if (stand_in := _stand_in(name)) is not None]


def _stand_in(name: str) -> Any:
    """Something harmless in place of what a trainer saved; None for what such a file must not refer to."""
    if name == "collections.defaultdict":
        return _mapping
    if name.endswith(".AttributeDict"):
        return OrderedDict
    return type("Ignored", (_Ignored,), {}) if BESIDE.fullmatch(name) else None


def _blueprint_of(metadata: Mapping[str, str]) -> Blueprint | None:
    """As demucs 4.1 keeps it in a safetensors file: the class's name, and its arguments in JSON."""
    if "klass" not in metadata:
        return None
    args, kwargs = (read_json(metadata[key], hook=_fraction_of) for key in ("args", "kwargs"))
    return Blueprint(metadata["klass"], tuple(args), kwargs)


def _fraction_of(node: dict[str, Any]) -> Any:
    return Fraction(node["numerator"], node["denominator"]) if node.get("_type") == "fraction" else node


def metadata_of(blueprint: Blueprint) -> dict[str, str]:
    def plain(value: Any) -> Any:
        if isinstance(value, Fraction):
            return {"_type": "fraction", "numerator": value.numerator, "denominator": value.denominator}
        return str(value)

    args, kwargs = (json.dumps(value, default=plain) for value in (blueprint.args, blueprint.kwargs))
    return {"klass": blueprint.class_name, "args": args, "kwargs": kwargs}


def _open_safetensors(path: Path) -> tuple[dict[str, Any], Blueprint | None]:
    """For each name a function that reads its tensor."""
    header, header_bytes = read_safetensors_header(path)
    with safe_open(path, framework="pt"):  # checks the header, also against the size of the file
        pass
    metadata = header.pop("__metadata__", {})
    if "structure" in metadata:
        raise CheckpointError(f"{path} holds weights that demucs packed: use the publisher's .th file of them")
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {name} has the type {entry['dtype']}: use one of {', '.join(DTYPES)}")
    tensors = {name: partial(_read_tensor, path, 8 + header_bytes, entry) for name, entry in header.items()}
    return tensors, _blueprint_of(metadata)


def _read_tensor(path: Path, data_start: int, entry: Mapping[str, Any]) -> Tensor:
    """A tensor of a safetensors file, read at once: mapped memory would be read page by page, slowly if not cached."""
    start, stop = entry["data_offsets"]
    content = torch.empty(stop - start, dtype=torch.uint8)
    with path.open("rb", buffering=0) as stream:
        stream.seek(data_start + start)
        missing = content.numpy().data
        while missing:
            n_bytes = stream.readinto(missing)
            if not n_bytes:
                raise EOFError(f"{path} became shorter while it was read")
            missing = missing[n_bytes:]
    return content.view(DTYPES[entry["dtype"]]).view(entry["shape"])


def _unreadable(path: Path) -> CheckpointError:
    kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
    return CheckpointError(
        f"{path} ({size_bytes(path):,} bytes) is damaged, incomplete or no {kind} checkpoint: "
        "delete it and get it again"
    )
