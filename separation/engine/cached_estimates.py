"""The estimates of songs in the cache: what identifies an estimate, and how it is looked up and stored."""

import hashlib
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from separation.audio.waveform import SAMPLE_RATE, StoredSamples, Waveform
from separation.device import identity
from separation.engine.cache import Cache, engine_version
from separation.engine.chunk_plan import ChunkPlan, Span
from separation.engine.parts import EstimatePart
from separation.engine.recipes import Combination, Ensemble, Estimate
from separation.errors import CheckpointError
from separation.models.base import SeparationModel

logger: logging.Logger = logging.getLogger("separation")


class EstimateSettings:
    """Everything that the samples of an estimate depend on, except the song.

    Args:
        models: by name.
        plans: how songs are cut, by model.
        device: what the models run on.
        batch_size: chunks computed at once, which affects the rounding of matrix products; None if it depends on the
            GPU.

    Raises:
        CheckpointError: a model does not come from `load_model`, or its files have changed since it was loaded.
    """

    def __init__(
        self,
        models: Mapping[str, SeparationModel],
        plans: Mapping[str, ChunkPlan],
        device: torch.device,
        batch_size: int | None,
    ) -> None:
        self._models, self._plans = models, plans
        self._device, self._batch_size = device, batch_size
        self._checksums = {name: _checksums(name, model) for name, model in models.items()}

    def of(self, estimate: Estimate, mixture: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of an estimate, as plain values; `mixture` identifies the song."""
        run, stem = estimate
        model, plan, checksums = self._models[run.model], self._plans[run.model], self._checksums[run.model]
        assert model.origin is not None
        return {
            "engine": engine_version(),
            "stem": stem,
            "architecture": model.origin.architecture,
            "hyper_parameters": model.origin.hyper_parameters,
            "stems": model.origin.stems,
            # If each stem has a network of its own, only that network's weights matter.
            "weights": [checksums[stem]] if stem in checksums else list(checksums.values()),
            "sample_rate": model.sample_rate,
            "normalisation": model.normalisation,
            "precision": str(model.precision).removeprefix("torch."),
            "attention": model.attention,
            "cpu_kind": model.cpu_kind,
            "device": identity(self._device),
            "batch_size": self._batch_size or "auto",
            "chunk_samples": plan.chunk_samples,
            "overlap_samples": plan.overlap_samples,
            "view": list(run.view),
            "input": self._of_sum(run.input, mixture),
        }

    def _of_sum(self, parts: Combination, mixture: Mapping[str, Any]) -> list[tuple[float, dict[str, Any]]]:
        return [(weight, self._of_part(part, mixture)) for part, weight in parts]

    def _of_part(self, part: Estimate | Ensemble | None, mixture: Mapping[str, Any]) -> dict[str, Any]:
        if part is None:
            return dict(mixture)
        if isinstance(part, Ensemble):
            return {"rule": part.rule, "parts": [self._of_sum(each, mixture) for each in part.parts]}
        return self.of(part, mixture)


class CachedEstimates:
    """The estimates of one song in the cache.

    Args:
        song: the song's name, for `separation cache list`.
        opened: closes the waveforms that `find` returns.
    """

    def __init__(
        self, cache: Cache, settings: EstimateSettings, mixture: Waveform, song: str, opened: ExitStack
    ) -> None:
        self._cache, self._settings, self._mixture, self._song = cache, settings, mixture, song
        self._opened = opened
        checksum = hashlib.sha256()
        for block in mixture.raw():
            checksum.update(block)
        # The last digit of mean and std depends on the blocks in which the song was decoded, and the estimates of a
        # model that normalises by them depend on that digit.
        self._identity = {"sha256": checksum.hexdigest(), "mean": mixture.mean, "std": mixture.std}

    def find(self, estimate: Estimate) -> Waveform | None:
        """The waveform of a cached estimate; None on a cache miss."""
        kept = self._cache.get(self._settings.of(estimate, self._identity))
        if kept is None:
            return None
        logger.info(f"{estimate.stem} by {estimate.run.model}: from the cache")
        stored = StoredSamples(kept.file, self._mixture.n_samples, kept.facts["statistics"])
        return self._opened.enter_context(Waveform(stored))

    def find_part(self, estimate: Estimate) -> EstimatePart | None:
        """The part of an estimate that was stored last; None on a cache miss."""
        kept = self._cache.get(self._part_settings(estimate))
        if kept is None:
            return None
        span = Span(*kept.facts["span"])
        stored = StoredSamples(kept.file, span.stop - span.start, kept.facts["statistics"])
        return EstimatePart(span, self._opened.enter_context(Waveform(stored)))

    def keep(self, estimate: Estimate, wave: Waveform, span: Span) -> None:
        """Store a span of an estimate: the complete estimate, or a part of it in place of the part stored before."""
        is_complete = span == (0, wave.n_samples)
        settings = self._settings.of(estimate, self._identity) if is_complete else self._part_settings(estimate)
        facts = {
            "song": self._song,
            "seconds": (span.stop - span.start) / SAMPLE_RATE,
            "model": estimate.run.model,
            "statistics": wave.statistics,
            "span": span,
        }
        self._cache.put(settings, wave.raw(*span), n_bytes(span.stop - span.start), facts)

    def _part_settings(self, estimate: Estimate) -> dict[str, Any]:
        return self._settings.of(estimate, self._identity) | {"is_part": True}


def n_bytes(n_samples: int) -> int:
    """The size of a stereo waveform."""
    return n_samples * 2 * 4


def _checksums(name: str, model: SeparationModel) -> dict[str, str]:
    """The checksums of a model's files, by part."""
    if model.origin is None:
        raise CheckpointError(f"model {name!r} was not made by load_model: turn the cache off")
    return {part: checksum() for part, checksum in model.origin.weights.items()}
