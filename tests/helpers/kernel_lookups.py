"""Starts a model's kernels as on a GPU, under a driver that stands in for one, and says what was compiled for it.

    python tests/helpers/kernel_lookups.py MODEL CAPABILITY

What starts them is loaded as on a GPU, from the module in C; the GPU's driver is an empty library, see test_ahead.py.
It prints a JSON object: how many kernels were compiled, how many were found, and how often a C compiler was started.
"""

import json
import sys
from typing import Any

import torch
from triton import knobs
from triton.backends.nvidia import driver
from triton.runtime import build

from separation.checkpoints.build import model_for_gpu
from separation.models.kernels.ahead import standing_in, start_kernels

counts = {"compiled": 0, "found": 0, "built": 0}


def note(*, cache_hit: bool, **facts: Any) -> None:
    counts["found" if cache_hit else "compiled"] += 1


def noted(*arguments: Any) -> str:
    counts["built"] += 1
    return compiler(*arguments)


class Launcher(driver.CudaLauncher):  # type: ignore[misc]  # of Triton, as on a GPU
    def __call__(self, *arguments: Any) -> None:
        assert callable(self.launch)  # all but starting the kernel


if __name__ == "__main__":
    name, capability = sys.argv[1:]
    knobs.compilation.listener = note
    compiler, build._build = build._build, noted
    model = model_for_gpu(name, torch.float16)
    with standing_in(int(capability), Launcher):
        start_kernels(model)
        driver.CudaUtils()
    print(json.dumps(counts))
