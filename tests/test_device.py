"""device: each choice is the best there is, with its reason; what is not there is an error that says so."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from separation import device
from separation.errors import InputError


def test_auto_is_a_device_that_is_there_with_a_reason() -> None:
    choice = device.choose()
    torch.zeros(1, device=choice.device, dtype=choice.precision)
    assert str(choice.device) in choice.reason
    assert "(" in choice.reason


def test_what_is_asked_for_is_taken() -> None:
    choice = device.choose("cpu", "fp32")
    assert (choice.device.type, choice.precision) == ("cpu", torch.float32)
    assert choice.reason == "device cpu (asked for), precision fp32 where a model can (asked for)"


@pytest.mark.parametrize(
    "capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_a_gpu_computes_in_bfloat16_from_sm_80_and_in_float16_below(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.choose_precision("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize("instructions, dtype", [("avx512_bf16", torch.bfloat16), ("", torch.float32)])
def test_a_cpu_computes_in_bfloat16_where_it_has_the_instructions(
    instructions: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "bfloat16_instructions", lambda: instructions)
    choice = device.choose("cpu", "auto")
    assert choice.precision == dtype
    assert (instructions or "no bfloat16 instructions") in choice.reason


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cpu cpu"])
def test_an_unknown_device_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match="auto, cpu, cuda"):
        device.choose(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is there")
def test_a_gpu_that_is_not_there_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(InputError, match="PyTorch sees no CUDA GPU; use --device cpu or auto"):
        device.choose("cuda")


def test_int8_is_for_a_cpu() -> None:
    assert device.choose("cpu", "int8").precision == torch.int8
    with pytest.raises(InputError, match="precision 'int8' is for a CPU, and the device is mps: use auto"):
        device.choose_precision("int8", torch.device("mps"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_without_a_gpu_is_that_of_the_process_in_bytes() -> None:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    high_water = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert high_water * 0.95 <= device.peak_memory_bytes(torch.device("cpu")) < everything


def test_what_something_needs_of_a_gpus_memory_is_measured_and_the_peak_so_far_not_forgotten(
    gpu_statistics: None,
) -> None:
    gpu, ran = torch.device("cuda"), []
    assert device.peak_memory_bytes(gpu) == 5000
    assert device.needed_memory_bytes(lambda: ran.append(True), gpu) == 700
    assert ran
    assert device.peak_memory_bytes(gpu) == device.peak_memory_bytes(torch.device("cuda:0")) == 5000


def test_peak_memory_on_a_gpu_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"cuda": 123, "cuda:1": 456}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: peaks[str(gpu)])
    assert {name: device.peak_memory_bytes(torch.device(name)) for name in peaks} == peaks
