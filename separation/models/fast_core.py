"""Models with a faster core for CPUs and for CUDA GPUs in 16-bit precisions, beside their plain layers."""

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from separation.models.base import SeparationModel
from separation.models.kernels.native import NotFusedError, library
from separation.models.kernels.registry import cpu_fault, triton_fault

logger: logging.Logger = logging.getLogger("separation")


class CpuCoreModel(SeparationModel):
    """A model whose `forward` uses `_core` where that is not None. `fuse_for_cpu` makes it."""

    # Spectrograms [B, C, F, N, 2] and the indices of the wanted stems to spectrograms [B, S, C, N, F, 2]; all float32.
    _core: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None
    # Why the layers have no faster core; empty if they have one.
    no_core_because: str = ""
    # The precisions in which `fuse_for_cpu` replaces the plain layers, by layers that compute mostly in float32.
    cpu_core_precisions: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)

    @abstractmethod
    def make_cpu_core(self) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
        """The core for a CPU, in float32, made from the current weights."""

    def fuse_for_cpu(self) -> None:
        fault = self.no_core_because or cpu_fault()
        if not fault and self.precision == torch.bfloat16 and library().kind.name == "amx":
            fault = "AMX computes bfloat16 faster"
        if fault:
            logger.info(f"{self.name}: using plain layers ({fault})")
        elif self.precision in self.cpu_core_precisions:
            self._core = self.make_cpu_core()

    def to_precision(self, dtype: torch.dtype) -> None:
        super().to_precision(dtype)
        self._update_core()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        cast(Any, super())._apply(fn, recurse)
        self._update_core()
        return self

    def _update_core(self) -> None:
        """Drop the core, since it was made from other weights."""
        self._core = None


class FastCoreModel(CpuCoreModel):
    """A model with a core for CPUs and for GPUs.

    It is made from the model's weights when they arrive on a GPU in 16 bits, and made again when they change. A forward
    therefore allocates no weights and can be captured as a CUDA graph.
    """

    # The lowest compute capability for which the core is used. Triton's products need tensor cores of 8.0.
    lowest_capability: ClassVar[tuple[int, int]] = (7, 5)

    @abstractmethod
    def make_gpu_core(self) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
        """The core for a GPU, made from the current weights."""

    @property
    @abstractmethod
    def cast_weight(self) -> Tensor:
        """One of the weights that `to_precision` casts."""

    def fuse_for_gpu(self, dtype: torch.dtype) -> None:
        if self.no_core_because:
            raise NotFusedError(self.no_core_because)
        self.to_precision(dtype)
        self._core = self.make_gpu_core()

    def _update_core(self) -> None:
        weight = self.cast_weight
        is_used = (
            not self.no_core_because
            and weight.is_cuda
            and weight.dtype in (torch.float16, torch.bfloat16)
            and torch.cuda.get_device_capability(weight.device) >= self.lowest_capability
            and not triton_fault(weight.device)
        )
        self._core = self.make_gpu_core() if is_used else None
