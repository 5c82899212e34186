"""Whether weights fit a model; if they do not, which key of the YAML is wrong."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from separation.checkpoints.build import architectures_with, hyper_parameters
from separation.checkpoints.description import Checkpoint
from separation.checkpoints.state_dict import Stored
from separation.documents import quoted
from separation.errors import CheckpointError
from separation.models import ARCHITECTURES
from separation.models.base import SeparationModel
from separation.models.shapes import Shapes

MOST_SHOWN = 3  # keys in a message


def check_fit(
    model: SeparationModel, weights: Mapping[str, Tensor], description: Checkpoint, stored: Mapping[str, Stored]
) -> None:
    """Raise CheckpointError unless these weights, from the files in `stored`, have the model's keys and shapes."""
    found = _differences(model, weights)
    if not found:
        return
    source = f"{description.name} ({', '.join(str(file.path) for file in stored.values())})"
    names = {name: None for file in stored.values() for name in file.tensors}
    recognised = architectures_with(names)
    if recognised and description.architecture not in recognised:
        raise CheckpointError(
            f"{source} has the weights of the architecture {' or '.join(recognised)}, but "
            f"{description.source} says {description.architecture} ({found}): correct the YAML"
        )
    for part in stored if recognised else ():
        prefix = type(model).key_prefix(part)
        shapes = {key.removeprefix(prefix): tuple(w.shape) for key, w in weights.items() if key.startswith(prefix)}
        if disagreements := sizes_that_differ(description, Shapes(shapes)):
            raise CheckpointError(
                f"{source} does not fit {description.source}: {'; '.join(disagreements)}: correct the YAML, or use the "
                "one that the weights were published with"
            )
    raise CheckpointError(
        f"{source} is of another architecture or size ({found}): use the YAML that the weights were published with"
    )


def _differences(model: SeparationModel, weights: Mapping[str, Tensor]) -> str:
    """How the weights differ from the model's state dict; empty if they do not."""
    expected = model.state_dict()
    different = {
        "missing": [key for key in expected if key not in weights],
        "unexpected": [key for key in weights if key not in expected],
        "of another shape": [
            f"{key}: {list(weights[key].shape)} instead of {list(value.shape)}"
            for key, value in expected.items()
            if key in weights and weights[key].shape != value.shape
        ],
    }
    return "; ".join(
        f"{len(keys)} of its keys are {kind} ({', '.join(keys[:MOST_SHOWN])}{', …' if len(keys) > MOST_SHOWN else ''})"
        for kind, keys in different.items()
        if keys
    )


def sizes_that_differ(description: Checkpoint, shapes: Shapes) -> list[str]:
    """For each key of the YAML that does not agree with weights of these shapes, both values."""
    assert description.architecture is not None
    architecture: Any = ARCHITECTURES[description.architecture]
    config = architecture.Config(**hyper_parameters(description))
    sections = {name: f"audio.{key}" for key, name in architecture.AUDIO_KEYS.items() if key in description.audio}
    differences = []
    for name, found in architecture.sizes_in(shapes, config).items():
        given = getattr(config, name)
        is_length = isinstance(given, list | tuple) and isinstance(found, int)
        if found is None or (isinstance(found, tuple) and None in found):
            continue
        if found == (len(given) if is_length else given):
            continue
        where = sections.get(name, f"model.{name}")
        if is_length:
            differences.append(f"{where} has {len(given)} entries, the weights are for {found}")
        else:
            differences.append(f"{where} is {_in_yaml(given)}, the weights have {_in_yaml(found)}")
    return differences


def _in_yaml(value: Any) -> str:
    """A value as YAML spells it, for an error message."""
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(list(value) if isinstance(value, tuple) else value)
