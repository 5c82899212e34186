"""Finds the state dict in a trainer's file: nested, among optimizers and averages, with wrappers' prefixes.

PyTorch Lightning, DataParallel, torch.compile, FSDP, ema_pytorch, PyTorch's AveragedModel and the scripts of
Music-Source-Separation-Training each have their own layout. If a file has both the weights and their moving average,
the average is used, because trainers validate with it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema")  # keys of a moving average
NESTINGS = ("state_dict", "state", "model", "model_state_dict", "net", "network", "module")  # keys of plain weights
# Prefixes of the weights' names, by preference: averages first.
WRAPPERS = ("ema_model.", "model_ema.", "ema.", "module.", "_orig_mod.", "model.", "net.", "network.", "online_model.")
BESIDE = "_metadata"  # the package neuraloperator puts its arguments among the weights
INNER_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")  # anywhere in a name
MOST_NESTINGS = 8


def state_dict_in(saved: Any) -> tuple[dict[str, Any], list[str]]:
    """The weights in a saved value by the model's own names, and a message for each choice between several.

    The weights are empty if there is no state dict. Each is a `partial`, a function that reads the tensor.
    """
    choices: list[str] = []
    for _ in range(MOST_NESTINGS):
        if not isinstance(saved, Mapping):
            return {}, []
        inside = [name for name in (*AVERAGES, *NESTINGS) if _holds_weights(saved.get(name))]
        if not inside:
            break
        if inside[0] in AVERAGES and (others := [name for name in inside if name not in AVERAGES]):
            choices.append(f"using the moving average {inside[0]!r}, not {others[0]!r}")
        saved = saved[inside[0]]
    if not isinstance(saved, Mapping):
        return {}, []
    saved = {name: value for name, value in saved.items() if name != BESIDE}
    if not all(_is_weight(value) or _is_number(value) for value in saved.values()):
        return {}, []
    named = {str(name): value for name, value in saved.items() if _is_weight(value)}
    weights = {_without_inner(name): value for name, value in named.items()}
    if len(weights) < len(named):  # two names became one: plain and compiled layers side by side
        weights = named
    for _ in range(MOST_NESTINGS):
        prefix = next((each for each in WRAPPERS if _wraps(each, weights)), None)
        if prefix is None:
            break
        others = sorted({name.partition(".")[0] for name in weights if not name.startswith(prefix)})
        if others:
            choices.append(f"using the weights {prefix}*, not those of {', '.join(others[:3])}")
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return weights, choices


def _wraps(prefix: str, names: Mapping[str, Any]) -> bool:
    """Whether some names have this prefix. If a number follows, it is the name of a list of layers."""
    rests = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return bool(rests) and not any(rest[:1].isdigit() for rest in rests)


def _holds_weights(value: Any) -> bool:
    """Whether a nested dictionary has a tensor."""
    seen: set[int] = set()  # a dictionary may be in many places, even inside itself
    left = [value]
    while left:
        each = left.pop()
        if _is_weight(each):
            return True
        if isinstance(each, Mapping) and id(each) not in seen:
            seen.add(id(each))
            left += each.values()
    return False


def _is_weight(value: Any) -> bool:
    return isinstance(value, partial)


def _is_number(value: Any) -> bool:
    """Whether a state dict may have this value although it is not a tensor; an epoch, for example."""
    return value is None or isinstance(value, int | float)


def _without_inner(name: str) -> str:
    for wrapper in INNER_WRAPPERS:
        name = name.replace(wrapper, "")
    return name
