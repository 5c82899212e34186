"""Loaded models, shared by separators."""

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from separation.checkpoints.load import load_model
from separation.device import Choice, choose
from separation.engine.compute_thread import compute_thread
from separation.engine.gpu_models import GpuModels
from separation.engine.options import EngineOptions
from separation.engine.turns import Turns
from separation.models.base import SeparationModel


class Models(Protocol):
    """Where a separator gets its models from."""

    @property
    def device(self) -> torch.device:
        """What the models run on."""
        ...

    @property
    def on_gpu(self) -> GpuModels:
        """What was prepared for the models on a CUDA GPU."""
        ...

    @property
    def turns(self) -> Turns:
        """The lock with which songs take turns on the device."""
        ...

    def get(self, name: str, stems: tuple[str, ...]) -> SeparationModel:
        """The model of that name, for these stems at least."""
        ...


class ModelPool:
    """Models on one device in one precision, each loaded when it is first asked for.

    A model is loaded once. The exception is a checkpoint with one network per stem: it is loaded again when further
    stems are asked for.

    Args:
        options: device, precision and attention; the other options do not matter here.

    Attributes:
        choice: device and precision, and why they were chosen.
        attention: the requested attention backend.
        load_seconds: how long loading each model took, by name.
        on_gpu: what was prepared for the models on a CUDA GPU, such as recorded graphs.
        turns: the lock with which songs that are separated at once take turns on the device.

    Raises:
        InputError: the device or precision cannot be used.
    """

    def __init__(self, options: EngineOptions = EngineOptions()) -> None:
        self.choice: Choice = choose(options.device, options.precision)
        if self.choice.device.type == "cuda":
            compute_thread(self.choice.device)  # configures CUDA's numerics before anything runs
        self.attention: str = options.attention
        self.load_seconds: dict[str, float] = {}  # by model
        self.on_gpu: GpuModels = GpuModels()
        self.turns: Turns = Turns()
        self._models: dict[str, SeparationModel] = {}
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """What the models run on."""
        return self.choice.device

    def get(self, name: str, stems: tuple[str, ...]) -> SeparationModel:
        """The model of that name; if its checkpoint has one network per stem, with the networks of `stems` only.

        Raises CheckpointError if the checkpoint is missing or wrong, and InputError for an unknown attention backend.
        """
        with self._lock:
            loaded = self._models.get(name)
            if loaded is None or not set(stems) <= set(loaded.stems):
                loaded = self._load(name, tuple(dict.fromkeys((*(loaded.stems if loaded else ()), *stems))))
            return loaded.only(stems)

    def keep_only(self, names: Iterable[str]) -> None:
        """Drop every model but these, so that memory does not grow with the models that were ever asked for."""
        with self._lock:
            for name in self._models.keys() - set(names):
                del self._models[name]
                if self.choice.device.type == "cuda":
                    compute_thread(self.choice.device).run(self.on_gpu.forget, name)

    def _load(self, name: str, stems: tuple[str, ...]) -> SeparationModel:
        started = time.monotonic()
        model = load_model(
            name,
            stems=stems,
            device=self.choice.device,
            precision=self.choice.precision,
            attention=self.attention,
        )
        self.load_seconds[name] = time.monotonic() - started
        if name in self._models and self.choice.device.type == "cuda":
            compute_thread(self.choice.device).run(self.on_gpu.forget, name)
        self._models[name] = model
        return model


@dataclass(frozen=True)
class LoadedModels:
    """Models that were loaded one by one, by name; all are on one device."""

    models: Mapping[str, SeparationModel]
    on_gpu: GpuModels = field(default_factory=GpuModels)
    turns: Turns = field(default_factory=Turns)

    @property
    def device(self) -> torch.device:
        parameters = (parameter for model in self.models.values() for parameter in model.parameters())
        return next((parameter.device for parameter in parameters), torch.device("cpu"))  # fused layers have none

    def get(self, name: str, stems: tuple[str, ...]) -> SeparationModel:
        """The model of that name, for `stems` only."""
        return self.models[name].only(stems)
