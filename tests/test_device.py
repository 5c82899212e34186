"""The choice of a device and a precision; a missing device is an error."""

import logging
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.cpus import kind_of, set_flags
from helpers.simulated_gpu import simulated_gpu
from separation import device
from separation.errors import InputError

BF16 = kind_of("avx512_bf16")


def test_auto_chooses_an_available_device_and_gives_a_reason() -> None:
    choice = device.choose()
    torch.zeros(1, device=choice.device, dtype=choice.precision)
    assert str(choice.device) in choice.reason
    assert "(" in choice.reason


def test_a_requested_choice_is_made() -> None:
    choice = device.choose("cpu", "fp32")
    assert (choice.device.type, choice.precision) == ("cpu", torch.float32)
    assert choice.reason == "device cpu (requested), precision fp32 where a model supports it (requested)"


def test_auto_precision_on_a_gpu_is_float16() -> None:
    assert device.choose_precision("auto", torch.device("cuda")) == torch.float16
    assert "closer to float32" in device._precision("auto", torch.device("cuda"))[1]


@pytest.mark.parametrize("flags, precision", [(BF16.cpu_flags, torch.bfloat16), (("avx2",), torch.float32)])
def test_auto_precision_on_a_cpu_is_bfloat16_if_it_has_the_instructions(
    flags: tuple[str, ...], precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_flags(monkeypatch, "x86_64", flags)
    choice = device.choose("cpu", "auto")
    assert choice.precision == precision
    assert ("the CPU has avx512_bf16" if precision == torch.bfloat16 else "no bfloat16 instructions") in choice.reason


def test_auto_precision_on_an_apple_cpu_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "bfloat16_kind", lambda: BF16)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert device.choose_precision("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cpu cpu"])
def test_an_unknown_device_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match="auto, cpu, cuda"):
        device.choose(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is there")
def test_a_missing_gpu_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(InputError, match="PyTorch sees no CUDA GPU: use --device cpu or auto"):
        device.choose("cuda")


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an NVIDIA GPU that PyTorch cannot use. Returns the file with its driver's version."""
    version = tmp_path / "version"
    kernel_module = "NVIDIA UNIX Open Kernel Module for x86_64  470.82.01  Release Build"
    version.write_text(f"NVRM version: {kernel_module}\nGCC version: 12.3.0\n", encoding="ascii")
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(device, "NVIDIA_DEVICES", tmp_path)
    monkeypatch.setattr(device, "NVIDIA_VERSION", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update.\nMore.")

    monkeypatch.setattr(torch.cuda, "init", init)
    return version


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
@pytest.mark.parametrize("driver", ["470.82.01", "unknown"])
def test_a_gpu_that_pytorch_cannot_use_is_an_error_with_its_driver_and_what_to_do(
    name: str, driver: str, nvidia: Path
) -> None:
    if driver == "unknown":
        nvidia.unlink()
    words = (
        f"PyTorch, which is built for CUDA 13.0, cannot use this machine's NVIDIA GPU with driver {driver} "
        "(The NVIDIA driver on your system is too old (found version 11040). Please update): update the driver, or "
        "choose the CPU with --device cpu or CUDA_VISIBLE_DEVICES=-1"
    )
    with pytest.raises(InputError, match=f"^{re.escape(words)}$"):
        device.choose(name)
    assert device.choose("cpu").device.type == "cpu"


@pytest.mark.parametrize("reason", ["hidden", "hidden by -1", "not in this container", "PyTorch for CPUs"])
def test_a_hidden_gpu_is_no_error(reason: str, nvidia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason.startswith("hidden"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1" if "-1" in reason else "")
    elif reason == "PyTorch for CPUs":
        monkeypatch.setattr(torch.version, "cuda", None)
    else:
        (nvidia.parent / "nvidia0").unlink()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.choose().device.type == "cpu"


def test_only_auto_and_cuda_mean_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    for name in ("auto", "cuda"):
        assert device.parallel_devices(name) == ["cuda:0", "cuda:1", "cuda:2"]
    assert device.parallel_devices("cuda:1") == ["cuda:1"]
    assert device.parallel_devices("cpu") == ["cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.parallel_devices("auto") == ["auto"]


def test_chosen_gpus_are_used_in_their_order_and_a_missing_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu():
        assert device.parallel_devices("auto", [0]) == ["cuda:0"]
        name = torch.cuda.get_device_name(0)
        with pytest.raises(InputError, match=rf"^GPU 1 is missing: choose from 0 \({name}\)$"):
            device.parallel_devices("cuda", [0, 1])
    with pytest.raises(InputError, match=r"^--gpus and device 'cuda:1' cannot be combined: leave one of them out$"):
        device.parallel_devices("cuda:1", [1, 0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    assert device.parallel_devices("auto", [2, 0]) == ["cuda:2", "cuda:0"]
    with pytest.raises(InputError, match=r"^GPU 3 is missing: choose from 0 \(card 0\), 1 \(card 1\), 2 \(card 2\)$"):
        device.parallel_devices("auto", [0, 3])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "_unusable_gpu", lambda: "")
    missing = "GPU 0 is missing, since PyTorch sees no CUDA GPU: leave --gpus out"
    with pytest.raises(InputError, match=f"^{missing}$"):
        device.parallel_devices("auto", [0])


def test_a_crashed_gpu_is_told_from_a_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.works(torch.device("cpu"))

    def raising(message: str) -> bool:
        def ones(*shape: int, device: torch.device) -> torch.Tensor:
            raise RuntimeError(message)

        monkeypatch.setattr(torch, "ones", ones)
        return device.works(torch.device("cuda"))

    assert not raising("CUDA error: an illegal memory access was encountered")
    assert not raising("CUDA driver error: unspecified launch failure")
    assert raising("CUDA error: out of memory")
    with pytest.raises(RuntimeError, match="shapes differ"):
        raising("shapes differ")


@pytest.mark.parametrize(
    "message, expected",
    [
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("CUDA error: out of memory", False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_fault_of_a_gpu_is_recognised(message: str, expected: bool) -> None:
    assert device.is_gpu_fault(RuntimeError(message)) == expected


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasLtCreate(&handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
ANOTHER = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("cuFFT error: CUFFT_INVALID_SIZE"),
    RuntimeError("the shapes do not match"),
    ValueError("CUDA error: out of memory"),
]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *ANOTHER], ids=str)
def test_out_of_memory_errors_are_told_from_others(error: Exception) -> None:
    assert device.is_out_of_memory(error) == (error in OUT_OF_MEMORY)


@pytest.fixture
def numerics() -> Iterator[None]:
    """Restores CUDA's settings after the test."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    names = [
        (matmul, "allow_tf32"),
        (cudnn, "allow_tf32"),
        (matmul, "allow_fp16_reduced_precision_reduction"),
        (matmul, "allow_bf16_reduced_precision_reduction"),
        (cudnn, "deterministic"),
        (cudnn, "benchmark"),
    ]
    before = [getattr(place, name) for place, name in names]
    device.make_cuda_deterministic.cache_clear()
    yield
    device.make_cuda_deterministic.cache_clear()
    for (place, name), value in zip(names, before, strict=True):
        setattr(place, name, value)


def test_cuda_is_made_exact_and_deterministic_once(numerics: None, caplog: pytest.LogCaptureFixture) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    with caplog.at_level(logging.INFO):
        device.make_cuda_deterministic()
        device.make_cuda_deterministic()
    assert [record.getMessage().split()[:3] for record in caplog.records] == [["CUDA:", "TF32", "off,"]]
    assert not (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_the_identity_of_a_gpu_is_its_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.identity(torch.device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "NVIDIA T4")
    monkeypatch.setattr(device, "memory_limit_bytes", lambda gpu: 15 << 30)
    assert (
        device.identity(torch.device("cuda"))
        == device.identity(torch.device("cuda:1"))
        == "cuda (NVIDIA T4, 15360 MiB)"
    )


def test_int8_is_for_a_cpu() -> None:
    assert device.choose("cpu", "int8").precision == torch.int8
    with pytest.raises(InputError, match="precision 'int8' is for CPUs, and the device is mps: use auto"):
        device.choose_precision("int8", torch.device("mps"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_on_a_cpu_is_that_of_the_process_in_bytes() -> None:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    high_water = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert high_water * 0.95 <= device.peak_memory_bytes(torch.device("cpu")) < everything


def test_measuring_needed_memory_does_not_lose_the_earlier_peak(
    gpu_statistics: None,
) -> None:
    gpu, ran = torch.device("cuda"), []
    assert device.peak_memory_bytes(gpu) == 5000
    assert device.needed_memory_bytes(lambda: ran.append(True), gpu) == 700
    assert ran
    assert device.peak_memory_bytes(gpu) == device.peak_memory_bytes(torch.device("cuda:0")) == 5000


@pytest.mark.parametrize("disturbed", [0, 2, 99])
def test_a_measurement_is_repeated_if_another_thread_interferes(
    disturbed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, in_use = [], [1000]

    def run() -> None:
        runs.append(True)
        in_use[0] += 50 * (len(runs) <= disturbed)  # another thread loads a model

    monkeypatch.setattr(device, "_earlier_peaks", {})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: in_use[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: in_use[0] + 700)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: None)
    needed = device.needed_memory_bytes(run, torch.device("cuda"))
    assert len(runs) == min(disturbed + 1, device.MOST_MEASUREMENTS)
    assert needed == 700 + 50 * (disturbed == 99)


def test_peak_memory_on_a_gpu_is_that_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"cuda": 123, "cuda:1": 456}
    monkeypatch.setattr(device, "_earlier_peaks", {})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: peaks[str(gpu)])
    assert {name: device.peak_memory_bytes(torch.device(name)) for name in peaks} == peaks
