"""Train the demo weights on songs that make_song.py rendered: two CPU cores, an hour and a half.

    python weights/demo/train.py SONGS --singing a.wav b.wav --minutes 90 --out weights/demo/demo.safetensors

SONGS holds a folder a song with one WAV a stem. The last `--held-out` folders are never trained on: every few minutes
the running mean of the weights is scored on them and written to `--out` (float16), with the scores beside it.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from separation.evaluation.metrics import sdr
from separation.models.attention import BACKENDS
from separation.models.base import Identity
from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig

SAMPLE_RATE = 44100
SEGMENT_SAMPLES = 3 * SAMPLE_RATE
BATCH = 6
CONFIG = Path(__file__).parents[2] / "configs" / "models" / "demo.yaml"


def float32_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention outside autocast: its bfloat16 gradient is several times slower on a CPU."""
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


def load_song(folder: Path, stems: list[str]) -> np.ndarray:
    """All stems of a song as int16 `[S, C, T]`, memory-mapped; packed beside the WAV files the first time."""
    packed = folder / "stems.npy"
    if not packed.exists():
        audio = np.stack([soundfile.read(folder / f"{stem}.wav", dtype="float32")[0].T for stem in stems])
        np.save(packed, np.round(audio * 32767).astype(np.int16))
    stems_of_song: np.ndarray = np.load(packed, mmap_mode="r")
    return stems_of_song


def stretch(audio: np.ndarray, factor: float) -> np.ndarray:
    """Plays `[C, T]` faster by `factor`, pitch and all, by linear interpolation."""
    positions = np.arange(0, audio.shape[1] - 1, factor)
    return np.stack([np.interp(positions, np.arange(audio.shape[1]), channel) for channel in audio])


class Segments:
    """Endless random training segments: half from one song, half with every stem from a song of its own."""

    def __init__(self, songs: list[np.ndarray], singing: list[np.ndarray], seed: int) -> None:
        self.songs, self.singing = songs, singing
        self.random = np.random.default_rng(seed)

    def cut(self, audio: np.ndarray, samples: int) -> np.ndarray:
        start = int(self.random.integers(0, max(1, audio.shape[-1] - samples)))
        piece = np.asarray(audio[..., start : start + samples], dtype=np.float32)
        missing = samples - piece.shape[-1]
        return np.pad(piece, [(0, 0)] * (piece.ndim - 1) + [(0, missing)]) if missing else piece

    def voice(self, sung: np.ndarray) -> np.ndarray:
        """The synthetic voice, or a real one at its level; either sometimes at another pitch."""
        random = self.random
        factor = 2 ** random.uniform(-0.35, 0.35) if random.random() < 0.4 else 1.0
        needed = int(SEGMENT_SAMPLES * factor) + 2
        if random.random() < 0.25:
            piece = self.cut(self.singing[random.integers(len(self.singing))], needed)
            late = np.roll(piece, int(random.integers(300, 1200)), axis=-1) * random.uniform(0, 0.3)
            piece = np.stack([piece + late, piece - late])
            level = 0.06 * 32767 / (piece.std() + 1.0)
            piece = piece * min(level, 4.0)
        else:
            piece = self.cut(sung, needed)
        return stretch(piece, factor)[:, :SEGMENT_SAMPLES] if factor != 1.0 else piece[:, :SEGMENT_SAMPLES]

    def segment(self) -> np.ndarray:
        random = self.random
        if random.random() < 0.5:
            song = self.songs[random.integers(len(self.songs))]
            stems = self.cut(song, SEGMENT_SAMPLES)
            if random.random() < 0.5:
                stems[0] = self.voice(song[0])
        else:
            picks = [self.songs[random.integers(len(self.songs))] for _ in range(6)]
            stems = np.stack(
                [self.voice(picks[0][0])] + [self.cut(song[i], SEGMENT_SAMPLES) for i, song in enumerate(picks) if i]
            )
        gains = 10 ** (random.normal(0, 2.5, size=(6, 1, 1)) / 20)
        gains[random.random((6, 1, 1)) < 0.04] = 0  # a stem that is not there
        stems = stems * gains
        if random.random() < 0.2:
            stems = stems[:, ::-1]
        return stems / 32767

    def batches(self) -> Iterator[Tensor]:
        while True:
            yield torch.from_numpy(np.stack([self.segment() for _ in range(BATCH)]).astype(np.float32))


def loss_function(estimates: Tensor, references: Tensor) -> Tensor:
    """Per stem: the error's level in dB over the batch, plus the absolute error relative to the stem's own."""
    error = estimates - references
    dims = (0, 2, 3)
    power = references.square().sum(dims) + 1e-3
    decibels = 10 * torch.log10(error.square().sum(dims) / power + 1e-3)
    absolute = error.abs().sum(dims) / (references.abs().sum(dims) + 1.0)
    return (decibels / 10 + absolute).mean()


@torch.no_grad()
def score(model: nn.Module, songs: list[np.ndarray]) -> np.ndarray:
    """Median SDR in dB of each stem over songs, `[S]`."""
    scores = []
    for song in songs:
        references = torch.from_numpy(np.asarray(song, dtype=np.float32) / 32767)
        estimates = model(references.sum(0, keepdim=True))[0]
        scores.append([sdr(reference, estimate) for reference, estimate in zip(references, estimates, strict=True)])
    return np.median(scores, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("songs", type=Path)
    parser.add_argument("--singing", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=85)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--resume", type=Path, help="start from these weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    document = yaml.safe_load(CONFIG.read_text())
    stems: list[str] = document["stems"]
    hyper = document["model"] | {"freqs_per_bands": tuple(document["model"]["freqs_per_bands"])}
    BACKENDS["float32"] = float32_attention
    audio = document["audio"]
    identity = Identity(
        name="demo", stems=tuple(stems), sample_rate=audio["sample_rate"], chunk_samples=audio["chunk_size"]
    )
    model = BSRoFormer(BSRoFormerConfig(**hyper), identity, attention="float32")
    if options.resume:
        model.load_state_dict({k: v.float() for k, v in load_file(options.resume).items()})
    average = BSRoFormer(BSRoFormerConfig(**hyper), identity).eval()
    average.load_state_dict(model.state_dict())
    for layer in model.layers:
        for transformer in layer.children():
            transformer.compile()

    folders = sorted(path for path in options.songs.iterdir() if path.is_dir())
    songs = [load_song(folder, stems) for folder in folders]
    unseen, songs = songs[-options.held_out :], songs[: -options.held_out]
    singing = [soundfile.read(path, dtype="float32")[0] * 32767 for path in options.singing]
    singing = [voice.mean(axis=1) if voice.ndim == 2 else voice for voice in singing]
    batches = Segments(songs, singing, options.seed).batches()

    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    started, scored, step, running = time.monotonic(), time.monotonic(), 0, 0.0
    while True:
        elapsed = (time.monotonic() - started) / 60 / options.minutes
        rate = options.learning_rate * min(1.0, (step + 1) / 150) * max(0.0, 1 - elapsed)
        for group in optimizer.param_groups:
            group["lr"] = rate
        references = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            estimates = model(references.sum(1))
        loss = loss_function(estimates, references)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        running += (loss.item() - running) * max(0.02, 1 / step)
        with torch.no_grad():
            keep = min(0.998, (step + 1) / (step + 10))
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 1 - keep)
        if elapsed >= 1 or time.monotonic() - scored > 300:
            decibels = score(average, unseen)
            words = {stem: round(float(value), 2) for stem, value in zip(stems, decibels, strict=True)}
            print(f"{elapsed * options.minutes:.1f} min, step {step}, loss {running:.3f}, {words}", flush=True)
            state = {key: value.half().contiguous() for key, value in average.state_dict().items()}
            save_file(state, options.out)
            options.out.with_suffix(".json").write_text(
                json.dumps({"steps": step, "minutes": round(elapsed * options.minutes), "sdr_unseen": words})
            )
            scored = time.monotonic()
        if elapsed >= 1:
            return


if __name__ == "__main__":
    main()
