"""LoRA (Hu et al. 2021, arXiv:2106.09685): adapters in the form of the package loralib, merged into the weights.

Music-Source-Separation-Training saves them beside the weights in one file, or alone. A layer's weight
`[outputs, inputs]` gains `lora_B @ lora_A` times `lora_alpha / r`. Of a layer that holds several in its rows, such as
queries, keys and values, `enable_lora` says which have an adapter; each then has `r` rows of `lora_A` and its own rows
of `lora_B`.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from separation.checkpoints.lora import Lora
from separation.checkpoints.state_dict import Stored, read_weights
from separation.errors import CheckpointError

A, B = ".lora_A", ".lora_B"
REMEDY = "use the YAML that the adapter was trained with"


def adapted_weights(names: Iterable[str]) -> set[str]:
    """The weights that have an adapter among these names."""
    return {f"{name.removesuffix(A)}.weight" for name in names if name.endswith(A)}


def read_adapter(stored: Stored, *, networks: int) -> dict[str, Tensor]:
    """The adapter in a file of its own. Raises CheckpointError for any other file, and for several networks."""
    if not stored.tensors or not all(name.endswith((A, B)) for name in stored.tensors):
        raise CheckpointError(f"{stored.path} is not a LoRA adapter of loralib: correct the file in the section lora")
    if networks > 1:
        raise CheckpointError(f"{stored.path} is for one network and the model has {networks}: remove the section lora")
    return read_weights(stored, {})


def merged(weights: Mapping[str, Tensor], lora: Lora | None, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The weights with their adapters merged, in these types.

    Raises CheckpointError for adapters without their section in the YAML, or of other sizes than it says.
    """
    merging = dict(weights)
    for name in [name.removesuffix(A) for name in weights if name.endswith(A)]:
        if lora is None:
            raise CheckpointError(
                f"{name} has a LoRA adapter, and the YAML has no section lora with r and lora_alpha: {REMEDY}"
            )
        first, second = merging.pop(name + A), merging.pop(name + B, None)
        target = f"{name}.weight"
        if second is None or target not in merging:
            missing = name + B if second is None else target
            raise CheckpointError(f"{name} has a LoRA adapter without {missing}: use the adapter's own model")
        change = _change(name, first.float(), second.float(), lora, tuple(merging[target].shape))
        total = merging[target].float() + change * (lora.alpha / lora.r)
        merging[target] = total.to(dtypes.get(target, merging[target].dtype))
    return merging


def _change(name: str, first: Tensor, second: Tensor, lora: Lora, shape: tuple[int, ...]) -> Tensor:
    """`lora_B @ lora_A` in the rows of the layers that have an adapter, zeros in the others."""
    if second.shape[0] == shape[0] and tuple(first.shape) == (lora.r, *shape[1:]) and second.shape[1] == lora.r:
        return second @ first
    count = sum(lora.enabled)
    rows = shape[0] // len(lora.enabled)
    is_sized = first.shape == (lora.r * count, *shape[1:]) and second.shape == (rows * count, lora.r)
    if not count or shape[0] % len(lora.enabled) or not is_sized:
        raise CheckpointError(
            f"{lora.source}: r {lora.r} and enable_lora do not fit the LoRA adapter of {name}, which has "
            f"{list(first.shape)} and {list(second.shape)} for a weight of {list(shape)}: {REMEDY}"
        )
    change = torch.zeros(shape)
    places = [place for place, is_enabled in enumerate(lora.enabled) if is_enabled]
    for place, narrow, wide in zip(places, first.chunk(count), second.chunk(count), strict=True):
        change[place * rows : (place + 1) * rows] = wide @ narrow
    return change
