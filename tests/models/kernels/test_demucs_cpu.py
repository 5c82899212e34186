"""The Demucs family's C++ kernels equal their references in PyTorch, whatever the batch and the number of threads."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from separation.models.kernels import demucs_cpu, demucs_ops
from separation.models.kernels.demucs_cpu import GatedConvolution
from separation.models.kernels.registry import cpu_fault, ops

pytestmark = pytest.mark.skipif(bool(cpu_fault()), reason=cpu_fault() or "kernels for CPUs work")
DTYPES = [torch.float32, torch.bfloat16]
each_type = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def gains(*shape: int) -> Tensor:
    return random(*shape) * 0.3 + 1


def stats(batch: int) -> list[Tensor]:
    return [random(batch), random(batch).abs() + 0.1]


def results_of(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """What the function returns, and its arguments after it."""
    returned = function(*arguments)
    returned = [returned] if isinstance(returned, Tensor) else list(returned or ())
    return returned + [each for each in arguments if isinstance(each, Tensor)]


def assert_same(name: str, *arguments: Any) -> None:
    """The kernel equals its reference up to one rounding, with one thread and with three."""
    expected = results_of(getattr(demucs_ops, name), copy.deepcopy(arguments))
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 3):
        torch.set_num_threads(count)
        runs.append(results_of(getattr(demucs_cpu, name), copy.deepcopy(arguments)))
    torch.set_num_threads(threads)
    for once, again, reference in zip(*runs, expected, strict=True):
        assert once.dtype == reference.dtype and once.shape == reference.shape
        rounding = 1e-5 if once.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(once, reference, atol=rounding, rtol=rounding)
        assert torch.equal(once, again)


@each_type
@pytest.mark.parametrize("strided", [True, False])
def test_pack(dtype: torch.dtype, strided: bool) -> None:
    x = random(2, 2, 9, 24, 2).transpose(2, 3) if strided else random(2, 2, 41, 1, 1)
    assert_same("pack", x, stats(2), 4, 2, -(-x.shape[2] // 4) + 1, dtype)


@each_type
@pytest.mark.parametrize("channels", [48, 10])  # whole vectors, and less than one
def test_gelu_and_glu(dtype: torch.dtype, channels: int) -> None:
    assert_same("bias_gelu_", random(2, 5, 7, channels, dtype=dtype) * 3, random(channels))
    for table in (None, random(5, channels // 2)):
        assert_same("bias_glu", random(2, 5, 7, channels, dtype=dtype), random(channels), table)


@each_type
@pytest.mark.parametrize(
    "shape, hidden, dilation", [((20, 70, 48), 6, 2), ((2, 9, 8), 1, 1), ((1, 300, 96), 24, 1), ((3, 97, 40), 13, 1)]
)
def test_a_residual_branch(dtype: torch.dtype, shape: tuple[int, int, int], hidden: int, dilation: int) -> None:
    channels, stored = shape[2], hidden + -hidden % 8  # the features beyond `hidden` must not be read
    w_in, w_out = (torch.full(size, torch.nan) for size in ((3, channels, stored), (stored, 2 * channels)))
    w_in[..., :hidden], w_out[:hidden] = random(3, channels, hidden) * 0.1, random(hidden, 2 * channels)
    in_table = torch.full((3, stored), torch.nan)
    in_table[:, :hidden] = gains(3, hidden)
    layers = [w_in.to(dtype), in_table], [w_out.to(dtype), gains(3, 2 * channels)]
    assert_same("dconv_", random(*shape, dtype=dtype), *layers, hidden, dilation)


@each_type
def test_a_row_of_a_residual_branch_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    layers = [random(3, 16, 8, dtype=dtype), gains(3, 8)], [random(8, 32, dtype=dtype), gains(3, 32)]
    rows = random(9, 100, 16, dtype=dtype)
    together = rows.clone()
    demucs_cpu.dconv_(together, *layers, 8, 1)
    for row, expected in zip(rows.split(1), together, strict=True):
        demucs_cpu.dconv_(row, *layers, 8, 1)
        assert torch.equal(row[0], expected)


@each_type
@pytest.mark.parametrize("positions", [1, 5])
def test_interleave(dtype: torch.dtype, positions: int) -> None:
    x, bias = random(2, 7, positions, 4 * 24, dtype=dtype), random(24)
    assert_same("interleave", x, bias, None, 2, 24)
    skips = random(2, 30, positions, 24, dtype=dtype)[:, 3:26]  # the distance between items exceeds their length
    assert_same("interleave", x, bias, skips, 2, 23)


@each_type
@pytest.mark.parametrize("channels", [16, 24, 4])
def test_unpack_spectrum(dtype: torch.dtype, channels: int) -> None:
    x = random(2, 33, 3, 4 * channels, dtype=dtype)
    assert_same("unpack_spectrum", x, random(channels), stats(2), 2, 2)


@pytest.mark.parametrize("n_frames", [7, 2])
@pytest.mark.parametrize("hop_length", [16, 24])  # the second does not divide the frame
def test_overlap_add(n_frames: int, hop_length: int) -> None:
    window = torch.hann_window(64) + 0.01  # avoids a division by zero at the ends
    length = hop_length * (n_frames - 1) + 50
    assert_same("overlap_add", random(2, 3, n_frames, 64), window, hop_length, 5, length)


@each_type
def test_add_waveform(dtype: torch.dtype) -> None:
    x, out = random(2, 11, 1, 4 * 8, dtype=dtype), random(2, 8, 50)
    assert_same("add_waveform_", out[..., 9:], x, random(8), stats(2), 2)


@each_type
@pytest.mark.parametrize("dim", [64, 20])
def test_norms_of_the_transformer(dtype: torch.dtype, dim: int) -> None:
    x, y = random(2, 70, dim), random(2, 70, dim, dtype=dtype)
    assert_same("embed", y, gains(dim), random(dim), random(70, dim))
    assert_same("add_norm_", x, y, gains(dim))
    assert_same("add_group_norm_", x, y, *gains(3, dim))


@pytest.mark.parametrize("taps", [(1, 1), (1, 3), (3, 3)])
@pytest.mark.parametrize("shape", [(2, 5, 7, 8), (1, 1, 301, 48), (1, 4, 9, 64), (1, 1, 1, 20)])
@pytest.mark.parametrize("has_table", [True, False])
def test_a_gated_convolution(taps: tuple[int, int], shape: tuple[int, int, int, int], has_table: bool) -> None:
    channels = shape[3]
    x, bias = random(*shape), random(2 * channels)
    weight = random(2 * channels, channels, *taps) * (channels * taps[0] * taps[1]) ** -0.5
    table = random(shape[1], channels) if has_table else None
    y = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), padding=(taps[0] // 2, taps[1] // 2))
    expected = F.glu(y.permute(0, 2, 3, 1) + bias, dim=-1).float()
    if table is not None:
        expected += table[:, None]
    torch.testing.assert_close(GatedConvolution(weight, bias, table)(x), expected, atol=3e-6, rtol=3e-6)


@each_type
def test_nan_and_infinity_are_never_hidden(dtype: torch.dtype) -> None:
    for value in (torch.nan, torch.inf):
        x = torch.full((3, 8), value, dtype=dtype)
        demucs_cpu.bias_gelu_(x, torch.zeros(8))
        assert not x.isfinite().any()
    x = torch.full((1, 1, 1, 8), torch.nan, dtype=dtype)
    assert demucs_cpu.bias_glu(x, torch.zeros(8), None).isnan().all()


def test_operations_call_the_kernels_except_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[torch.dtype] = []
    monkeypatch.setattr(demucs_cpu, "bias_gelu_", lambda x, bias: called.append(x.dtype))
    for dtype in (*DTYPES, torch.float16):
        ops.bias_gelu_(random(3, 8, dtype=dtype), random(8))
    assert called == DTYPES
