"""The container's predictor: typed inputs -> Separator -> stem files. No signal processing here.

Cog reads the signature below without running it, so every default, choice and range is a plain literal.
"""

import os
import shutil
import tempfile
from typing import List  # noqa: UP035  # Cog's static reader knows this spelling

import torch
from cog import BasePredictor, Input, Path

from separation import ModelPool, Separator


class Predictor(BasePredictor):
    def setup(self) -> None:
        """Load the models of vocals_instrumental and all_4 and run each once; all_6 loads its own when first asked."""
        self.recipe = os.environ.get("SEPARATION_RECIPE", "standard")
        self.folder: str | None = None
        self.pool = ModelPool()
        print(self.pool.choice.reason)
        noise = torch.randn(2, 44100, generator=torch.Generator().manual_seed(0)) * 0.1
        Separator(self.recipe, "all_4", pool=self.pool).separate(noise)

    def predict(
        self,
        audio: Path = Input(description="Audio file to separate (WAV, MP3, FLAC, OGG, etc.)"),
        stems: str = Input(
            description="Which stems to extract",
            default="vocals_instrumental",
            choices=["vocals_instrumental", "all_4", "all_6"],
        ),
        output_format: str = Input(description="Output audio format", default="wav", choices=["wav", "mp3", "flac"]),
        chunk_size: int = Input(description="Processing chunk size in seconds", default=8, ge=4, le=30),
        overlap: int = Input(description="Overlap between chunks in seconds", default=4, ge=1, le=8),
        sample_rate: int = Input(description="Output sample rate", default=44100, choices=[44100, 48000]),
    ) -> List[Path]:  # noqa: UP006
        """Separate a song into stems."""
        if self.folder:  # its files have been sent; Cog leaves them to us
            shutil.rmtree(self.folder)
        self.folder = tempfile.mkdtemp(prefix="stems-")
        separator = Separator(
            self.recipe, stems, pool=self.pool, chunk_seconds=int(chunk_size), overlap_seconds=int(overlap)
        )
        files = separator.separate_file(
            str(audio), self.folder, format=output_format, sample_rate=int(sample_rate), progress=_Log()
        )
        return [Path(path) for path in files.values()]


class _Log:
    """Prints the progress every tenth of the job, as `npm replicate` reads it."""

    def __init__(self) -> None:
        self.printed = -1

    def __call__(self, share: float, stage: str) -> None:
        tenths = int(share * 10)
        if tenths > self.printed:
            self.printed = tenths
            print(f"{tenths * 10:3d}%|{'█' * tenths}{' ' * (10 - tenths)}| {tenths}/10 {stage}", flush=True)
