"""The container's predictor: typed inputs -> Separator -> stem files. No signal processing here.

Cog reads the signature below without running it, so every default, choice and range is a plain literal. Called from
Python, `predict` needs all its arguments: the defaults are Cog's.
"""

import os
import secrets
import shutil
import tempfile
from typing import List  # noqa: UP035  # Cog's static reader knows this spelling

import torch
from cog import BasePredictor, Input, Path

from separation import ModelPool, Separator
from separation.device import peak_memory_bytes


class Predictor(BasePredictor):
    def setup(self) -> None:
        """Load the models of vocals_instrumental and all_4 and run each once; all_6 loads its own when first asked."""
        self.recipe = os.environ.get("SEPARATION_RECIPE") or "standard"
        # Three hours: up to there each stem is a plain WAV of less than 4 GB at either rate.
        self.max_seconds = float(os.environ.get("SEPARATION_MAX_SECONDS") or 3 * 60 * 60)
        self.folder = _new_folder()
        self.pool = ModelPool()
        print(self.pool.choice.reason)
        noise = torch.randn(2, 44100, generator=torch.Generator().manual_seed(0)) * 0.1  # with this overlap, one chunk
        Separator(self.recipe, "all_4", overlap_seconds=1, pool=self.pool).separate(noise)

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
        mp3_bitrate: int = Input(
            description="Bitrate in kbit/s if the output format is mp3", default=320, choices=[128, 192, 320]
        ),
        two_stems: str = Input(
            description="Give only this stem and the rest of the song (such as no_vocals); stems is then ignored",
            default="none",
            choices=["none", "vocals", "drums", "bass", "other"],
        ),
        recipe: str = Input(
            description="Models: standard for quality, demo for a quick rough try, default leaves it to the server",
            default="default",
            choices=["default", "standard", "demo"],
        ),
    ) -> List[Path]:  # noqa: UP006
        """Separate a song into stems."""
        # The last prediction's stems have been sent, and Cog leaves them to us. A new name each time, so that no file
        # of one song can ever be taken for another's. A run that fails or is cancelled removes its folder itself.
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = _new_folder()
        separator = Separator(
            self.recipe if recipe == "default" else recipe,
            stems,
            two_stems=None if two_stems == "none" else two_stems,
            chunk_seconds=int(chunk_size),
            overlap_seconds=int(overlap),
            pool=self.pool,
        )
        files = separator.separate_file(
            audio,
            self.folder,
            format=output_format,
            sample_rate=int(sample_rate),
            mp3_bitrate=int(mp3_bitrate),
            max_seconds=self.max_seconds,
            progress=_ProgressLog(),
        )
        device = self.pool.choice.device
        self.record_metric("audio_seconds", round(files.duration_seconds, 3))
        self.record_metric("times_realtime", round(files.times_realtime, 3))
        self.record_metric("model_load_seconds", round(sum(self.pool.load_seconds[m] for m in separator.models), 3))
        self.record_metric("device", str(device))
        self.record_metric("peak_memory_mib", round(peak_memory_bytes(device) / 2**20, 1))
        return [Path(path) for path in files.values()]


def _new_folder() -> str:
    """A path that nothing has yet."""
    return os.path.join(tempfile.gettempdir(), f"stems-{secrets.token_hex(8)}")


class _ProgressLog:
    """Prints a line a stage and a line a twentieth of the job, the latter as `npm replicate` reads it from the logs."""

    def __init__(self) -> None:
        self._stage, self._printed = "", -1

    def __call__(self, share: float, stage: str) -> None:
        if stage != self._stage:
            self._stage = stage
            print(stage, flush=True)
        steps = int(share * 20)
        if steps > self._printed:
            self._printed = steps
            print(f"{steps * 5:3d}%|{'█' * steps}{' ' * (20 - steps)}| {steps}/20", flush=True)
