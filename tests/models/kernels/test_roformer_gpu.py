"""The GPU's layers equal the plain ones, and each Triton kernel its twin; no GPU is needed."""

import copy
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import triton_cases
from helpers.common import PROJECT, quick_first
from helpers.small_model import identity, small_model
from separation.checkpoints.load import load_model
from separation.evaluation.metrics import sdr
from separation.models.base import SeparationModel
from separation.models.kernels.native import NotFusedError
from separation.models.mel_band_roformer import MelBandRoFormer, MelBandRoFormerConfig

triton = pytest.importorskip("triton", reason="needs Triton")
from separation.models.kernels import roformer_triton as triton_kernels  # noqa: E402 - it imports Triton

CAPABILITIES = [90, 75, 80, 86, 89, 100, 120]
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
NAMES = sorted({name for name, _, _ in triton_cases.cases(torch.float16)})
ALLOWED = {"fp32": 1e-6, "fp16": 1e-3}


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """The kernels' errors by Triton's interpreter, which must be chosen before Triton is imported."""
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
def test_a_kernel_equals_its_plain_twin(errors: dict[str, float], name: str, precision: str) -> None:
    assert errors[f"{name} {precision}"] <= ALLOWED[precision]


def test_kernels_refuse_what_lies_in_another_order() -> None:
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
    assert own - {"add_product_"} == set(NAMES)  # which is a product by cuBLAS


@pytest.mark.parametrize("capability", quick_first(CAPABILITIES, 2))
def test_the_kernels_compile_for_every_gpu_kind(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
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


def mel_model() -> MelBandRoFormer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 16, "depth": 2, "dim_head": 16, "heads": 2, "num_bands": 6, "stft_n_fft": 128}
    config = MelBandRoFormerConfig(**sizes, stft_hop_length=32, stft_win_length=128, stereo=True, num_stems=2)
    return MelBandRoFormer(config, identity()).eval()


def varied(model: SeparationModel) -> SeparationModel:
    """With gains and biases that training has moved away from one and zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "bias")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


MODELS = {
    "one head size a power of two": lambda: small_model(dim_head=16),
    "another": lambda: small_model(dim_head=12),
    "several layers along an axis": lambda: small_model(time_transformer_depth=2, depth=2),
    "shared biases": lambda: small_model(use_shared_bias=True, depth=2),
    "deeper masks": lambda: small_model(mask_estimator_depth=3),
    "mel bands": mel_model,
}


@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_the_gpus_layers_equal_the_plain_ones(kind: str) -> None:
    model = varied(MODELS[kind]())
    chunks = torch.randn(3, 2, 700)
    expected = model(chunks)
    model.prepare(torch.float32, attention="triton")
    assert sdr(expected.flatten(0, 2), model(chunks).flatten(0, 2)) > 90


@pytest.mark.parametrize("more", [{"use_pope": True}, {"linear_transformer_depth": 1}, {"skip_connection": True}])
@torch.inference_mode()
def test_a_model_of_other_layers_is_left_as_it_was(more: dict[str, Any]) -> None:
    model = small_model(**more)
    chunks = torch.randn(1, 2, 700)
    expected = model(chunks)
    with pytest.raises(NotFusedError, match="it does not support"):
        model.prepare(torch.float16, attention="triton")
    assert torch.equal(model(chunks), expected)


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[SeparationModel, Tensor, Tensor]]:
    """The demo model, chunks and what it gives for them in float32."""
    model = load_model("demo", device="cpu", precision="fp32", attention="sdpa")
    chunks = torch.randn(2, 2, 44100, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.inference_mode():
        yield model, chunks, model(chunks).flatten(0, 2)


@torch.inference_mode()
def test_half_precision_is_near_to_float32(demo: tuple[SeparationModel, Tensor, Tensor]) -> None:
    plain, chunks, expected = demo
    model = copy.deepcopy(plain)
    model.prepare(torch.float16, attention="triton")
    assert sdr(expected, model(chunks).flatten(0, 2)) > 60
    again = copy.deepcopy(model)
    again.to_precision(torch.bfloat16)
    assert {weight.dtype for name, weight in again.named_parameters() if "weights" in name} == {torch.bfloat16}
    assert sdr(expected, again(chunks).flatten(0, 2)) > 40
    assert sdr(expected, model(chunks).flatten(0, 2)) > 60


@torch.inference_mode()
def test_a_chunk_does_not_depend_on_those_beside_it(demo: tuple[SeparationModel, Tensor, Tensor]) -> None:
    plain, chunks, _ = demo
    model = copy.deepcopy(plain)
    model.prepare(torch.float32, attention="triton")
    alone = torch.cat([model(chunk[None]) for chunk in chunks])
    assert (alone - model(chunks)).abs().max() <= 1e-5 * alone.abs().max()
