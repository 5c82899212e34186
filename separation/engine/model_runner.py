"""Runs the models of a recipe over one song after another."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from separation.audio.resample import ResampledView, resampled_as_it_comes, resampled_length
from separation.audio.waveform import SAMPLE_RATE, Readable, Waveform
from separation.engine.chunk_plan import ChunkPlan, Span, read_extended
from separation.engine.chunking import Level, ReadyModel, separate
from separation.engine.compute_thread import compute_thread
from separation.engine.gpu_models import on_stereo
from separation.engine.options import EngineOptions
from separation.engine.pairs import pairs_help
from separation.engine.parts import EstimatePart, KnownPart, with_margin
from separation.engine.pool import Models
from separation.engine.recipe_lines import PLAIN
from separation.engine.recipes import Estimate, Recipe, Run
from separation.engine.song_waveforms import Samples, SongWaveforms, Wave
from separation.engine.views import Viewed, undone
from separation.models.base import SeparationModel
from separation.progress import Progress

PEAK = 0.9  # of the mixture, for models with `normalisation` "peak"


class ModelRunner:
    """Runs the models of a recipe, which it loads. Several threads may use one runner.

    Args:
        recipe: names the models, and the stems to load of each.
        pool: loads them.
        options: batch size, chunk and overlap; the pool decides the rest.

    Attributes:
        models: the recipe's models, by name.
        plans: how a song is cut for each model.
        device: what they run on.
    """

    def __init__(self, recipe: Recipe, pool: Models, options: EngineOptions) -> None:
        self._recipe = recipe
        self.models: dict[str, SeparationModel] = {
            name: pool.get(name, wanted) for name, wanted in recipe.models.items()
        }
        self.plans: dict[str, ChunkPlan] = {name: _plan(model, options) for name, model in self.models.items()}
        self.device: torch.device = pool.device
        self._batch_size = options.batch_size
        self._on_gpu = pool.on_gpu
        self._turns = pool.turns

    @property
    def fixed_batch_size(self) -> int | None:
        """The number of chunks computed at once; None if it depends on a GPU's memory."""
        if self._batch_size != "auto":
            return self._batch_size
        return {"cpu": 1, "mps": 4}.get(self.device.type)

    def warm_up(self) -> None:
        """Run each model over a chunk of noise, so that the first song does not wait for one-time setup."""
        for name, stems in dict.fromkeys((run.model, stems) for run, stems in self._recipe.runs.items()):
            plan = replace(self.plans[name], overlap_samples=0)
            noise = torch.randn(2, min(SAMPLE_RATE, plan.chunk_samples), generator=torch.Generator().manual_seed(0))
            model, source = self.models[name].only(stems), Samples.of(noise * 0.1)
            for _ in separate(self.ready(model, plan), source, plan, _level(model, source)):
                pass

    def run(
        self,
        song: SongWaveforms[Wave],
        part: Span,
        progress: Progress,
        find_part: Callable[[Estimate], EstimatePart | None] | None = None,
    ) -> Iterator[tuple[Estimate, Wave, Span]]:
        """Run the models that a part of a song needs; yields each estimate with the span of it that is complete.

        A run whose estimates another run needs is complete, because their level decides about the other's estimates.
        """
        whole, inputs = Span(0, song.n_samples), self._recipe.inputs
        spans = {run: whole if run in inputs else with_margin(part, song.n_samples) for run in song.runs}
        n_chunks = {run: self._n_chunks(run, song.n_samples, span) for run, span in spans.items()}
        total, done = sum(n_chunks.values()), 0
        for run, stems in song.runs.items():
            share = progress.part(done / total, (done + n_chunks[run]) / total, run.model)
            done += n_chunks[run]
            waves = {Estimate(run, stem): song.estimates[Estimate(run, stem)] for stem in stems}
            known = KnownPart(map(find_part, waves) if find_part else ())
            self._run_model(run, waves, song.wait_for(run.input), known, spans[run], share)
            for estimate, wave in waves.items():
                yield estimate, wave, known.with_span(spans[run])

    def _n_chunks(self, run: Run, n_samples: int, span: Span) -> int:
        """How many chunks a run computes for a span of a song."""
        return self.n_chunks(run.model, n_samples + run.view.delay_samples, _in_view(span, run))

    def n_chunks(self, model: str, n_samples: int, span: Span | None = None) -> int:
        """How many chunks a model computes for a song of `n_samples`, or for a span of it, at 44100 Hz."""
        rate = self.models[model].sample_rate
        chunks = self.plans[model].chunks(resampled_length(n_samples, SAMPLE_RATE, rate))
        return sum(chunk.is_for([(span or Span(0, n_samples)).at(rate)]) for chunk in chunks)

    def _run_model(
        self, run: Run, waves: Mapping[Estimate, Wave], source: Wave, known: KnownPart, span: Span, progress: Progress
    ) -> None:
        """Run a model over a waveform, and append what it estimates to `waves`: complete in `span`, else anything."""
        model = self.models[run.model].only(tuple(estimate.stem for estimate in waves))
        outputs, start = [model.stems.index(estimate.stem) for estimate in waves], 0
        with closing(self._estimate(model, source, run, progress, known.missing(span))) as blocks:
            for block in undone(blocks, run.view):
                estimates = [block[output] for output in outputs]
                known.fill_in(estimates, start)
                start += block.shape[-1]
                for wave, estimate in zip(waves.values(), estimates, strict=True):
                    wave.append(estimate)

    def _estimate(
        self, model: SeparationModel, source: Samples | Waveform, run: Run, progress: Progress, spans: Sequence[Span]
    ) -> Generator[Tensor]:
        """The estimates of a model for a run's view of these spans of a complete waveform, in blocks `[S, 2, n]`."""
        plan, level, rate = self.plans[run.model], _level(model, source), model.sample_rate
        if run.view.is_inverted:
            level = replace(level, offset=-level.offset)
        viewed: Readable = source if run.view == PLAIN else Viewed(source, run.view)
        spans = [_in_view(span, run) for span in spans]
        ready = self.ready(model, plan)
        if rate == SAMPLE_RATE:
            yield from separate(ready, viewed, plan, level, progress, spans)
            return
        at_its_rate, spans = ResampledView(viewed, SAMPLE_RATE, rate), [span.at(rate) for span in spans]
        with closing(separate(ready, at_its_rate, plan, level, progress, spans)) as blocks:
            yield from resampled_as_it_comes(blocks, rate, SAMPLE_RATE, viewed.n_samples)

    def ready(self, model: SeparationModel, plan: ChunkPlan) -> ReadyModel:
        """The model, ready to run over batches of chunks of that plan."""
        if self.device.type != "cuda":
            return ReadyModel(
                on_stereo(model),
                len(model.stems),
                self.fixed_batch_size or 1,
                self.device,
                in_pairs=self.device.type == "cpu" and pairs_help(),
                turns=self._turns,
            )
        samples = plan.whole_chunk_input_samples
        return compute_thread(self.device).run(self._on_gpu.get, model, samples, self._batch_size, self.device)


def _in_view(span: Span, run: Run) -> Span:
    """Where a span of a run's input lies in its view of the input."""
    return Span(span.start + run.view.delay_samples, span.stop + run.view.delay_samples)


def _plan(model: SeparationModel, options: EngineOptions) -> ChunkPlan:
    """How a model's songs are cut."""
    if model.spill_samples:
        return ChunkPlan(model.chunk_samples, 0, False, model.input_samples, model.spill_samples)
    chunk_samples, overlap_samples = options.chunks.samples(
        model.name, model.chunk_samples, model.sample_rate, is_fixed=model.fixed_chunk
    )
    return ChunkPlan(chunk_samples, overlap_samples, model.reflects_border, model.input_samples)


def _level(model: SeparationModel, source: Samples | Waveform) -> Level:
    """How the model's input is shifted and scaled."""
    if model.normalisation == "none":
        return Level()
    if model.normalisation == "standard":
        return Level(offset=source.mean, scale=source.std + 1e-8)
    if model.normalisation == "spectrum":
        return Level(scale=_spectral_peak(model, source) or 1.0)
    return Level(scale=source.peak / PEAK or 1.0)


@torch.inference_mode()
def _spectral_peak(model: SeparationModel, source: Samples | Waveform) -> float:
    """The largest magnitude in the model's spectrogram of a song, chunk by chunk."""
    plan = ChunkPlan(model.chunk_samples, 0, False, model.input_samples, model.spill_samples)
    song = source if model.sample_rate == SAMPLE_RATE else ResampledView(source, SAMPLE_RATE, model.sample_rate)
    mixtures = (
        read_extended(song, chunk.read_start, chunk.read_start + chunk.read_length, 0)
        for chunk in plan.chunks(song.n_samples)
    )
    return max(model.spectral_peak(mixture[None]) for mixture in mixtures)
