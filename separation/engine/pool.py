"""Loaded models, and what is made of them once on a CUDA GPU."""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from separation.checkpoints.load import load_model
from separation.device import Choice, choose, is_out_of_memory
from separation.engine.chunking import chunk_memory_bytes, does_not_fit, fitting_batch_size, halved
from separation.engine.gpu import Model, captured, compute_thread
from separation.engine.options import EngineOptions
from separation.errors import EstimateError
from separation.models.base import SeparationModel

MAX_READY = 16  # models over one shape of batch that are kept ready on a GPU: each keeps a batch and its estimates

logger = logging.getLogger("separation")


@dataclass(frozen=True)
class Ready:
    """A model that is ready to run over batches of a fixed size."""

    model: Model  # chunks [B, 2, T] to estimates [B, S, 2, T]
    batch_size: int
    chunk_bytes: int = 0  # of a CUDA GPU's memory that a chunk needs, as measured


class GpuModels:
    """What is made once of models that run on a CUDA GPU. Its methods are for the device's compute thread."""

    def __init__(self) -> None:
        self.ready: dict[tuple[Any, ...], Ready] = {}  # by name, stems, samples and size; the last was used last
        self._spares: dict[tuple[str, tuple[str, ...]], SeparationModel] = {}

    def get(
        self, model: SeparationModel, samples: int, batch_size: int | Literal["auto"], device: torch.device
    ) -> Ready:
        """The model ready for chunks of so many samples, in batches of that size or, with `auto`, of one that fits.

        The size then follows from what a chunk needs and the memory that the GPU has. Raises EstimateError if the
        memory does not hold one chunk.
        """
        kind = model.name, model.stems, samples, batch_size
        ready = self.ready.pop(kind, None)
        if ready is not None:
            self.ready[kind] = ready
            return ready
        apply = on_stereo(model)
        chunk_bytes = chunk_memory_bytes(apply, 2, samples, device)
        wanted = size = fitting_batch_size(chunk_bytes, device) if batch_size == "auto" else int(batch_size)
        logger.info("%s: %d chunks at once, of %.0f MiB each", model.name, size, chunk_bytes / 2**20)
        while True:
            try:
                ready = Ready(captured(model.name, apply, (size, 2, samples), device), size, chunk_bytes)
                break
            except RuntimeError as e:
                if not is_out_of_memory(e):
                    raise
                if size == 1:
                    raise does_not_fit(samples, device) from e
            torch.cuda.empty_cache()
            size = halved(size)
        if size == wanted:  # else others have the memory: the next song tries again
            self.ready[kind] = ready
            while len(self.ready) > MAX_READY:
                del self.ready[next(iter(self.ready))]
        return ready

    def spare(self, model: SeparationModel) -> Model:
        """A copy of a model that overflows in float16, which computes in bfloat16; a warning says so."""
        logger.warning("%s: NaN or Inf in float16: the rest of this song is computed in bfloat16", model.name)
        kind = model.name, model.stems
        if kind not in self._spares:
            try:
                self._spares[kind] = model.in_precision(torch.bfloat16)
            except RuntimeError as e:
                if not is_out_of_memory(e):
                    raise
                fault = f"the GPU's memory does not hold a second copy of {model.name}, in bfloat16: use precision bf16"
                raise EstimateError(fault) from e
        return on_stereo(self._spares[kind])

    def forget(self, name: str) -> None:
        """Drop what was made of the model of that name, which has been loaded anew."""
        self.ready = {kind: ready for kind, ready in self.ready.items() if kind[0] != name}
        self._spares = {kind: spare for kind, spare in self._spares.items() if kind[0] != name}


class Models(Protocol):
    """Where a separator gets its models from."""

    @property
    def device(self) -> torch.device: ...

    @property
    def on_gpu(self) -> GpuModels: ...

    def get(self, name: str, stems: tuple[str, ...]) -> SeparationModel: ...


class ModelPool:
    """Loaded models on one device in one precision, each loaded when first asked for.

    A model is loaded once; only a checkpoint made of specialists is loaded again when others of them are asked for.
    """

    def __init__(self, options: EngineOptions = EngineOptions()) -> None:
        self.choice: Choice = choose(options.device, options.precision)
        if self.choice.device.type == "cuda":
            compute_thread(self.choice.device)  # settles how CUDA computes before anything is tried on it
        self.attention = options.attention
        self.load_seconds: dict[str, float] = {}  # how long each model took
        self.on_gpu = GpuModels()
        self._models: dict[str, SeparationModel] = {}
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        return self.choice.device

    def get(self, name: str, stems: tuple[str, ...]) -> SeparationModel:
        """The model of that name; of a checkpoint made of specialists, those for `stems` alone."""
        with self._lock:
            loaded = self._models.get(name)
            here = loaded.stems if loaded else ()
            if loaded is None or not set(stems) <= set(here):
                wanted = tuple(dict.fromkeys((*here, *stems)))
                started = time.monotonic()
                loaded = load_model(
                    name,
                    stems=wanted,
                    device=self.choice.device,
                    precision=self.choice.precision,
                    attention=self.attention,
                )
                self.load_seconds[name] = time.monotonic() - started
                if name in self._models and self.choice.device.type == "cuda":
                    compute_thread(self.choice.device).run(self.on_gpu.forget, name)
                self._models[name] = loaded
            return loaded.only(stems)


@dataclass(frozen=True)
class LoadedModels:
    """Models that were loaded one by one, by name, all on one device."""

    models: Mapping[str, SeparationModel]
    on_gpu: GpuModels = field(default_factory=GpuModels)

    @property
    def device(self) -> torch.device:
        parameters = (parameter for model in self.models.values() for parameter in model.parameters())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))  # fused layers have none

    def get(self, name: str, stems: tuple[str, ...]) -> SeparationModel:
        return self.models[name].only(stems)


def on_stereo(model: SeparationModel) -> Model:
    """The model over two channels, `[B, 2, T]` to `[B, S, 2, T]`; a mono model over each of them."""
    if model.channels == 2:
        return model

    def apply(chunks: Tensor) -> Tensor:
        estimates = model(chunks.reshape(-1, 1, chunks.shape[-1]))  # [B * 2, S, 1, T]
        return estimates.unflatten(0, (-1, 2)).squeeze(3).transpose(1, 2)

    return apply
