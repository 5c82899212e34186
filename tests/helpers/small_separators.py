"""Models for tests of separators: one that records its inputs, and a small one with random weights."""

from dataclasses import replace
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from helpers.small_model import identity
from separation.engine.options import EngineOptions
from separation.models.base import SeparationModel
from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig

QUICK = EngineOptions(chunk_seconds=4, overlap_seconds=1)


def write(path: Path, audio: Tensor, rate: int = 44100) -> Path:
    soundfile.write(path, audio.T.numpy(), rate, subtype="FLOAT")
    return path


def read(path: Path) -> Tensor:
    return torch.from_numpy(soundfile.read(path, dtype="float32", always_2d=True)[0].T.copy())


def random_model(
    stems: tuple[str, ...],
    *,
    name: str = "random",
    stereo: bool = True,
    seed: int = 0,
    residual: str | None = None,
) -> BSRoFormer:
    torch.manual_seed(seed)
    config = BSRoFormerConfig(
        dim=16, depth=1, dim_head=8, heads=2, stereo=stereo, num_stems=len(stems), stft_hop_length=1024
    )
    return BSRoFormer(config, replace(identity(stems, name=name, chunk_samples=352_800), residual=residual)).eval()


class Recorder(SeparationModel):
    """Records its inputs. Its estimate of each stem is its input, times a gain."""

    channels = 2

    def __init__(self, name: str, stems: tuple[str, ...], chunk_samples: int, *, sample_rate: int = 44100) -> None:
        super().__init__(identity(stems, name=name, sample_rate=sample_rate, chunk_samples=chunk_samples))
        self.gain = torch.nn.Parameter(torch.ones(1))
        self.seen: list[Tensor] = []

    def forward(self, chunks: Tensor) -> Tensor:
        self.seen.append(chunks.clone())
        return (chunks * self.gain).unsqueeze(1).repeat(1, len(self.stems), 1, 1)


class StandardRecorder(Recorder):
    """Like Demucs: chunks of a fixed length, normalised by mean and deviation, no reflected border."""

    normalisation = "standard"
    fixed_chunk = True
    reflects_border = False
