"""Models made ready to run on a CUDA GPU: batch sizes that fit, CUDA graphs, and spares for overflows."""

import logging
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from separation.device import is_out_of_memory
from separation.engine.batch_memory import Model, chunk_memory_bytes, fitting_batch_size, halving
from separation.engine.chunking import ReadyModel
from separation.engine.cuda_graphs import captured
from separation.errors import EstimateError
from separation.models.base import SeparationModel

MAX_READY = 16  # models that stay ready, per GPU: each keeps a batch and its estimates in memory

logger: logging.Logger = logging.getLogger("separation")


class GpuModels:
    """The models that are ready on a CUDA GPU. Call its methods on the device's compute thread."""

    def __init__(self) -> None:
        # By name, stems, chunk samples and batch size asked for; the least recently used comes first.
        self.ready: dict[tuple[Any, ...], ReadyModel] = {}
        self._spares: dict[tuple[str, tuple[str, ...]], SeparationModel] = {}

    def get(
        self, model: SeparationModel, chunk_samples: int, batch_size: int | Literal["auto"], device: torch.device
    ) -> ReadyModel:
        """A model ready for chunks of `chunk_samples`, made on the first call.

        With batch size `auto`, the size depends on what a chunk needs and on the GPU's total memory. Raises
        EstimateError if one chunk does not fit.
        """
        key = model.name, model.stems, chunk_samples, batch_size
        ready = self.ready.pop(key, None)
        if ready is not None:
            self.ready[key] = ready
            return ready
        stereo = on_stereo(model)
        chunk_bytes = chunk_memory_bytes(stereo, 2, chunk_samples, device)
        wanted = fitting_batch_size(chunk_bytes, device) if batch_size == "auto" else batch_size
        logger.info("%s: batches of %d chunks, %.0f MiB per chunk", model.name, wanted, chunk_bytes / 2**20)
        run, size = halving(
            lambda size: captured(model.name, stereo, (size, 2, chunk_samples), device), wanted, chunk_samples, device
        )
        spare = partial(self.spare, model) if model.is_half else None
        ready = ReadyModel(run, len(model.stems), size, device, spare)
        if size == wanted:  # a smaller size is not kept: the memory may be free again for the next song
            self.ready[key] = ready
            while len(self.ready) > MAX_READY:
                del self.ready[next(iter(self.ready))]
        return ready

    def spare(self, model: SeparationModel) -> Model:
        """A bfloat16 copy of a model that overflows in float16; logs a warning.

        Raises EstimateError if the GPU's memory does not hold the copy.
        """
        logger.warning("%s: NaN or Inf in float16: the rest of this song is computed in bfloat16", model.name)
        key = model.name, model.stems
        if key not in self._spares:
            try:
                self._spares[key] = model.in_precision(torch.bfloat16)
            except RuntimeError as e:
                if not is_out_of_memory(e):
                    raise
                raise EstimateError(
                    f"the GPU's memory does not hold a second copy of {model.name}, in bfloat16: choose precision bf16"
                ) from e
        return on_stereo(self._spares[key])

    def forget(self, name: str) -> None:
        """Drop everything that was made of a model, because it has been loaded again."""
        self.ready = {key: ready for key, ready in self.ready.items() if key[0] != name}
        self._spares = {key: spare for key, spare in self._spares.items() if key[0] != name}


def on_stereo(model: SeparationModel) -> Model:
    """The model over stereo chunks, `[B, 2, T]` to `[B, S, 2, T]`; a mono model runs over each channel."""
    if model.channels == 2:
        return model

    def over_channels(chunks: Tensor) -> Tensor:
        estimates: Tensor = model(chunks.reshape(-1, 1, chunks.shape[-1]))  # [B * 2, S, 1, T]
        return estimates.reshape(-1, 2, *estimates.shape[1:]).squeeze(3).transpose(1, 2)

    return over_channels
