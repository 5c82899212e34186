"""From a checkpoint's description to its model without weights: the architecture and its hyper-parameters."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from separation.checkpoints import foreign
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.description import Checkpoint, WeightFile
from separation.checkpoints.files import converted_path, local_path
from separation.checkpoints.state_dict import Stored, building, open_weights
from separation.documents import escaped, first_line, quoted
from separation.errors import CheckpointError, EstimateError, InputError
from separation.models import ARCHITECTURES
from separation.models.base import Identity, SeparationModel
from separation.models.kernels.native import NotFusedError
from separation.models.limits import Uninitialised, check_arguments, check_frames
from separation.system.memory import enough_memory
from separation.system.places import size_bytes

# Community YAML files list options of related architectures even when they are off. Off is None, 0, False, an empty
# list, or the value given here.
OFF = {"num_subbands": 1}
METADATA = {"name", "type", "model_name", "model_type", "version", "description"}  # in the `model:` section


def build(description: Checkpoint, specialists: tuple[str, ...] = (), *, initialised: bool = False) -> SeparationModel:
    """The model without weights, on the meta device; if `initialised`, on the CPU with PyTorch's random weights.

    If the checkpoint is made of specialists, the model has those for the stems in `specialists`.

    Raises CheckpointError for a description that no model can be built from.
    """
    if description.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{description.source}: unknown architecture {quoted(description.architecture)}: use one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture: Any = ARCHITECTURES[description.architecture]
    types = {field.name: field.type for field in fields(architecture.Config)}
    arguments = hyper_parameters(description)
    if unknown := sorted(set(arguments) - set(types)):
        raise CheckpointError(
            f"{description.source}: {description.architecture} has no hyper-parameter "
            f"{escaped(', '.join(unknown), most=200)}: correct the key, or use another architecture"
        )
    if "rescale" in types and not initialised:
        arguments["rescale"] = 0  # Demucs rescales only random weights, for training
    try:
        check_arguments(arguments, types)
        check_frames(description.chunk_samples, arguments)
        config = architecture.Config(**arguments)
        outputs = getattr(config, "num_stems", len(description.stems))
        if outputs != len(description.stems):
            raise CheckpointError(
                f"{description.source} names {len(description.stems)} stems and num_stems is {outputs}: correct one"
            )
        networks = _networks(description, specialists)
        # On the meta device, some operations would import PyTorch's compiler, which takes most of a second. Memory on
        # the CPU costs nothing until something is written to it.
        with enough_memory(description.name), Uninitialised():
            model: SeparationModel = architecture(config, _identity(description, specialists), **networks)
        if initialised:
            model = architecture(config, _identity(description, specialists), **networks)
        else:
            model = model.to("meta")
    except (CheckpointError, EstimateError):
        raise
    except Exception as e:  # arguments can be anything
        raise CheckpointError(f"{description.source}: the model section is not valid: {first_line(e)}") from e
    if description.chunk_samples < model.least_samples:
        raise CheckpointError(
            f"{description.source}: chunk_size is {description.chunk_samples} samples, and its Fourier transform needs "
            f"at least {model.least_samples}: correct it"
        )
    return model


def _identity(description: Checkpoint, specialists: tuple[str, ...]) -> Identity:
    return Identity(
        name=description.name,
        stems=specialists or description.stems,
        sample_rate=description.sample_rate,
        chunk_samples=description.chunk_samples,
        standardised=description.standardised,
        residual=description.residual,
    )


def _networks(description: Checkpoint, specialists: tuple[str, ...]) -> dict[str, Any]:
    """The constructor's arguments for a checkpoint of several networks: specialists, or members that are averaged."""
    if specialists:
        return {"specialists": specialists}
    members = sum(file.stem is None for file in description.files)
    return {"members": members, "shares": description.shares} if members > 1 else {}


def hyper_parameters(description: Checkpoint) -> dict[str, Any]:
    """The arguments of the architecture's Config, without keys that only training reads and options that are off."""
    assert description.architecture is not None
    architecture: Any = ARCHITECTURES[description.architecture]
    known = {field.name for field in fields(architecture.Config)}
    ignored = architecture.TRAINING_KEYS | METADATA
    found: dict[str, Any] = {"num_stems": len(description.stems)} if "num_stems" in known else {}
    for key, value in _flat(description.hyper_parameters):
        is_off = not value or value == OFF.get(key)
        if key not in ignored and (key in known or not is_off):
            found[key] = tuple(value) if isinstance(value, list) else value
    for key, name in architecture.AUDIO_KEYS.items():
        if key in description.audio:
            found[name] = description.audio[key]
    return found


def _flat(section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a section; the keys in a section inside it follow its name and an underscore."""
    for key, value in section.items():
        yield from (
            ((f"{key}_{inner}", each) for inner, each in value.items()) if isinstance(value, dict) else [(key, value)]
        )


# ---------------------------------------------------------------------------------------------------------------------
# Architectures that no YAML names


def with_architecture(description: Checkpoint, stored: Stored | None = None) -> Checkpoint:
    """The description with its architecture: as named, or recognised by the weights' names and the hyper-parameters.

    Raises CheckpointError unless exactly one architecture is possible.
    """
    if description.architecture is not None:
        return description
    if stored is None:
        found = list(ARCHITECTURES)
    else:
        foreign.refuse_names(stored.path, stored.tensors)
        found = architectures_with(stored.tensors)
        if not found:
            raise CheckpointError(
                f"{stored.path} fits none of the architectures {', '.join(ARCHITECTURES)} (its first weights are "
                f"{', '.join(list(stored.tensors)[:3])}): use the program that it was made for"
            )
    if len(found) > 1:
        found = [name for name in found if _takes(replace(description, architecture=name))]
        # Of the YAML alone, architectures that extend another may be that one.
        found = [name for name in found if not any(ARCHITECTURES[other] in _bases(name) for other in found)]
    if len(found) != 1:
        raise CheckpointError(
            f"{description.source} does not name its architecture ({' or '.join(found) or 'none fits its keys'}): "
            f"add the line `architecture: NAME`, one of {', '.join(ARCHITECTURES)}"
        )
    description = replace(description, architecture=found[0])
    return description if stored is None else _told_by_shape(description, stored)


def _told_by_shape(description: Checkpoint, stored: Stored) -> Checkpoint:
    """The description, with an architecture that extends its own if the shape of a weight fits that one alone."""
    assert description.architecture is not None
    own = ARCHITECTURES[description.architecture]
    for name, architecture in ARCHITECTURES.items():
        key, other = architecture.TELLING_WEIGHT, replace(description, architecture=name)
        if key in stored.tensors and architecture.__base__ is own:
            shape = stored.tensors[key]().shape
            if _shape_in(description, key) != shape and _shape_in(other, key) == shape:
                return other
    return description


def _shape_in(description: Checkpoint, key: str) -> torch.Size | None:
    """The shape of a weight in the model that is described; None if no model can be built."""
    try:
        weight: Tensor = build(description).state_dict()[key]
    except (CheckpointError, EstimateError):
        return None
    return weight.shape


def architectures_with(names: Mapping[str, Any]) -> list[str]:
    """The architectures whose weights may have these names.

    If an architecture fits, those that it extends do not count: it has their names and more.
    """
    fitting = {
        name: architecture
        for name, architecture in ARCHITECTURES.items()
        if all(any(re.fullmatch(pattern, key) for key in names) for pattern in architecture.KEY_PATTERNS)
    }
    extended = {base for name in fitting for base in _bases(name)}
    return [name for name, architecture in fitting.items() if architecture not in extended]


def _bases(name: str) -> tuple[type, ...]:
    """The classes that an architecture extends."""
    return ARCHITECTURES[name].__mro__[1:]


def _takes(description: Checkpoint) -> bool:
    """Whether the architecture has all hyper-parameters of the YAML, and a default for all others."""
    assert description.architecture is not None
    given = set(hyper_parameters(description))
    all_fields = fields(ARCHITECTURES[description.architecture].Config)
    needed = {field.name for field in all_fields if field.default is MISSING and field.default_factory is MISSING}
    return needed <= given <= {field.name for field in all_fields}


# ---------------------------------------------------------------------------------------------------------------------
# Networks of several files


def parts_of(files: Sequence[WeightFile]) -> list[str]:
    """The network that each file holds: a specialist's stem, else a number."""
    return [file.stem or str(number) for number, file in enumerate(files)] or ["0"]


def specialists_of(files: Sequence[WeightFile]) -> tuple[str, ...]:
    """The stems of the specialists among these files."""
    return tuple(file.stem for file in files if file.stem is not None)


def follow(model: SeparationModel, stored: Mapping[str, Stored]) -> None:
    """Rebuild each network whose file describes it, by that description; the model stays on the meta device."""
    for part, file in stored.items():
        if file.blueprint is not None:
            with building(file.path, size_bytes(file.path)):
                model.rebuild(part, file.blueprint)
    model.to("meta")


# ---------------------------------------------------------------------------------------------------------------------
# Models without a checkpoint's weights


def count_parameters(description: Checkpoint) -> tuple[str, int]:
    """A checkpoint's architecture, and the number of parameters of all its networks. Downloads nothing.

    Raises CheckpointError for a model that cannot be built.
    """
    files = description.files
    places: list[Path] = [converted_path(file) or local_path(file) for file in files]
    stored = {part: open_weights(path) for part, path in zip(parts_of(files), places, strict=False) if path.exists()}
    description = with_architecture(description, next(iter(stored.values()), None))
    model = build(description, specialists_of(files))
    follow(model, stored)
    assert description.architecture is not None
    return description.architecture, sum(parameter.numel() for parameter in model.parameters())


def random_weights(name_or_path: str | Path, *, seed: int = 0) -> dict[str, Tensor]:
    """The weights of this model before any training, as a state dict: for measurements without a checkpoint.

    The same seed gives the same weights. No two tensors share memory, so every format can store them; `load_model`
    takes the file as `checkpoint=`. For a checkpoint of several networks, these are the weights of one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(with_architecture(read_config(name_or_path)), initialised=True)
    prefix, state = type(model).key_prefix("0"), model.state_dict()
    return {key.removeprefix(prefix): value.clone() for key, value in state.items() if key.startswith(prefix)}


def model_for_gpu(name_or_path: str | Path, dtype: torch.dtype) -> SeparationModel:
    """A model with the layers for a CUDA GPU, in float16 or bfloat16, on the meta device: it gives shapes only.

    Of a checkpoint made of specialists, it has the first; all are alike.

    Raises RecipeError for an unknown model, InputError for a model that has no layers for a GPU.
    """
    description = with_architecture(read_config(name_or_path))
    model = build(description, specialists_of(description.files)[:1]).eval().requires_grad_(False)
    try:
        with torch.device("meta"):
            model.fuse_for_gpu(dtype)
    except NotFusedError as e:
        raise InputError(f"{model.name} has no layers for a GPU: {e}") from e
    return model
