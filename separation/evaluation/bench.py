"""Benchmark: how fast loaded models separate a song in memory."""

import contextlib
import gc
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from separation.audio.waveform import SAMPLE_RATE
from separation.checkpoints.build import random_weights
from separation.checkpoints.load import load_model
from separation.device import choose, float_precision, peak_memory_bytes
from separation.engine.options import EngineOptions
from separation.engine.pool import LoadedModels
from separation.engine.selection import Selection
from separation.engine.separator import Separator
from separation.errors import InputError
from separation.evaluation.metrics import sdr
from separation.models.base import SeparationModel
from separation.models.kernels.native import CODES, library
from separation.system.places import shipped

SONG = shipped("weights") / "demo" / "song.flac"
PRODUCTS = 5  # of each size; the fastest counts
BARE_SECONDS = 0.5  # for which the bare instructions run
SHARE_OF_PRODUCTS = 0.9  # of the linear layers' operations; the largest sizes up to this share represent all


@dataclass(frozen=True, kw_only=True)
class EngineSpeed:
    """How fast loaded models separate a song in memory, and how precisely."""

    models: dict[str, str]  # name -> attention backend
    weights: Literal["own", "random"]
    reason: str  # the device and precision, and why they were chosen
    chunk_seconds: dict[str, float]  # by model
    overlap_seconds: dict[str, float]  # by model
    batch_size: int | Literal["auto"]
    audio_seconds: float
    run_seconds: list[float]  # of each run after the warm-up
    chunks: int  # in a run, of all models
    operations: int  # floating point operations in a run
    products: float  # operations per second of the models' matrix products in PyTorch, on their own
    bare: float | None  # operations per second of the bare instructions, for models on fused layers
    peak_bytes: int  # of memory during the runs
    model_bytes: int  # of memory after loading
    sdr_db: dict[str, float]  # by model: a chunk compared with plain float32

    @property
    def median_seconds(self) -> float:
        """The median of the runs."""
        return statistics.median(self.run_seconds)

    @property
    def times_realtime(self) -> float:
        """Seconds of music per second of computing."""
        return self.audio_seconds / self.median_seconds

    @property
    def ceiling_share(self) -> float:
        """The share of the ceiling that the runs reach: of the bare instructions, else of PyTorch's products."""
        return self.operations / self.median_seconds / (self.bare or self.products)

    def as_json(self) -> str:
        """One JSON object."""
        return json.dumps(
            {
                "models": self.models,
                "weights": self.weights,
                "device": self.reason,
                "chunk_seconds": self.chunk_seconds,
                "overlap_seconds": self.overlap_seconds,
                "batch_size": self.batch_size,
                "audio_seconds": self.audio_seconds,
                "run_seconds": [round(seconds, 3) for seconds in self.run_seconds],
                "mean_seconds": round(statistics.mean(self.run_seconds), 3),
                "median_seconds": round(self.median_seconds, 3),
                "times_realtime": round(self.times_realtime, 3),
                "chunks": self.chunks,
                "seconds_per_chunk": round(self.median_seconds / self.chunks, 4),
                "gflop": round(self.operations / 1e9, 1),
                "products_gflop_per_second": round(self.products / 1e9, 1),
                "ceiling_gflop_per_second": round((self.bare or self.products) / 1e9, 1),
                "ceiling_share": round(self.ceiling_share, 3),
                "peak_memory_mib": self.peak_bytes >> 20,
                "memory_above_model_mib": (self.peak_bytes - self.model_bytes) >> 20,
                "sdr_db": {name: round(value, 1) for name, value in self.sdr_db.items()},
            }
        )

    def __str__(self) -> str:
        chunk = ", ".join(
            f"{seconds:.4g} s with {self.overlap_seconds[name]:.4g} s of overlap"
            for name, seconds in self.chunk_seconds.items()
        )
        rows = {
            "models": ", ".join(f"{name} (attention {attention})" for name, attention in self.models.items()),
            "weights": self.weights,
            "chunks": f"{chunk}, {self.batch_size} at once",
            "runs": f"{', '.join(f'{seconds:.2f}' for seconds in self.run_seconds)} s for {self.audio_seconds:g} s of "
            f"music: mean {statistics.mean(self.run_seconds):.2f} s, median {self.median_seconds:.2f} s",
            "times real-time": f"{self.times_realtime:.2f}",
            "s per chunk": f"{self.median_seconds / self.chunks:.3f} ({self.chunks} chunks, "
            f"{self.operations / self.chunks / 1e12:.3g} TFLOP each)",
            "of the ceiling": f"{self.ceiling_share:.0%} ("
            + (f"the bare instructions: {self.bare / 1e9:.0f} GFLOP/s; " if self.bare else "")
            + f"the linear layers' products alone: {self.products / 1e9:.0f} GFLOP/s)",
            "peak memory": f"{self.peak_bytes >> 20} MiB, {(self.peak_bytes - self.model_bytes) >> 20} above the "
            "loaded models",
            "SDR to float32": ", ".join(f"{value:.1f} dB" for value in self.sdr_db.values()),
        }
        return "\n".join([*(f"{name:16} {value}" for name, value in rows.items()), self.reason])


def engine_speed(
    selection: Selection = Selection(),
    options: EngineOptions = EngineOptions(),
    *,
    random: bool = False,
    seconds: int = 30,
    runs: int = 3,
) -> EngineSpeed:
    """Separate `seconds` of the demo song in memory `runs` times, after a warm-up run.

    With `random`, the models get random weights instead of their own. The ceiling and the float32 reference are
    measured last, so that they do not count towards time and memory.

    Raises:
        InputError: `seconds` or `runs` is less than 1, or `random` is given along with weights.
        SeparationError: as `Separator`.
    """
    for name, value in (("seconds", seconds), ("runs", runs)):
        if value < 1:
            raise InputError(f"{name} is {value}: choose a whole number from 1 up")
    if random and selection.model_path is not None:
        raise InputError(f"random weights and the weights in {selection.model_path} cannot be combined: leave one out")
    choice = choose(options.device, options.precision)
    with contextlib.ExitStack() as stack:
        wanted = selection.models()
        weights = dict.fromkeys(wanted, selection.model_path)
        if random:
            weights = _write_random_weights(list(wanted), Path(stack.enter_context(TemporaryDirectory())))
        loader = _Loader(wanted, weights, choice.device)
        models = {name: loader.load(name, choice.precision, options.attention) for name in wanted}
        chunked = replace(options, device="auto", precision="auto", attention="auto")  # the models decide these
        separator = separator_of(models, selection, chunked)
        mixture = _song(seconds)
        gc.collect()
        model_bytes = memory_bytes(choice.device)[0]
        reset_peak_memory(choice.device)
        separator.separate(mixture)
        run_seconds = [_seconds(lambda: separator.separate(mixture)) for _ in range(runs)]
        peak_bytes = memory_bytes(choice.device)[1]

        floats = float_precision(choice.precision, choice.device)
        costs: dict[str, _Cost] = {}
        for name, model in models.items():
            plan = separator.plans[model.name]
            chunk = _song(-(-plan.chunk_samples // SAMPLE_RATE))[None, :, : plan.chunk_samples]
            if model.channels == 1:  # computes each channel on its own
                chunk = chunk.transpose(0, 1)
            model_runs = sum(run.model == model.name for run in separator.recipe.runs)
            n_chunks = model_runs * separator.runner.n_chunks(model.name, mixture.shape[1])
            reference = loader.load(name, torch.float32, "itemwise")
            costs[model.name] = _cost(model, reference, chunk.to(choice.device), n_chunks, floats)
    operations = sum(cost.operations for cost in costs.values())
    return EngineSpeed(
        models={model.name: model.attention or "its own" for model in models.values()},
        weights="random" if random else "own",
        reason=choice.reason,
        chunk_seconds={
            name: plan.chunk_samples / separator.models[name].sample_rate for name, plan in separator.plans.items()
        },
        overlap_seconds={
            name: plan.overlap_samples / separator.models[name].sample_rate for name, plan in separator.plans.items()
        },
        batch_size=separator.runner.fixed_batch_size or "auto",
        audio_seconds=seconds,
        run_seconds=run_seconds,
        chunks=sum(cost.chunks for cost in costs.values()),
        operations=operations,
        products=operations / sum(cost.products_seconds for cost in costs.values()),
        bare=_bare_speed(list(models.values()), choice.device),
        peak_bytes=peak_bytes,
        model_bytes=model_bytes,
        sdr_db={name: cost.sdr_db for name, cost in costs.items()},
    )


@dataclass(frozen=True)
class _Loader:
    """Loads models by name."""

    stems: Mapping[str, tuple[str, ...] | None]  # by model; None stands for all
    weights: Mapping[str, Path | None]  # by model; None stands for its own
    device: torch.device

    def load(self, name: str, precision: torch.dtype, attention: str) -> SeparationModel:
        return load_model(
            name,
            checkpoint=self.weights[name],
            stems=self.stems[name],
            device=self.device,
            precision=precision,
            attention=attention,
        )


@dataclass(frozen=True)
class _Cost:
    """What a model does in a run."""

    chunks: int
    operations: int  # floating point operations
    products_seconds: float  # the time that the operations would take at the speed of the matrix products alone
    sdr_db: float  # of the estimates of a chunk, compared with the reference's


def _cost(
    model: SeparationModel, reference: SeparationModel, chunk: Tensor, n_chunks: int, floats: torch.dtype
) -> _Cost:
    """The cost of `n_chunks` chunks like this one, `[1, 2, T]`, or `[2, 1, T]` for a mono model.

    `reference` is the same model in plain float32.
    """
    with torch.inference_mode():
        estimates = model(chunk)
    expected, operations, products = _reference(reference, chunk)
    return _Cost(
        chunks=n_chunks,
        operations=n_chunks * operations,
        products_seconds=n_chunks * operations / _products_speed(products, floats, chunk.device),
        sdr_db=sdr(expected[0].flatten(0, 1), estimates[0].flatten(0, 1).cpu()),
    )


def _write_random_weights(names: Sequence[str], folder: Path) -> dict[str, Path | None]:
    paths: dict[str, Path | None] = {}
    for number, name in enumerate(names):
        path = folder / f"{number}.safetensors"
        save_file(random_weights(name), path)
        paths[name] = path
    return paths


def separator_of(
    models: dict[str, SeparationModel], selection: Selection, options: EngineOptions = EngineOptions()
) -> Separator:
    """A separator that uses the selection's models, already loaded."""
    if selection.model is None:
        return Separator(selection.load(), pool=LoadedModels(models), options=options)
    (model,) = models.values()
    return Separator.from_model(model, two_stems=selection.two_stems, only=selection.only, options=options)


def _song(seconds: int) -> Tensor:
    """The first seconds of the demo song, which repeats if it is too short, `[2, T]`."""
    samples, _ = soundfile.read(SONG, dtype="float32")
    return torch.from_numpy(np.resize(samples, (seconds * SAMPLE_RATE, 2)).T.copy())


def _seconds(job: Callable[[], object]) -> float:
    started = time.monotonic()
    job()
    return time.monotonic() - started


@torch.no_grad()
def _reference(model: SeparationModel, chunk: Tensor) -> tuple[Tensor, int, Mapping[tuple[int, int, int], int]]:
    """Run a model on a chunk `[B, C, T]` and count its work.

    Returns the estimates `[1, S, C, T]` on the CPU, the number of floating point operations in matrix products,
    attention and convolutions, and how often each product of a linear layer occurs, by (rows, columns in, columns out).
    """
    products: Counter[tuple[int, int, int]] = Counter()

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        assert isinstance(layer, nn.Linear)
        products[inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features] += 1

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)
    with FlopCounterMode(display=False) as counter:
        estimates = model(chunk)
    return estimates.cpu(), counter.get_total_flops(), products


def _bare_speed(models: Sequence[SeparationModel], device: torch.device) -> float | None:
    """Operations per second of the CPU kind's instructions in a loop without memory, if all models use its kernels.

    If the models differ in precision, that of the fastest counts.
    """
    if device.type != "cpu" or not all(model.attention == "fused" for model in models):
        return None
    speed = library().functions.operations_per_second
    codes = {CODES[model.precision] for model in models}
    return max(float(speed(code, torch.get_num_threads(), BARE_SECONDS)) for code in codes)


def _products_speed(
    products: Mapping[tuple[int, int, int], int], precision: torch.dtype, device: torch.device
) -> float:
    """Operations per second of these products of `nn.functional.linear`, one after another; the best of several."""
    flops = {size: 2 * size[0] * size[1] * size[2] * count for size, count in products.items()}
    counted = seconds = 0.0
    for size in sorted(flops, key=lambda size: flops[size], reverse=True):
        if counted >= SHARE_OF_PRODUCTS * sum(flops.values()):
            break
        rows, columns_in, columns_out = size
        x = torch.randn(rows, columns_in, device=device).to(precision)
        weight = torch.randn(columns_out, columns_in, device=device).to(precision)

        def product(x: Tensor = x, weight: Tensor = weight) -> None:
            nn.functional.linear(x, weight)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

        product()
        seconds += products[size] * min(_seconds(product) for _ in range(PRODUCTS))
        counted += flops[size]
    return counted / seconds


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Memory in use now, and the peak since `reset_peak_memory`.

    On a CUDA GPU, tensors count; elsewhere the whole process.
    """
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), peak_memory_bytes(device)
    if sys.platform != "linux":
        return peak_memory_bytes(device), peak_memory_bytes(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    now, peak = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, peak


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # missing in some sandboxes; the peak then includes loading
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
