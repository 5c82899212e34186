"""MDX23C's faster layers equal its plain layers, here on the CPU."""

import pytest
import torch

from helpers.small_unets import small_mdx23c
from separation.evaluation.metrics import sdr
from separation.models.kernels import mdx23c_core


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "BatchNorm", "act": "relu", "num_subbands": 2},
        {"norm": "GroupNorm4", "act": "elu0.7", "scale": [1, 2], "num_blocks_per_scale": 3, "chunk_size": 64 * 20},
    ],
    ids=str,
)
def test_the_gpu_core_equals_the_plain_layers(
    monkeypatch: pytest.MonkeyPatch, channels_last: bool, changes: dict
) -> None:
    monkeypatch.setattr(mdx23c_core, "CHANNELS_LAST", channels_last)
    model = small_mdx23c(**changes)
    for value in model.state_dict().values():
        if value.ndim == 1:  # of a norm: a mistake would not show with gains of exactly one
            value.add_(torch.rand_like(value) * 0.2)
    chunks = torch.randn(2, 2, model.config.chunk_size) * torch.tensor([0.1, 0.01])[:, None, None]
    fewer = model.only(("cymbals", "snare"))
    with torch.inference_mode():
        expected = model(chunks)
        model._core = fewer._core = model.make_gpu_core()
        got, some = model(chunks), fewer(chunks)
        assert (got - expected).abs().amax((1, 2, 3)).le(1e-5 * expected.abs().amax((1, 2, 3))).all()
        assert (some - expected[:, [4, 1]]).abs().max() <= 1e-5 * expected.abs().max()
        model.prepare(torch.float16)  # drops the core
        plain = model(chunks)
        model._core = model.make_gpu_core()
        fast = model(chunks)
    exact, plain, fast = (estimates[0].flatten(0, 1) for estimates in (expected, plain, fast))
    assert sdr(exact, fast) > max(50, sdr(exact, plain) - 1)
