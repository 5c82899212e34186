"""Separator: a recipe, its models and a mixture -> stems."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from separation.audio import SAMPLE_RATE, Waveform, check_output, decode, resample
from separation.checkpoints import load_model
from separation.chunking import ChunkPlan, Model, Read, chunk_memory_bytes, fitting_batch_size, separate
from separation.device import Choice, choose
from separation.errors import AudioError, InputError
from separation.models import SeparationModel
from separation.output import OutputFolder, encode_all
from separation.recipes import Recipe, load_recipe

CHUNK_SECONDS = range(4, 31)
OVERLAP_SECONDS = range(1, 9)
SAMPLE_RATES = (44100, 48000)
DECODED, ESTIMATED = 0.05, 0.9  # the share of a file's job, in the progress, that is done by then; the rest is writing
PEAK = 0.9  # what a mixture's peak is scaled to before a model that was trained on such audio

logger = logging.getLogger("separation")

ChunkKind = tuple[str, tuple[str, ...], int]  # a model's name, its stems, samples
Progress = Callable[[float, str], None]  # (share of the whole job done, 0 to 1; stage); raise from it to cancel


class ModelPool:
    """Loaded models on one device in one precision, each loaded when first asked for.

    A model is loaded once; only a checkpoint made of specialists is loaded again when others of them are asked for.
    """

    def __init__(self, device: str = "auto", precision: str = "auto", attention: str = "auto") -> None:
        self.choice: Choice = choose(device, precision)
        self.attention = attention
        self.load_seconds: dict[str, float] = {}  # how long each model took
        self.chunk_bytes: dict[ChunkKind, int] = {}  # the GPU memory that each model needs for a chunk, as measured
        self._models: dict[str, SeparationModel] = {}
        self._lock = threading.Lock()

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
                self._models[name] = loaded
            return loaded.only(stems)


@dataclass(frozen=True)
class Mixture:
    """What a song's separation needs to know of it: its samples on demand and its level."""

    read: Read
    n_samples: int
    peak: float  # largest absolute sample
    mean: float  # of the mono mixture
    std: float  # of the mono mixture, unbiased

    def normalisation(self, model: SeparationModel) -> tuple[float, float]:
        """(offset, scale) such that the model sees (mixture - offset) / scale."""
        if model.normalisation == "standard":
            return self.mean, self.std + 1e-8
        return 0.0, self.peak / PEAK if self.peak else 1.0


class StemFiles(dict[str, Path]):
    """The paths of a song's stems, by stem and in order, and what else is worth knowing of them."""

    duration_seconds: float  # of the song
    elapsed_seconds: float  # from the song's file to the stems' files
    gain: float  # that every stem was scaled by on writing; 1 unless FLAC or MP3 would have clipped

    @property
    def times_realtime(self) -> float:
        """Seconds of the song separated in a second."""
        return self.duration_seconds / self.elapsed_seconds


class Separator:
    """Splits songs into the stems of a recipe.

    Args:
        recipe: a folder of configs/recipes.
        stems: one of the recipe's choices, e.g. `vocals_instrumental`, `all_4`, `all_6`.
        two_stems: one stem of `all_4`, e.g. `drums`, to give that and `no_drums`, the mixture minus it. Only the models
            that this needs are loaded and run; `stems` is then ignored.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        attention: `auto` or a backend's name in `separation.models.attention.NAMES`.
        batch_size: chunks computed at once, or `auto`: 1 on a CPU, on a CUDA GPU up to 8 that its free memory holds, 4
            on an Apple GPU.
        chunk_seconds: 4 to 30. A model that takes only chunks of its own length (Demucs) keeps that length.
        overlap_seconds: 1 to 8, below `chunk_seconds`. A model with chunks of its own length overlaps them by the same
            share.
        pool: models that are loaded already, to share between separators; its device, precision and
            attention then hold.

    Raises:
        InputError, RecipeError: an option that cannot be used.
        CheckpointError: a checkpoint that is missing or wrong.
    """

    def __init__(
        self,
        recipe: str | Recipe = "standard",
        stems: str = "vocals_instrumental",
        *,
        two_stems: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        attention: str = "auto",
        batch_size: int | Literal["auto"] = "auto",
        chunk_seconds: int = 8,
        overlap_seconds: int = 4,
        pool: ModelPool | None = None,
    ) -> None:
        _check_options(chunk_seconds, overlap_seconds, batch_size)
        if isinstance(recipe, str):
            recipe = load_recipe(recipe, stems if two_stems is None else "all_4")
        self._choose_stems(recipe, two_stems)
        pool = pool or ModelPool(device, precision, attention)
        self._setup(
            {name: pool.get(name, wanted) for name, wanted in self.recipe.models.items()},
            pool.choice.device,
            batch_size,
            chunk_seconds,
            overlap_seconds,
            pool.chunk_bytes,
        )

    @classmethod
    def from_model(
        cls,
        model: SeparationModel,
        *,
        two_stems: str | None = None,
        batch_size: int | Literal["auto"] = "auto",
        chunk_seconds: int = 8,
        overlap_seconds: int = 4,
    ) -> "Separator":
        """A separator whose stems are those of one loaded model; options as for the class."""
        _check_options(chunk_seconds, overlap_seconds, batch_size)
        separator = cls.__new__(cls)
        separator._choose_stems(Recipe(model.name, "all", dict.fromkeys(model.stems, model.name)), two_stems)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))  # fused: none
        models = {model.name: model.only(separator.recipe.models[model.name])}
        separator._setup(models, device, batch_size, chunk_seconds, overlap_seconds, {})
        return separator

    def _choose_stems(self, recipe: Recipe, two_stems: str | None) -> None:
        self.recipe = recipe if two_stems is None else recipe.only(two_stems)
        self.two_stems = two_stems

    def _setup(
        self,
        models: dict[str, SeparationModel],
        device: torch.device,
        batch_size: int | Literal["auto"],
        chunk_seconds: int,
        overlap_seconds: int,
        chunk_bytes: dict[ChunkKind, int],
    ) -> None:
        for name, model in models.items():
            if model.sample_rate != SAMPLE_RATE:
                raise InputError(f"model {name!r} works at {model.sample_rate} Hz: only {SAMPLE_RATE} Hz is supported")
        self.models = models
        self.device = device
        self.batch_size = batch_size
        self._chunk_bytes = chunk_bytes
        self.plans = {name: _plan(model, chunk_seconds, overlap_seconds) for name, model in models.items()}

    @property
    def stems(self) -> tuple[str, ...]:
        """The stems that come out, in order."""
        return (self.two_stems, f"no_{self.two_stems}") if self.two_stems else self.recipe.stems

    def separate(self, mixture: Tensor, *, progress: Progress | None = None) -> dict[str, Tensor]:
        """A song in memory, `[2, T]` at 44100 Hz, to its stems, each `[2, T]` float32 on the CPU.

        Raises InputError for another shape and AudioError for NaN, Inf or no samples.
        """
        if mixture.ndim != 2 or mixture.shape[0] != 2:
            raise InputError(f"the mixture must be a tensor of shape [2, T], not {list(mixture.shape)}")
        if mixture.shape[1] == 0:
            raise AudioError("the mixture has no samples")
        mixture = mixture.detach().to("cpu", torch.float32)
        if not torch.isfinite(mixture).all():
            first = int((~torch.isfinite(mixture)).any(dim=0).nonzero()[0])
            raise AudioError(f"the mixture holds NaN or Inf at sample {first}")
        mono = mixture.double().mean(dim=0)
        song = Mixture(
            lambda start, stop: mixture[:, start:stop],
            mixture.shape[1],
            float(mixture.abs().max()),
            float(mono.mean()),
            float(mono.std()) if mixture.shape[1] > 1 else 0.0,
        )
        blocks: dict[str, list[Tensor]] = {stem: [] for stem in self.recipe.stems if stem != self.recipe.residual}
        for stem, block in self._estimates(song, progress):
            blocks[stem].append(block)
        stems = {stem: torch.cat(parts, dim=-1) for stem, parts in blocks.items()}
        if self.recipe.residual:
            stems[self.recipe.residual] = mixture - sum(stems.values())
        if self.two_stems:
            stems[f"no_{self.two_stems}"] = mixture - stems[self.two_stems]
        if progress:
            progress(1.0, "done")
        return {stem: stems[stem] for stem in self.stems}

    def separate_file(
        self,
        path: Path | str,
        folder: Path | str,
        *,
        format: str = "wav",
        sample_rate: int = SAMPLE_RATE,
        mp3_bitrate: int = 320,
        max_seconds: float | None = None,
        progress: Progress | None = None,
    ) -> StemFiles:
        """A song's file to one file a stem in `folder` (made if needed), named `<stem>.<format>`; returns their paths.

        WAV is 32-bit float, FLAC 24 bit, MP3 `mp3_bitrate` kbit/s. FLAC and MP3 cannot hold samples beyond full scale:
        if any stem has such, all stems of the song are scaled by one gain, and a warning is logged.
        Memory does not grow with the song. A run that fails or is cancelled leaves no file behind.

        Raises:
            InputError: a format, rate or bitrate that is not offered, or a folder where a stem would replace the song.
            AudioError: the file cannot be read as audio, or holds more than `max_seconds` of it.
            EstimateError: a model gave NaN or Inf.
            OutputError: the stems cannot be written.
        """
        started = time.monotonic()
        check_output(format, sample_rate, mp3_bitrate)
        if sample_rate not in SAMPLE_RATES:
            raise InputError(f"sample rate {sample_rate} is not offered: choose {' or '.join(map(str, SAMPLE_RATES))}")
        path = Path(path)
        parts = {stem: f"{stem}.{format}" for stem in self.stems}
        with OutputFolder(Path(folder)) as output, ExitStack() as stack:
            output.check_targets(list(parts.values()), path)
            mixture = stack.enter_context(
                decode(path, output.work, max_seconds=max_seconds, progress=_decoding(progress))
            )
            stems = {stem: stack.enter_context(Waveform(output.work)) for stem in self.recipe.stems}
            song = Mixture(mixture.read, mixture.n_samples, mixture.peak, mixture.mean, mixture.std)
            for stem, block in self._estimates(song, part_of(progress, DECODED, ESTIMATED)):
                stems[stem].append(block)
            if self.recipe.residual:
                _write_residual(mixture, stems, self.recipe.residual)
            if self.two_stems:
                rest = f"no_{self.two_stems}"
                stems = {self.two_stems: stems[self.two_stems], rest: stack.enter_context(Waveform(output.work))}
                _write_residual(mixture, stems, rest)
            if sample_rate != SAMPLE_RATE:
                stems = {
                    stem: stack.enter_context(resample(wave, sample_rate, output.work)) for stem, wave in stems.items()
                }
            gain = 1.0 if format == "wav" else _gain(stems)
            for wave in stems.values():
                wave.tags = mixture.tags
            encoded = {stem: output.work / name for stem, name in parts.items()}

            def writing(done: int, stem: str) -> None:
                if progress:
                    progress(ESTIMATED + (1 - ESTIMATED) * done / len(stems), f"writing {stem}")

            encode_all(stems, encoded, gain=gain, mp3_bitrate=mp3_bitrate, progress=writing)
            if progress:
                progress(1.0, "done")  # the last moment to cancel
            files = StemFiles(output.publish(encoded))
            files.duration_seconds, files.gain = mixture.n_samples / SAMPLE_RATE, gain
            files.elapsed_seconds = time.monotonic() - started
            return files

    def _estimates(self, song: Mixture, progress: Progress | None) -> Iterator[tuple[str, Tensor]]:
        """Runs each model over the song; yields (stem, finished block `[2, n]`), each stem's blocks in order."""
        counts = {name: len(plan.starts(song.n_samples)) for name, plan in self.plans.items()}
        total, before = sum(counts.values()), 0
        for name, model in self.models.items():
            offset, scale = song.normalisation(model)
            stereo_model = model if model.channels == 2 else _mono_on_stereo(model)
            blocks = separate(
                stereo_model,
                song.read,
                song.n_samples,
                self.plans[name],
                n_stems=len(model.stems),
                batch_size=self._batch_size((name, model.stems, self.plans[name].chunk_samples), stereo_model),
                device=self.device,
                offset=offset,
                scale=scale,
                progress=_within(progress, before, total, name),
            )
            wanted = {stem: model.stems.index(stem) for stem in self.recipe.models[name]}
            for block in blocks:
                yield from ((stem, block[index]) for stem, index in wanted.items())
            before += counts[name]

    def _batch_size(self, kind: ChunkKind, model: Model) -> int:
        """Chunks of that kind to compute at once."""
        if self.batch_size != "auto":
            return self.batch_size
        if self.device.type != "cuda":
            return 1 if self.device.type == "cpu" else 4
        if kind not in self._chunk_bytes:
            self._chunk_bytes[kind] = chunk_memory_bytes(model, 2, kind[-1], self.device)
        batch_size = fitting_batch_size(self._chunk_bytes[kind], self.device)
        logger.info("%s: %d chunks at once, of %.0f MiB each", kind[0], batch_size, self._chunk_bytes[kind] / 2**20)
        return batch_size


def _check_options(chunk_seconds: int, overlap_seconds: int, batch_size: int | str) -> None:
    for name, value, allowed in (
        ("chunk size", chunk_seconds, CHUNK_SECONDS),
        ("overlap", overlap_seconds, OVERLAP_SECONDS),
    ):
        if not isinstance(value, int) or value not in allowed:
            choose = f"choose whole seconds from {allowed[0]} to {allowed[-1]}"
            raise InputError(f"{name} {value} s is not offered: {choose}")
    if overlap_seconds >= chunk_seconds:
        raise InputError(
            f"overlap ({overlap_seconds} s) must be smaller than the chunk size ({chunk_seconds} s): "
            f"choose an overlap of {chunk_seconds - 1} s or less"
        )
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch size {batch_size!r} must be auto or a whole number from 1 up")


def _plan(model: SeparationModel, chunk_seconds: int, overlap_seconds: int) -> ChunkPlan:
    chunk_samples = model.chunk_samples if model.fixed_chunk else chunk_seconds * model.sample_rate
    overlap_samples = chunk_samples * overlap_seconds // chunk_seconds
    return ChunkPlan(chunk_samples, overlap_samples, model.reflects_border)


def _mono_on_stereo(model: SeparationModel) -> Callable[[Tensor], Tensor]:
    """A mono model over both channels: `[B, 2, T]` to `[B, S, 2, T]`."""

    def apply(chunks: Tensor) -> Tensor:
        estimates = model(chunks.reshape(-1, 1, chunks.shape[-1]))  # [B * 2, S, 1, T]
        return estimates.unflatten(0, (-1, 2)).squeeze(3).transpose(1, 2)

    return apply


def part_of(progress: Progress | None, start: float, stop: float) -> Progress | None:
    """The progress of a part of the job, which begins and ends at these shares of the whole."""
    return (lambda share, stage: progress(start + (stop - start) * share, stage)) if progress else None


def _decoding(progress: Progress | None) -> Callable[[float], None] | None:
    return (lambda share: progress(DECODED * share, "decoding")) if progress else None


def _within(progress: Progress | None, before: int, total: int, stage: str) -> Callable[[int, int], None] | None:
    """One model's progress in chunks as a share of all models'."""
    return (lambda done, _: progress((before + done) / total, stage)) if progress else None


def _gain(stems: dict[str, Waveform]) -> float:
    """What to scale all stems by so that none exceeds full scale; says so if that is not 1."""
    peak = max(wave.peak for wave in stems.values())
    if peak <= 1.0:
        return 1.0
    logger.warning(
        "a stem peaks at %.2f, beyond full scale: all stems are scaled by %.3f so that none clips", peak, 1 / peak
    )
    return 1 / peak


def _write_residual(mixture: Waveform, stems: dict[str, Waveform], residual: str) -> None:
    block = 10 * SAMPLE_RATE
    for start in range(0, mixture.n_samples, block):
        stop = min(start + block, mixture.n_samples)
        others = [wave.read(start, stop) for stem, wave in stems.items() if stem != residual]
        stems[residual].append(mixture.read(start, stop) - sum(others))
