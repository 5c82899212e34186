"""Compiles Triton kernels on a machine without a GPU, into a folder that a machine with one can use.

Triton compiles a kernel at its first launch, for the GPU in the machine, and caches it under a key of the kernel's
source, constants, argument types and alignments, and Triton's version. Here `_Driver` takes the place of the GPU's
driver: it reports a compute capability and launches nothing. A model on the meta device then requests the same kernels
as on that GPU, and Triton caches them under the keys that the GPU's machine looks up.
"""

import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build
from triton.runtime.cache import FileCacheManager, get_cache_manager

from separation.errors import InputError
from separation.models.base import SeparationModel
from separation.models.kernels.registry import PROBE_SHAPE, kernel_of, launch_probe
from separation.system.os_errors import output_errors

BATCH_SIZES = (1, 2, 4, 8)  # the engine uses no others on a GPU

Launcher = Callable[..., Any]  # takes Triton's source and metadata of a kernel, returns the function that launches it


def compile_kernels(models: Sequence[SeparationModel], capabilities: Sequence[int], folder: Path) -> int:
    """Compile the kernels that models in float16 need on GPUs of these compute capabilities (90 means 9.0).

    The models are on the meta device. Kernels that are already in the folder are not compiled again.
    Returns the number of kernels that were compiled. Raises InputError if there is no C compiler, which the kernels'
    launchers need, and OutputError if the folder cannot be written.
    """
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise InputError("no C compiler was found, and kernels need one for their launchers: install gcc")
    compiled = 0

    def count(*, cache_hit: bool, **facts: Any) -> None:
        nonlocal compiled
        compiled += not cache_hit

    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(folder)
        knobs.cache.manager_class = FileCacheManager  # do not look in any other folder
        knobs.compilation.store_binary_only = True
        knobs.compilation.listener = count
        with output_errors(folder):
            launchers = _LauncherCompiler()
            for capability in capabilities:
                with stand_in_driver(capability, launchers):
                    for model in models:
                        request_kernels(model)
    return compiled


@torch.inference_mode()
def request_kernels(model: SeparationModel) -> None:
    """Run a model on the meta device on chunks of its own length, with each of `BATCH_SIZES`."""
    launch_probe(torch.empty(PROBE_SHAPE, device="meta"))
    samples = model.input_samples(model.chunk_samples) or model.chunk_samples
    for batch_size in BATCH_SIZES:
        with _KernelMode():  # type: ignore[no-untyped-call]  # PyTorch annotates no __init__ here
            model(torch.empty(batch_size, model.channels, samples, device="meta"))


class _KernelMode(TorchDispatchMode):
    """Launches the Triton kernels of our operations, which would otherwise run their references on meta tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.addmm.dtype_out:
            return kwargs["out"]  # PyTorch does not implement it for meta tensors
        if func.namespace != "separation":
            return func(*args, **kwargs)
        with self:
            return kernel_of(func._schema.name.partition("::")[2])(*args, **kwargs)


@contextmanager
def stand_in_driver(capability: int, launchers: Launcher) -> Iterator[None]:
    """Within the context, Triton sees a GPU of that compute capability, on which kernels do nothing."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(capability, launchers))
    try:
        yield
    finally:
        triton.runtime.driver._active = before


class _Driver:
    """The part of Triton's driver interface that a launch uses."""

    def __init__(self, capability: int, launchers: Launcher) -> None:
        self.capability = capability
        self.launcher_cls = launchers
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps kernels by device, so several capabilities stay apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**30}

    def load_binary(self, *arguments: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads


class _LauncherCompiler:
    """Compiles Triton's C modules: one that calls the driver, and a launcher for each signature of a kernel."""

    def __init__(self) -> None:
        self._build("cuda_utils", (Path(nvidia.dirname) / "driver.c").read_text())

    def __call__(self, source: Any, metadata: Any) -> Callable[..., None]:
        constants = {(source.fn.arg_names.index(key),) if isinstance(key, str) else key: value
                     for key, value in source.constants.items()}  # fmt: skip
        self._build("__triton_launcher", nvidia.make_launcher(constants, dict(source.signature), None))
        return lambda *arguments: None

    @staticmethod
    def _build(name: str, text: str) -> None:
        """Do what `triton.runtime.build.compile_module_from_src` does, but do not load the result: that needs a GPU."""
        cached = get_cache_manager(hashlib.sha256((text + build.platform_key()).encode()).hexdigest())
        file = name + sysconfig.get_config_var("EXT_SUFFIX")
        if cached.get_file(file) is not None:
            return
        with tempfile.TemporaryDirectory() as folder:
            # The module is linked against an empty libcuda.so.1: symbols are resolved when it is loaded.
            driver = Path(folder, "empty.c")
            driver.touch()
            soname = "-Wl,-soname,libcuda.so.1"
            empty = build._build("empty", str(driver), folder, [], [], [], [soname])
            Path(empty).rename(driver.with_name("libcuda.so.1"))
            source = Path(folder, f"{name}.c")
            source.write_text(text)
            # Without --no-as-needed the linker would drop the empty library.
            linked = ["-Wl,--no-as-needed", str(driver.with_name("libcuda.so.1"))]
            built = build._build(name, str(source), folder, [], nvidia.include_dirs, [], linked)
            cached.put(Path(built).read_bytes(), file, binary=True)
