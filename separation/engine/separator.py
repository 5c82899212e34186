"""Separator: a recipe, its models and a mixture -> stems."""

import copy
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from separation.audio.decode import decode
from separation.audio.encode import check_output, check_rate, clips, is_rf64
from separation.audio.resample import resampled, resampled_length
from separation.audio.waveform import MAX_SAMPLE, SAMPLE_RATE, Growing, Waveform, sample_fault
from separation.checkpoints.chunk_choice import ChunkChoice, Seconds
from separation.checkpoints.load import load_model
from separation.device import Choice, choose, identity, is_out_of_memory
from separation.engine.about_song import about_song
from separation.engine.cache import Cache, engine_version
from separation.engine.chunking import ChunkPlan, chunk_memory_bytes, does_not_fit, fitting_batch_size, halved, separate
from separation.engine.encoders import Encoders
from separation.engine.gpu import Model, captured, compute_thread
from separation.engine.recipes import Combination, Estimate, Recipe, load_recipe, one_model
from separation.errors import AudioError, CheckpointError, EstimateError, InputError
from separation.models import SeparationModel
from separation.system.memory import enough_memory
from separation.system.output import OutputFolder
from separation.system.text import shown
from separation.system.threads import Threads

SAMPLE_RATES: tuple[int | str, ...] = (44100, 48000, "source")
DECODED, ESTIMATED = 0.05, 0.9  # the share of a file's job, in the progress, that is done by then; the rest is writing
PEAK = 0.9  # what a mixture's peak is scaled to before a model that was trained on such audio
BLOCK_SAMPLES = 65536  # that are added up at once

logger = logging.getLogger("separation")

MAX_READY = 16  # models over one shape of batch that are kept ready on a GPU: each keeps a batch and its estimates

Progress = Callable[[float, str], None]  # (share of the whole job done, 0 to 1; stage); raise from it to cancel


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


class ModelPool:
    """Loaded models on one device in one precision, each loaded when first asked for.

    A model is loaded once; only a checkpoint made of specialists is loaded again when others of them are asked for.
    """

    def __init__(self, device: str = "auto", precision: str = "auto", attention: str = "auto") -> None:
        self.choice: Choice = choose(device, precision)
        if self.choice.device.type == "cuda":
            compute_thread(self.choice.device)  # settles how CUDA computes before anything is tried on it
        self.attention = attention
        self.load_seconds: dict[str, float] = {}  # how long each model took
        self.on_gpu = GpuModels()
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
                if name in self._models and self.choice.device.type == "cuda":
                    compute_thread(self.choice.device).run(self.on_gpu.forget, name)
                self._models[name] = loaded
            return loaded.only(stems)


class Samples(Growing):
    """What `Waveform` is in a file, in memory: `[2, T]` float32 at 44100 Hz, appended block by block."""

    def __init__(self, n_samples: int) -> None:
        super().__init__(n_samples)
        self.samples = torch.from_numpy(np.empty((2, n_samples), dtype=np.float32))  # numpy asks for huge pages

    @classmethod
    def of(cls, samples: Tensor) -> "Samples":
        """These samples on the CPU, without a copy where they are contiguous."""
        whole = cls(0)
        whole.samples = torch.from_numpy(np.ascontiguousarray(samples.numpy()))
        whole._total_samples = whole._there = samples.shape[1]
        return whole

    def append(self, block: Tensor) -> None:
        self.samples[:, self._there : self._there + block.shape[1]] = block
        self._grow(block.shape[1])

    def read(self, start: int, stop: int) -> Tensor:
        self._wait(stop)
        return self.samples[:, start:stop]

    @property
    def peak(self) -> float:
        lowest, highest = torch.aminmax(self.samples)
        return max(-float(lowest), float(highest))

    @property
    def mean(self) -> float:
        return float(self._mono().mean())

    @property
    def std(self) -> float:
        return float(self._mono().std(ddof=1)) if self.n_samples > 1 else 0.0

    def _mono(self) -> NDArray[np.float64]:
        # In numpy, for sums in torch depend on the number of threads.
        mono: NDArray[np.float64] = np.add(*self.samples.numpy(), dtype=np.float64)
        mono /= 2
        return mono


Wave = TypeVar("Wave", Samples, Waveform)
Find = Callable[[Estimate], Wave | None]  # an estimate that is there from before, if it is
Keep = Callable[[Estimate, Wave], None]


class _Sum(Generic[Wave]):
    """Waveforms added up, each times its weight, as they are read."""

    def __init__(self, parts: list[tuple[Wave, float]]) -> None:
        self._parts: list[tuple[Wave, float]] = parts
        self.n_samples = parts[0][0].n_samples

    def read(self, start: int, stop: int) -> Tensor:
        total = torch.zeros(2, stop - start)
        for wave, weight in self._parts:
            total.add_(wave.read(start, stop), alpha=weight)
        return total

    def blocks(self) -> Iterator[Tensor]:
        for start in range(0, self.n_samples, BLOCK_SAMPLES):
            yield self.read(start, min(start + BLOCK_SAMPLES, self.n_samples))


class _Song(Generic[Wave]):
    """The waveforms of a song: the mixture, what models estimate, and what is made of these.

    Inside the `with` block a thread makes what was asked for by `wave` and `fill`, and the inputs of runs, as the
    estimates come. An exception there closes all waveforms, so that who waits for more samples of one ends.

    Args:
        new: makes an empty waveform of the song's length.
        find: gives an estimate that is there from before, if it is.
    """

    def __init__(
        self, recipe: Recipe, mixture: Wave, new: Callable[[], Wave], find: "Find[Wave] | None" = None
    ) -> None:
        self.n_samples = mixture.n_samples
        self.estimates: dict[Estimate | None, Wave] = {None: mixture}
        self._new: Callable[[], Wave] = new
        self._sums: dict[Combination, Wave] = {}
        self._filled: list[tuple[int, Wave, Iterator[Tensor]]] = []  # by the number of the last run that is needed
        self._threads = Threads(max_workers=2)  # one makes sums, one does what is asked for
        self._filling: Future[None] | None = None
        self._jobs: list[Future[None]] = []

        def is_known(estimate: Estimate) -> bool:
            if find and (found := find(estimate)) is not None:
                self.estimates[estimate] = found
            return estimate in self.estimates

        self.runs = recipe.runs_without(is_known)
        self.estimates |= {Estimate(run, stem): new() for run, stems in self.runs.items() for stem in stems}
        for run in self.runs:
            self.wave(run.input)

    def wave(self, parts: Combination) -> Wave:
        """The sum, which the thread will make; or the one waveform that it is."""
        readable = self.readable(parts)
        if not isinstance(readable, _Sum):
            return readable
        if parts not in self._sums:
            self._sums[parts] = self._new()
            self.fill(self._sums[parts], parts, readable.blocks())
        return self._sums[parts]

    def readable(self, parts: Combination) -> "Wave | _Sum[Wave]":
        """The sum, added up anew whenever it is read; or the one waveform that it is."""
        if [weight for _, weight in parts] == [1.0]:
            return self.estimates[parts[0][0]]
        return _Sum([(self.estimates[estimate], weight) for estimate, weight in parts])

    def fill(self, wave: Wave, parts: Combination, blocks: Iterator[Tensor]) -> None:
        """Have the thread append blocks, which come of these estimates, to a waveform."""
        numbers = {run: number for number, run in enumerate(self.runs)}
        last = max((numbers.get(estimate.run, -1) for estimate, _ in parts if estimate), default=-1)
        self._filled.append((last, wave, blocks))

    def _fill(self) -> None:
        # Those that the same runs make grow together.
        for _, group in groupby(sorted(self._filled, key=itemgetter(0)), key=itemgetter(0)):
            for _ in zip_longest(*(_appending(wave, blocks) for _, wave, blocks in group)):
                pass

    def _filled_or_failed(self, filling: "Future[None]") -> None:
        """Once `check` knows the error, who waits for what will not come may end too."""
        if filling.exception():
            for _, wave, _ in self._filled:
                wave.close()

    def in_background(self, job: Callable[[], None]) -> None:
        self._jobs.append(self._threads.submit(job))

    def check(self) -> None:
        """Raise what a thread has failed with, if one has."""
        for job in (self._filling, *self._jobs):
            if job and job.done():
                job.result()

    def complete(self, parts: Combination) -> Wave:
        """The sum, once it is made."""
        wave = self.wave(parts)
        while not wave.is_complete(0.2):
            self.check()
        return wave

    def finish(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until all sums are made; `waiting` is called now and then: raise from it to cancel."""
        while self._filling and wait([self._filling], timeout=0.2).not_done:
            waiting()
        self.check()

    def __enter__(self) -> Self:
        if self._filled:
            self._filling = self._threads.submit(self._fill)
            self._filling.add_done_callback(self._filled_or_failed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        wait(self._jobs)  # what a run gave is kept, whatever comes after it
        if error is not None:
            for wave in (*self.estimates.values(), *(wave for _, wave, _ in self._filled)):
                wave.close()
        self._threads.shutdown()
        if error is None:
            self.check()


def _appending(wave: Wave, blocks: Iterator[Tensor]) -> Iterator[None]:
    for block in blocks:
        wave.append(block)
        yield


class StemFiles(dict[str, Path]):
    """The paths of a song's stems, by stem and in order, and what else is worth knowing of them."""

    duration_seconds: float  # of the song
    elapsed_seconds: float  # from the song's file to the stems' files
    gain: float  # that every stem was scaled by on writing; 1 unless FLAC, MP3 or integer WAV would have clipped

    @property
    def times_realtime(self) -> float:
        """Seconds of the song separated in a second."""
        return self.duration_seconds / self.elapsed_seconds


class Separator:
    """Splits songs into the stems of a recipe.

    Args:
        recipe: a folder of configs/recipes.
        stems: one of the recipe's choices, e.g. `vocals_instrumental`, `all_4`, `all_6`.
        two_stems: any stem, e.g. `drums`, to give that and `no_drums`, the mixture minus it: by `stems` or, where that
            has no such stem, by the first choice that has. Only the models that this needs are loaded and run.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        precision: `auto`, `fp32`, `bf16`, `fp16` or, on a CPU, `int8`, which is for the RoFormers.
        attention: `auto` or a backend's name in `separation.models.attention.NAMES`.
        batch_size: chunks computed at once, or `auto`: 1 on a CPU, 4 on an Apple GPU, and on a CUDA GPU 8 or as many as
            a third of its memory holds. There it never follows from what others have of the memory.
        chunk_seconds: 4 to 30, or `auto`: the length that each model was trained on. A model that takes only chunks of
            its own length (Demucs, MDX23C) keeps that length.
        overlap_seconds: 1 to 8, below the chunk's, or `auto`: half a chunk. Where `chunk_seconds` is a number, a model
            that keeps its own length overlaps its chunks by the same share.
        pool: models that are loaded already, to share between separators, in place of a device, precision and
            attention.
        cache: where `separate_file` keeps what models estimate, and looks before it runs them; None: nowhere.

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
        chunk_seconds: Seconds = "auto",
        overlap_seconds: Seconds = "auto",
        pool: ModelPool | None = None,
        cache: Cache | None = None,
    ) -> None:
        choice = ChunkChoice(chunk_seconds, overlap_seconds)
        _check_batch_size(batch_size)
        if isinstance(recipe, str):
            recipe = load_recipe(recipe, stems, two_stems=two_stems)
        elif stems != "vocals_instrumental":
            raise InputError(f"stems {stems!r} mean nothing beside a recipe that is loaded already: leave them out")
        elif two_stems is not None:
            recipe = recipe.two_stems(two_stems)
        for name, value in {"device": device, "precision": precision, "attention": attention}.items():
            if pool is not None and value != "auto":
                raise InputError(
                    f"{name} {value!r} means nothing beside a pool, which has its own: leave one of them out"
                )
        pool = pool or ModelPool(device, precision, attention)
        models = {name: pool.get(name, wanted) for name, wanted in recipe.models.items()}
        self._setup(recipe, models, pool.choice.device, batch_size, choice, pool.on_gpu)
        self._set_cache(cache)

    @classmethod
    def from_model(
        cls,
        model: SeparationModel,
        *,
        two_stems: str | None = None,
        batch_size: int | Literal["auto"] = "auto",
        chunk_seconds: Seconds = "auto",
        overlap_seconds: Seconds = "auto",
        cache: Cache | None = None,
    ) -> "Separator":
        """A separator whose stems are those of one loaded model; options as for the class.

        With a `cache`, `load_model` must have made the model, and its weights must be as they were.
        """
        choice = ChunkChoice(chunk_seconds, overlap_seconds)
        _check_batch_size(batch_size)
        recipe = one_model(model.name, model.stems)
        if two_stems is not None:
            recipe = recipe.two_stems(two_stems)
        separator = cls.__new__(cls)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))  # fused: none
        models = {model.name: model.only(recipe.models[model.name])}
        separator._setup(recipe, models, device, batch_size, choice, GpuModels())
        separator._set_cache(cache)
        return separator

    def _setup(
        self,
        recipe: Recipe,
        models: dict[str, SeparationModel],
        device: torch.device,
        batch_size: int | Literal["auto"],
        choice: ChunkChoice,
        on_gpu: GpuModels,
    ) -> None:
        for name, model in models.items():
            if model.sample_rate != SAMPLE_RATE:
                raise InputError(f"model {name!r} works at {model.sample_rate} Hz: only {SAMPLE_RATE} Hz is supported")
        self.recipe = recipe
        self.models = models
        self.device = device
        self.batch_size = batch_size
        self._on_gpu = on_gpu
        # Held while a model runs, for songs may be separated in several threads. On a CUDA GPU its thread sees to that.
        self._turn = nullcontext() if device.type == "cuda" else threading.Lock()
        self.plans = {name: _plan(model, choice) for name, model in models.items()}

    def _set_cache(self, cache: Cache | None) -> None:
        """Raises CheckpointError for a model that a cache could not tell from another."""
        self.cache = cache
        self._weights: dict[str, dict[str, str]] = {}  # the checksums of each model's files
        for name, model in self.models.items() if cache else ():
            if model.origin is None:
                raise CheckpointError(f"model {name!r} was not made by load_model: do without a cache")
            self._weights[name] = {part: checksum() for part, checksum in model.origin.weights.items()}

    @property
    def stems(self) -> tuple[str, ...]:
        """The stems that come out, in order."""
        return self.recipe.stems

    def warm_up(self) -> None:
        """Run each model over one chunk of noise: what is made once, the first song then does not wait for."""
        once = copy.copy(self)
        once.plans = {name: replace(plan, overlap_samples=0) for name, plan in self.plans.items()}
        samples = min(SAMPLE_RATE, *(plan.chunk_samples for plan in self.plans.values()))
        once.separate(torch.randn(2, samples, generator=torch.Generator().manual_seed(0)) * 0.1)

    def separate(self, mixture: Tensor, *, progress: Progress | None = None) -> dict[str, Tensor]:
        """A song in memory, `[2, T]` at 44100 Hz, to its stems, each `[2, T]` float32 on the CPU.

        Raises InputError for another shape, AudioError for NaN, Inf, samples beyond MAX_SAMPLE or no samples, and
        EstimateError for a model that gave NaN or Inf or needs more memory than there is.
        """
        if mixture.ndim != 2 or mixture.shape[0] != 2:
            raise InputError(f"the mixture must be a tensor of shape [2, T], not {list(mixture.shape)}")
        if mixture.shape[1] == 0:
            raise AudioError("the mixture has no samples")
        whole = Samples.of(mixture.detach().to("cpu", torch.float32))
        if not whole.peak <= MAX_SAMPLE:  # which NaN is not
            faulty = ~(whole.samples.abs() <= MAX_SAMPLE)
            first = int(faulty.any(dim=0).nonzero()[0])
            fault = sample_fault(float(whole.samples[:, first][faulty[:, first]][0]))
            raise AudioError(f"the mixture holds {fault} at sample {first}")
        with enough_memory("the mixture"):
            song = _Song(self.recipe, whole, lambda: Samples(whole.n_samples))
            stems = {stem: song.wave(parts) for stem, parts in self.recipe.outputs.items()}
            with song:
                self._run(song, progress)
                song.finish()
        if progress:
            progress(1.0, "done")
        return {stem: samples.samples for stem, samples in stems.items()}

    def separate_file(
        self,
        path: Path | str,
        folder: Path | str,
        *,
        format: str = "wav",
        sample_rate: int | Literal["source"] = SAMPLE_RATE,
        mp3_bitrate: int | None = None,
        wav_depth: str | None = None,
        flac_depth: str | None = None,
        max_seconds: float | None = None,
        overwrite: bool = False,
        accept_damaged: bool = False,
        progress: Progress | None = None,
    ) -> StemFiles:
        """A song's file to one file a stem in `folder` (made if needed), named `<stem>.<format>`; returns their paths.

        WAV has `wav_depth` bits (`16`, dithered, `24`, or by default the floats of `32f`), FLAC `flac_depth` (`16`,
        dithered, or by default `24`), MP3 `mp3_bitrate` kbit/s (by default 320); one that is not the format's is an
        error. Only floats can go beyond full scale: elsewhere, if any stem does, all stems of the song are scaled by
        one gain, and a warning is logged. WAV over 4 GB becomes RF64, with a warning too. At the rate of the song's
        file, which `source` always is, the stems have its number of samples. Their title is the song's, or else its
        file's name, with the stem's behind it, as in `Song (vocals)`; artist and album are the song's.
        Memory does not grow with the song. A run that fails or is cancelled leaves no file behind.

        Stems that this program wrote into the folder before are replaced; its record there, `.separation.json`, says
        which they are. Any other file of such a name is refused before any work, unless `overwrite`.

        What a damaged song lacks is silent in the stems, and a warning says where. If more than a tenth is missing, or
        nobody knows how much, the song is refused, unless `accept_damaged`.

        Raises:
            InputError: a format, rate, bitrate or depth that is not offered, or a stem would replace the song.
            AudioError: the file cannot be read as audio, is damaged, or holds more than `max_seconds` of it.
            EstimateError: a model gave NaN or Inf, or needs more memory than there is.
            OutputError: the stems cannot be written, or a file that this program did not write is in their place.
        """
        started = time.monotonic()
        check_output(format, mp3_bitrate, wav_depth, flac_depth)
        if sample_rate not in SAMPLE_RATES:
            raise InputError(f"sample rate {sample_rate} is not offered: choose {' or '.join(map(str, SAMPLE_RATES))}")
        path = Path(path)
        with ExitStack() as stack:
            stack.enter_context(about_song(path.name))
            output = stack.enter_context(OutputFolder(Path(folder), overwrite=overwrite))
            output.check_targets([f"{stem}.{format}" for stem in self.stems], path)
            mixture = stack.enter_context(
                decode(
                    path,
                    output.work,
                    max_seconds=max_seconds,
                    progress=_decoding(progress),
                    accept_damaged=accept_damaged,
                )
            )
            rate = mixture.source_rate if sample_rate == "source" else int(sample_rate)
            check_rate(format, rate)
            find, keep = self._kept(mixture, path.name, stack)

            def new(sample_rate: int = SAMPLE_RATE, n_samples: int = mixture.n_samples) -> Waveform:
                return stack.enter_context(Waveform(output.work, sample_rate=sample_rate, total_samples=n_samples))

            song = _Song(self.recipe, mixture, new, find)
            if rate == SAMPLE_RATE:
                stems = {stem: song.wave(parts) for stem, parts in self.recipe.outputs.items()}
            else:
                length = resampled_length(mixture.n_samples, SAMPLE_RATE, rate)
                if rate == mixture.source_rate:  # rounding up twice may have made it longer
                    length = min(length, mixture.source_samples)
                stems = {stem: new(rate, length) for stem in self.stems}
                for stem, parts in self.recipe.outputs.items():
                    song.fill(stems[stem], parts, resampled(song.readable(parts), SAMPLE_RATE, rate, length))
            title = mixture.tags.get("title") or shown(path.stem)  # without one, players show the file's name
            for stem, wave in stems.items():
                wave.tags = {**mixture.tags, "title": f"{title} ({stem})"}
            if format == "wav" and is_rf64(wave, wav_depth):
                logger.warning(
                    "more than 4 GB a stem, too much for WAV: written as RF64, which not every program reads"
                )
            encoded = {stem: output.work / f"{stem}.{format}" for stem in self.stems}
            clipping = clips(format, wav_depth)

            def estimating(share: float, stage: str) -> None:
                try:
                    encoders.check()
                finally:
                    song.check()  # goes first, for an encoder fails too when a sum that it waits for does
                if progress:
                    progress(DECODED + (ESTIMATED - DECODED) * share, stage)

            def writing(done: int, stem: str) -> None:
                if progress:
                    progress(ESTIMATED + (1 - ESTIMATED) * done / len(stems), f"writing {stem}")

            with (
                Encoders(
                    stems,
                    encoded,
                    clips=clipping,
                    mp3_bitrate=mp3_bitrate,
                    wav_depth=wav_depth,
                    flac_depth=flac_depth,
                ) as encoders,
                song,  # leaves first, and ends what the encoders wait for
            ):
                self._run(song, estimating, keep)
                song.finish(lambda: writing(0, self.stems[0]))
                gain = _gain(stems) if clipping else 1.0
                encoders.finish(gain, writing)
            if progress:
                progress(1.0, "done")  # the last moment to cancel
            files = StemFiles(output.publish(encoded))
            files.duration_seconds, files.gain = mixture.n_samples / SAMPLE_RATE, gain
            files.elapsed_seconds = time.monotonic() - started
            return files

    def _run(self, song: "_Song[Wave]", progress: Progress | None, keep: "Keep[Wave] | None" = None) -> None:
        """Does the song's runs; `keep` is given each estimate that is made."""
        runs = song.runs
        counts = [len(self.plans[run.model].starts(song.n_samples)) for run in runs]
        for index, (run, stems) in enumerate(runs.items()):
            model, plan = self.models[run.model].only(stems), self.plans[run.model]
            source = song.complete(run.input)
            offset, scale = _normalisation(model, source)
            ready = self._ready(model, plan)
            may_overflow = self.device.type == "cuda" and model.is_half
            with self._turn:
                for block in separate(
                    ready.model,
                    source.read,
                    source.n_samples,
                    plan,
                    n_stems=len(model.stems),
                    batch_size=ready.batch_size,
                    device=self.device,
                    offset=offset,
                    scale=scale,
                    spare=partial(self._on_gpu.spare, model) if may_overflow else None,
                    progress=_within(progress, sum(counts[:index]), sum(counts), run.model),
                ):
                    for stem in stems:
                        song.estimates[Estimate(run, stem)].append(block[model.stems.index(stem)])
            if keep:
                for stem in stems:
                    song.in_background(partial(keep, Estimate(run, stem), song.estimates[Estimate(run, stem)]))

    def _kept(
        self, mixture: Waveform, song: str, stack: ExitStack
    ) -> tuple["Find[Waveform] | None", "Keep[Waveform] | None"]:
        """`find` for `_Song` and `keep` for `_run`, by the cache; None without one, or if it cannot hold the song."""
        cache, n_bytes = self.cache, mixture.n_samples * mixture.channels * 4
        if cache is None or n_bytes * sum(map(len, self.recipe.runs.values())) > cache.limit_bytes:
            return None, None
        checksum = hashlib.sha256()
        for block in mixture.raw():
            checksum.update(block)
        # The last digit of these two depends on the blocks that the song was decoded in, and estimates on that digit.
        identity = {"sha256": checksum.hexdigest(), "mean": mixture.mean, "std": mixture.std}

        def find(estimate: Estimate) -> Waveform | None:
            kept = cache.get(self._settings(estimate, identity))
            if kept is None:
                return None
            logger.info(f"{estimate.stem} by {estimate.run.model}: from the cache")
            return stack.enter_context(Waveform.kept(kept.file, mixture.n_samples, kept.facts["statistics"]))

        def keep(estimate: Estimate, wave: Waveform) -> None:
            facts = {"song": song, "seconds": mixture.n_samples / SAMPLE_RATE, "model": estimate.run.model}
            cache.put(self._settings(estimate, identity), wave.raw(), n_bytes, {**facts, "statistics": wave.statistics})

        return find, keep

    def _settings(self, estimate: Estimate, mixture: Mapping[str, Any]) -> dict[str, Any]:
        """All that the samples of an estimate depend on."""
        run, stem = estimate
        model, plan, weights = self.models[run.model], self.plans[run.model], self._weights[run.model]
        assert model.origin is not None
        return {
            "engine": engine_version(),
            "stem": stem,
            "architecture": model.origin.architecture,
            "hyper_parameters": model.origin.hyper_parameters,
            "stems": model.origin.stems,
            # Which stems are computed beside this one changes nothing: of specialists, the others do not matter.
            "weights": [weights[stem]] if stem in weights else list(weights.values()),
            "normalisation": model.normalisation,
            "precision": str(model.precision).removeprefix("torch."),
            "attention": model.attention,
            "device": identity(self.device),
            "batch_size": self.fixed_batch_size or "auto",  # by the rounding of matrix products
            "chunk_samples": plan.chunk_samples,
            "overlap_samples": plan.overlap_samples,
            "input": [(weight, self._settings(part, mixture) if part else dict(mixture)) for part, weight in run.input],
        }

    @property
    def fixed_batch_size(self) -> int | None:
        """Chunks that are computed at once, where that does not depend on a GPU's memory."""
        if self.batch_size != "auto":
            return self.batch_size
        return {"cpu": 1, "mps": 4}.get(self.device.type)

    def _ready(self, model: SeparationModel, plan: ChunkPlan) -> Ready:
        """The model ready to run over batches of chunks of that plan."""
        if self.device.type != "cuda":
            return Ready(on_stereo(model), self.fixed_batch_size or 1)
        samples = plan.input_samples(plan.chunk_samples) or plan.chunk_samples
        return compute_thread(self.device).run(self._on_gpu.get, model, samples, self.batch_size, self.device)


def _check_batch_size(batch_size: int | str) -> None:
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch size {batch_size!r} must be auto or a whole number from 1 up")


def _plan(model: SeparationModel, choice: ChunkChoice) -> ChunkPlan:
    chunk_samples, overlap_samples = choice.samples(
        model.name, model.chunk_samples, model.sample_rate, is_fixed=model.fixed_chunk
    )
    return ChunkPlan(chunk_samples, overlap_samples, model.reflects_border, model.input_samples)


def _normalisation(model: SeparationModel, source: Samples | Waveform) -> tuple[float, float]:
    """(offset, scale) such that the model sees (source - offset) / scale."""
    if model.normalisation == "none":
        return 0.0, 1.0
    return (source.mean, source.std + 1e-8) if model.normalisation == "standard" else (0.0, source.peak / PEAK or 1.0)


def on_stereo(model: SeparationModel) -> Model:
    """The model over two channels, `[B, 2, T]` to `[B, S, 2, T]`; a mono model over each of them."""
    if model.channels == 2:
        return model

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
    """One run's progress in chunks as a share of all runs'."""
    return (lambda done, _: progress((before + done) / total, stage)) if progress else None


def _gain(stems: dict[str, Waveform]) -> float:
    """What to scale all stems by so that none exceeds full scale; says so if that is not 1."""
    peak = max(wave.peak for wave in stems.values())
    if peak <= 1.0:
        return 1.0
    logger.warning(
        "a stem peaks at %.3g, beyond full scale: all stems are scaled by %.3g so that none clips", peak, 1 / peak
    )
    return 1 / peak
