"""The Triton kernels of MDX23C and SCNet equal their references, and compile, without a GPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.small_unets import small_mdx23c, small_scnet
from separation.evaluation.metrics import sdr
from separation.models.kernels import scnet_core, unet_ops
from separation.models.kernels.registry import ops

pytest.importorskip("triton", reason="needs Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
TYPES = [torch.float32, torch.float16]
# The most shared memory of a program on GeForce 30 to 50, and on Hopper and Blackwell in data centres.
SHARED_BYTES, SHARED_BYTES_OF_DATA_CENTRES = 101_376, 232_448
ERRORS = {torch.float32: 2e-6, torch.float16: 2e-3}


def slow(*values: int) -> Any:
    return pytest.param(values if len(values) == 3 else values[0], marks=pytest.mark.slow)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape and got.stride() == expected.stride()
    error = (got.float() - expected.float()).abs().max()
    assert error <= ERRORS[got.dtype] * expected.float().abs().max()


def both(name: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The results of the kernel and of its reference."""
    from separation.models.kernels import unet_triton

    return getattr(unet_triton, name)(*arguments), getattr(unet_ops, name)(*arguments)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that starts the other")
def test_in_tritons_interpreter_kernels_equal_their_references(request: pytest.FixtureRequest) -> None:
    chosen = ["-k", "reference and not gpu", "-m", request.config.getoption("-m")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, __file__]
    ran = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def interpreted(test: Callable) -> Callable:
    return pytest.mark.skipif(not INTERPRETED, reason="runs in a process that interprets Triton")(test)


@interpreted
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 2100, 3), slow(2, 70, 66), slow(2, 1, 3)])
@pytest.mark.parametrize("features_last", [True, False])
def test_moments_and_norms_equal_the_references(
    dtype: torch.dtype, shape: tuple[int, ...], features_last: bool
) -> None:
    x = noise(*shape) * 3 + 5
    x = (x if features_last else x.transpose(1, 2).contiguous().transpose(1, 2)).to(dtype)
    gain, bias = noise(shape[2]), noise(shape[2] + 1)[:-1]
    for whole in (False, True):
        got, expected = both("moments", x, whole)
        assert_near(got, expected)
        assert_near(*both("normalise", x, [expected, gain, bias], unet_ops.NONE, 0.0, torch.float16))


@interpreted
@pytest.mark.parametrize("activation", range(4))
def test_activations_equal_the_references(activation: int) -> None:
    x, moments = noise(2, 20, 8), noise(2, 2, 8).abs()
    assert_near(*both("normalise", x, [moments, noise(8), noise(9)[:-1]], activation, 0.7, torch.float32))


@interpreted
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(2, 700, 12), slow(3, 33, 8)])
def test_a_norm_over_rows_equals_the_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (noise(*shape) * 2 + 1).to(dtype)
    assert_near(*both("normalise_rows", x, noise(shape[2]), noise(shape[2] + 1)[:-1]))


@interpreted
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "hidden, features, kernel, frames", [pytest.param(3, 12, 5, 33, marks=pytest.mark.slow), (16, 64, 3, 7)]
)
@pytest.mark.parametrize("activation", [unet_ops.NONE, unet_ops.GELU])
def test_a_gated_branch_equals_the_reference(
    dtype: torch.dtype, hidden: int, features: int, kernel: int, frames: int, activation: int
) -> None:
    x, gated = noise(2, 3, frames, features, dtype=dtype), noise(2, 3, frames, 2 * hidden, dtype=dtype)
    taps, weight = noise(kernel, hidden, dtype=dtype), noise(hidden, features, dtype=dtype)
    table, bias = noise(3, hidden), noise(features)
    outs = [torch.zeros(2, 5, frames, features, dtype=dtype) for _ in range(2)]
    arguments = x, gated, [taps, table, weight, bias], activation
    both_into = [out[:, 1:4] for out in outs]  # between other bands
    from separation.models.kernels import unet_triton

    unet_triton.gated_branch_(both_into[0], *arguments)
    unet_ops.gated_branch_(both_into[1], *arguments)
    assert_near(*outs)
    assert outs[0][:, 1:4].any() and not outs[0][:, [0, 4]].any()


@interpreted
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("hidden", [16, slow(32)])
def test_an_lstm_equals_the_reference(dtype: torch.dtype, axis: int, hidden: int) -> None:
    gates = noise(2, 5, 9, 8 * hidden, dtype=dtype)
    weight = (noise(2, hidden, 4, hidden) * hidden**-0.5).to(dtype)
    assert_near(*both("lstm", gates, weight, axis))


def test_kernels_refuse_unsupported_strides() -> None:
    from separation.models.kernels import unet_triton

    x, ones, apart = noise(2, 3, 8, 16), torch.ones(16), noise(2, 3, 16, 8).mT
    branch = [noise(3, 16), noise(3, 16), noise(16, 16), ones], unet_ops.NONE
    calls: list[tuple[Callable, tuple[Any, ...]]] = [
        (unet_triton.normalise, (noise(2, 8, 20)[..., :16], [noise(2, 2, 16), ones, ones], 0, 0.0, torch.float32)),
        (unet_triton.normalise_rows, (apart.flatten(0, 1), ones, ones)),
        (unet_triton.gated_branch_, (x, apart, noise(2, 3, 8, 32), *branch)),
        (unet_triton.gated_branch_, (x, x, noise(2, 3, 32, 8).mT, *branch)),
        (unet_triton.gated_branch_, (apart, x, noise(2, 3, 8, 32), *branch)),
        (unet_triton.lstm, (noise(2, 3, 8 * 16, 5).mT, noise(2, 16, 4, 16), 1)),
    ]
    for kernel, arguments in calls:
        with pytest.raises(AssertionError):
            kernel(*arguments)


def test_the_reference_lstm_equals_pytorchs() -> None:
    torch.manual_seed(0)
    lstm, x = torch.nn.LSTM(16, 16, bidirectional=True), noise(2, 5, 9, 16)
    gates = torch.cat([x @ w.T + b + c for w, _, b, c in lstm.all_weights], dim=-1)
    weight = torch.stack([w.T.unflatten(1, (4, -1)) for _, w, _, _ in lstm.all_weights])
    for axis, sequences in ((1, x.transpose(0, 1).flatten(1, 2)), (2, x.permute(2, 0, 1, 3).flatten(1, 2))):
        expected = lstm(sequences)[0]
        got = unet_ops.lstm(gates, weight, axis).movedim(axis, 0).flatten(1, 2)
        assert (got - expected).abs().max() <= 1e-6


def on_gpu(argument: Any) -> Any:
    """Copy the argument to the GPU if it is a tensor or a list of tensors."""
    if isinstance(argument, list):
        return [on_gpu(each) for each in argument]
    return argument.cuda() if isinstance(argument, Tensor) else argument


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("dtype, error", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_the_kernels_equal_their_references_on_a_gpu(dtype: torch.dtype, error: float) -> None:
    """At the sizes of public checkpoints, for which Triton's interpreter would take hours."""
    gain, bias, x = noise(128), noise(129)[:-1], (noise(2, 16_384, 128) + 1).to(dtype)
    moments = unet_ops.moments(x, False)
    calls: list[tuple[Any, ...]] = [
        ("moments", x, False),
        ("moments", x, True),
        ("moments", x.transpose(1, 2).contiguous().transpose(1, 2), False),
        ("normalise", x, [moments, gain, bias], unet_ops.GELU, 0.0, dtype),
        ("normalise_rows", x[:, :476].contiguous(), gain, bias),
    ]
    for hidden, sequences in ((128, 2048), (256, 1100), (256, 2100), (512, 40)):
        weight = (noise(2, hidden, 4, hidden) * hidden**-0.5).to(dtype)
        calls.append(("lstm", noise(1, 20, sequences, 8 * hidden, dtype=dtype), weight, 1))
        calls.append(("lstm", noise(2, sequences // 2, 20, 8 * hidden, dtype=dtype), weight, 2))
    for name, *arguments in calls:
        moved = [on_gpu(argument) for argument in arguments]
        got, expected = getattr(ops, name)(*moved).cpu(), getattr(unet_ops, name)(*arguments)
        assert (got.float() - expected.float()).abs().max() <= error * expected.float().abs().max(), name
    for hidden in (8, 16, 32, 64):
        weight = (noise(hidden, 4 * hidden) * hidden**-0.5).to(dtype)
        branch = (
            torch.zeros(2, 30, 476, 4 * hidden, dtype=dtype),
            noise(2, 30, 476, 4 * hidden, dtype=dtype),
            noise(2, 30, 476, 2 * hidden, dtype=dtype),
            [noise(3, hidden, dtype=dtype), noise(3, hidden), weight, noise(4 * hidden)],
        )
        moved = [on_gpu(argument) for argument in branch]
        ops.gated_branch_(*moved, unet_ops.GELU)
        unet_ops.gated_branch_(*branch, unet_ops.GELU)
        assert (moved[0].cpu().float() - branch[0].float()).abs().max() <= error * branch[0].float().abs().max()


@needs_gpu
@pytest.mark.filterwarnings("error")  # such as PyTorch's, that an LSTM's weights are not in one block of memory
@pytest.mark.parametrize("dtype, decibels", [(torch.float16, 40), (torch.bfloat16, 25)])
@pytest.mark.parametrize("make", [small_mdx23c, small_scnet], ids=["MDX23C", "SCNet"])
@pytest.mark.parametrize("largest", [0, 256], ids=["PyTorch's LSTM", "our LSTM"])
def test_a_forward_on_a_gpu_equals_the_cpus_and_can_be_captured(
    monkeypatch: pytest.MonkeyPatch, make: Any, dtype: torch.dtype, decibels: float, largest: int
) -> None:
    monkeypatch.setattr(scnet_core, "MOST_LSTM_FEATURES", largest)
    model = make()
    chunks = torch.randn(3, 2, model.chunk_samples) * 0.1
    with torch.inference_mode():
        expected = model(chunks)
        model.prepare(dtype)
        model.cuda()
        given = chunks.cuda()
        assert model._core is not None or torch.cuda.get_device_capability() < model.lowest_capability
        for _ in range(2):
            got = model(given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(given)
        graph.replay()
    for one, other, exact in zip(captured.cpu(), got.cpu(), expected, strict=True):
        assert sdr(exact.flatten(0, 1), one.flatten(0, 1)) > decibels
        assert sdr(one.flatten(0, 1), other.flatten(0, 1)) > decibels


OPTIONS = ("num_warps", "num_stages")
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def launches(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, hidden_sizes: tuple[int, ...]
) -> list[tuple[Any, tuple, dict[str, int]]]:
    """The kernel, arguments and constants of every launch for the sizes of the models."""
    from separation.models.kernels import unet_triton

    found: list[tuple[Any, tuple, dict[str, int]]] = []
    monkeypatch.setattr(
        unet_triton,
        "launch",
        lambda kernel, grid, *arguments, **constants: found.append((kernel, arguments, constants)),
    )
    with torch.device("meta"):
        gain = torch.empty(128)
        for x in (torch.empty(1, 8192, 128, dtype=dtype), torch.empty(1, 128, 8192, dtype=dtype).transpose(1, 2)):
            moments = unet_triton.moments(x, False)
            unet_triton.normalise(x, [moments, gain, gain], unet_ops.GELU, 0.0, dtype)
        x = torch.empty(1, 8192, 256)
        unet_triton.normalise(x, [unet_triton.moments(x, True), gain, gain], unet_ops.NONE, 0.0, dtype)
        for hidden in hidden_sizes:  # of the LSTM; the encoder's branches have a quarter of it
            small, x = hidden // 4, torch.empty(1, 64, 476, hidden, dtype=dtype)
            unet_triton.normalise_rows(x[0], gain, gain)
            gated = torch.empty(1, 64, 476, 2 * small, dtype=dtype)
            taps, weight = torch.empty(3, small, dtype=dtype), torch.empty(small, hidden, dtype=dtype)
            unet_triton.gated_branch_(x, x, gated, [taps, torch.empty(3, small), weight, gain], unet_ops.GELU)
            for sequences in (16, 1024, 2048) if len(hidden_sizes) > 1 else (16,):
                gates = torch.empty(1, 58, sequences, 8 * hidden, dtype=dtype)
                unet_triton.lstm(gates, torch.empty(2, hidden, 4, hidden, dtype=dtype), 1)
    return found


def compiled(kernel: Any, arguments: tuple, constants: dict[str, int], capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    names, signature, fixed, hints = kernel.arg_names, {}, {}, {}
    for place, (name, value) in enumerate(zip(names, arguments, strict=False)):
        specialised = isinstance(value, int) and not kernel.params[place].do_not_specialize
        signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "fp32"
        if isinstance(value, int):
            signature[name] = "constexpr" if specialised and value == 1 else "i32"
            fixed |= {name: 1} if specialised and value == 1 else {}
        if isinstance(value, Tensor) or (specialised and value % 16 == 0):
            hints[(place,)] = [["tt.divisibility", 16]]
    options = {key: constants[key] for key in OPTIONS if key in constants}
    fixed |= {key: value for key, value in constants.items() if key not in OPTIONS}
    signature |= dict.fromkeys(fixed, "constexpr")
    source = triton.compiler.ASTSource(kernel, signature, fixed, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")
@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, hidden_sizes", [(90, (64,)), *((number, (64, 256)) for number in (75, 80, 86, 89, 90, 100, 120))]
)
def test_every_kernel_compiles_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, hidden_sizes: tuple[int, ...]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in launches(monkeypatch, torch.float16, hidden_sizes):
        binary = compiled(*launch, capability)
        most = SHARED_BYTES_OF_DATA_CENTRES if capability in (90, 100) else SHARED_BYTES
        assert binary.asm["cubin"] and binary.metadata.shared <= most
