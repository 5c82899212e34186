"""PyTorch operations in the namespace `separation`: each has a reference in plain PyTorch and a Triton kernel.

A module `X_ops.py` holds the references and `X_triton.py` the kernels of the same names. Some operations also have a
kernel for CPUs, in C++. The reference runs wherever no kernel can: on meta tensors, on the tests' simulated GPU, on a
CPU in float16 or without a C++ library, and where Triton does not work.
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from separation.models.kernels.native import NotFusedError, library

ops: Any = torch.ops.separation  # ops.rms_norm(...) calls the kernel or its reference, depending on the device
logger: logging.Logger = logging.getLogger("separation")
PROBE_SHAPE = (16, 64)  # of the rows that `triton_fault` normalises

_LIBRARY = torch.library.Library("separation", "FRAGMENT")
_KERNEL_MODULES: dict[str, str] = {}  # by operation


def operation(schema: str, *, cpu: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as an operation's reference. The operation's first argument is a tensor.

    `cpu` names a module with a function of the same name that calls a kernel for CPUs.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        _KERNEL_MODULES[name] = reference.__module__.removesuffix("_ops") + "_triton"

        def on_gpu(x: Tensor, *arguments: Any) -> Any:
            with torch.cuda.device(x.device):
                function = reference if triton_fault(x.device) else kernel_of(name)
                return function(x, *arguments)

        def on_cpu(x: Tensor, *arguments: Any) -> Any:
            works = bool(cpu) and not cpu_fault() and not any(map(_is_half, (x, *arguments)))
            function = getattr(importlib.import_module(cpu), name) if works else reference
            return function(x, *arguments)

        _LIBRARY.impl(name, on_cpu, "CPU")
        _LIBRARY.impl(name, reference, "Meta")
        _LIBRARY.impl(name, on_gpu, "CUDA")
        return reference

    return register


def _is_half(argument: Any) -> bool:
    return torch.float16 in (argument, getattr(argument, "dtype", None))


@cache
def cpu_fault() -> str:
    """Why kernels for CPUs do not work here, or an empty string if they do."""
    try:
        library()
    except NotFusedError as e:
        return str(e)
    return ""


def kernel_of(name: str) -> Callable[..., Any]:
    """The function that launches an operation's Triton kernel. Imports Triton."""
    function: Callable[..., Any] = getattr(_kernel_module(_KERNEL_MODULES[name]), name)
    return function


@cache
def _kernel_module(name: str) -> Any:
    importlib.import_module("separation.models.kernels.precompiled").use_precompiled_kernels()
    return importlib.import_module(name)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: int) -> None:
    """Launch a Triton kernel on the current device. Tests replace this function to compile kernels without a GPU."""
    kernel[grid](*arguments, **constants)


@cache
def triton_fault(device: torch.device) -> str:
    """Why Triton kernels do not work on a CUDA GPU, or an empty string if they do.

    Launches a small kernel and waits for it. Logs a fault once.
    """
    x = torch.linspace(-1, 1, 1024).view(PROBE_SHAPE)
    try:
        works = torch.allclose(ops.probe(x.to(device)).cpu(), ops.probe(x), atol=1e-5)
        fault = "" if works else "the test kernel's result is wrong"
    except Exception as e:  # a missing package, compiler or driver can make Triton raise anything
        fault = (str(e).strip().splitlines() or [type(e).__name__])[0]
    if fault:
        logger.info(f"Triton kernels do not work on {device} ({fault}): using plain PyTorch operations")
    return fault


def launch_probe(x: Tensor) -> Tensor:
    """Launch the kernel with which `triton_fault` tests Triton: an RMS norm of `x`, of `PROBE_SHAPE`."""
    importlib.import_module("separation.models.kernels.roformer_ops")  # registers the kernel
    zeros, ones = x.new_zeros(x.shape[-1]), x.new_ones(x.shape[-1])
    normed: Tensor = kernel_of("rms_norm")(x, zeros, ones, x.dtype)
    return normed


def _probe_on_cpu(x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:])


def _probe_on_gpu(x: Tensor) -> Tensor:
    with torch.cuda.device(x.device):
        return launch_probe(x)


_LIBRARY.define("probe(Tensor x) -> Tensor")
_LIBRARY.impl("probe", _probe_on_cpu, "CPU")
_LIBRARY.impl("probe", _probe_on_gpu, "CUDA")
