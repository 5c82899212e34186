"""Which device and precision to compute with, each chosen once, with the reason."""

import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from separation.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class Choice:
    """A device and a precision, and why."""

    device: torch.device
    precision: torch.dtype
    reason: str


def choose(device: str = "auto", precision: str = "auto") -> Choice:
    """Resolve `auto | cpu | cuda | cuda:N | mps` and `auto | fp32 | bf16 | fp16 | int8`.

    Raises InputError for an unknown name, a device that is not there, and for int8 on a GPU.
    """
    chosen_device = choose_device(device)
    chosen_precision, precision_reason = _precision(precision, chosen_device)
    device_reason = "asked for" if device != "auto" else _device_reason(chosen_device)
    name = next(name for name, dtype in PRECISIONS.items() if dtype == chosen_precision)
    reason = f"device {chosen_device} ({device_reason}), precision {name} where a model can ({precision_reason})"
    return Choice(chosen_device, chosen_precision, reason)


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; for `auto` the first of cuda, mps, cpu that is there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise InputError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:0 or mps") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} is not there: PyTorch sees no CUDA GPU; use --device cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA GPU(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is not there: this is not an Apple GPU machine; use --device cpu or auto")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {name!r} is not supported: use auto, cpu, cuda or mps")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; for `auto` the fastest floats that the device computes well."""
    return _precision(name, device)[0]


def floats_of(precision: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision itself or, of int8, that of what is not computed in bytes."""
    return choose_precision("auto", device) if precision == torch.int8 else precision


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has used at once: the tensors on a CUDA GPU; else all of the process."""
    if device.type == "cuda":
        return max(_earlier_peaks.get(device.index or 0, 0), torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def free_memory_bytes(device: torch.device) -> int:
    """The memory of a CUDA GPU that new tensors can have: what no program has, and what PyTorch holds in reserve."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


_earlier_peaks: dict[int, int] = {}  # of each GPU in bytes, before its statistics began anew


def needed_memory_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory of a CUDA GPU that `run` has at once beyond what was in use before."""
    before = torch.cuda.memory_allocated(device)
    _earlier_peaks[device.index or 0] = peak_memory_bytes(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


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
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor} has fast bfloat16"
        return torch.float16, f"compute capability {major}.{minor} has no fast bfloat16"
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
