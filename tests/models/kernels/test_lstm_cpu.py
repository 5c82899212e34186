"""The C++ LSTMs equal PyTorch's, whatever the batch and the number of threads."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from helpers.fused import every_kind, needs_fused, use_kind
from separation.cpu import KINDS, Kind
from separation.models.kernels import fused, unet_ops
from separation.models.kernels.lstm_cpu import LSTM, AddedLinear
from separation.models.kernels.native import library

pytestmark = needs_fused
ERRORS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def precisions(kind: Kind) -> list[torch.dtype]:
    return [dtype for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")) if name in kind.precisions]


def plain(lstm: nn.LSTM, x: Tensor, axis: int) -> Tensor:
    steps = x.movedim(axis, 0)
    return lstm(steps.flatten(1, 2))[0].unflatten(1, steps.shape[1:3]).movedim(0, axis)


def with_threads(function: Callable[[], Tensor]) -> Tensor:
    """The function's result, which must be the same with one thread, three and more than there is work for."""
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3, 70):
        torch.set_num_threads(count)
        results.append(function())
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    return results[0]


def sums(linear: AddedLinear, x: Tensor, y: Tensor) -> Tensor:
    total = x.clone()
    linear.add_to(total, y)
    return total


def make(features: int, hidden: int, layers: int = 1) -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(features, hidden, num_layers=layers, bidirectional=True).requires_grad_(False)


@every_kind
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(
    "shape, hidden, layers",
    [((2, 5, 9, 16), 16, 1), ((1, 3, 70, 20), 12, 2), ((2, 1, 6, 40), 70, 1), ((1, 4, 1, 128), 64, 1)],
)
def test_an_lstm_equals_pytorchs(
    kind: Kind,
    axis: int,
    shape: tuple[int, int, int, int],
    hidden: int,
    layers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_kind(kind, monkeypatch)
    lstm, x = make(shape[3], hidden, layers), torch.randn(shape) * 2
    with torch.inference_mode():
        for precision in precisions(kind):
            ours, given = LSTM(lstm, precision), x.to(precision)
            got = with_threads(partial(ours, given, axis))
            assert got.dtype == precision
            assert (got - plain(lstm, x, axis)).abs().max() <= ERRORS[precision]
            assert torch.equal(got[-1:], ours(given[-1:], axis))


@every_kind
def test_its_input_is_normalised_first(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kind(kind, monkeypatch)
    lstm = make(20, 32)
    x = torch.randn(2, 3, 4, 20) * 3 + 1
    moments, gain, bias = unet_ops.moments(x.flatten(1, 2), True), torch.rand(20) + 0.5, torch.randn(20)
    normed = unet_ops.normalise(x.flatten(1, 2), [moments, gain, bias], unet_ops.NONE, 0.0, torch.float32).view_as(x)
    scales = (moments[:, 1] + unet_ops.EPS).rsqrt() * gain
    norms = torch.stack([moments[:, 0], scales, bias.expand_as(scales)], dim=1)
    with torch.inference_mode():
        for precision in precisions(kind):
            got = LSTM(lstm, precision)(x, 1, norms)
            assert (got - plain(lstm, normed, 1)).abs().max() <= ERRORS[precision]


@every_kind
@pytest.mark.parametrize("rows, features, hidden", [(200, 20, 12), (1, 64, 32)])
def test_a_linear_layer_is_added(
    kind: Kind, rows: int, features: int, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kind(kind, monkeypatch)
    torch.manual_seed(0)
    linear = nn.Linear(hidden, features).requires_grad_(False)
    x, y = torch.randn(rows, features), torch.randn(rows, hidden)
    for precision in precisions(kind):
        got = with_threads(partial(sums, AddedLinear(linear, precision), x, y.to(precision)))
        assert (got - x - linear(y)).abs().max() <= 4 * ERRORS[precision]


@every_kind
def test_nan_is_never_hidden_and_large_inputs_saturate(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kind(kind, monkeypatch)
    lstm = make(16, 16)
    x = torch.randn(1, 6, 3, 16)
    x[0, 2, 1, 3] = torch.nan
    x[0, :, 2] = 1e4
    with torch.inference_mode():
        for precision in precisions(kind):
            got = LSTM(lstm, precision)(x.to(precision), 1)
            assert got[0, 2:, 1, :16].isnan().all() and got[0, :3, 1, 16:].isnan().all()
            assert not got[0, :2, 1, :16].isnan().any() and not got[0, :, [0, 2]].isnan().any()
            expected = plain(lstm, x.to(precision).float(), 1)[0, :, 2]
            assert (got[0, :, 2] - expected).abs().max() <= ERRORS[precision]


def test_it_computes_in_float32_where_the_kind_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    without = next(kind for kind in KINDS if "bf16" not in kind.precisions)
    monkeypatch.setattr(fused, "library", lambda: replace(library(), kind=without))
    assert LSTM(make(8, 8), torch.bfloat16).precision == torch.float32
