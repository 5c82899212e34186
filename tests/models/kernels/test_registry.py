"""Operations run their references where no kernel can run."""

import inspect
from types import ModuleType

import pytest
import torch

from separation.models.kernels import demucs_ops, roformer_ops, unet_ops
from separation.models.kernels.registry import kernel_of, ops, triton_fault

MODULES = (demucs_ops, roformer_ops, unet_ops)


def operations(module: ModuleType) -> list[str]:
    functions = inspect.getmembers(module, inspect.isfunction)
    return [name for name, value in functions if value.__module__ == module.__name__ and hasattr(ops, name)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_on_meta_tensors_and_in_float16_on_a_cpu_an_operation_is_its_reference(device: str) -> None:
    x, bias = torch.randn(3, 8, device=device, dtype=torch.float16), torch.randn(8, device=device)
    expected = x.clone()
    demucs_ops.bias_gelu_(expected, bias)
    ops.bias_gelu_(x, bias)
    assert x.device.type == device and (device == "meta" or torch.equal(x, expected))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_operation_has_a_kernel_of_its_name(module: ModuleType) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    names = operations(module)
    assert len(names) > 4
    for name in names:
        kernel = kernel_of(name)
        assert kernel.__name__ == name and kernel.__module__ == module.__name__.replace("_ops", "_triton")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_kernel_takes_the_arguments_of_its_reference(module: ModuleType) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    for name in operations(module):
        assert inspect.signature(kernel_of(name)) == inspect.signature(getattr(module, name))


def test_where_triton_does_not_work_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "separation")
    assert triton_fault.__wrapped__(torch.device("meta"))
    (message,) = caplog.messages
    assert message.startswith("Triton kernels do not work on meta (separation::probe: attempted to run")
    assert message.endswith("using plain PyTorch operations")
