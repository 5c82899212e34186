"""When a model's core for GPUs is made."""

from collections.abc import Callable

import pytest
import torch

from helpers.simulated_gpu import simulated_gpu
from helpers.small_unets import small_mdx23c, small_scnet
from separation.models.fast_core import FastCoreModel

MODELS = pytest.mark.parametrize("make", [small_mdx23c, small_scnet], ids=["MDX23C", "SCNet"])
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is there")


@needs_no_gpu
@MODELS
def test_it_is_made_when_16_bit_weights_arrive_on_a_gpu(make: Callable[[], FastCoreModel]) -> None:
    model = make()
    model.to_precision(torch.float16)
    assert model._core is None
    with simulated_gpu():
        model.to("cuda")
        first = model._core
        assert first is not None
        model.to_precision(torch.bfloat16)
        assert model._core not in (None, first)
        model.to("cpu")
        assert model._core is None


@needs_no_gpu
@MODELS
@pytest.mark.parametrize("dtype, capability", [(torch.float32, (9, 0)), (torch.float16, (7, 0))])
def test_float32_and_old_gpus_use_the_plain_layers(
    make: Callable[[], FastCoreModel], dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    model = make()
    model.to_precision(dtype)
    with simulated_gpu(capability):
        model.to("cuda")
        assert model._core is None


@MODELS
def test_it_can_be_had_wherever_the_weights_are(make: Callable[[], FastCoreModel]) -> None:
    model = make().to("meta")
    model.fuse_for_gpu(torch.float16)
    assert model._core is not None and model.is_half
