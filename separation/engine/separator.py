"""Separator: a recipe, its models and a mixture -> stems."""

import copy
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from separation.audio.decode import decode
from separation.audio.encode import check_rate, is_rf64
from separation.audio.options import OutputOptions
from separation.audio.resample import resampled, resampled_length
from separation.audio.waveform import MAX_SAMPLE, SAMPLE_RATE, StoredSamples, Waveform, sample_fault
from separation.checkpoints.chunk_choice import ChunkChoice
from separation.device import identity
from separation.engine.about_song import about_song
from separation.engine.cache import Cache, engine_version
from separation.engine.chunk_plan import ChunkPlan
from separation.engine.chunking import Level, ReadyModel, separate
from separation.engine.compute_thread import compute_thread
from separation.engine.encoders import Encoders
from separation.engine.gpu_models import on_stereo
from separation.engine.options import EngineOptions
from separation.engine.pool import LoadedModels, ModelPool, Models
from separation.engine.recipes import Estimate, Recipe, load_recipe, one_model
from separation.engine.song import Find, Keep, Samples, Song, Wave
from separation.errors import AudioError, CheckpointError, InputError
from separation.models.base import SeparationModel
from separation.progress import Progress, Report
from separation.system.memory import enough_memory
from separation.system.output import OutputFolder
from separation.system.text import shown

DECODED, ESTIMATED = 0.05, 0.9  # shares of a file's job that are done after decoding and after the models
PEAK = 0.9  # what a mixture's peak is scaled to before a model that was trained on such audio

logger = logging.getLogger("separation")


class StemFiles(dict[str, Path]):
    """The paths of a song's stems, by stem and in order.

    Attributes:
        duration_seconds: the song's length.
        elapsed_seconds: how long it took from the song's file to the stems' files.
        gain: what all stems were scaled by; 1 unless FLAC, MP3 or integer WAV would have clipped.
    """

    def __init__(
        self, paths: Mapping[str, Path], *, duration_seconds: float, elapsed_seconds: float, gain: float
    ) -> None:
        super().__init__(paths)
        self.duration_seconds = duration_seconds
        self.elapsed_seconds = elapsed_seconds
        self.gain = gain

    @property
    def times_realtime(self) -> float:
        """Seconds of the song separated in a second."""
        return self.duration_seconds / self.elapsed_seconds


class Separator:
    """Splits songs into the stems of a recipe.

    Args:
        recipe: a recipe's name (a folder of configs/recipes), or a recipe that is loaded already.
        stems: one of the recipe's choices, e.g. `vocals_instrumental`, `all_4`, `all_6`.
        two_stems: a stem, e.g. `drums`, to return only that and `no_drums`, the mixture minus it. It comes from `stems`
            or, if that has no such stem, from the first choice that has. Only the models that it needs are loaded.
        options: what the models run on and how; see `EngineOptions`.
        pool: loaded models to share between separators; it decides device, precision and attention.
        cache: where `separate_file` keeps estimates and looks them up; None turns caching off.

    Raises:
        InputError, RecipeError: an option cannot be used.
        CheckpointError: a checkpoint is missing or wrong.
    """

    def __init__(
        self,
        recipe: str | Recipe = "standard",
        stems: str = "vocals_instrumental",
        *,
        two_stems: str | None = None,
        options: EngineOptions = EngineOptions(),
        pool: Models | None = None,
        cache: Cache | None = None,
    ) -> None:
        if isinstance(recipe, str):
            recipe = load_recipe(recipe, stems, two_stems=two_stems)
        elif stems != "vocals_instrumental":
            raise InputError(f"stems {stems!r} mean nothing beside a loaded recipe: leave them out")
        elif two_stems is not None:
            recipe = recipe.two_stems(two_stems)
        for name in ("device", "precision", "attention"):
            value = getattr(options, name)
            if pool is not None and value != "auto":
                raise InputError(f"{name} {value!r} means nothing beside a pool, which has its own: leave one out")
        pool = pool or ModelPool(options)
        self.recipe = recipe
        self.models = {name: pool.get(name, wanted) for name, wanted in recipe.models.items()}
        for name, model in self.models.items():
            if model.sample_rate != SAMPLE_RATE:
                raise InputError(f"model {name!r} works at {model.sample_rate} Hz: only {SAMPLE_RATE} Hz is supported")
        self.plans = {name: _plan(model, options.chunks) for name, model in self.models.items()}
        self.device = pool.device
        self.batch_size = options.batch_size
        self.cache = cache
        self._on_gpu = pool.on_gpu
        # Songs may be separated in several threads; a model runs for one at a time. On a CUDA GPU its compute thread
        # sees to that.
        self._turn = nullcontext() if self.device.type == "cuda" else threading.Lock()
        self._weights = {name: _checksums(name, model) for name, model in self.models.items()} if cache else {}

    @classmethod
    def from_model(
        cls,
        model: SeparationModel,
        *,
        two_stems: str | None = None,
        options: EngineOptions = EngineOptions(),
        cache: Cache | None = None,
    ) -> "Separator":
        """A separator whose stems are those of one loaded model, which decides device, precision and attention.

        With a `cache`, `load_model` must have made the model, and its files must not have changed since.
        """
        recipe = one_model(model.name, model.stems)
        return cls(recipe, two_stems=two_stems, options=options, pool=LoadedModels({model.name: model}), cache=cache)

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

    def separate(self, mixture: Tensor, *, progress: Report | None = None) -> dict[str, Tensor]:
        """A song in memory, `[2, T]` at 44100 Hz, to its stems, each `[2, T]` float32 on the CPU.

        `progress` is called with the share that is done, 0 to 1, and the stage; an exception that it raises cancels.

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
            song = Song(self.recipe, whole, lambda: Samples(whole.n_samples))
            stems = {stem: song.wave(parts) for stem, parts in self.recipe.outputs.items()}
            with song:
                self._run(song, Progress(progress))
                song.finish()
        Progress(progress)(1.0, "done")
        return {stem: samples.samples for stem, samples in stems.items()}

    def separate_file(
        self,
        path: Path | str,
        folder: Path | str,
        options: OutputOptions = OutputOptions(),
        *,
        max_seconds: float | None = None,
        accept_damaged: bool = False,
        progress: Report | None = None,
    ) -> StemFiles:
        """Separate a song's file into one file per stem, `<folder>/<stem>.<format>`; returns their paths.

        The folder is made if needed. WAV over 4 GB becomes RF64, and a warning is logged. At the song's own rate the
        stems have its number of samples. A stem's title is the song's title, or its file name, with the stem's name
        behind it, e.g. `Song (vocals)`; artist and album are the song's. Memory does not grow with the song's length.
        A run that fails or is cancelled leaves no file behind.

        Stems that this program wrote into the folder before are replaced; the record there, `.separation.json`, says
        which those are. Any other file of such a name is refused before any work, unless `options.overwrite`.

        Gaps in a damaged song are silent in the stems, and a warning says where they are. If more than a tenth of the
        song or an unknown amount is missing, the song is refused, unless `accept_damaged`.

        Args:
            path: a file that libsndfile or ffmpeg can read.
            folder: where the stems go.
            options: format, sample rate, bitrate and depth.
            max_seconds: the longest song to accept.
            accept_damaged: take what can be read of a damaged song.
            progress: called with the share that is done, 0 to 1, and the stage; an exception that it raises cancels.

        Raises:
            InputError: the format cannot have the sample rate, or a stem would replace the song.
            AudioError: the file cannot be read as audio, is damaged, or is longer than `max_seconds`.
            EstimateError: a model returned NaN or Inf, or needs more memory than there is.
            OutputError: the stems cannot be written, or files that this program did not write are in their place.
        """
        started = time.monotonic()
        path, reports = Path(path), Progress(progress)
        with ExitStack() as stack:
            stack.enter_context(about_song(path.name))
            output = stack.enter_context(OutputFolder(Path(folder), overwrite=options.overwrite))
            output.check_targets([f"{stem}.{options.format}" for stem in self.stems], path)
            mixture = stack.enter_context(
                decode(
                    path,
                    output.work,
                    max_seconds=max_seconds,
                    progress=reports.part(0, DECODED, "decoding"),
                    accept_damaged=accept_damaged,
                )
            )
            rate = mixture.source_rate if options.sample_rate == "source" else options.sample_rate
            check_rate(options.format, rate)
            find, keep = self._kept(mixture, path.name, stack)

            def new(sample_rate: int = SAMPLE_RATE, n_samples: int = mixture.n_samples) -> Waveform:
                return stack.enter_context(Waveform(output.work, sample_rate=sample_rate, total_samples=n_samples))

            song = Song(self.recipe, mixture, new, find)
            stems = self._stem_waves(song, mixture, rate, new)
            title = mixture.tags.get("title") or shown(path.stem)  # without one, players show the file's name
            tags = {stem: {**mixture.tags, "title": f"{title} ({stem})"} for stem in stems}
            if options.format == "wav" and is_rf64(next(iter(stems.values())), options):
                logger.warning("stems over 4 GB are too large for WAV: written as RF64, which not every program reads")
            encoded = {stem: output.work / f"{stem}.{options.format}" for stem in self.stems}
            with (
                Encoders(stems, encoded, tags, options) as encoders,
                song,  # leaves first, and ends what the encoders wait for
            ):

                def estimating(share: float, stage: str) -> None:
                    try:
                        encoders.check()
                    finally:
                        song.check()  # comes first: an encoder fails too if a sum that it waits for does
                    reports.part(DECODED, ESTIMATED)(share, stage)

                writing = reports.part(ESTIMATED, 1)
                self._run(song, Progress(estimating), keep)
                song.finish(lambda: writing(0, f"writing {self.stems[0]}"))
                gain = _gain(stems) if options.clips else 1.0
                encoders.finish(gain, writing)
            reports(1.0, "done")  # the last moment to cancel
            return StemFiles(
                output.publish(encoded),
                duration_seconds=mixture.n_samples / SAMPLE_RATE,
                elapsed_seconds=time.monotonic() - started,
                gain=gain,
            )

    def _stem_waves(
        self, song: Song[Waveform], mixture: Waveform, rate: int, new: Callable[..., Waveform]
    ) -> dict[str, Waveform]:
        """The stems at that rate, which grow as the models run."""
        if rate == SAMPLE_RATE:
            return {stem: song.wave(parts) for stem, parts in self.recipe.outputs.items()}
        length = resampled_length(mixture.n_samples, SAMPLE_RATE, rate)
        if rate == mixture.source_rate:  # rounding up twice may have made it longer
            length = min(length, mixture.source_samples)
        stems = {stem: new(rate, length) for stem in self.stems}
        for stem, parts in self.recipe.outputs.items():
            song.fill(stems[stem], parts, resampled(song.readable(parts), SAMPLE_RATE, rate, length))
        return stems

    def _run(self, song: "Song[Wave]", progress: Progress, keep: "Keep[Wave] | None" = None) -> None:
        """Does the song's runs; `keep` is given each estimate that is made."""
        runs = song.runs
        counts = [len(self.plans[run.model].starts(song.n_samples)) for run in runs]
        for index, (run, stems) in enumerate(runs.items()):
            model, plan = self.models[run.model].only(stems), self.plans[run.model]
            source = song.complete(run.input)
            level = _level(model, source)
            ready = self._ready(model, plan)
            part = progress.part(sum(counts[:index]) / sum(counts), sum(counts[: index + 1]) / sum(counts), run.model)
            with self._turn:
                for block in separate(ready, source, plan, level, part):
                    for stem in stems:
                        song.estimates[Estimate(run, stem)].append(block[model.stems.index(stem)])
            if keep:
                for stem in stems:
                    song.in_background(partial(keep, Estimate(run, stem), song.estimates[Estimate(run, stem)]))

    def _kept(
        self, mixture: Waveform, song: str, stack: ExitStack
    ) -> tuple["Find[Waveform] | None", "Keep[Waveform] | None"]:
        """`find` for `Song` and `keep` for `_run`, by the cache; None without one, or if it cannot hold the song."""
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
            stored = StoredSamples(kept.file, mixture.n_samples, kept.facts["statistics"])
            return stack.enter_context(Waveform(stored))

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

    def _ready(self, model: SeparationModel, plan: ChunkPlan) -> ReadyModel:
        """The model, ready to run over batches of chunks of that plan."""
        if self.device.type != "cuda":
            return ReadyModel(on_stereo(model), len(model.stems), self.fixed_batch_size or 1, self.device)
        samples = plan.whole_chunk_input_samples
        return compute_thread(self.device).run(self._on_gpu.get, model, samples, self.batch_size, self.device)


def _checksums(name: str, model: SeparationModel) -> dict[str, str]:
    """The checksums of a model's files, by part. Raises CheckpointError if a cache cannot identify the model."""
    if model.origin is None:
        raise CheckpointError(f"model {name!r} was not made by load_model: turn the cache off")
    return {part: checksum() for part, checksum in model.origin.weights.items()}


def _plan(model: SeparationModel, choice: ChunkChoice) -> ChunkPlan:
    chunk_samples, overlap_samples = choice.samples(
        model.name, model.chunk_samples, model.sample_rate, is_fixed=model.fixed_chunk
    )
    return ChunkPlan(chunk_samples, overlap_samples, model.reflects_border, model.input_samples)


def _level(model: SeparationModel, source: Samples | Waveform) -> Level:
    """How a model's input is shifted and scaled."""
    if model.normalisation == "none":
        return Level()
    if model.normalisation == "standard":
        return Level(offset=source.mean, scale=source.std + 1e-8)
    return Level(scale=source.peak / PEAK or 1.0)


def _gain(stems: dict[str, Waveform]) -> float:
    """What to scale all stems by so that none exceeds full scale; says so if that is not 1."""
    peak = max(wave.peak for wave in stems.values())
    if peak <= 1.0:
        return 1.0
    logger.warning(
        "a stem peaks at %.3g, beyond full scale: all stems are scaled by %.3g so that none clips", peak, 1 / peak
    )
    return 1 / peak
