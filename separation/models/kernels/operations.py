"""Operations of the namespace `separation`: a plain twin in PyTorch each, and a Triton kernel for CUDA tensors.

The twins of `X_ops.py` have their kernels in `X_triton.py`. As operations of PyTorch they run by the twin wherever no
kernel can: on a CPU, for shapes alone, on what stands in for a GPU, and where Triton does not work.
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

run: Any = torch.ops.separation  # run.rms_norm(...): the kernel or its twin, by where the tensors are
logger = logging.getLogger("separation")
PROBE = (16, 64)  # the rows that Triton is tried with

_LIBRARY = torch.library.Library("separation", "FRAGMENT")
_MODULES: dict[str, str] = {}  # by operation: where its kernel is


def operation(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the plain twin of the kernel of its name; its first argument is a tensor."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)

    def register(twin: Callable[..., Any]) -> Callable[..., Any]:
        _MODULES[name] = twin.__module__.removesuffix("_ops") + "_triton"

        def fastest(x: Tensor, *arguments: Any) -> Any:
            with torch.cuda.device(x.device):
                chosen = twin if triton_fault(x.device) else kernel_of(name)
                return chosen(x, *arguments)

        for key in ("CPU", "Meta"):
            _LIBRARY.impl(name, twin, key)
        _LIBRARY.impl(name, fastest, "CUDA")
        return twin

    return register


def kernel_of(name: str) -> Callable[..., Any]:
    """What starts the Triton kernel of an operation; it takes the operation's arguments. Imports Triton."""
    kernel: Callable[..., Any] = getattr(_triton_module(_MODULES[name]), name)
    return kernel


@cache
def _triton_module(name: str) -> Any:
    importlib.import_module("separation.models.kernels.shipped").use_shipped_kernels()
    return importlib.import_module(name)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: int) -> None:
    """Start a Triton kernel on the current device; a door for tests, which compile and interpret kernels instead."""
    kernel[grid](*arguments, **constants)


@cache
def triton_fault(device: torch.device) -> str:
    """Why Triton kernels do not work on a CUDA GPU, empty if they do: the smallest is tried, and waited for.

    A fault is logged once.
    """
    x = torch.linspace(-1, 1, 1024).view(PROBE)
    try:
        fault = "" if torch.allclose(run.probe(x.to(device)).cpu(), run.probe(x), atol=1e-5) else "its norm is wrong"
    except Exception as e:  # whatever a missing package, compiler or driver makes Triton raise
        fault = (str(e).strip().splitlines() or [type(e).__name__])[0]
    if fault:
        logger.info(f"Triton kernels are not used on {device} ({fault}): plain operations take their place")
    return fault


def _probe(x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:])


def start_probe(x: Tensor) -> Tensor:
    """The kernel by which `triton_fault` sees whether any works."""
    importlib.import_module("separation.models.kernels.roformer_ops")  # whose first kernel it is
    zeros, ones = x.new_zeros(x.shape[-1]), x.new_ones(x.shape[-1])
    norm: Tensor = kernel_of("rms_norm")(x, zeros, ones, x.dtype)
    return norm


def _probe_by_triton(x: Tensor) -> Tensor:
    with torch.cuda.device(x.device):
        return start_probe(x)


_LIBRARY.define("probe(Tensor x) -> Tensor")
_LIBRARY.impl("probe", _probe, "CPU")
_LIBRARY.impl("probe", _probe_by_triton, "CUDA")
