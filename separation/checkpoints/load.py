"""From a name to a loaded model: the YAML and the verified file of catalogue.py -> model in eval mode.

When it is done every weight has been read: nothing of the file is needed any more, and no page of it is left for the
first chunk to wait for.
"""

import contextlib
import functools
import gc
import hashlib
import itertools
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from separation.checkpoints import foreign
from separation.checkpoints.catalogue import (
    SOURCE_SHA256,
    WEIGHT_SUFFIXES,
    Checkpoint,
    WeightFile,
    converted_path,
    fetch,
    file_state,
    files_for,
    known_sha256,
    loaded_sha256,
    local_path,
    read_config,
)
from separation.checkpoints.state_dict import Stored, building, metadata_of, open_weights, read_weights
from separation.device import choose_device, choose_precision, floats_of
from separation.documents import bare, first_line, shown
from separation.errors import CheckpointError, EstimateError, InputError
from separation.models import ARCHITECTURES
from separation.models.attention import LAYERS, AttentionChoice, choose_attention
from separation.models.base import Identity, Origin, SeparationModel
from separation.models.kernels.native import NotFusedError, library
from separation.models.limits import Uninitialised, check_arguments, check_frames
from separation.models.shapes import Shapes
from separation.system.memory import enough_memory
from separation.system.os_errors import output_errors
from separation.system.output import OutputFolder
from separation.system.places import size_bytes
from separation.system.record import check_targets

logger = logging.getLogger("separation")

# Parts that relatives of an architecture have are named in community files also where they are off: None, 0, False, an
# empty list, or such a value.
OFF = {"num_subbands": 1}
METADATA = {"name", "type", "model_name", "model_type", "version", "description"}  # of the `model:` section


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

    `name_or_path` is a model's name; or, of your own, the path of a YAML file, of weights with their YAML beside them
    (`x.ckpt`), of a folder with one of each, or of such a pair without its suffix. `checkpoint` is a file of weights to
    use in place of those; it is not compared with a sha256. Of a checkpoint made of specialists, only those for `stems`
    are fetched and loaded, in that order; other models keep all their stems. `device` and `precision` may be "auto";
    what cannot be computed in "int8" is computed in floats, as for "auto", and a warning says so.
    `attention` is a name of `separation.models.attention.NAMES`.

    Raises RecipeError for an unknown model or stem, CheckpointError for weights that are missing or do not fit.
    """
    description = read_config(name_or_path)
    if description.ignored:
        _warn_of_ignored(description.source, description.ignored)
    device = choose_device(device) if isinstance(device, str) else device
    asked = choose_precision(precision, device) if isinstance(precision, str) else precision
    dtype = floats_of(asked, device)
    files = files_for(description, stems)
    parts = _parts(files)
    specialists = tuple(file.stem for file in files if file.stem is not None)
    paths: list[Path] = []  # found first only where they must say what is built: what is wrong there costs no download
    if description.architecture is None:
        paths = _weight_paths(description, files, checkpoint)
        keys = list(open_weights(paths[0]).tensors)
        description = replace(description, architecture=_architecture(description, keys, paths[0]))
    model = _build(description, specialists)
    choice = choose_attention(attention, device, dtype, model.head_size) if model.head_size else None
    needs_weights = choice is not None and choice.name in LAYERS

    paths = paths or _weight_paths(description, files, checkpoint)
    checksums = _checksums(files, paths, given=checkpoint is not None)
    stored = dict(zip(parts, map(open_weights, paths), strict=True))
    for file in stored.values():
        if what := foreign.by_names(file.tensors):
            raise foreign.refusal(file.path, what)
    _follow(model, stored)
    if not needs_weights:
        _prepare(model, asked, dtype, choice, attention)
    dtypes = {key: value.dtype for key, value in model.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for part, file in stored.items():
        prefix = type(model).key_prefix(part)
        wanted = {key.removeprefix(prefix): dtype for key, dtype in dtypes.items() if key.startswith(prefix)}
        weights |= {prefix + key: value for key, value in read_weights(file, wanted).items()}
    weights = {key: value for key, value in weights.items() if not re.fullmatch(model.UNUSED_KEYS, key)}
    _check_fit(model, weights, description, stored)
    model.load(weights, _origin(description, dict(zip(parts, checksums, strict=True))))
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    stranded = [name for name, tensor in tensors if tensor.is_meta]
    assert not stranded, f"not in the state dict, so nothing fills them: {stranded}"
    if needs_weights:
        _prepare(model, asked, dtype, choice, attention)
    model = model.to(device)
    if model.is_half and not model.fits(torch.float16):
        logger.info(f"{model.name}: computed in bfloat16, for its weights exceed the range of float16")
        del model
        return load_model(
            name_or_path,
            checkpoint=checkpoint,
            stems=stems,
            device=device,
            precision=torch.bfloat16,
            attention=attention,
        )
    return model


def count_parameters(description: Checkpoint) -> tuple[str, int]:
    """The architecture of a checkpoint, and how many numbers all of its networks have learned; nothing is downloaded.

    Where its files are here, they are asked too. Raises CheckpointError for a model that cannot be built.
    """
    files = description.files
    places = [converted_path(file) or local_path(file) for file in files]
    stored = {part: open_weights(path) for part, path in zip(_parts(files), places, strict=False) if path.exists()}
    if description.architecture is None:
        first = next(iter(stored.values()), None)
        keys, path = (None, None) if first is None else (list(first.tensors), first.path)
        description = replace(description, architecture=_architecture(description, keys, path))
    model = _build(description, tuple(file.stem for file in files if file.stem is not None))
    _follow(model, stored)
    assert description.architecture is not None
    return description.architecture, sum(parameter.numel() for parameter in model.parameters())


def _parts(files: Sequence[WeightFile]) -> list[str]:
    """What each file is for: a specialist's stem, else a number."""
    return [file.stem or str(number) for number, file in enumerate(files)] or ["0"]


def _follow(model: SeparationModel, stored: Mapping[str, Stored]) -> None:
    """Rebuild those parts of a model whose files say themselves what they are, and leave it on the meta device."""
    for part, file in stored.items():
        if file.blueprint is not None:
            with building(file.path, size_bytes(file.path)):
                model.follow(part, file.blueprint)
    model.to("meta")


@functools.cache  # once, however often a file is loaded
def _warn_of_ignored(path: Path, keys: tuple[str, ...]) -> None:
    logger.warning(f"{path}: ignored, since nothing here knows them: {bare(', '.join(keys), most=500)}")


def _weight_paths(description: Checkpoint, files: Sequence[WeightFile], checkpoint: Path | str | None) -> list[Path]:
    """Where these files lie, downloaded if need be, or the one that is given in their place."""
    if checkpoint is not None:
        if len(files) > 1:
            raise CheckpointError(f"{description.name} needs {len(files)} files, checkpoint= gives one")
        return [Path(checkpoint)]
    if not files:
        endings = ", ".join(WEIGHT_SUFFIXES)
        raise CheckpointError(
            f"{description.source} names no files of weights, and there are none of its name ({endings}) beside it: "
            "give them with checkpoint= or --model-path"
        )
    return [fetch(file) for file in files]


def _checksums(files: Sequence[WeightFile], paths: Sequence[Path], *, given: bool) -> list[Callable[[], str]]:
    """How to learn the sha256 of each file that is about to be loaded; of a user's own it takes a second at most."""
    if not given and all(map(known_sha256, files)):
        return [partial(str, known_sha256(file)) for file in files]
    return [partial(loaded_sha256, path, file_state(path)) for path in paths]


def _architectures_with(keys: Sequence[str]) -> list[str]:
    """The architectures that weights of these names may be of."""
    return [
        name
        for name, architecture in ARCHITECTURES.items()
        if all(any(re.fullmatch(pattern, key) for key in keys) for pattern in architecture.KEY_PATTERNS)
    ]


def _architecture(description: Checkpoint, keys: Sequence[str] | None, weights: Path | None) -> str:
    """The one architecture that has weights of these names (None: any) and, of several, takes the hyper-parameters.

    Raises CheckpointError if there is none or more than one.
    """
    found = list(ARCHITECTURES) if keys is None else _architectures_with(keys)
    if weights and (what := foreign.by_names(keys or ())):
        raise foreign.refusal(weights, what)
    if not found:
        raise CheckpointError(
            f"{weights} is of none of the architectures {', '.join(ARCHITECTURES)}: its first names are "
            f"{', '.join((keys or ())[:3])}"
        )
    if len(found) > 1:
        found = [name for name in found if _takes(ARCHITECTURES[name], description)]
    if len(found) != 1:
        raise CheckpointError(
            f"{description.source} does not tell its architecture ({' or '.join(found) or 'none takes all its keys'}): "
            f"add the line `architecture: NAME`, one of {', '.join(ARCHITECTURES)}"
        )
    return found[0]


def _hyper_parameters(architecture: Any, description: Checkpoint) -> dict[str, Any]:
    """What the YAML gives for the architecture's Config, without what only training reads and parts that are off."""
    known = {field.name for field in fields(architecture.Config)}
    return (
        ({"num_stems": len(description.stems)} if "num_stems" in known else {})
        | {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in description.hyper_parameters.items()
            if key not in architecture.TRAINING_KEYS | METADATA and (key in known or (value and value != OFF.get(key)))
        }
        | {name: description.audio[key] for key, name in architecture.AUDIO_KEYS.items() if key in description.audio}
    )


def _disagreements(description: Checkpoint, shapes: Shapes) -> list[str]:
    """In which keys of the YAML the weights of these shapes are others."""
    assert description.architecture is not None
    architecture: Any = ARCHITECTURES[description.architecture]
    config = architecture.Config(**_hyper_parameters(architecture, description))
    sections = {name: f"audio.{key}" for key, name in architecture.AUDIO_KEYS.items() if key in description.audio}
    said = []
    for name, found in architecture.sizes_in(shapes, config).items():
        given = getattr(config, name)
        is_list = isinstance(given, list | tuple)
        if found is None or (isinstance(found, tuple) and None in found):
            continue
        if found == (len(given) if is_list and isinstance(found, int) else given):
            continue
        where = sections.get(name, f"model.{name}")
        if is_list and isinstance(found, int):
            said.append(f"{where} has {len(given)} entries, the weights are for {found}")
        else:
            said.append(f"{where} is {_in_yaml(given)}, the weights have {_in_yaml(found)}")
    return said


def _in_yaml(value: Any) -> str:
    """A value as an error message shows it, spelt as in a YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return shown(list(value) if isinstance(value, tuple) else value)


def _takes(architecture: Any, description: Checkpoint) -> bool:
    """Whether the architecture knows all hyper-parameters, and has a default for all others."""
    given = set(_hyper_parameters(architecture, description))
    needed = {f.name for f in fields(architecture.Config) if f.default is MISSING and f.default_factory is MISSING}
    return needed <= given <= {field.name for field in fields(architecture.Config)}


def random_weights(name_or_path: str | Path, *, seed: int = 0) -> dict[str, Tensor]:
    """Weights of this model's shapes as a training would begin with: to measure time and memory without a checkpoint.

    The same seed gives the same weights. No two tensors share memory, so any format can hold them; `load_model` takes
    the file as `checkpoint=`. Of a checkpoint that is made of several networks they are one network's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        description = read_config(name_or_path)
        if description.architecture is None:
            description = replace(description, architecture=_architecture(description, None, None))
        model = _build(description, (), initialised=True)
    prefix, state = type(model).key_prefix("0"), model.state_dict()
    return {key.removeprefix(prefix): value.clone() for key, value in state.items() if key.startswith(prefix)}


def model_for_gpu(name_or_path: str | Path, dtype: torch.dtype) -> SeparationModel:
    """A model with a CUDA GPU's layers in that precision, float16 or bfloat16, and without weights: on the meta device.

    It gives shapes alone. Of a checkpoint made of specialists it is the first, for all are alike.
    Raises RecipeError for an unknown model, InputError for one that has no layers for a GPU.
    """
    description = read_config(name_or_path)
    if description.architecture is None:
        description = replace(description, architecture=_architecture(description, None, None))
    specialists = tuple(file.stem for file in description.files if file.stem is not None)[:1]
    model = _build(description, specialists).eval().requires_grad_(False)
    try:
        with torch.device("meta"):
            model.fuse_for_gpu(dtype)
    except NotFusedError as e:
        raise InputError(f"{model.name} has no layers for a GPU: {e}") from e
    return model


def _origin(description: Checkpoint, checksums: Mapping[str, Callable[[], str]]) -> Origin:
    assert description.architecture is not None
    hyper_parameters = _hyper_parameters(ARCHITECTURES[description.architecture], description)
    if description.shares:
        hyper_parameters["shares"] = description.shares
    return Origin(
        architecture=description.architecture,
        hyper_parameters={name: repr(value) for name, value in hyper_parameters.items()},
        stems=description.stems,
        weights=checksums,
    )


def _prepare(
    model: SeparationModel, asked: torch.dtype, floats: torch.dtype, choice: AttentionChoice | None, attention: str
) -> None:
    """Prepare the model for the precision that was asked for or, where it cannot compute in int8, for floats.

    `attention` is the backend that was asked for.
    """
    dtype = asked if model.has_int8 and choice is not None and choice.name == "fused" else floats
    if choice is None:
        model.prepare(dtype)
    else:
        try:
            model.prepare(dtype, attention=choice.name)
        except NotFusedError as e:
            if attention == choice.name:
                raise InputError(f"{model.name} cannot use attention {choice.name!r} ({e}): use auto") from e
            plain = "itemwise" if choice.name == "fused" else "sdpa"
            choice, dtype = AttentionChoice(plain, f"not {choice.name}: {e}"), floats
            model.prepare(dtype, attention=choice.name)
        logger.info(f"{model.name}: attention {choice.name} ({choice.reason})")
    if dtype != asked:
        logger.warning(f"{model.name} is not computed in int8, but in floats ({_why_not_int8(model, choice)})")


def _why_not_int8(model: SeparationModel, choice: AttentionChoice | None) -> str:
    if choice is None or not model.has_int8:
        return "int8 is for RoFormers"
    try:
        library()
    except NotFusedError as e:
        return str(e)
    return f"attention {choice.name}: {choice.reason}"


def convert(checkpoint: Path, target: Path, *, overwrite: bool = False) -> None:
    """Write a checkpoint's state dict, in the types that it has, as a .safetensors file: the form that loads fastest.

    `target` appears complete or not at all; only with `overwrite` does it replace a file. Its metadata names the
    checkpoint and holds its sha256, by which `fetch` knows what it is, and what it says of its network, in the way of
    demucs 4.1. Raises CheckpointError for a checkpoint that cannot be used, InputError for a target with another
    ending, OutputError where it cannot be written.
    """
    if target.suffix != ".safetensors":
        raise InputError(f"the output {str(target)!r} must end in .safetensors: that is its format")
    check_targets(target.parent, [target.name], overwrite=overwrite)
    stored = open_weights(checkpoint)
    weights = read_weights(stored, {})
    with checkpoint.open("rb") as stream:
        metadata = {SOURCE_SHA256: hashlib.file_digest(stream, "sha256").hexdigest(), "source_name": checkpoint.name}
    if stored.blueprint is not None:
        metadata |= metadata_of(stored.blueprint)
    with OutputFolder(target.parent, overwrite=overwrite, recorded=False) as folder:
        part = folder.work / target.name
        with output_errors(target, SafetensorError):
            safetensors.torch.save_file({key: value.contiguous() for key, value in weights.items()}, part, metadata)
            shutil.copymode(checkpoint, part)  # the library lets no one else read what it writes
        folder.publish({"weights": part})


def _build(description: Checkpoint, specialists: tuple[str, ...], *, initialised: bool = False) -> SeparationModel:
    """The model without weights, on the meta device, so that no memory is used or filled in vain.

    If `initialised`, it is on the CPU with PyTorch's random weights.
    """
    if description.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{description.source}: unknown architecture {shown(description.architecture)}, use one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture: Any = ARCHITECTURES[description.architecture]
    known = {field.name for field in fields(architecture.Config)}
    hyper_parameters = _hyper_parameters(architecture, description)
    if unknown := sorted(set(hyper_parameters) - known):
        raise CheckpointError(
            f"{description.source}: {description.architecture} has no hyper-parameter "
            f"{bare(', '.join(unknown), most=200)}: "
            "the checkpoint needs another architecture, or the key is misspelt"
        )
    # Files without a stem of their own are as many networks, whose estimates are averaged.
    members = [file for file in description.files if file.stem is None]
    identity = Identity(
        name=description.name,
        stems=specialists or description.stems,
        sample_rate=description.sample_rate,
        chunk_samples=description.chunk_samples,
        standardised=description.normalised,
    )
    several: dict[str, Any] = {"specialists": specialists} if specialists else {}
    if len(members) > 1:
        several = {"members": len(members), "shares": description.shares}
    if "rescale" in known and not initialised:
        hyper_parameters["rescale"] = 0  # of random weights, with which a training begins
    try:
        check_arguments(hyper_parameters, {field.name: field.type for field in fields(architecture.Config)})
        check_frames(description.chunk_samples, hyper_parameters)
        config = architecture.Config(**hyper_parameters)
        outputs = getattr(config, "num_stems", len(description.stems))
        if outputs != len(description.stems):
            raise CheckpointError(f"{description.source} names {len(description.stems)} stems, num_stems is {outputs}")
        # Built where PyTorch computes and then emptied: operations on the meta device itself would import its
        # compiler, most of a second. Until it is written to, memory on the CPU costs nothing either.
        with enough_memory(description.name), Uninitialised():
            model = architecture(config, identity, **several)
        model = architecture(config, identity, **several) if initialised else model.to("meta")
    except (CheckpointError, EstimateError):
        raise
    except Exception as e:  # arguments may be anything
        raise CheckpointError(f"{description.source}: the model section is not usable: {first_line(e)}") from e
    if description.chunk_samples < model.least_samples:
        raise CheckpointError(
            f"{description.source}: chunk_size is {description.chunk_samples} samples, and its Fourier transform needs "
            f"at least {model.least_samples}: correct it"
        )
    return model


def _check_fit(
    model: SeparationModel, weights: Mapping[str, Tensor], description: Checkpoint, stored: Mapping[str, Stored]
) -> None:
    """Raise CheckpointError unless these tensors, of those files, have every key and shape of the model's."""
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
        source = f"{description.name} ({', '.join(str(file.path) for file in stored.values())})"
        told = _architectures_with([key for file in stored.values() for key in file.tensors])
        if told and description.architecture not in told:
            raise CheckpointError(
                f"{source} is of the architecture {' or '.join(told)}, by the names of its weights, and not "
                f"{description.architecture}, as {description.source} says: {found}"
            )
        for part in stored if told else ():
            prefix = type(model).key_prefix(part)
            shapes = {key.removeprefix(prefix): tuple(w.shape) for key, w in weights.items() if key.startswith(prefix)}
            if others := _disagreements(description, Shapes(shapes)):
                raise CheckpointError(
                    f"{source} does not fit {description.source}: {'; '.join(others)}: correct it, or use the YAML "
                    "that the weights were published with"
                )
        raise CheckpointError(f"{source} seems to be of another architecture or size: {found}")
