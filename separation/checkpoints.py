"""From a name to a loaded model: the YAML and the verified file of catalogue.py -> model in eval mode.

This module alone unpickles, with `weights_only=True`. When it is done every weight has been read: nothing of the file
is needed any more, and no page of it is left for the first chunk to wait for.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from separation.catalogue import (
    SOURCE_SHA256,
    Checkpoint,
    fetch,
    files_for,
    first_line,
    read_config,
    size_bytes,
)
from separation.device import choose_device, choose_precision
from separation.errors import CheckpointError, InputError, OutputError
from separation.models import ARCHITECTURES
from separation.models.attention import AttentionChoice, choose_attention
from separation.models.base import SeparationModel
from separation.models.native import NotFusedError

logger = logging.getLogger("separation")

# Parts that relatives of an architecture have. Community files name them even where they are off.
ABSENT_PARTS = {"linear_transformer_depth", "skip_connection"}
NESTINGS = ("state_dict", "state", "model", "model_state_dict")  # where trainers put the weights in what they save
WRAPPERS = ("module.", "model.")  # what DataParallel and Lightning put before every key
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
def _collector_paused() -> Iterator[None]:
    """Keeps the thousands of objects of a new model from setting off Python's garbage collector.

    It would walk all of PyTorch's too: a tenth of a second, and nothing of them is garbage.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collector_paused()
def load_model(
    name_or_path: str | Path,
    *,
    checkpoint: Path | str | None = None,
    stems: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    precision: torch.dtype | str = "fp32",
    attention: str = "auto",
) -> SeparationModel:
    """Load a model in eval mode, without gradients, on the device.

    `checkpoint` is a file of weights to use in place of the YAML's own; it is not compared with a sha256. Of a
    checkpoint made of specialists, only those for `stems` are fetched and loaded, in that order; other models keep all
    their stems. `device` and `precision` may be "auto". `attention` is a name of `separation.models.attention.NAMES`.

    Raises RecipeError for an unknown model or stem, CheckpointError for weights that are missing or do not fit.
    """
    description = read_config(name_or_path)
    device = choose_device(device) if isinstance(device, str) else device
    dtype = choose_precision(precision, device) if isinstance(precision, str) else precision
    files = files_for(description, stems)
    specialists = tuple(file.stem for file in files if file.stem is not None)
    model = _build(description, specialists)
    choice = choose_attention(attention, device, dtype, model.head_size) if model.head_size else None
    if choice is None or choice.name != "fused":  # that folds gains into the weights before it rounds them
        model.prepare(dtype)  # still without weights: it now says in which type each is wanted
    dtypes = {key: value.dtype for key, value in model.state_dict().items()}

    if checkpoint is None:
        paths = {file.stem: fetch(file) for file in files}
        if not paths:
            raise CheckpointError(f"{name_or_path} names no files of weights: give one with checkpoint=")
    elif len(files) > 1:
        raise CheckpointError(f"{description.name} needs {len(files)} files, checkpoint= gives one")
    else:
        paths = {specialists[0] if specialists else None: Path(checkpoint)}
    weights: dict[str, Tensor] = {}
    for stem, path in paths.items():
        prefix = type(model).key_prefix(stem)
        wanted = {key.removeprefix(prefix): dtype for key, dtype in dtypes.items() if key.startswith(prefix)}
        weights |= {prefix + key: value for key, value in _read_weights(path, wanted).items()}
    _assign(model, weights, f"{description.name} ({', '.join(str(path) for path in paths.values())})")

    model.name = description.name
    model.stems = specialists or description.stems
    model.sample_rate = description.sample_rate
    model.chunk_samples = description.chunk_samples
    model.eval().requires_grad_(False)
    if choice is None:
        model.prepare(dtype)
    else:
        _prepare(model, dtype, choice, asked_for=attention)
    return model.to(device)


def random_weights(name_or_path: str | Path, *, seed: int = 0) -> dict[str, Tensor]:
    """Weights of this model's shapes as a training would begin with: to measure time and memory without a checkpoint.

    The same seed gives the same weights. No two tensors share memory, so any format can hold them; `load_model` takes
    the file as `checkpoint=`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(read_config(name_or_path), (), initialised=True)
    prefix = type(model).key_prefix(None)
    return {key.removeprefix(prefix): value.clone() for key, value in model.state_dict().items()}


def _prepare(model: SeparationModel, dtype: torch.dtype, choice: AttentionChoice, *, asked_for: str) -> None:
    try:
        model.prepare(dtype, attention=choice.name)
    except NotFusedError as e:
        if asked_for == choice.name:
            raise InputError(f"{model.name} cannot use attention {choice.name!r} ({e}): use auto") from e
        choice = AttentionChoice("itemwise", f"not fused: {e}")
        model.prepare(dtype, attention=choice.name)
    model.attention = choice.name
    logger.info(f"{model.name}: attention {choice.name} ({choice.reason})")


def convert(checkpoint: Path, target: Path) -> None:
    """Write a checkpoint's state dict, in the types that it has, as a .safetensors file: the form that loads fastest.

    `target` appears complete or not at all. Its metadata names the checkpoint and holds its sha256, by which `fetch`
    knows what it is. Raises CheckpointError for a checkpoint that cannot be used, InputError for a target with another
    ending, OutputError where it cannot be written.
    """
    if target.suffix != ".safetensors":
        raise InputError(f"the output {str(target)!r} must end in .safetensors: that is its format")
    weights = _read_weights(checkpoint, {})
    with checkpoint.open("rb") as stream:
        metadata = {SOURCE_SHA256: hashlib.file_digest(stream, "sha256").hexdigest(), "source_name": checkpoint.name}
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, part, metadata)
            shutil.copymode(checkpoint, part)  # the library lets no one else read what it writes
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as e:
        raise OutputError(f"{target} cannot be written ({first_line(e)}): free space, or name another place") from e


def _build(description: Checkpoint, specialists: tuple[str, ...], *, initialised: bool = False) -> SeparationModel:
    """The model without weights, on the meta device, so that no memory is used or filled in vain.

    If `initialised`, it is on the CPU with PyTorch's random weights.
    """
    if description.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{description.name}.yaml: unknown architecture {description.architecture!r}, use one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture: Any = ARCHITECTURES[description.architecture]
    known = {field.name for field in fields(architecture.Config)}
    hyper_parameters = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in description.hyper_parameters.items()
        if key not in architecture.TRAINING_KEYS and not (key in ABSENT_PARTS and not value)
    } | {key: value for key, value in description.audio.items() if key in architecture.AUDIO_KEYS}
    if unknown := sorted(set(hyper_parameters) - known):
        raise CheckpointError(
            f"{description.name}.yaml: {description.architecture} has no hyper-parameter {', '.join(unknown)}: "
            "the checkpoint needs another architecture, or the key is misspelt"
        )
    try:
        config = architecture.Config(**hyper_parameters)
        # Built where PyTorch computes and then emptied: operations on the meta device itself would import its
        # compiler, most of a second. Until it is written to, memory on the CPU costs nothing either.
        with contextlib.nullcontext() if initialised else _Uninitialised():
            model = architecture(config, specialists=specialists) if specialists else architecture(config)
        if not initialised:
            model.to("meta")
    except (TypeError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{description.name}.yaml: the model section is not usable: {first_line(e)}") from e
    outputs = getattr(config, "num_stems", len(description.stems))
    if outputs != len(description.stems):
        raise CheckpointError(f"{description.name}.yaml names {len(description.stems)} stems, num_stems is {outputs}")
    return model


class _Uninitialised(TorchFunctionMode):
    """Within it, new layers keep whatever their memory holds in place of random numbers."""

    _SKIPPED = frozenset(
        {getattr(torch.nn.init, name) for name in dir(torch.nn.init) if re.fullmatch("[a-z].*_", name)}
        | {Tensor.uniform_, Tensor.normal_}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _read_weights(path: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The state dict in a file, taken out of what trainers wrap it in; in these types, others in the file's own.

    The file is read and cast by several threads, tensor by tensor, so that its memory is needed once.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: give a checkpoint's path (.ckpt, .pth, .th, .safetensors)")
    try:
        stored = _unwrapped(_open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path))
        if not stored:
            raise CheckpointError(f"{path} holds no state dict (names and tensors): it is not a checkpoint of a model")

        def read(key: str) -> Tensor:
            value = stored[key]
            tensor = value if isinstance(value, Tensor) else value()
            # A tensor of a pickle is mapped memory, which the copy reads.
            return tensor.to(dtypes.get(key, tensor.dtype), copy=isinstance(value, Tensor))

        with ThreadPoolExecutor(READERS) as readers:
            return dict(zip(stored, readers.map(read, stored), strict=True))
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


def _open_pickle(path: Path) -> Any:
    """What was saved, its tensors mapped from the file where the format allows it."""
    with path.open("rb") as stream:
        is_zip = stream.read(4) == b"PK\x03\x04"  # older formats cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _open_safetensors(path: Path) -> dict[str, Callable[[], Tensor]]:
    """For each name a function that reads its tensor."""
    with safe_open(path, framework="pt"):  # checks the header, also against the size of the file
        pass
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {name} has the type {entry['dtype']}: use one of {', '.join(DTYPES)}")
    return {name: partial(_read_tensor, path, 8 + header_bytes, entry) for name, entry in header.items()}


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


def _unwrapped(saved: Any) -> dict[str, Any]:
    """The state dict in what was saved, under the model's own names; empty if there is none."""
    while isinstance(saved, Mapping):
        inner = next((saved[key] for key in NESTINGS if isinstance(saved.get(key), Mapping)), None)
        if inner is None:
            break
        saved = inner
    if not isinstance(saved, Mapping) or not all(isinstance(value, Tensor | partial) for value in saved.values()):
        return {}
    weights = {str(key): value for key, value in saved.items()}
    while prefix := next((p for p in WRAPPERS if weights and all(key.startswith(p) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _unreadable(path: Path) -> CheckpointError:
    kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
    return CheckpointError(
        f"{path} ({size_bytes(path):,} bytes) is damaged, incomplete or no {kind} checkpoint: "
        "delete it and get it again"
    )


def _assign(model: SeparationModel, weights: dict[str, Tensor], source: str) -> None:
    """Make these tensors the model's own; every key and shape must match."""
    expected = model.state_dict()
    faults = {
        "missing": [key for key in expected if key not in weights],
        "unexpected": [key for key in weights if key not in expected],
        "of another shape": [
            f"{key}: {list(weights[key].shape)} instead of {list(value.shape)}"
            for key, value in expected.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    if any(faults.values()):
        found = "; ".join(
            f"{len(keys)} of its keys are {fault} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for fault, keys in faults.items()
            if keys
        )
        raise CheckpointError(f"{source} seems to be of another architecture or size: {found}")
    model.load_state_dict(weights, strict=True, assign=True)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    stranded = [name for name, tensor in tensors if tensor.is_meta]
    assert not stranded, f"not in the state dict, so nothing fills them: {stranded}"
