"""MDX-Net's layers for CPUs equal the plain ones."""

import copy
from pathlib import Path

import pytest
import torch

from helpers.fused import needs_fused

pytest.importorskip("onnx", reason="needs onnx")

from helpers.mdx_nets import small_mdx_net  # needs onnx


@needs_fused
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sizes", [{}, {"scales": 3, "layers": 1, "kernel": 5}, {"features": 20, "layers": 3, "narrow": 8}], ids=str
)
def test_the_cpu_core_equals_the_plain_layers(tmp_path: Path, sizes: dict, precision: str) -> None:
    model = small_mdx_net(tmp_path, compensate=1.25, **sizes)
    assert model._core is not None
    for value in model.parameters():
        if value.ndim == 1:  # of a bias or a norm: a mistake would not show with factors of exactly one
            value.add_(torch.rand_like(value) * 0.2)
    model.to_precision({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    assert model._core is None
    chunks = torch.randn(2, 2, model.input_samples(1)) * torch.tensor([0.1, 0.01])[:, None, None]
    with torch.inference_mode():
        expected = copy.deepcopy(model).float()(chunks)
    model.fuse_for_cpu()
    assert model._core is not None
    with torch.inference_mode():
        assert (model(chunks) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (model(chunks[1:]) - expected[1:]).abs().max() <= 1e-5 * expected[1:].abs().max()


@needs_fused
def test_linear_layers_with_biases_stay_plain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "separation")
    assert small_mdx_net(tmp_path, form={"bias": True})._core is None
    assert "using plain layers (there are none for linear layers with biases)" in caplog.text
