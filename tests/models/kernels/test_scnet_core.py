"""SCNet's faster layers equal its plain layers, here on the CPU."""

from typing import Any

import pytest
import torch

from helpers.common import quick_first
from helpers.small_unets import XL_IHF, small_scnet
from separation.evaluation.metrics import sdr
from separation.models.kernels import scnet_core


@pytest.mark.parametrize("largest", [0, 256], ids=["PyTorch's LSTM", "our LSTM"])
@pytest.mark.parametrize(
    "changes",
    quick_first(
        [
            {},
            {**XL_IHF, "num_dplayer": 4, "normalized": False},
            {
                "audio_channels": 1,
                "dims": (2, 8, 16),
                "compress": 2,
                "conv_kernel": 5,
                "expand": 2,
                "conv_depths": (0, 1, 2),
            },
        ],
        1,
    ),
    ids=str,
)
def test_the_gpu_core_equals_the_plain_layers(
    monkeypatch: pytest.MonkeyPatch, largest: int, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(scnet_core, "MOST_LSTM_FEATURES", largest)
    model = small_scnet(**changes)
    for value in model.state_dict().values():
        if value.ndim == 1:  # a mistake would not show with gains of exactly one
            value.add_(torch.randn_like(value) * 0.1)
    chunks = torch.randn(2, model.channels, 12_000) * torch.tensor([0.1, 0.01])[:, None, None]
    fewer = model.only(("vocals", "bass"))
    with torch.inference_mode():
        expected = model(chunks)
        model._core = fewer._core = model.make_gpu_core()
        got, some = model(chunks), fewer(chunks)
        assert (got - expected).abs().amax((1, 2, 3)).le(1e-5 * expected.abs().amax((1, 2, 3))).all()
        assert (some - expected[:, [3, 1]]).abs().max() <= 1e-5 * expected.abs().max()
        model.prepare(torch.float16)
        plain = model(chunks)
        model._core = model.make_gpu_core()
        fast = model(chunks)
    exact, plain, fast = (estimates[0].flatten(0, 1) for estimates in (expected, plain, fast))
    assert sdr(exact, fast) > max(45, sdr(exact, plain) - 1)
