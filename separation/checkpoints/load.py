"""From a name to a loaded model: the description, the verified files, the weights, and the layers for the precision.

A loaded model needs nothing more of its files: all weights have been read, and the first chunk waits for no page of
them.
"""

import contextlib
import functools
import gc
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from separation.checkpoints import foreign
from separation.checkpoints.adapters import adapted_weights, merged, read_adapter
from separation.checkpoints.build import (
    build,
    follow,
    hyper_parameters,
    parts_of,
    specialists_of,
    with_architecture,
)
from separation.checkpoints.catalogue import WEIGHT_SUFFIXES, files_for, read_config
from separation.checkpoints.description import Checkpoint, WeightFile
from separation.checkpoints.download import fetch
from separation.checkpoints.files import file_state, known_sha256, loaded_sha256
from separation.checkpoints.fit import check_fit
from separation.checkpoints.state_dict import Stored, open_weights, read_weights
from separation.device import choose_device, choose_precision, float_precision
from separation.documents import escaped
from separation.errors import CheckpointError, InputError
from separation.models.attention import LAYER_BACKENDS, AttentionChoice, choose_attention, requested_attention
from separation.models.base import Origin, SeparationModel
from separation.models.kernels.native import NotFusedError, library

logger: logging.Logger = logging.getLogger("separation")


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Keeps the thousands of objects of a new model from triggering Python's garbage collector.

    It would walk all of PyTorch's objects as well, which takes a tenth of a second and finds no garbage.
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
    """Load a model for inference: in eval mode, without gradients, on the device.

    Args:
        name_or_path: a model's name; or, for a model of your own, the path of a YAML file, of weights with their YAML
            beside them (`x.ckpt`), of a folder with one of each, or of such a pair without its suffix.
        checkpoint: a weights file to use instead. It is not compared with a sha256.
        stems: the specialists to load, in this order, of a checkpoint made of specialists. Other models keep all their
            stems.
        device: a name such as "cpu" or "cuda", or "auto".
        precision: "auto", "fp32", "bf16", "fp16" or "int8". A model that cannot compute in int8 computes in floats, as
            with "auto", and a warning says so.
        attention: a name in `separation.models.attention.NAMES`.

    Raises RecipeError for an unknown model or stem, CheckpointError for weights that are missing or do not fit.
    """
    description = read_config(name_or_path)
    if description.ignored:
        _warn_of_ignored(description.source, description.ignored)
    if description.facts.warning:
        _warn_of_model(description.name, description.facts.warning)
    device = choose_device(device) if isinstance(device, str) else device
    asked = choose_precision(precision, device) if isinstance(precision, str) else precision
    floats = float_precision(asked, device)
    files = files_for(description, stems)
    paths: list[Path] = []
    if description.architecture is None:
        paths = _weight_paths(description, files, checkpoint)
        description = with_architecture(description, open_weights(paths[0]))
    # Built before the download, so that a mistake in the YAML is reported at once.
    model = build(description, specialists_of(files))
    choice = choose_attention(attention, device, floats, model.head_size) if model.head_size else None
    needs_weights = choice is not None and choice.name in LAYER_BACKENDS

    paths = paths or _weight_paths(description, files, checkpoint)
    checksums = _checksums(files, paths, given=checkpoint is not None)
    stored = dict(zip(parts_of(files), map(open_weights, paths), strict=True))
    for file in stored.values():
        foreign.refuse_names(file.path, file.tensors)
    follow(model, stored)
    if not needs_weights:
        _prepare(model, asked, floats, choice, attention)
    weights = _read(model, stored, description)
    check_fit(model, weights, description, stored)
    known = dict(zip(stored, checksums, strict=True))
    if (adapter := _adapter(description)) is not None:
        known["lora"] = partial(loaded_sha256, adapter, file_state(adapter))
    model.load(weights, _origin(description, known))
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta]
    assert not empty, f"not in the state dict, so nothing fills them: {empty}"
    if needs_weights:
        _prepare(model, asked, floats, choice, attention)
    model = model.to(device)
    if device.type == "cpu" and requested_attention(attention) in ("auto", "fused"):
        model.fuse_for_cpu()
        model.cpu_kind = _cpu_kind()
    if model.is_half and not model.fits(torch.float16):
        logger.info(f"{model.name}: computes in bfloat16, because its weights exceed the range of float16")
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


def _cpu_kind() -> str | None:
    """The kind of CPU that there are kernels for here, if any."""
    try:
        return library().kind.name
    except NotFusedError:
        return None


@functools.cache  # one warning, however often a file is loaded
def _warn_of_ignored(path: Path, keys: tuple[str, ...]) -> None:
    logger.warning(f"{path}: ignoring unknown keys: {escaped(', '.join(keys), most=500)}")


@functools.cache
def _warn_of_model(name: str, warning: str) -> None:
    logger.warning(f"{name}: {escaped(warning, most=500)}")


def _weight_paths(description: Checkpoint, files: Sequence[WeightFile], checkpoint: Path | str | None) -> list[Path]:
    """The paths of these files, downloaded if need be, or of the file that the user gave in their place."""
    if checkpoint is not None:
        if len(files) > 1:
            raise CheckpointError(
                f"{description.name} needs {len(files)} files and checkpoint= is only one: leave checkpoint= out"
            )
        return [Path(checkpoint)]
    if not files:
        raise CheckpointError(
            f"{description.source} names no weights files and no weights are beside it "
            f"({', '.join(WEIGHT_SUFFIXES)}): give them with checkpoint= or --model-path"
        )
    return [fetch(file) for file in files]


def _checksums(files: Sequence[WeightFile], paths: Sequence[Path], *, given: bool) -> list[Callable[[], str]]:
    """A function for the sha256 of each file: known for a verified file, computed when needed for a user's own."""
    if not given and all(map(known_sha256, files)):
        return [partial(str, known_sha256(file)) for file in files]
    return [partial(loaded_sha256, path, file_state(path)) for path in paths]


def _adapter(description: Checkpoint) -> Path | None:
    """The file of the description's LoRA adapter, if it has one of its own."""
    return None if description.lora is None else description.lora.file


def _read(model: SeparationModel, stored: Mapping[str, Stored], description: Checkpoint) -> dict[str, Tensor]:
    """The model's state dict from the files of its networks, each tensor in the type that the model wants.

    LoRA adapters in the files or beside them are merged.
    """
    lora, path = description.lora, _adapter(description)
    beside = {} if lora is None or path is None else read_adapter(lora, open_weights(path), networks=len(stored))
    dtypes = {key: value.dtype for key, value in model.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for part, file in stored.items():
        prefix = type(model).key_prefix(part)
        wanted = {key.removeprefix(prefix): dtype for key, dtype in dtypes.items() if key.startswith(prefix)}
        adapted = adapted_weights([*file.tensors, *beside])  # these are cast after the merge
        read = read_weights(file, {key: dtype for key, dtype in wanted.items() if key not in adapted}) | beside
        if adapted:
            read = merged(read, lora, wanted)
        weights |= {prefix + key: value for key, value in read.items()}
    return {key: value for key, value in weights.items() if not re.fullmatch(model.UNUSED_KEYS, key)}


def _origin(description: Checkpoint, checksums: Mapping[str, Callable[[], str]]) -> Origin:
    assert description.architecture is not None
    settings = hyper_parameters(description)
    if description.shares:
        settings["shares"] = description.shares
    if description.lora is not None:
        settings["lora"] = description.lora.identity
    return Origin(
        architecture=description.architecture,
        hyper_parameters={name: repr(value) for name, value in settings.items()},
        stems=description.stems,
        weights=checksums,
    )


def _prepare(
    model: SeparationModel, asked: torch.dtype, floats: torch.dtype, choice: AttentionChoice | None, attention: str
) -> None:
    """Prepare the model for the precision `asked`, or for `floats` if that is int8 and the model cannot compute in it.

    `attention` is the backend that the user asked for, `choice` the one to use.
    """
    dtype = asked if asked != torch.int8 or not _why_not_int8(model, choice) else floats
    if choice is None:
        model.prepare(dtype)
    else:
        try:
            model.prepare(dtype, attention=choice.name)
        except NotFusedError as e:
            if attention == choice.name:
                raise InputError(f"{model.name} cannot use attention {choice.name!r} ({e}): use auto") from e
            plain = "itemwise" if choice.name == "fused" and floats == torch.bfloat16 else "sdpa"
            choice, dtype = AttentionChoice(plain, f"not {choice.name}: {e}"), floats
            model.prepare(dtype, attention=choice.name)
        logger.info(f"{model.name}: attention {choice.name} ({choice.reason})")
    if dtype != asked:
        logger.warning(f"{model.name} computes in floats, not in int8 ({_why_not_int8(model, choice)})")


def _why_not_int8(model: SeparationModel, choice: AttentionChoice | None) -> str:
    """Why a model does not compute in int8, or an empty string if it does."""
    if choice is None or not model.has_int8:
        return "int8 is for RoFormers"
    try:
        kind = library().kind
    except NotFusedError as e:
        return str(e)
    if "int8" not in kind.precisions:
        return f"the kernels for {kind.name} are not for int8"
    return "" if choice.name == "fused" else f"attention {choice.name}: {choice.reason}"
