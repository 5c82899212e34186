"""Triton kernels compiled where no GPU is, into a folder that a machine with one takes them from.

Triton compiles a kernel when it is first started, for the GPU that is there, and keeps it under a key made of its
source, its constants, the types and alignments of its arguments, and Triton itself. Here a driver stands in for the
GPU: it says which one it is, and starts nothing. A model whose tensors have shapes alone then asks for its kernels as
it does on the GPU, and Triton keeps them under the keys that it will look for there.
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
from separation.models.kernels.operations import PROBE, kernel_of, start_probe
from separation.system.os_errors import output_errors

BATCH_SIZES = (1, 2, 4, 8)  # that the engine takes on a GPU


def compile_for(models: Sequence[SeparationModel], capabilities: Sequence[int], folder: Path) -> int:
    """Fill a folder with the kernels that models in float16 start on GPUs of these compute capabilities (90 for 9.0).

    The models have no weights: they are on the meta device, and are changed. Returns how many kernels are compiled;
    those that the folder has already are left as they are. Raises InputError without a C compiler, which makes what
    starts the kernels, and OutputError where the folder cannot be written.
    """
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise InputError("kernels need a C compiler for what starts them, and there is none: install gcc")
    compiled = 0

    def note(*, cache_hit: bool, **facts: Any) -> None:
        nonlocal compiled
        compiled += not cache_hit

    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(folder)
        knobs.cache.manager_class = FileCacheManager  # what other folders have does not count
        knobs.compilation.store_binary_only = True
        knobs.compilation.listener = note
        with output_errors(folder):
            launchers = _Launchers()
            for capability in capabilities:
                with standing_in(capability, launchers):
                    for model in models:
                        start_kernels(model)
    return compiled


@torch.inference_mode()
def start_kernels(model: SeparationModel) -> None:
    """Run a model, on the meta device, over chunks of its own length, in each batch size that the engine takes."""
    start_probe(torch.empty(PROBE, device="meta"))
    samples = model.input_samples(model.chunk_samples) or model.chunk_samples
    for batch_size in BATCH_SIZES:
        with _Kernels():
            model(torch.empty(batch_size, model.channels, samples, device="meta"))


class _Kernels(TorchDispatchMode):
    """Takes the Triton kernel of each operation that has one, where else shapes alone would have its twin."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.addmm.dtype_out:
            return kwargs["out"]  # PyTorch does not know it for shapes alone
        if func.namespace != "separation":
            return func(*args, **kwargs)
        with self:
            return kernel_of(func._schema.name.partition("::")[2])(*args, **kwargs)


@contextmanager
def standing_in(capability: int, launchers: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Within, Triton takes this for a machine with a GPU of that compute capability, on which kernels do nothing."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(capability, launchers))
    try:
        yield
    finally:
        triton.runtime.driver._active = before


class _Driver:
    """As much of a driver as Triton asks on the way to a kernel."""

    def __init__(self, capability: int, launchers: Callable[[Any, Any], Any]) -> None:
        self.capability = capability
        self.launcher_cls = launchers
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # by which kernels are kept: those of several GPUs stay apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**30}

    def load_binary(self, *arguments: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads


class _Launchers:
    """Compiles the modules in C by which Triton reaches the driver and starts kernels, one for each signature."""

    def __init__(self) -> None:
        self._build("cuda_utils", (Path(nvidia.dirname) / "driver.c").read_text())

    def __call__(self, source: Any, metadata: Any) -> Callable[..., None]:
        constants = {(source.fn.arg_names.index(key),) if isinstance(key, str) else key: value
                     for key, value in source.constants.items()}  # fmt: skip
        self._build("__triton_launcher", nvidia.make_launcher(constants, dict(source.signature), None))
        return lambda *arguments: None

    @staticmethod
    def _build(name: str, text: str) -> None:
        """As `triton.runtime.build.compile_module_from_src` does, but for loading it, which needs the GPU's driver."""
        kept = get_cache_manager(hashlib.sha256((text + build.platform_key()).encode()).hexdigest())
        file = name + sysconfig.get_config_var("EXT_SUFFIX")
        if kept.get_file(file) is not None:
            return
        with tempfile.TemporaryDirectory() as folder:
            # What is linked is looked up when it is loaded: until then an empty library of the driver's name will do.
            driver = Path(folder, "empty.c")
            driver.touch()
            soname = "-Wl,-soname,libcuda.so.1"
            empty = build._build("empty", str(driver), folder, [], [], [], [soname])
            Path(empty).rename(driver.with_name("libcuda.so.1"))
            source = Path(folder, f"{name}.c")
            source.write_text(text)
            linked = ["-Wl,--no-as-needed", str(driver.with_name("libcuda.so.1"))]  # for nothing in it is needed yet
            built = build._build(name, str(source), folder, [], nvidia.include_dirs, [], linked)
            kept.put(Path(built).read_bytes(), file, binary=True)
