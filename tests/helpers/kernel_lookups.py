"""Launches a model's kernels under a driver that stands in for a GPU's, and reports what had to be compiled.

    python tests/helpers/kernel_lookups.py MODEL CAPABILITY

The kernels' launchers are loaded from their C modules, as on a GPU; the driver's library is an empty one, which
test_compile_ahead.py makes. Prints a JSON object: how many kernels were compiled, how many were found in a cache, and
how often a C compiler ran.
"""

import json
import sys
from typing import Any

import torch
from triton import knobs
from triton.backends.nvidia import driver
from triton.runtime import build

from separation.checkpoints.build import model_for_gpu
from separation.models.kernels.compile_ahead import request_kernels, stand_in_driver

counts = {"compiled": 0, "found": 0, "built": 0}


def count_kernel(*, cache_hit: bool, **facts: Any) -> None:
    counts["found" if cache_hit else "compiled"] += 1


def count_build(*arguments: Any) -> str:
    counts["built"] += 1
    return compiler(*arguments)


class Launcher(driver.CudaLauncher):  # type: ignore[misc]  # Triton's own, as on a GPU
    def __call__(self, *arguments: Any) -> None:
        assert callable(self.launch)  # loaded; only the launch itself is left out


if __name__ == "__main__":
    name, capability = sys.argv[1:]
    knobs.compilation.listener = count_kernel
    compiler, build._build = build._build, count_build
    model = model_for_gpu(name, torch.float16)
    with stand_in_driver(int(capability), Launcher):
        request_kernels(model)
        driver.CudaUtils()
    print(json.dumps(counts))
