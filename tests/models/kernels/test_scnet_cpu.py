"""SCNet's residual branches in C++ equal its plain layers."""

import pytest
import torch
import torch.nn.functional as F

from helpers.fused import every_kind, needs_fused, use_kind
from separation.cpu import Kind
from separation.models.kernels.scnet_cpu import TimeBranches
from separation.models.kernels.unet_ops import GELU, NONE
from separation.models.scnet import TimeConvolutions

pytestmark = needs_fused


@every_kind
@pytest.mark.parametrize(
    "features, compress, kernel, depth, frames",
    [(32, 4, 3, 3, 70), (20, 2, 5, 2, 7), (64, 2, 1, 1, 1), (8, 4, 3, 0, 3)],
)
def test_branches_equal_the_plain_layers(
    kind: Kind,
    features: int,
    compress: int,
    kernel: int,
    depth: int,
    frames: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_kind(kind, monkeypatch)
    torch.manual_seed(0)
    plain = TimeConvolutions(features, depth, compress, kernel).requires_grad_(False)
    for parameter in plain.parameters():
        parameter += torch.randn_like(parameter) * 0.1  # a mistake would not show with gains of exactly one
    branches = TimeBranches(plain.layers)
    x = torch.randn(2, 3, frames, features) * 3 + 1
    expected = plain(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    threads = torch.get_num_threads()
    for count, activation in ((1, GELU), (3, GELU), (1, NONE)):
        torch.set_num_threads(count)
        out = torch.zeros(2, 5, frames, features)
        branches(out[:, 1:4], x, activation)  # between other bands
        wanted = F.gelu(expected) if activation == GELU else expected
        assert (out[:, 1:4] - wanted).abs().max() <= 1e-5
        assert not out[:, [0, 4]].any()
    torch.set_num_threads(threads)


def test_nan_is_never_hidden() -> None:
    torch.manual_seed(0)
    branches = TimeBranches(TimeConvolutions(16, 1, 4, 3).requires_grad_(False).layers)
    x = torch.randn(1, 3, 5, 16)
    x[0, 1, 2, 3] = torch.nan
    out = torch.empty_like(x)
    branches(out, x, GELU)
    assert out[0, 1].isnan().all() and not out[0, [0, 2]].isnan().any()
