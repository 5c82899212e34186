"""The models to measure, with random weights in a folder, and the song.

A model is a YAML file with its weights beside it, like a user's own model. `tiny` models have the same architectures
with few features, for a dry run on a CPU.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from names import DEMO, DRUMSEP, HTDEMUCS, HTDEMUCS_FT, KIM, MDX23C, SCNET, SCNET_XL, SW, VIPERX
from separation.checkpoints.build import random_weights
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.load import load_model
from separation.engine.options import EngineOptions
from separation.engine.separator import SAMPLE_RATE, Separator
from separation.models import SeparationModel

SONG = Path(__file__).parents[2] / "weights" / "demo" / "song.flac"

_SMALL_ROFORMER: dict[str, Any] = {"dim": 32, "depth": 1, "heads": 2, "dim_head": 16, "stft_hop_length": 1024}
_FIVE_BANDS = {"freqs_per_bands": [205] * 5}
_SMALL_DEMUCS: dict[str, Any] = {"channels": 8, "bottom_channels": 32, "t_layers": 3, "segment": "1"}
_SMALL_MDX23C: dict[str, Any] = {"num_channels": 4, "growth": 4, "num_scales": 3, "num_blocks_per_scale": 1}
_TINY: dict[str, dict[str, Any]] = {
    VIPERX: _SMALL_ROFORMER | _FIVE_BANDS,
    SW: _SMALL_ROFORMER | _FIVE_BANDS,
    KIM: _SMALL_ROFORMER,
    HTDEMUCS: _SMALL_DEMUCS,
    HTDEMUCS_FT: _SMALL_DEMUCS,
    MDX23C: _SMALL_MDX23C,
    DRUMSEP: _SMALL_MDX23C,
    SCNET: {"num_dplayer": 2, "dims": [4, 8, 8, 16]},
    SCNET_XL: {"num_dplayer": 2, "dims": [4, 8, 8, 16]},
}
_TINY_CHUNK_SAMPLES = {HTDEMUCS: 44100, HTDEMUCS_FT: 44100, MDX23C: 31 * 1024, DRUMSEP: 31 * 512}


class Workloads:
    """Models and songs, for one device.

    Args:
        folder: where the models are; it becomes this process's weights folder.
        tiny: whether models and songs are small.
    """

    def __init__(self, folder: Path, device: torch.device, *, tiny: bool) -> None:
        self.folder = folder
        self.device = device
        self.tiny = tiny
        os.environ["SEPARATION_WEIGHTS"] = str(folder)

    def config_path(self, name: str) -> Path:
        """The model's YAML file."""
        return self.folder / f"{name}.yaml"

    def weights_path(self, name: str) -> Path:
        """The model's weights file; with specialists, the first one's."""
        description = read_config(self.config_path(name))
        return self.folder / (description.files[0].name if description.files else f"{name}.safetensors")

    def make(self, names: Iterable[str]) -> None:
        """Write the missing models. The YAML comes last: a model that has one is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if not self.config_path(name).exists():
                self._make(name)

    def _make(self, name: str) -> None:
        published = read_config(name)
        specialists = [file.stem for file in published.files if file.stem is not None]
        weights = [f"{name}.{stem}.safetensors" for stem in specialists] or [f"{name}.safetensors"]
        document = {
            "architecture": published.architecture,
            "stems": list(published.stems),
            "files": [{"name": file, "stem": stem} for file, stem in zip(weights, specialists, strict=True)]
            if specialists
            else [],
            "audio": published.audio | self._smaller_chunk(name),
            "model": published.hyper_parameters | (_TINY[name] if self.tiny else {}),
            "inference": {"normalize": published.standardised},
        }
        draft = self.folder / f"part.{os.getpid()}.{name}.yaml"
        draft.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        for seed, file in enumerate(weights):
            save_file(random_weights(draft, seed=seed), self.folder / file)
        draft.rename(self.config_path(name))

    def _smaller_chunk(self, name: str) -> dict[str, int]:
        """Hyper-parameters for a smaller chunk of a model that keeps its own chunk."""
        return {"chunk_size": _TINY_CHUNK_SAMPLES[name]} if self.tiny and name in _TINY_CHUNK_SAMPLES else {}

    def load(self, name: str, precision: torch.dtype) -> SeparationModel:
        """Load the model on the device, in the given precision if it supports that."""
        path = DEMO if name == DEMO else self.config_path(name)
        return load_model(path, device=self.device, precision=precision)

    def separator(self, model: SeparationModel, chunk_seconds: int, overlap_seconds: int) -> Separator:
        """The engine around a loaded model, with its own choice of batch size."""
        return Separator.from_model(
            model, options=EngineOptions(chunk_seconds=chunk_seconds, overlap_seconds=overlap_seconds)
        )

    def chunk_seconds(self, model: SeparationModel) -> int:
        """The model's training length in whole seconds; in a dry run the shortest chunk on offer."""
        return 4 if self.tiny else round(model.chunk_samples / model.sample_rate)

    def song_seconds(self, seconds: int) -> int:
        """The length of a song that stands for one of so many seconds: a few seconds in a dry run."""
        return min(seconds, 4) if self.tiny else seconds

    @property
    def many_songs(self) -> int:
        """How many songs to separate at once."""
        return 2 if self.tiny else 8

    def song(self, seconds: int) -> Tensor:
        """The demo song, cut or repeated to that length, `[2, T]`."""
        samples, _ = soundfile.read(SONG, dtype="float32")
        return torch.from_numpy(np.resize(samples, (self.song_seconds(seconds) * SAMPLE_RATE, 2)).T.copy())

    def chunks(self, channels: int, chunk_samples: int, batch_size: int) -> Tensor:
        """Chunks of the song on the device, `[B, C, T]`."""
        shift = 100  # samples from one chunk to the next
        samples, _ = soundfile.read(SONG, dtype="float32")
        song = torch.from_numpy(np.resize(samples, (chunk_samples + shift * batch_size, 2)).T.copy())[:channels]
        starts = range(0, shift * batch_size, shift)
        return torch.stack([song[:, start : start + chunk_samples] for start in starts]).to(self.device)
