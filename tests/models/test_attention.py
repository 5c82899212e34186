"""Attention backends equal their reference, and the choice of one has a reason."""

import logging
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.small_model import HYPER_PARAMETERS, small_model, write_weights, write_yaml
from separation import load_model
from separation.errors import InputError
from separation.models import attention
from separation.models.attention import BACKENDS, choose_attention, einsum_attention
from separation.models.kernels.native import NotFusedError

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["sdpa", "itemwise"])
@pytest.mark.parametrize("shape", [(3, 2, 37, 16), (5, 8, 801, 64), (40, 8, 62, 64), (2, 2, 2100, 16)])
def test_every_backend_equals_the_reference(backend: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *shape)
    assert (BACKENDS[backend](q, k, v) - einsum_attention(q, k, v)).abs().max() <= 1e-5


def test_a_requested_choice_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_attention("einsum", CPU, torch.float32).name == "einsum"
    monkeypatch.setenv("SEPARATION_ATTENTION", "einsum")
    choice = choose_attention("auto", CPU, torch.float32)
    assert (choice.name, choice.reason) == ("einsum", "requested by SEPARATION_ATTENTION")
    assert choose_attention("sdpa", CPU, torch.float32).name == "sdpa"
    monkeypatch.setenv("SEPARATION_ATTENTION", "sage")
    with pytest.raises(InputError, match=r"^attention backend 'sage' does not work here \(No module named"):
        choose_attention("auto", CPU, torch.bfloat16)


def test_a_requested_backend_that_does_not_work_is_an_error_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"^attention backend 'sage' does not work here \(No module named"):
        choose_attention("sage", CPU, torch.bfloat16)
    with pytest.raises(InputError, match=r"'fused' does not work here \(it is for CPUs in fp32 and bf16\): use auto"):
        choose_attention("fused", CPU, torch.float16)
    with pytest.raises(InputError, match="unknown attention backend 'flash': use auto, fused, triton, sage, sdpa"):
        choose_attention("flash", CPU, torch.float32)


def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nmore lines")


def no_library() -> None:
    raise NotFusedError("no compiler")


def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return einsum_attention(q, k, v) * 2


@pytest.mark.parametrize("link, following", [("sage", "sdpa"), ("sdpa", "einsum")])
@pytest.mark.parametrize(
    "failing, reason", [(broken, "no kernel image is available"), (wrong, "its result is wrong by 100%")]
)
def test_auto_falls_back_to_the_next_candidate_of_a_gpu(
    link: str, following: str, failing: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The candidates of a GPU, tried on the CPU.
    monkeypatch.setattr(attention, "_candidates", lambda device, dtype: (link, following))
    monkeypatch.setitem(BACKENDS, link, failing)
    choice = choose_attention("auto", CPU, torch.float32)
    assert choice.name == following
    assert choice.reason.startswith(f"not {link}: {reason}; the fastest that works here")


@pytest.mark.parametrize("gain, is_taken", [(1.04, True), (0.96, True), (1.06, False), (0.94, False)])
def test_a_backend_may_differ_from_the_reference_by_less_than_5_percent(
    gain: float, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_candidates", lambda device, dtype: ("sage", "sdpa"))
    monkeypatch.setitem(BACKENDS, "sage", lambda q, k, v: gain * einsum_attention(q, k, v))
    choice = choose_attention("auto", CPU, torch.float32)
    assert choice.name == ("sage" if is_taken else "sdpa")
    assert is_taken or choice.reason.startswith("not sage: its result is wrong by 6%")


@pytest.mark.parametrize(
    "failing, reason", [(broken, "no kernel image is available"), (wrong, "its result is wrong by 100%")]
)
def test_auto_falls_back_to_the_reference_on_a_cpu_in_bfloat16(
    failing: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "library", no_library)
    monkeypatch.setitem(BACKENDS, "itemwise", failing)
    choice = choose_attention("auto", CPU, torch.bfloat16)
    assert choice.name == "einsum"
    assert choice.reason == f"not fused: no compiler; not itemwise: {reason}; the fastest that works here"


def test_auto_skips_a_backend_that_does_not_support_the_head_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def only_64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape[-1] == 64, "headdim should be 64"
        return einsum_attention(q, k, v)

    monkeypatch.setattr(attention, "_candidates", lambda device, dtype: ("sage", "sdpa"))
    monkeypatch.setitem(BACKENDS, "sage", only_64)
    assert choose_attention("auto", CPU, torch.float32, 64).name == "sage"
    choice = choose_attention("auto", CPU, torch.float32, 48)
    assert (choice.name, choice.reason.split(";")[0]) == ("sdpa", "not sage: headdim should be 64")
    with pytest.raises(InputError, match=r"'sage' does not work here \(headdim should be 64\): use auto"):
        choose_attention("sage", CPU, torch.float32, 48)


def test_backends_are_tried_with_the_models_head_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(attention, "_candidates", lambda device, dtype: ("sage", "sdpa"))
    monkeypatch.setitem(BACKENDS, "sage", lambda q, k, v: asked.append(q.shape[-1]) or broken(q, k, v))
    with caplog.at_level(logging.INFO):
        weights = write_weights(small_model().state_dict(), tmp_path / "small.safetensors")
        load_model(write_yaml(tmp_path), checkpoint=weights)
    assert asked == [HYPER_PARAMETERS["dim_head"]]
    assert re.search(
        r"^small: attention sdpa \(not sage: no kernel .*, with PyTorch's \w+ kernel\)$", caplog.messages[0]
    )


def test_the_reason_names_the_kernel_of_sdpa() -> None:
    assert choose_attention("sdpa", CPU, torch.float32).reason == "requested, with PyTorch's flash kernel"
    with sdpa_kernel(SDPBackend.MATH):
        assert choose_attention("sdpa", CPU, torch.float32).reason == "requested, with PyTorch's math kernel"


def test_sage_is_used_if_its_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("sageattention")
    package.sageattn = lambda q, k, v, tensor_layout, is_causal: einsum_attention(q, k, v)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sageattention", package)
    monkeypatch.setattr(attention, "_candidates", lambda device, dtype: ("sage", "sdpa"))
    assert choose_attention("auto", CPU, torch.float32).name == "sage"


def test_each_device_and_precision_has_its_candidates() -> None:
    cuda = torch.device("cuda")
    assert attention._candidates(cuda, torch.bfloat16) == ("triton", "sdpa", "einsum")
    assert attention._candidates(cuda, torch.float32) == ("sdpa", "einsum")
    assert attention._candidates(CPU, torch.bfloat16) == ("fused", "itemwise", "einsum")
    assert attention._candidates(CPU, torch.float32) == ("fused", "sdpa", "einsum")


def test_if_no_backend_works_the_error_names_the_fault_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "library", no_library)
    for name in ("sdpa", "einsum"):
        monkeypatch.setitem(BACKENDS, name, broken)
    faults = r"not fused: no compiler; not sdpa: no kernel .*; not einsum: no kernel .*"
    with pytest.raises(InputError, match=rf"works on cpu \({faults}\): use another"):
        choose_attention("auto", CPU, torch.float32)
