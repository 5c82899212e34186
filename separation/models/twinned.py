"""Models that have a second way to compute, for a CUDA GPU in 16 bits; the plain layers are its slow, readable twin."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from separation.models.base import SeparationModel
from separation.models.kernels.operations import triton_fault


class TwinnedModel(SeparationModel):
    """A model whose `forward` takes `_fast` where that is not None: the core on a GPU, made of the model's weights.

    It is made when weights in 16 bits arrive on a GPU and made anew when they change, so that a forward makes nothing:
    it can be captured as a CUDA graph.
    """

    # Spectrograms [B, C, F, N, 2] and the outputs that are wanted to spectrograms [B, S, C, N, F, 2], all in float32.
    _fast: Callable[[Tensor, tuple[int, ...]], Tensor] | None = None
    # The oldest GPU that `_fast` is for, by its compute capability: Triton's products need tensor cores of 8.0.
    oldest_gpu: ClassVar[tuple[int, int]] = (7, 5)

    @abstractmethod
    def fast_core(self) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
        """The core for a GPU, from the weights as they are now."""

    @property
    @abstractmethod
    def cast_weight(self) -> Tensor:
        """One of the weights that `to_precision` casts."""

    def fuse_for_gpu(self, dtype: torch.dtype) -> None:
        self.to_precision(dtype)
        self._fast = self.fast_core()

    def to_precision(self, dtype: torch.dtype) -> None:
        super().to_precision(dtype)
        self._remake()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._remake()
        return self

    def _remake(self) -> None:
        weight = self.cast_weight
        is_fast = (
            weight.is_cuda
            and weight.dtype in (torch.float16, torch.bfloat16)
            and torch.cuda.get_device_capability(weight.device) >= self.oldest_gpu
            and not triton_fault(weight.device)
        )
        self._fast = self.fast_core() if is_fast else None
