"""The choice of a device and a precision, with the reason for each."""

import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from separation.cpu import bfloat16_kind
from separation.errors import InputError

# Where Linux shows an NVIDIA GPU and its driver's version. A container without the GPU sees only the version.
NVIDIA_DEVICES = Path("/dev")
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")

MOST_MEASUREMENTS = 5  # attempts to measure needed memory without interference from other threads

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}

# Messages of CUDA and its libraries when memory runs out outside of PyTorch's allocator. cuBLAS reports the second one
# when it cannot allocate its handle.
_OUT_OF_MEMORY = re.compile(
    r"(CUBLAS|CUFFT|CUDNN)\w*_ALLOC(ATION)?_FAILED|CUBLAS_STATUS_NOT_INITIALIZED\W+when calling\W+cublas(Lt)?Create"
    r"|CUDA[^\n]*: out of memory|Triton Error \[CUDA\]: out of memory"
)

_GPU_FAULT = re.compile(r"(CUDA|driver) error|(CUBLAS|CUFFT|CUDNN|CUSOLVER)_\w+|cuDNN error|Triton Error \[CUDA\]")

logger: logging.Logger = logging.getLogger("separation")


@dataclass(frozen=True)
class Choice:
    """A device and a precision, and the reason for choosing them."""

    device: torch.device
    precision: torch.dtype
    reason: str


def choose(device: str = "auto", precision: str = "auto") -> Choice:
    """Resolve `auto | cpu | cuda | cuda:N | mps` and `auto | fp32 | bf16 | fp16 | int8`.

    Raises InputError for an unknown name, a device that is missing or that PyTorch cannot use, int8 on a GPU, and a
    SEPARATION_CPU_KIND that this CPU is not.
    """
    chosen_device = choose_device(device)
    chosen_precision, precision_reason = _precision(precision, chosen_device)
    device_reason = "requested" if device != "auto" else _device_reason(chosen_device)
    name = next(name for name, dtype in PRECISIONS.items() if dtype == chosen_precision)
    reason = (
        f"device {chosen_device} ({device_reason}), precision {name} where a model supports it ({precision_reason})"
    )
    return Choice(chosen_device, chosen_precision, reason)


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; for `auto` the first available of cuda, mps and cpu.

    Raises InputError for an unknown name and a device that is missing. `auto` also raises it if the machine has an
    NVIDIA GPU that PyTorch cannot use, unless CUDA_VISIBLE_DEVICES hides it: the far slower CPU must be the user's
    choice.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if fault := _unusable_gpu():
            raise InputError(fault)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise InputError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:0 or mps") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        missing = f"device {name!r} is missing, since PyTorch sees no CUDA GPU: use --device cpu or auto"
        raise InputError(_unusable_gpu() or missing)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"device {name!r} is missing, since PyTorch sees {count} CUDA GPU(s): use a lower number")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is missing, since this machine has no Apple GPU: use --device cpu or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r} is not supported: use auto, cpu, cuda or mps")
    return device


def parallel_devices(name: str, gpus: Sequence[int] = ()) -> list[str]:
    """The names of all CUDA GPUs if the name is `auto` or `cuda` and there are several, else only the name.

    `gpus` are the numbers of those to use instead. Raises InputError for one that is missing, and beside another name.
    """
    if gpus and name not in ("auto", "cuda"):
        raise InputError(f"--gpus and device {name!r} cannot be combined: leave one of them out")
    if gpus:
        _check_gpus(gpus)
        return [f"cuda:{index}" for index in gpus]
    if name in ("auto", "cuda") and choose_device(name).type == "cuda" and torch.cuda.device_count() > 1:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [name]


def _check_gpus(gpus: Sequence[int]) -> None:
    if not torch.cuda.is_available():
        missing = "PyTorch sees no CUDA GPU: leave --gpus out"
        raise InputError(_unusable_gpu() or f"GPU {gpus[0]} is missing, since {missing}")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if absent := [index for index in gpus if index >= len(names)]:
        found = ", ".join(f"{index} ({name})" for index, name in enumerate(names))
        raise InputError(f"GPU {absent[0]} is missing: choose from {found}")


def _unusable_gpu() -> str:
    """Why PyTorch cannot use the machine's NVIDIA GPU, or an empty string if it has none or the GPU is hidden."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if hidden or torch.version.cuda is None or not any(NVIDIA_DEVICES.glob("nvidia[0-9]*")):
        return ""
    try:
        found = re.search(r"\d+\.\d[\d.]*", NVIDIA_VERSION.read_text(encoding="ascii", errors="replace"))
        driver = found[0] if found else "unknown"
    except OSError:
        driver = "unknown"
    try:
        torch.cuda.init()
        reason = "it finds no GPU"
    except RuntimeError as e:
        reason = str(e).strip().partition("\n")[0].rstrip(".")
    return (
        f"PyTorch, which is built for CUDA {torch.version.cuda}, cannot use this machine's NVIDIA GPU with driver "
        f"{driver} ({reason}): update the driver, or choose the CPU with --device cpu or CUDA_VISIBLE_DEVICES=-1"
    )


def identity(device: torch.device) -> str:
    """The properties of a device that affect rounding: its type and, for a CUDA GPU, its name and memory."""
    if device.type != "cuda":
        return device.type
    return f"cuda ({torch.cuda.get_device_name(device)}, {memory_limit_bytes(device) >> 20} MiB)"


@cache
def make_cuda_deterministic() -> None:
    """Make CUDA exact and deterministic, where PyTorch's defaults prefer speed."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False  # on by default
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # would choose kernels by their time, anew in each run
    logger.info("CUDA: TF32 off, reductions in float32, cuDNN deterministic and without benchmarks")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch, CUDA or one of its libraries means that a GPU ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def is_gpu_fault(error: BaseException) -> bool:
    """Whether an error of PyTorch, CUDA or one of its libraries means that a GPU or its driver failed."""
    return isinstance(error, RuntimeError) and not is_out_of_memory(error) and bool(_GPU_FAULT.search(str(error)))


def works(device: torch.device) -> bool:
    """Whether a device still computes. A CUDA GPU that crashed stays unusable for the process."""
    try:
        return float(torch.ones(1, device=device).add(1).cpu()) == 2.0
    except RuntimeError as e:
        if is_out_of_memory(e):  # it is full, and works
            return True
        if is_gpu_fault(e):
            return False
        raise


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; for `auto` the fastest floating-point type that suits the device."""
    return _precision(name, device)[0]


def float_precision(precision: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision itself; for int8 the precision of everything that is not computed in int8."""
    return choose_precision("auto", device) if precision == torch.int8 else precision


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory of this process: that of its tensors on a CUDA GPU, else that of the whole process.

    Returns 0 if the system does not report it.
    """
    if device.type == "cuda":
        return max(_earlier_peaks.get(device.index or 0, 0), torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def memory_limit_bytes(device: torch.device) -> int:
    """The memory of a CUDA GPU that PyTorch may use, regardless of what other processes use now."""
    total: int = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


_earlier_peaks: dict[int, int] = {}  # by GPU: the peak in bytes before its statistics were last reset


def needed_memory_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The peak memory of a CUDA GPU while `run` runs, beyond the memory that was in use before.

    Measures again, up to `MOST_MEASUREMENTS` times, if another thread changes the memory in use.
    """
    for _ in range(MOST_MEASUREMENTS):
        before = torch.cuda.memory_allocated(device)
        _earlier_peaks[device.index or 0] = peak_memory_bytes(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        needed = torch.cuda.max_memory_allocated(device) - before
        if torch.cuda.memory_allocated(device) == before:
            break
    return needed


def _device_reason(device: torch.device) -> str:
    if device.type == "cuda":
        return f"this machine has a CUDA GPU, {torch.cuda.get_device_name(device)}"
    return "this machine has an Apple GPU" if device.type == "mps" else "this machine has no GPU"


def _precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    if name == "int8" and device.type != "cpu":
        raise InputError(f"precision 'int8' is for CPUs, and the device is {device}: use auto, or --device cpu")
    if name in PRECISIONS:
        return PRECISIONS[name], "requested"
    if name != "auto":
        raise InputError(f"unknown precision {name!r}: use auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        return torch.float16, "as fast as bfloat16 on a GPU and closer to float32; overflows are repeated in bfloat16"
    if device.type == "mps":
        return torch.float32, "the most exact type of an Apple GPU"
    kind = bfloat16_kind()
    if kind is None:
        return torch.float32, "the CPU has no bfloat16 instructions"
    if platform.system() != "Linux":
        return torch.float32, "only on Linux is PyTorch fast in bfloat16"
    return torch.bfloat16, f"the CPU has {kind.name}"
