"""Exports a model to an ONNX file, for programs without Python or PyTorch: its `core` for one chunk, in float32.

The STFT stays outside, because many runtimes have none. The file's metadata have its settings (see
`separation.models.base.Transform`).
"""

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from separation.checkpoints.build import random_weights
from separation.checkpoints.load import load_model
from separation.documents import first_line
from separation.errors import EstimateError, InputError
from separation.models.base import SeparationModel, Transform
from separation.models.stft import make_window
from separation.system.os_errors import output_errors
from separation.system.output import OutputFolder

OPSET = 20  # from 2023, the first with GELU
MOST_BYTES = 2**31 - 2**26  # of weights; a file can have 2 GiB in all
MOST_FOLDED = 2**18  # numbers in a folded constant: folding larger ones would only make the file larger
MOST_ERROR = 1e-3  # of ONNX Runtime's stems, relative to the highest sample
AXES = {
    "spectrogram": "1, channel, bin, frame, real and imaginary part",
    "waveform": "1, channel, sample",
    "spectrograms": "1, stem, channel, bin, frame, real and imaginary part",
    "waveforms": "1, stem, channel, sample",
}


@dataclass(frozen=True, kw_only=True)
class Export:
    """An exported file."""

    path: Path
    n_bytes: int
    inputs: dict[str, list[int]]  # shapes by name
    outputs: dict[str, list[int]]
    error: float | None  # ONNX Runtime's difference from PyTorch; None if onnxruntime is not installed

    def __str__(self) -> str:
        ends = [", ".join(f"{name} {shape}" for name, shape in end.items()) for end in (self.inputs, self.outputs)]
        checked = (
            "not checked, because onnxruntime is not installed"
            if self.error is None
            else f"ONNX Runtime agrees with PyTorch to {self.error:.1e}"
        )
        return f"{self.path}: {self.n_bytes / 1e6:.1f} MB, {ends[0]} -> {ends[1]}; {checked}"


def export(
    name_or_path: str | Path,
    target: Path,
    *,
    checkpoint: Path | None = None,
    random: bool = False,
    overwrite: bool = False,
) -> Export:
    """Export a model, and compare ONNX Runtime's and PyTorch's estimates for a chunk of noise.

    `random` exports random weights. `target` appears complete and checked, or not at all; it replaces a file only with
    `overwrite`.

    Raises what `load_model` raises, InputError for a target with another suffix, a missing package or a model that
    cannot be exported, EstimateError if the estimates differ by more than `MOST_ERROR`, OutputError if the file cannot
    be written.
    """
    _check_options(target, checkpoint, random=random)
    with OutputFolder(target.parent, overwrite=overwrite, record=None) as folder, torch.no_grad():
        folder.check_targets([target.name])
        part = folder.work / target.name
        if random:
            checkpoint = folder.work / "random.safetensors"
            with output_errors(target, SafetensorError):
                save_file(random_weights(name_or_path), checkpoint)
        model = load_model(name_or_path, checkpoint=checkpoint, attention="sdpa")
        if (n_bytes := sum(tensor.nbytes for tensor in model.state_dict().values())) > MOST_BYTES:
            raise InputError(
                f"{model.name} has {n_bytes / 1e9:.1f} GB of weights, an ONNX file can have 2 GB: choose another model"
            )
        length = model.input_samples(model.chunk_samples) or model.chunk_samples
        transform = model.transform(length)
        chunk = torch.randn(1, model.channels, length, generator=torch.Generator().manual_seed(0)) * 0.1
        inputs = {} if transform is None else {"spectrogram": spectrogram_of(chunk, transform)}
        if model.core_takes_waveform:
            inputs["waveform"] = chunk
        expected = model(chunk)  # before the export, in which the model would cache tables without values
        shapes = _write(model, inputs, _facts(model, length, transform, list(inputs)), part, target)
        error = None
        if find_spec("onnxruntime") is not None:
            error = _error(expected, _by_onnxruntime(part, inputs, transform, length))
            if not error <= MOST_ERROR:
                raise EstimateError(
                    f"{model.name} in ONNX Runtime differs from PyTorch by {error:.1e}, more than {MOST_ERROR:.0e}, "
                    f"and {target} was not written: choose another model"
                )
        n_bytes = part.stat().st_size
        folder.publish({"model": part})
    return Export(path=target, n_bytes=n_bytes, inputs=shapes[0], outputs=shapes[1], error=error)


def _check_options(target: Path, checkpoint: Path | None, *, random: bool) -> None:
    if target.suffix != ".onnx" or target.is_dir():
        raise InputError(f"the output {str(target)!r} must be a file whose name ends in .onnx: that is its format")
    if random and checkpoint is not None:
        raise InputError(f"random weights and the weights in {checkpoint} cannot be combined: leave one out")
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise InputError(f"the package {package} is missing: run `pip install onnx onnxscript onnxruntime`")


def _write(
    model: SeparationModel, inputs: Mapping[str, Tensor], facts: dict[str, Any], part: Path, target: Path
) -> list[dict[str, list[int]]]:
    """Write the model to `part`, on its way to `target`. Returns the shapes of the inputs and of the outputs."""
    program = _program(model, inputs)
    program.model.doc_string = f"{model.name}: one chunk of a mixture to its stems; see the key `separation`"
    program.model.metadata_props["separation"] = json.dumps(facts)
    with output_errors(target, SafetensorError):
        program.save(part, external_data=False)
    ends = program.model.graph.inputs, program.model.graph.outputs
    return [{str(value.name): list(value.shape.numpy()) for value in end if value.shape} for end in ends]


class _Core(nn.Module):
    def __init__(self, model: SeparationModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with _MeansOfMeans():
            return self.model.core(*inputs)


class _MeansOfMeans(TorchFunctionMode):
    """Replaces group norms, means and deviations over several axes by means along one axis at a time, the last first.

    ONNX Runtime sums the millions of numbers of a norm one by one in float32, in one thread and with an error of 1e-3.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(kwargs.get("dim"), tuple):
            func = {Tensor.mean: _mean, Tensor.std: _std}.get(func, func)
        return (_group_norm if func is F.group_norm else func)(*args, **kwargs)


def _mean(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    assert keepdim
    for axis in reversed(dim):
        x = x.mean(axis, keepdim=True)
    return x


def _std(x: Tensor, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    n = math.prod(x.shape[axis] for axis in dim)
    squares = (x - _mean(x, dim=dim, keepdim=keepdim)).square()
    return (_mean(squares, dim=dim, keepdim=keepdim) * (n / (n - 1))).sqrt()


def _group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    each_channel = (1, -1, *(1,) * (x.dim() - 2))

    def mean(lines: Tensor) -> Tensor:
        """Means along the last axis to means of each group, repeated for its channels: `[B, C, 1, ...]`."""
        means = lines.reshape(len(x), num_groups, -1).mean(-1, keepdim=True)
        return means.expand(-1, -1, x.shape[1] // num_groups).reshape(len(x), *each_channel[1:])

    centred = x - mean(x.mean(-1))
    variance = mean(torch.linalg.vector_norm(centred, dim=-1).square() / x.shape[-1])
    return centred * ((variance + eps).rsqrt() * weight.reshape(each_channel)) + bias.reshape(each_channel)


def _program(model: SeparationModel, inputs: Mapping[str, Tensor]) -> torch.onnx.ONNXProgram:
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants

    try:
        with _quiet():
            program = torch.onnx.export(
                _Core(model).eval(),
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=[name + "s" for name in inputs],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                optimize=False,  # takes time quadratic in the model's size; the passes below do nearly as much
            )
            assert program is not None
            fold_constants(program.model, input_size_limit=MOST_FOLDED, output_size_limit=MOST_FOLDED)
            for tidy in (
                passes.CommonSubexpressionEliminationPass(),
                passes.IdentityEliminationPass(),
                passes.RemoveUnusedNodesPass(),
                passes.DeduplicateInitializersPass(),
                passes.ClearMetadataAndDocStringPass(),  # they name the source line of each operation
            ):
                tidy(program.model)
    except torch.onnx.errors.OnnxExporterError as e:
        raise InputError(f"{model.name} cannot be exported ({first_line(e)}): choose another model") from e
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's messages about its own deprecated, optional and unoptimised parts."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _facts(model: SeparationModel, length: int, transform: Transform | None, inputs: list[str]) -> dict[str, Any]:
    """What a user of the file needs to know."""
    return {
        "name": model.name,
        "stems": model.stems,
        "sample_rate": model.sample_rate,
        "channels": model.channels,
        "chunk_samples": length,
        "normalisation": model.normalisation,
        "reflects_border": model.reflects_border,
        "inputs": {name: AXES[name] for name in inputs},
        "outputs": {name + "s": AXES[name + "s"] for name in inputs},
        "transform": None if transform is None else asdict(transform),
    }


def spectrogram_of(chunk: Tensor, transform: Transform) -> Tensor:
    """Chunks `[B, C, T]` to the core's input, `[B, C, F, N, 2]`."""
    padded = F.pad(F.pad(chunk, (0, transform.zeros_after)), transform.padding, transform.padding_mode)
    frames = padded.unfold(-1, transform.n_fft, transform.hop_length) * _window(transform)
    spectrum = torch.fft.rfft(frames)[..., : transform.bins].transpose(-1, -2) * transform.scale
    return torch.view_as_real(spectrum).contiguous()


def waveforms_of(spectrograms: Tensor, transform: Transform, length: int) -> Tensor:
    """The core's output `[B, S, C, F, N, 2]` to waveforms `[B, S, C, length]`."""
    missing = transform.n_fft // 2 + 1 - transform.bins
    spectra = F.pad(
        torch.view_as_complex(spectrograms.contiguous()), (transform.zero_frames, transform.zero_frames, 0, missing)
    )
    window = _window(transform)
    frames = torch.fft.irfft(spectra.transpose(-1, -2), transform.n_fft) / transform.scale * window
    audio = frames.new_zeros(*frames.shape[:-2], frames.shape[-2] * transform.hop_length + transform.n_fft)
    envelope = torch.zeros(audio.shape[-1])
    for number, frame in enumerate(frames.unbind(-2)):
        place = slice(number * transform.hop_length, number * transform.hop_length + transform.n_fft)
        audio[..., place] += frame
        envelope[place] += window**2
    kept = slice(transform.crop, transform.crop + length)
    waveforms: Tensor = audio[..., kept] / envelope[kept]
    return waveforms


def _window(transform: Transform) -> Tensor:
    missing = transform.n_fft - transform.win_length
    window = make_window(transform.window, transform.win_length, torch.device("cpu"))
    return F.pad(window, (missing // 2, missing - missing // 2))


def _by_onnxruntime(path: Path, inputs: Mapping[str, Tensor], transform: Transform | None, length: int) -> Tensor:
    """ONNX Runtime's estimates, `[1, S, C, length]`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    outputs: dict[str, Tensor] = dict(zip(names, map(torch.from_numpy, values), strict=True))
    waveforms = outputs.get("waveforms", torch.zeros(()))
    if transform is None:
        return waveforms
    return waveforms + waveforms_of(outputs["spectrograms"], transform, length)


def _error(expected: Tensor, got: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())
