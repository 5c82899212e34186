"""The Triton kernels of the Demucs family equal their references, and compile, without a GPU."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.common import PROJECT, quick_first
from separation.models.kernels import demucs_ops
from separation.models.kernels.registry import ops

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
DTYPES = [torch.float32, torch.float16]  # Triton's interpreter is wrong in bfloat16

pytestmark = pytest.mark.usefixtures("one_thread")
ON_GPU = torch.cuda.is_available() and not INTERPRETED
interpreted = pytest.mark.skipif(
    not (INTERPRETED or ON_GPU), reason="runs on a GPU, or in a process of its own in Triton's interpreter"
)
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="runs outside of Triton's interpreter")


@pytest.fixture
def kernels() -> ModuleType:
    from separation.models.kernels import demucs_triton

    return demucs_triton


@pytest.mark.slow
@not_interpreted
def test_in_tritons_interpreter_kernels_equal_their_references() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ran = subprocess.run(
        command, cwd=PROJECT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout + ran.stderr


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def table(*shape: int) -> Tensor:
    return random(*shape) * 0.3 + 1


def moved(argument: Any, device: str) -> Any:
    """Copy the argument to the device if it is a tensor or a list of tensors."""
    if isinstance(argument, list):
        return [moved(each, device) for each in argument]
    return argument.to(device, copy=True) if isinstance(argument, Tensor) else argument


def assert_same(kernels: ModuleType, name: str, *arguments: Any) -> None:
    """The kernel and its reference return the same and change their arguments alike, up to one rounding."""
    copies = [moved(value, "cpu") for value in arguments]
    if ON_GPU:
        arguments = tuple(moved(value, "cuda") for value in arguments)
    got, expected = getattr(kernels, name)(*arguments), getattr(demucs_ops, name)(*copies)
    results = [(got, expected)] if isinstance(got, Tensor) else list(zip(got or (), expected or (), strict=True))
    changed = [pair for pair in zip(arguments, copies, strict=True) if isinstance(pair[0], Tensor)]
    for a, b in ((each.cpu(), other) for each, other in results + changed):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        rounding = 1e-5 if a.dtype == torch.float32 else 2e-3
        assert torch.allclose(a.float(), b.float(), atol=rounding, rtol=rounding), (a.float() - b.float()).abs().max()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [True, False])
def test_pack_equals_its_reference(kernels: ModuleType, dtype: torch.dtype, strided: bool) -> None:
    x = random(2, 2, 9, 24, 2).transpose(2, 3) if strided else random(2, 2, 41, 1, 1)
    rows = -(-x.shape[2] // 4) + 1
    assert_same(kernels, "pack", x, [random(2), random(2).abs()], 4, 2, rows, dtype)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_glu_equal_their_references(kernels: ModuleType, dtype: torch.dtype) -> None:
    assert_same(kernels, "bias_gelu_", random(2, 5, 7, 48, dtype=dtype), random(48))
    for extra in (None, random(5, 24)):
        assert_same(kernels, "bias_glu", random(2, 5, 7, 48, dtype=dtype), random(48), extra)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, hidden, dilation", [((3, 70, 48), 6, 2), ((2, 9, 8), 1, 1), ((1, 300, 96), 24, 1)])
def test_a_residual_branch_equals_its_reference(
    kernels: ModuleType,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    hidden: int,
    dilation: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = shape[2]
    monkeypatch.setattr(kernels, "MOST_PARTS", 2)  # so that a program has several tiles
    w_in, w_out = torch.zeros(3, features, -(-hidden // 8) * 8), torch.zeros(-(-hidden // 8) * 8, 2 * features)
    w_in[..., :hidden], w_out[:hidden] = random(3, features, hidden) * 0.1, random(hidden, 2 * features)
    in_table = torch.zeros(3, w_in.shape[2])
    in_table[:, :hidden] = table(3, hidden)
    layers = [w_in.to(dtype), in_table], [w_out.to(dtype), table(3, 2 * features)]
    assert_same(kernels, "dconv_", random(*shape, dtype=dtype), *layers, hidden, dilation)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [1, 5])
def test_interleave_equals_its_reference(kernels: ModuleType, dtype: torch.dtype, positions: int) -> None:
    x, bias = random(2, 7, positions, 4 * 24, dtype=dtype), random(24)
    assert_same(kernels, "interleave", x, bias, None, 2, 24)
    skips = random(2, 30, positions, 24, dtype=dtype)[:, 3:26]  # the distance between items exceeds their length
    assert_same(kernels, "interleave", x, bias, skips, 2, 23)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 24, 4])
def test_unpack_spectrum_equals_its_reference(kernels: ModuleType, dtype: torch.dtype, channels: int) -> None:
    x = random(2, 33, 3, 4 * channels, dtype=dtype)
    assert_same(kernels, "unpack_spectrum", x, random(channels), [random(2), random(2).abs()], 2, 2)


@interpreted
@pytest.mark.parametrize("n_frames", [7, 2])
def test_overlap_add_equals_its_reference(kernels: ModuleType, n_frames: int) -> None:
    window = torch.hann_window(64) + 0.01  # avoids a division by zero at the ends
    assert_same(kernels, "overlap_add", random(2, 3, n_frames, 64), window, 16, 5, 16 * n_frames + 32)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_waveform_equals_its_reference(kernels: ModuleType, dtype: torch.dtype) -> None:
    x, out = random(2, 11, 1, 4 * 8, dtype=dtype), random(2, 8, 50)
    assert_same(kernels, "add_waveform_", out[..., 9:], x, random(8), [random(2), random(2).abs()], 2)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 48])
def test_norms_of_the_transformer_equal_their_references(
    kernels: ModuleType, dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "MOST_PARTS", 3)
    x, y = random(2, 21, dim), random(2, 21, dim, dtype=dtype)
    assert_same(kernels, "embed", y, table(dim), random(dim), random(21, dim))
    assert_same(kernels, "add_norm_", x, y, table(dim))
    assert_same(kernels, "add_group_norm_", x, y, *table(3, dim))


def operations() -> list[str]:
    functions = inspect.getmembers(demucs_ops, inspect.isfunction)
    return [name for name, _ in functions if not name.startswith("_") and hasattr(ops, name)]


class Launches:
    """Takes the place of a kernel and records the arguments of its launches."""

    def __init__(self, kernel: Any, launched: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < size < 2**16 for size in grid[1:]) and 0 < grid[0] < 2**31
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> None:
        self.launched.append((self.kernel, inspect.signature(self.kernel.fn).bind(*arguments, **options).arguments))


def launches(kernels: ModuleType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All kernels, with arguments that have the shapes of htdemucs's outermost and widest layers for a batch of 8."""
    launched: list[Any] = []
    names = [name for name, value in vars(kernels).items() if type(value).__name__ == "JITFunction"]
    for name in names:
        if any(f" {name}[" in inspect.getsource(getattr(kernels, each)) for each in operations()):
            monkeypatch.setattr(kernels, name, Launches(getattr(kernels, name), launched))
    empty = partial(torch.empty, device="meta", dtype=dtype)
    exact = partial(torch.empty, device="meta")
    stats = [exact(8), exact(8)]
    kernels.pack(exact(8, 2, 336, 2048, 2).transpose(2, 3), stats, 4, 2, 513, dtype)
    kernels.pack(exact(8, 2, 343980, 1, 1), stats, 4, 2, 85996, dtype)
    kernels.bias_gelu_(empty(8, 512, 336, 48), exact(48))
    for table_of in (None, exact(512, 48)):
        kernels.bias_glu(empty(8, 512, 336, 96), exact(96), table_of)
    for rows, length, features in ((8 * 512, 336, 48), (8, 85995, 48), (64, 336, 384), (8, 1344, 384)):
        hidden = features // 8
        width = hidden + -hidden % 8
        layer_in = [empty(3, features, width), exact(3, width)]
        layer_out = [empty(width, 2 * features), exact(3, 2 * features)]
        kernels.dconv_(empty(rows, length, features), layer_in, layer_out, hidden, 2)
    kernels.interleave(empty(8, 129, 336, 192), exact(48), empty(8, 512, 336, 48), 2, 512)
    kernels.interleave(empty(8, 21500, 1, 192), exact(48), empty(8, 85995, 1, 48), 2, 85995)
    kernels.unpack_spectrum(empty(8, 513, 336, 64), exact(16), stats, 2, 2)
    kernels.unpack_spectrum(empty(8, 513, 336, 96), exact(24), stats, 2, 2)
    kernels.overlap_add(exact(8, 8, 340, 4096), exact(4096), 1024, 3584, 343980)
    kernels.add_waveform_(exact(8, 8, 345516)[..., 1536:], empty(8, 85996, 1, 32), exact(8), stats, 2)
    for dim in (512, 384):
        x, y, gains = exact(8, 2688, dim), empty(8, 2688, dim), exact(3, dim)
        kernels.embed(y, *gains[:2], exact(2688, dim))
        kernels.add_norm_(x, y, gains[0])
        kernels.add_group_norm_(x, y, *gains)
    assert {kernel.fn.__name__ for kernel, _ in launched} == {
        name for name in names if isinstance(getattr(kernels, name), Launches)
    }
    return launched


@not_interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", quick_first([90, 75, 80, 86, 89, 100, 120], 1))
def test_the_kernels_compile_for_every_kind_of_gpu(
    kernels: ModuleType, capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if capability == 75 and dtype == torch.bfloat16:
        pytest.skip("that GPU has no bfloat16")
    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    seen = set()
    for kernel, arguments in launches(kernels, dtype, monkeypatch):
        constants = {
            name: value for name, value in arguments.items() if kernel.params[kernel.arg_names.index(name)].is_constexpr
        }
        signature = {
            name: "constexpr" if name in constants else types[value.dtype] if isinstance(value, Tensor) else "i32"
            for name, value in arguments.items()
        }
        key = kernel, *signature.items(), *constants.items()
        if key in seen:
            continue
        seen.add(key)
        source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        shared = compiled.metadata.shared
        print(f"sm_{capability} {kernel.fn.__name__}: {shared} bytes of shared memory")
        assert compiled.asm["cubin"] and shared <= 48 * 1024
