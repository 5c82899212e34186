"""Limits for the hyper-parameters in a YAML or a file of weights, checked before a network is built from them.

All limits are well above those of published networks; the largest of these, with 53 stems, has 13,573 tensors. A
network within every limit can still be too large, so `Uninitialised` counts its weights before they take memory.
"""

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, get_args, get_origin

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from separation.documents import quoted

MOST_WEIGHTS = 2**31
MOST_TENSORS = 25_000
MOST_REPEATS = 256  # of layers, bands, stems and so on
MOST_CHARACTERS = 64
LARGEST = 2**20
LARGEST_OF = {"chunk_size": 2**24, "dim_head": 2**10, "heads": 2**10}
LARGEST_FFT = 2**16
MOST_FRAMES = 2**15  # per chunk
MOST_OVERLAP = 64  # frames per sample

_COUNT = re.compile(r".*(depths?|layers|iters)|num_(stems|bands|subbands|scales|blocks_per_scale|dplayer)")
_FFT = re.compile(r".*(fft|hop|win)(_.*)?")
_FRACTION = re.compile(r"\d{1,9}(\.\d{1,9}|/[1-9]\d{0,8})?")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple: "a list"}
_FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})


def check_arguments(arguments: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    """Raise ValueError if a network's arguments have other types than these, or exceed the limits."""
    for name, value in arguments.items():
        if not _is_of(value, types.get(name, Any)):
            kind = types[name]
            raise ValueError(f"{name} must be {_WORDS[get_origin(kind) or kind]}, not {quoted(value)}")
        if isinstance(value, list | tuple):
            _check_most(f"the length of {name}", len(value), MOST_REPEATS)
        for item in value if isinstance(value, list | tuple) else [value]:
            _check_one(name, item)


def check_frames(chunk_samples: int, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if a chunk would have more frames, or a sample be in more frames, than the limits allow."""
    n_fft = max((value for name, value in arguments.items() if "fft" in name and isinstance(value, int)), default=0)
    for name, value in arguments.items():
        if "hop" in name and isinstance(value, int) and value > 0:
            _check_most(f"chunk_size / {name}", chunk_samples // value, MOST_FRAMES)
            _check_most(f"n_fft / {name}", n_fft // value, MOST_OVERLAP)


def _is_of(value: Any, kind: Any) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        return value is None or value in (True, False)
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_is_of(item, get_args(kind)[0]) for item in value)
    return kind is Any or isinstance(value, kind)


def _check_one(name: str, value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        _check_most(f"the length of {name}", len(value), MOST_CHARACTERS)
        if name == "segment" and not _FRACTION.fullmatch(value):  # parsing "1e999999999" would take hours
            raise ValueError(f"{name} must be seconds such as 7.8 or 39/5, not {quoted(value)}")
    elif isinstance(value, Fraction):
        _check_most(name, max(abs(value.numerator), value.denominator), 10**9)
    elif not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number or a text, not {quoted(value)}")
    elif _COUNT.fullmatch(name):
        _check_most(name, abs(value), MOST_REPEATS)
    elif name == "audio_channels" and value not in (1, 2):
        raise ValueError(f"{name} must be 1 or 2, not {quoted(value)}")
    else:
        _check_most(name, abs(value), LARGEST_FFT if _FFT.fullmatch(name) else LARGEST_OF.get(name, LARGEST))


def _check_most(name: str, value: float, most: int) -> None:
    if value > most:
        raise ValueError(f"{name} is {quoted(value)}, more than {most}")


class Uninitialised(TorchFunctionMode):
    """A context in which new layers are not initialised: their weights are whatever their memory contains.

    Raises ValueError before the layers have more than `most` weights in all, or more than MOST_TENSORS tensors.
    `holder` names in the message what cannot have so many.
    """

    def __init__(self, most: int = MOST_WEIGHTS, holder: str = "any network") -> None:
        super().__init__()
        self._most = self._left = most
        self._holder = holder
        self._tensors = 0

    _SKIPPED = frozenset(
        {getattr(torch.nn.init, name) for name in dir(torch.nn.init) if re.fullmatch("[a-z].*_", name)}
        | {Tensor.uniform_, Tensor.normal_}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._SKIPPED:
            return args[0] if args else kwargs["tensor"]
        if func in _FACTORIES:
            self._count(args)
        return func(*args, **kwargs)

    def _count(self, args: tuple[Any, ...]) -> None:
        sizes = args[0] if args and isinstance(args[0], list | tuple) else args
        if all(isinstance(size, int) for size in sizes):  # otherwise PyTorch raises an error
            self._left -= math.prod(sizes)
        self._tensors += 1
        if self._left < 0:
            raise ValueError(f"it has more weights than {self._holder} ({self._most:,})")
        if self._tensors > MOST_TENSORS:
            raise ValueError(f"it has more than {MOST_TENSORS:,} tensors")
