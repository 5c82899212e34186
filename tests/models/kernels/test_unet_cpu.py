"""The C++ kernels of MDX23C and SCNet equal PyTorch's operations, whatever the batch and the number of threads."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.small_unets import XL_IHF, small_mdx23c, small_scnet
from separation.evaluation.metrics import sdr
from separation.models.fast_core import FastCoreModel
from separation.models.kernels import unet_cpu, unet_ops
from separation.models.kernels.native import library
from separation.models.kernels.registry import cpu_fault
from separation.models.kernels.unet_cpu import Convolution

pytestmark = pytest.mark.skipif(bool(cpu_fault()), reason=cpu_fault() or "kernels for CPUs work")


def with_threads(function: Callable[[], Tensor]) -> Tensor:
    """The function's result, which must be the same with one thread and with three."""
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(function())
    torch.set_num_threads(threads)
    assert torch.equal(*results)
    return results[0]


def assert_near(got: Tensor, expected: Tensor, error: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= error * expected.abs().max()


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    "features, size",
    [((128, 64), (12, 40)), ((20, 36), (13, 7)), ((5, 3), (1, 1)), ((64, 33), (4, 4)), ((3, 130), (2, 9))],
)
def test_winograds_convolution(features: tuple[int, int], size: tuple[int, int], has_bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, features[0], *size)
    weight = torch.randn(features[1], features[0], 3, 3)
    bias = torch.randn(features[1]) if has_bias else None
    convolution = Convolution(weight, bias)
    got = with_threads(lambda: convolution(x))
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    assert_near(got.double(), exact)
    assert torch.equal(got[1:], convolution(x[1:]))
    for activation in (unet_ops.GELU, unet_ops.RELU):
        convolution.activation = activation
        assert_near(convolution(x), unet_ops.ACTIVATIONS[activation](got, 0.0))


@pytest.mark.parametrize("shape", [(2, 300, 20), (1, 64, 32), (3, 1, 5)])
@pytest.mark.parametrize("whole", [True, False])
def test_moments(shape: tuple[int, int, int], whole: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * 3 + 100  # a sum of squares would lose the variance
    got = with_threads(lambda: unet_cpu.moments(x, whole))
    torch.testing.assert_close(got, unet_ops.moments(x.double(), whole).float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("activation", list(unet_ops.ACTIVATIONS))
@pytest.mark.parametrize("features", [20, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_normalise(activation: int, features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 150, features) * 4
    norm = [unet_ops.moments(x, False) * 0.5, torch.randn(features), torch.randn(features)]
    got = with_threads(lambda: unet_cpu.normalise(x, norm, activation, 0.7, dtype))
    expected = unet_ops.normalise(x, norm, activation, 0.7, dtype)
    assert got.dtype == dtype
    features_first = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert unet_cpu.normalise(features_first, norm, activation, 0.7, dtype).stride() == features_first.stride()
    assert_near(got.float(), expected.float(), 1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("rows, depth, features", [(7, 30, 20), (24, 16, 64), (1, 1, 1)])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("has_table", [True, False])
def test_a_linear_layer_over_bins(rows: int, depth: int, features: int, adds: bool, has_table: bool) -> None:
    torch.manual_seed(0)
    x, weight, before = torch.randn(3, depth, features), torch.randn(rows, depth), torch.randn(3, rows, features)
    table = torch.randn(2, features) if has_table else None
    got = with_threads(lambda: unet_cpu.over_bins(x, weight, before.clone() if adds else None, table=table))
    product = weight @ x
    if table is not None:
        product = F.relu(product * table[0] + table[1])
    assert_near(got, product + (before if adds else 0))


@pytest.mark.parametrize(
    "make",
    [
        small_mdx23c,
        lambda: small_mdx23c(norm="BatchNorm", act="relu", num_subbands=2),
        lambda: small_mdx23c(norm="GroupNorm4", act="elu0.7", scale=[1, 2], chunk_size=64 * 20),
        small_scnet,
        lambda: small_scnet(**XL_IHF),
    ],
    ids=["mdx23c", "mdx23c BatchNorm", "mdx23c GroupNorm", "scnet", "scnet XL IHF"],
)
def test_the_cpu_core_equals_the_plain_layers(make: Callable[[], FastCoreModel]) -> None:
    model = make()
    for value in model.state_dict().values():
        if value.ndim == 1:  # of a norm or a bias: a mistake would not show with gains of exactly one
            value.add_(torch.rand_like(value) * 0.2)
    chunks = torch.randn(2, 2, model.chunk_samples) * torch.tensor([0.1, 0.01])[:, None, None]
    fewer = model.only((model.stems[1], model.stems[0]))
    with torch.inference_mode():
        expected = model(chunks)
        model.fuse_for_cpu()
        fewer.fuse_for_cpu()
        got, some = model(chunks), fewer(chunks)
    assert model._core is not None
    assert (got - expected).abs().amax((1, 2, 3)).le(1e-5 * expected.abs().amax((1, 2, 3))).all()
    assert_near(some, expected[:, [1, 0]])


def test_bfloat16_is_computed_in_float32_where_that_is_faster() -> None:
    model, exact = small_mdx23c(), small_mdx23c()
    chunks = torch.randn(1, 2, model.chunk_samples) * 0.1
    model.to_precision(torch.bfloat16)
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    with torch.inference_mode():
        model._core = model.make_cpu_core()
        assert_near(model(chunks), exact(chunks))


@pytest.mark.skipif(bool(cpu_fault()) or library().kind.name == "amx", reason="AMX computes bfloat16 in plain layers")
def test_of_scnet_in_bfloat16_only_the_lstms_compute_in_it() -> None:
    model, plain = small_scnet(), small_scnet()
    chunks = torch.randn(1, 2, model.chunk_samples) * 0.1
    with torch.inference_mode():
        exact = model(chunks)
        for each in (model, plain):
            each.prepare(torch.bfloat16)
        model.fuse_for_cpu()
        assert model._core is not None and model.precision == torch.bfloat16
        exact, got, expected = (estimates[0].flatten(0, 1) for estimates in (exact, model(chunks), plain(chunks)))
    assert sdr(exact, got) > sdr(exact, expected)


def test_large_weights_keep_pytorchs_convolution() -> None:
    layers = unet_cpu.for_cpu(torch.nn.Sequential(torch.nn.Conv2d(1024, 1024, 3), torch.nn.Conv2d(8, 8, 3, padding=1)))
    assert [type(layer) for layer in layers.children()] == [torch.nn.Conv2d, Convolution]
