"""LoRA (Hu et al. 2021, arXiv:2106.09685): adapters of the packages loralib and peft, merged into the weights.

Music-Source-Separation-Training saves loralib's beside the weights in one file, or alone, and peft's in a folder. A
layer's weight `[outputs, inputs]` gains `lora_B @ lora_A` times a scale (see lora.py); of a convolution, `inputs` are
those of all places of its kernel. In loralib's form a layer can hold several in its rows, such as queries, keys and
values. Then `enable_lora` says which have an adapter; each has `r` rows of `lora_A` and its own rows of `lora_B`.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from separation.checkpoints.lora import MERGE_BY_PEFT, PEFT_CONFIG, Lora
from separation.checkpoints.state_dict import Stored, read_weights
from separation.documents import escaped
from separation.errors import CheckpointError

A, B = ".lora_A", ".lora_B"
REMEDY = "use the settings that the adapter was trained with"


def adapted_weights(names: Iterable[str]) -> set[str]:
    """The weights that have an adapter among these names."""
    return {f"{name.removesuffix(A)}.weight" for name in names if name.endswith(A)}


def read_adapter(lora: Lora, stored: Stored, *, networks: int) -> dict[str, Tensor]:
    """The adapter in a file of its own. Raises CheckpointError for any other file, and for several networks."""
    if networks > 1:
        raise CheckpointError(f"{stored.path} is for one network and the model has {networks}: remove the section lora")
    if lora.source.name == PEFT_CONFIG:
        found = {name: re.fullmatch(r"base_model\.model\.(.*\.lora_[AB])\.weight", name) for name in stored.tensors}
        if odd := next((name for name, match in found.items() if not match), None):
            raise CheckpointError(
                f"{stored.path} has {escaped(odd)}, which is no matrix of an adapter of peft: {MERGE_BY_PEFT}"
            )
        return {match[1]: read for name, read in read_weights(stored, {}).items() if (match := found[name])}
    if not stored.tensors or not all(name.endswith((A, B)) for name in stored.tensors):
        raise CheckpointError(f"{stored.path} is not a LoRA adapter of loralib: correct the file in the section lora")
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
        total = merging[target].float() + change * lora.scale(name)
        merging[target] = total.to(dtypes.get(target, merging[target].dtype))
    return merging


def _change(name: str, first: Tensor, second: Tensor, lora: Lora, shape: tuple[int, ...]) -> Tensor:
    """`lora_B @ lora_A` in the rows of the layers that have an adapter, zeros in the others."""
    r, count = lora.rank(name), sum(lora.enabled)
    if first.shape == (r, *shape[1:]) and second.shape == (shape[0], r, *[1] * (len(shape) - 2)):
        return (second.flatten(1) @ first.flatten(1)).reshape(shape)
    rows = shape[0] // len(lora.enabled)
    is_sized = first.shape == (r * count, *shape[1:]) and second.shape == (rows * count, r)
    if not count or shape[0] % len(lora.enabled) or not is_sized or len(shape) != 2:
        also = "" if lora.source.name == PEFT_CONFIG else " and enable_lora"
        raise CheckpointError(
            f"{lora.source}: r {r}{also} does not fit the LoRA adapter of {name}, which has "
            f"{list(first.shape)} and {list(second.shape)} for a weight of {list(shape)}: {REMEDY}"
        )
    change = torch.zeros(shape)
    places = [place for place, is_enabled in enumerate(lora.enabled) if is_enabled]
    for place, narrow, wide in zip(places, first.chunk(count), second.chunk(count), strict=True):
        change[place * rows : (place + 1) * rows] = wide @ narrow
    return change
