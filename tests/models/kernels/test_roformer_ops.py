"""The RoFormers' Triton kernels equal their references, and compile, without a GPU."""

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import triton_cases
from helpers.common import PROJECT, quick_first

triton = pytest.importorskip("triton", reason="needs Triton")
from separation.models.kernels import roformer_triton as triton_kernels  # noqa: E402 - it imports Triton

CAPABILITIES = [90, 75, 80, 86, 89, 100, 120]
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
NAMES = sorted({name for name, _, _ in triton_cases.cases(torch.float16)})
ALLOWED = {"fp32": 1e-6, "fp16": 1e-3}


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """The kernels' errors in Triton's interpreter, in another process because it must be enabled before the import."""
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    ran = subprocess.run(
        [sys.executable, triton_cases.__file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_equals_its_reference(errors: dict[str, float], name: str, precision: str) -> None:
    assert errors[f"{name} {precision}"] <= ALLOWED[precision]


def test_kernels_refuse_unsupported_strides() -> None:
    x, ones = torch.randn(8, 16), torch.ones(8)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (triton_kernels.rms_norm, (x.T, ones, ones, torch.float32)),
        (triton_kernels.gate, (torch.randn(2, 4, 4, 2).mT, x, 0)),
        (triton_kernels.gate, (torch.randn(2, 4, 2, 4), torch.randn(16, 8).T, 0)),
        (triton_kernels.glu_into_, (x, torch.randn(2, 16, 8).mT)),
        (triton_kernels.glu_into_, (torch.randn(16, 8).T, torch.randn(2, 8, 16))),
    ]
    for kernel, arguments in calls:
        with pytest.raises(AssertionError):
            kernel(*arguments)


def test_every_kernel_has_a_case() -> None:
    functions = inspect.getmembers(triton_kernels, inspect.isfunction)
    own = {name for name, value in functions if value.__module__ == triton_kernels.__name__ and name[0] != "_"}
    assert own - {"add_product_"} == set(NAMES)  # computed by cuBLAS


@pytest.mark.parametrize("capability", quick_first(CAPABILITIES, 2))
def test_the_kernels_compile_for_every_kind_of_gpu(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    from triton.backends.compiler import GPUTarget

    compiled = set()

    def build(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: int) -> None:
        options = {name: constants.pop(name) for name in ("maxnreg", "num_stages") if name in constants}
        signature = dict.fromkeys(kernel.arg_names, "constexpr")
        signature |= {name: kind(value) for name, value in zip(kernel.arg_names, arguments, strict=False)}
        source = triton.compiler.ASTSource(kernel, signature, constants)
        target = GPUTarget("cuda", capability, 32)
        compiled.add(triton.compile(source, target=target, options=options).name)

    monkeypatch.setattr(triton_kernels, "launch", build)
    for name, arguments, _ in triton_cases.cases(torch.float16):
        getattr(triton_kernels, name)(*arguments)
    assert len(compiled) == len(NAMES)


def kind(value: object) -> str:
    if isinstance(value, Tensor):
        return TYPES[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"
