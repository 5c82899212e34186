"""Which device and precision to compute with, each chosen once, with the reason."""

import logging
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from separation.errors import InputError

# Where Linux shows an NVIDIA GPU and its driver. A container that is given no GPU sees the second file alone.
NVIDIA_DEVICES = Path("/dev")
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")

MEASUREMENTS = 5  # of the memory that something needs, until one is undisturbed

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}

# What CUDA and its libraries say where the allocator itself did not fail. cuBLAS has the second for a handle that it
# has no memory for.
_OUT_OF_MEMORY = re.compile(
    r"(CUBLAS|CUFFT|CUDNN)\w*_ALLOC(ATION)?_FAILED|CUBLAS_STATUS_NOT_INITIALIZED\W+when calling\W+cublas(Lt)?Create"
    r"|CUDA[^\n]*: out of memory|Triton Error \[CUDA\]: out of memory"
)

logger = logging.getLogger("separation")


@dataclass(frozen=True)
class Choice:
    """A device and a precision, and why."""

    device: torch.device
    precision: torch.dtype
    reason: str


def choose(device: str = "auto", precision: str = "auto") -> Choice:
    """Resolve `auto | cpu | cuda | cuda:N | mps` and `auto | fp32 | bf16 | fp16 | int8`.

    Raises InputError for an unknown name, a device that is not there or that PyTorch cannot use, and for int8 on a GPU.
    """
    chosen_device = choose_device(device)
    chosen_precision, precision_reason = _precision(precision, chosen_device)
    device_reason = "asked for" if device != "auto" else _device_reason(chosen_device)
    name = next(name for name, dtype in PRECISIONS.items() if dtype == chosen_precision)
    reason = f"device {chosen_device} ({device_reason}), precision {name} where a model can ({precision_reason})"
    return Choice(chosen_device, chosen_precision, reason)


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; for `auto` the first of cuda, mps, cpu that is there.

    An NVIDIA GPU that is there and that PyTorch cannot use is an error, unless CUDA_VISIBLE_DEVICES hides it: the
    user chooses the CPU, which is far slower.
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
        missing = f"device {name!r} is not there: PyTorch sees no CUDA GPU; use --device cpu or auto"
        raise InputError(_unusable_gpu() or missing)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA GPU(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not there: this is not an Apple GPU machine; use --device cpu or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r} is not supported: use auto, cpu, cuda or mps")
    return device


def parallel_devices(name: str) -> list[str]:
    """The names of all CUDA GPUs where `auto` or `cuda` leaves open which of several; else the name alone."""
    if name in ("auto", "cuda") and choose_device(name).type == "cuda" and torch.cuda.device_count() > 1:
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [name]


def _unusable_gpu() -> str:
    """Why PyTorch cannot use an NVIDIA GPU that is there; empty if there is none, or it is hidden on purpose."""
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
        reason = "it counts no GPU"
    except RuntimeError as e:
        reason = str(e).strip().partition("\n")[0].rstrip(".")
    return (
        f"an NVIDIA GPU is there, with driver {driver}, but PyTorch, which is built for CUDA {torch.version.cuda}, "
        f"cannot use it ({reason}): update the driver, or use --device cpu"
    )


def identity(device: torch.device) -> str:
    """What of a device rounding depends on: its type and, of a CUDA GPU, its name and memory."""
    if device.type != "cuda":
        return device.type
    return f"cuda ({torch.cuda.get_device_name(device)}, {memory_limit_bytes(device) >> 20} MiB)"


@cache
def settle_numerics() -> None:
    """Make CUDA compute what is asked for, the same each time: PyTorch's defaults trade some of both for speed."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False  # which is on by default
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False  # would choose by time, each run anew
    logger.info("CUDA: TF32 off, reductions in float32, cuDNN deterministic and without benchmarks")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in PyTorch's words, CUDA's or a library's, that a GPU's memory was not enough."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; for `auto` the fastest floats that the device computes well."""
    return _precision(name, device)[0]


def floats_of(precision: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision itself or, of int8, that of what is not computed in bytes."""
    return choose_precision("auto", device) if precision == torch.int8 else precision


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has used at once: the tensors on a CUDA GPU; else all of the process.

    0 where the system does not tell it.
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
    """The memory of a CUDA GPU that PyTorch may take, whatever others have of it now."""
    total: int = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


_earlier_peaks: dict[int, int] = {}  # of each GPU in bytes, before its statistics began anew


def needed_memory_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory of a CUDA GPU that `run` has at once beyond what was in use before.

    Runs it again, a few times at most, where another thread, which may be loading a model, changed what is in use.
    """
    for _ in range(MEASUREMENTS):
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
        return f"a CUDA GPU is there, {torch.cuda.get_device_name(device)}"
    return "an Apple GPU is there" if device.type == "mps" else "no GPU is there"


def _precision(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    if name == "int8" and device.type != "cpu":
        raise InputError(f"precision 'int8' is for a CPU, and the device is {device}: use auto, or --device cpu")
    if name in PRECISIONS:
        return PRECISIONS[name], "asked for"
    if name != "auto":
        raise InputError(f"unknown precision {name!r}: use auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        return torch.float16, "as fast as bfloat16 on a GPU and nearer to float32; what overflows is done in bfloat16"
    if device.type == "mps":
        return torch.float32, "the Apple GPU's exact type"
    instructions = bfloat16_instructions()
    if instructions:
        return torch.bfloat16, f"the CPU has {instructions}"
    return torch.float32, "the CPU has no bfloat16 instructions"


@cache
def cpu_flags() -> str:
    """What Linux says that the CPU can do: the names of its instructions, with spaces between them."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        return next((line for line in file if line.startswith("flags")), "")


@cache
def bfloat16_instructions() -> str:
    """The CPU's instructions for bfloat16 matrix products by name, empty where there are none."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return ""
    flags = cpu_flags().split()
    return next((name for name in ("amx_bf16", "avx512_bf16") if name in flags), "")
