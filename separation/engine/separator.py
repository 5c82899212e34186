"""Separates songs: a recipe, its models and a mixture in, stems out."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from separation.analysis.facts import SongAnalysis
from separation.analysis.song import analyse
from separation.audio.beside import PROJECT, VIDEO, names_beside, stems_in
from separation.audio.decode import decode
from separation.audio.encode import check_rate, is_rf64
from separation.audio.excerpt import Excerpt
from separation.audio.ffmpeg_writer import check_installed
from separation.audio.metadata import Metadata, read_metadata, tags_for
from separation.audio.options import SNDFILE_FORMATS, STEM_FILE, OutputOptions
from separation.audio.reaper import Project
from separation.audio.resample import resampled, resampled_length
from separation.audio.stem_file import MIXTURE_TRACK, tracks_of, write_stem_file
from separation.audio.video import check_picture, write_video
from separation.audio.waveform import MAX_SAMPLE, SAMPLE_RATE, Waveform, in_blocks, sample_fault
from separation.engine.cache import Cache
from separation.engine.cached_estimates import CachedEstimates, EstimateSettings, n_bytes
from separation.engine.chunk_plan import ChunkPlan, Span
from separation.engine.encoders import Encoders
from separation.engine.model_runner import ModelRunner
from separation.engine.options import EngineOptions
from separation.engine.parts import excerpt
from separation.engine.pool import LoadedModels, ModelPool, Models
from separation.engine.recipes import MIXTURE, Combination, Recipe, find_recipe, models_of_files, one_model
from separation.engine.song_context import song_context
from separation.engine.song_waveforms import Samples, SongWaveforms
from separation.errors import AudioError, InputError
from separation.models.base import SeparationModel
from separation.progress import Progress, Report
from separation.system.memory import enough_memory
from separation.system.names import Place, song_fields
from separation.system.os_errors import output_errors
from separation.system.output import OutputFolder
from separation.system.text import shown

SEPARATED = 0.8  # share of a file's job, if an analysis follows
DECODED, ESTIMATED = 0.05, 0.9  # the shares of a file's job that are done after decoding and after the models
DECODING = "decoding"  # the stage before the models

logger: logging.Logger = logging.getLogger("separation")


class StemFiles(dict[str, Path]):
    """The paths of a song's stems by name, in order.

    Attributes:
        duration_seconds: the length of the song, or of its part.
        elapsed_seconds: how long decoding, separating and encoding took.
        gain: what all stems were multiplied by; 1 unless FLAC, MP3 or integer WAV would have clipped.
        analysis: tempo, key and loudness, if the files' names hold the tempo or the key.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        *,
        duration_seconds: float,
        elapsed_seconds: float,
        gain: float,
        analysis: SongAnalysis | None = None,
    ) -> None:
        super().__init__(paths)
        self.duration_seconds: float = duration_seconds
        self.elapsed_seconds: float = elapsed_seconds
        self.gain: float = gain
        self.analysis: SongAnalysis | None = analysis

    @property
    def times_realtime(self) -> float:
        """Seconds of music separated per second."""
        return self.duration_seconds / self.elapsed_seconds


class Separator:
    """Splits songs into the stems of a recipe. Several threads may use one separator.

    Args:
        recipe: the name of a recipe in configs/recipes, the path of a YAML file, or a recipe that is already loaded.
        stems: one of the recipe's choices, such as `all_4` or `all_6`; None for `vocals_instrumental`, or for the
            recipe's first choice if it does not have that.
        two_stems: a stem such as `drums`, to return only that stem and `no_drums`, the mixture minus it. The stem is
            taken from the choice `stems` or, if that has no such stem, from the recipe's first choice that does. Only
            the models that it needs are loaded.
        options: what the models run on and how; see `EngineOptions`.
        pool: loaded models to share between separators; it decides device, precision and attention.
        cache: where `separate_file` looks up and stores estimates; None turns caching off.

    Attributes:
        recipe: which models give which stems.
        runner: runs the models.

    Raises:
        InputError, RecipeError: an option cannot be used.
        CheckpointError: a checkpoint is missing or wrong.
    """

    def __init__(
        self,
        recipe: str | Recipe = "standard",
        stems: str | None = None,
        *,
        two_stems: str | None = None,
        options: EngineOptions = EngineOptions(),
        pool: Models | None = None,
        cache: Cache | None = None,
    ) -> None:
        if pool is not None:
            _check_options_beside_pool(options)
        self.recipe: Recipe = _recipe(recipe, stems, two_stems)
        self.runner: ModelRunner = ModelRunner(self.recipe, pool or ModelPool(options), options)
        _check_parts(self.models, two_stems)
        self._cache = cache
        batch_size = self.runner.fixed_batch_size
        self._settings = EstimateSettings(self.models, self.plans, self.device, batch_size) if cache else None

    @classmethod
    def from_model(
        cls,
        model: SeparationModel,
        *,
        two_stems: str | None = None,
        only: str | None = None,
        options: EngineOptions = EngineOptions(),
        cache: Cache | None = None,
    ) -> "Separator":
        """A separator for one loaded model, which decides device, precision and attention.

        Its stems are the model's, and the mixture minus them if the model's YAML names that: `residual: instrumental`.
        With `only`, it gives that stem alone.

        A `cache` needs a model from `load_model` whose files have not changed since.

        Raises InputError for an option that cannot be used, and RecipeError for a stem that the model does not have.
        """
        recipe = one_model(model.name, model.stems, model.residual)
        recipe = recipe if only is None else recipe.only(only)
        return cls(recipe, two_stems=two_stems, options=options, pool=LoadedModels({model.name: model}), cache=cache)

    @property
    def stems(self) -> tuple[str, ...]:
        """The names of the stems, in order."""
        return self.recipe.stems

    @property
    def models(self) -> Mapping[str, SeparationModel]:
        """The models, by name."""
        return self.runner.models

    @property
    def plans(self) -> Mapping[str, ChunkPlan]:
        """How a song is cut for each model."""
        return self.runner.plans

    @property
    def device(self) -> torch.device:
        """What the models run on."""
        return self.runner.device

    def warm_up(self) -> None:
        """Run each model over a chunk of noise, so that the first song does not wait for one-time setup."""
        self.runner.warm_up()

    def separate(self, mixture: Tensor, *, progress: Report | None = None) -> dict[str, Tensor]:
        """Separate a song in memory.

        Args:
            mixture: `[2, T]` at 44100 Hz.
            progress: called with the share that is done, 0 to 1, and the stage; an exception that it raises cancels.

        Returns:
            The stems by name, each `[2, T]` float32 on the CPU.

        Raises:
            InputError: the mixture has another shape.
            AudioError: the mixture has no samples, or NaN, Inf or samples beyond MAX_SAMPLE.
            EstimateError: a model gave NaN or Inf, or memory ran out.
        """
        whole = _checked(mixture)
        with enough_memory("the mixture"):
            song = SongWaveforms(self.recipe, whole, lambda: Samples(whole.n_samples))
            stems = {stem: song.sum_of(parts) for stem, parts in self.recipe.outputs.items()}
            with song:
                for _ in self.runner.run(song, Span(0, song.n_samples), Progress(progress)):
                    pass
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
        """Separate a song's file into one file per stem, `<folder>/<stem>.<format>`, or as `options.name` says.

        If the names hold the tempo or the key, the song is analysed before its files get them, and a file of that name
        that this program did not write is only noticed then.

        The folder is created if needed. WAV over 4 GB becomes RF64, and a warning is logged. At the song's own rate,
        the stems have as many samples as the song. A stem's title is the song's title, or its file name, followed by
        the stem's name, such as `Song (vocals)`; the other tags and the cover are the song's, but without ffmpeg
        only artist and album. Memory does not grow with the song's length. If the run fails or is cancelled, no file is
        left behind.

        Stems that this program wrote into the folder before are replaced; the record there, `.separation.json`, says
        which those are. If any other file is in the way, the song is refused before any work, unless
        `options.overwrite`.

        Gaps in a damaged song are silent in the stems, and a warning says where they are. If more than a tenth of the
        song or an unknown amount is missing, the song is refused, unless `accept_damaged`.

        Args:
            path: a file that libsndfile or ffmpeg can read.
            folder: where the stems go.
            options: format, sample rate, bitrate and depth. The samples of an `excerpt` are those that the stems of the
                whole song have there.
            max_seconds: the longest song to accept.
            accept_damaged: take what can be read of a damaged song.
            progress: called with the share that is done, 0 to 1, and the stage; an exception that it raises cancels.

        Returns:
            The paths of the stems by name.

        Raises:
            InputError: the format does not support the sample rate or needs ffmpeg, or a stem would replace the song.
            AudioError: the file cannot be read as audio, is damaged, or is longer than `max_seconds`.
            EstimateError: a model gave NaN or Inf, or memory ran out.
            OutputError: the stems cannot be written, or files that this program did not write are in their place.
        """
        started, path, job = time.monotonic(), Path(path), Progress(progress)
        if options.format not in SNDFILE_FORMATS:
            check_installed(f"format {options.format}")
        chosen = stems_in(options.video, self.stems) if options.video else []
        if chosen:
            check_picture(path)
        place = self._place(path, options)
        separating = job.part(0, SEPARATED) if place.needs_analysis else job
        self._names(place, path, options)
        target = OutputFolder(Path(folder, place.folder), overwrite=options.overwrite, record=place.record)
        with song_context(path.name), target as output:
            names = self._checked_names(place, path, options, output)
            with decode(
                path,
                output.work,
                max_seconds=max_seconds,
                progress=separating.part(0, DECODED, DECODING),
                accept_damaged=accept_damaged,
            ) as mixture:
                part = Span(*(options.excerpt or Excerpt()).samples(mixture))
                duration_seconds = (part.stop - part.start) / SAMPLE_RATE
                self.on_decoded(duration_seconds, options)
                tracks = tracks_of(self.stems) if options.format == STEM_FILE else self.stems
                files = {track: output.work / f"{track}.{options.of_tracks.format}" for track in tracks}
                gain = self._write_stems(mixture, part, path, files, options.of_tracks, separating)
                analysis: SongAnalysis | None = None
                if place.needs_analysis:
                    stems = {track: file for track, file in files.items() if track != MIXTURE_TRACK}
                    analysing = job.part(SEPARATED, 1)
                    analysis = analyse(path, stems, excerpt=options.excerpt, folder=output.work, progress=analysing)
                    place = place.analysed(analysis.tempo_bpm, analysis.key)
                    names = self._checked_names(place, path, options, output)
                if options.format == STEM_FILE:
                    write_stem_file(files, output.work / STEM_FILE)
                    files = {"stems": output.work / STEM_FILE}
                if options.reaper:
                    rate = options.rate_of_stems(mixture.source_rate)
                    project = Project({stem: names[stem] for stem in files}, options.format, rate, duration_seconds)
                    files[PROJECT] = output.work / PROJECT
                    with output_errors(files[PROJECT]):
                        files[PROJECT].write_text(project.text(), encoding="utf-8")
                if chosen:
                    sounds = {stem: files[stem] for stem in chosen}
                    job(ESTIMATED, "writing the video")
                    files[VIDEO] = output.work / VIDEO
                    write_video(path, sounds, files[VIDEO])
                job(1.0, "done")  # the last moment to cancel
                return StemFiles(
                    output.publish(files, names),
                    duration_seconds=duration_seconds,
                    elapsed_seconds=time.monotonic() - started,
                    gain=gain,
                    analysis=analysis,
                )

    def _names(self, place: Place, path: Path, options: OutputOptions) -> dict[str, str]:
        """The names of all files of a song, by stem. Raises InputError if two are equal."""
        stems = place.names(models_of_files(self.recipe, options.format), options.format)
        return stems | names_beside(path, place, options)

    def _checked_names(self, place: Place, path: Path, options: OutputOptions, output: OutputFolder) -> dict[str, str]:
        """As `_names`. Raises an error also if one may not be written, unless the names are not known yet."""
        names = self._names(place, path, options)
        output.check_targets([] if place.needs_analysis else [*names.values()], path)
        return names

    def _place(self, path: Path, options: OutputOptions) -> Place:
        tags = tags_for(options.name, path)
        return Place.of(options.name, song_fields(path.stem, tags, self.recipe.name))

    def on_decoded(self, duration_seconds: float, options: OutputOptions) -> None:
        """Called by `separate_file` when a song is decoded, before any model runs. For subclasses; does nothing."""

    def _write_stems(
        self,
        mixture: Waveform,
        part: Span,
        path: Path,
        files: Mapping[str, Path],
        options: OutputOptions,
        job: Progress,
    ) -> float:
        """Separate a part of a decoded song, and encode its stems; returns the gain."""
        rate = options.rate_of_stems(mixture.source_rate)
        if options.channels == "source":
            options = replace(options, channels="mono" if mixture.is_mono else "stereo")
        check_rate(options.format, rate)
        outputs = {MIXTURE_TRACK: MIXTURE} | self.recipe.outputs
        outputs = {track: outputs[track] for track in files}
        with ExitStack() as stack:
            work = next(iter(files.values())).parent
            cached = self._cached_estimates(mixture, path.name, stack)

            def new(sample_rate: int = SAMPLE_RATE, n_samples: int = mixture.n_samples) -> Waveform:
                return stack.enter_context(Waveform(work, sample_rate=sample_rate, total_samples=n_samples))

            song = SongWaveforms(self.recipe, mixture, new, cached.find if cached else lambda estimate: None)
            stems = self._stems_at_rate(song, outputs, part, mixture, rate, new)
            _warn_of_rf64(stems, options)
            encoders = Encoders(stems, files, _metadata(mixture, path, [*files]), options)
            writing = job.part(ESTIMATED, 1)
            with encoders, song:  # `song` exits first: it closes the waveforms that the encoders wait for
                models = _checking(job.part(DECODED, ESTIMATED), song, encoders)
                for estimate, wave, span in self.runner.run(song, part, models, cached.find_part if cached else None):
                    if cached:
                        song.in_background(partial(cached.keep, estimate, wave, span))
                song.finish(lambda: writing(0, f"writing {self.stems[0]}"))
                gain = _gain(stems) if options.clips else 1.0
                encoders.finish(gain, writing)
            return gain

    def _cached_estimates(self, mixture: Waveform, song: str, opened: ExitStack) -> CachedEstimates | None:
        """The song's estimates in the cache; None if caching is off or the cache cannot hold all of them."""
        n_estimates = sum(map(len, self.recipe.runs.values()))
        if (
            self._cache is None
            or self._settings is None
            or n_bytes(mixture.n_samples) * n_estimates > self._cache.limit_bytes
        ):
            return None
        return CachedEstimates(self._cache, self._settings, mixture, song, opened)

    def _stems_at_rate(
        self,
        song: SongWaveforms[Waveform],
        outputs: Mapping[str, Combination],
        part: Span,
        mixture: Waveform,
        rate: int,
        new: Callable[..., Waveform],
    ) -> dict[str, Waveform]:
        """The outputs for a part of the song at a sample rate (hertz). They grow while the models run."""
        is_whole = part == (0, song.n_samples)
        if rate == SAMPLE_RATE and is_whole:
            return {stem: song.sum_of(parts) for stem, parts in outputs.items()}
        length = resampled_length(mixture.n_samples, SAMPLE_RATE, rate)
        if rate == mixture.source_rate:  # resampling there and back may have rounded the length up
            length = min(length, mixture.source_samples)
        start, stop = (0, length) if is_whole else (min(round(at * rate / SAMPLE_RATE), length) for at in part)
        stems = {stem: new(rate, stop - start) for stem in outputs}
        for stem, parts in outputs.items():
            source = song.readable(parts)
            if rate == SAMPLE_RATE:
                blocks = in_blocks(source, start, stop)
            else:
                blocks = excerpt(resampled(source, SAMPLE_RATE, rate, length), start, stop)
            song.fill(stems[stem], parts, blocks)
        return stems


def _check_options_beside_pool(options: EngineOptions) -> None:
    for name in ("device", "precision", "attention"):
        value = getattr(options, name)
        if value != "auto":
            raise InputError(f"{name} {value!r} has no effect with a pool, which has its own: leave one of them out")


def _check_parts(models: Mapping[str, SeparationModel], two_stems: str | None) -> None:
    restoring = [name for name, model in models.items() if model.restores]
    if two_stems is not None and restoring:
        raise InputError(
            f"{restoring[0]} restores the song and gives no part of it, so {two_stems!r} leaves no other stem: leave "
            "two_stems out"
        )


def _recipe(recipe: str | Recipe, stems: str | None, two_stems: str | None) -> Recipe:
    if isinstance(recipe, str):
        return find_recipe(recipe, stems, two_stems=two_stems)
    if stems is not None:
        raise InputError(f"stems {stems!r} have no effect with a loaded recipe: leave them out")
    return recipe if two_stems is None else recipe.two_stems(two_stems)


def _checked(mixture: Tensor) -> Samples:
    """The mixture on the CPU. Raises InputError or AudioError if it cannot be separated."""
    if mixture.ndim != 2 or mixture.shape[0] != 2:
        raise InputError(f"the mixture has shape {list(mixture.shape)}: pass a tensor of shape [2, T]")
    if mixture.shape[1] == 0:
        raise AudioError("the mixture has no samples: pass at least one")
    whole = Samples.of(mixture.detach().to("cpu", torch.float32))
    if not whole.peak <= MAX_SAMPLE:  # not `peak > MAX_SAMPLE`, which is false for NaN
        faulty = ~(whole.samples.abs() <= MAX_SAMPLE)
        first = int(faulty.any(dim=0).nonzero()[0])
        fault = sample_fault(float(whole.samples[:, first][faulty[:, first]][0]))
        raise AudioError(f"the mixture holds {fault} at sample {first}: correct it")
    return whole


def _checking(progress: Progress, song: SongWaveforms[Waveform], encoders: Encoders) -> Progress:
    """Progress that also raises the error of any other thread that failed."""

    def report(share: float, stage: str) -> None:
        try:
            encoders.check()
        finally:
            song.check()  # takes precedence: an encoder also fails if a sum that it waits for does
        progress(share, stage)

    return Progress(report)


def _metadata(mixture: Waveform, path: Path, stems: Sequence[str]) -> dict[str, Metadata]:
    """The tags and the cover of each stem's file, and of the mixture's."""
    song = read_metadata(path)
    tags = {**song.tags, **mixture.tags}
    title = tags.get("title") or shown(path.stem)  # without a title, players show the file's name
    titles = {stem: title if stem == MIXTURE_TRACK else f"{title} ({stem})" for stem in stems}
    return {stem: Metadata({**tags, "title": titles[stem]}, song.cover) for stem in stems}


def _warn_of_rf64(stems: Mapping[str, Waveform], options: OutputOptions) -> None:
    if options.format == "wav" and is_rf64(next(iter(stems.values())), options):
        logger.warning("stems over 4 GB are too large for WAV: written as RF64, which not every program reads")


def _gain(stems: Mapping[str, Waveform]) -> float:
    """What to multiply all stems by so that none clips; logs a warning if that is not 1."""
    peak = max(wave.peak for wave in stems.values())
    if peak <= 1.0:
        return 1.0
    logger.warning(
        "a stem peaks at %.3g, beyond full scale: all stems are scaled by %.3g so that none clips", peak, 1 / peak
    )
    return 1 / peak
