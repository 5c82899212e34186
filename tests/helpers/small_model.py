"""A BS-RoFormer of a few thousand weights, its YAML and its checkpoint."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from separation.checkpoints.convert import convert
from separation.evaluation.metrics import sdr
from separation.models.base import Identity, SeparationModel
from separation.models.bs_roformer import BSRoFormer, BSRoFormerConfig

HYPER_PARAMETERS: dict[str, Any] = {
    "dim": 16,
    "depth": 1,
    "stereo": True,
    "num_stems": 2,
    "freqs_per_bands": [3] * 11,
    "dim_head": 8,
    "heads": 2,
    "stft_n_fft": 64,
    "stft_hop_length": 16,
    "stft_win_length": 64,
}
DOCUMENT: dict[str, Any] = {
    "architecture": "bs_roformer",
    "stems": ["vocals", "drums"],
    "files": [{"name": "small.ckpt"}],
    "audio": {"sample_rate": 44100, "chunk_size": 4096, "dim_f": 1024},
    "model": HYPER_PARAMETERS,
}


def write_yaml(folder: Path, *, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    path = folder / "small.yaml"
    document = {key: value for key, value in {**DOCUMENT, **changes}.items() if key not in drop}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def identity(
    stems: Iterable[str] = ("vocals", "drums"),
    *,
    name: str = "small",
    sample_rate: int = 44100,
    chunk_samples: int = 4096,
) -> Identity:
    """The identity of a model that a test builds."""
    return Identity(name=name, stems=tuple(stems), sample_rate=sample_rate, chunk_samples=chunk_samples)


def small_model(**changes: Any) -> BSRoFormer:
    torch.manual_seed(0)
    hyper_parameters = HYPER_PARAMETERS | {"freqs_per_bands": tuple(HYPER_PARAMETERS["freqs_per_bands"])} | changes
    return BSRoFormer(BSRoFormerConfig(**hyper_parameters), identity()).eval()


def chunks(samples: int = 256) -> Tensor:
    return torch.randn(1, 2, samples, generator=torch.Generator().manual_seed(1))


def assert_near(estimates: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, which on some CPUs depends on the weights' alignment and on the batch."""
    assert estimates.shape == expected.shape
    assert (estimates - expected).abs().max() <= 1e-6 * expected.abs().max()


def assert_same_model(model: torch.nn.Module, expected: torch.nn.Module, chunk: Tensor) -> None:
    """The weights are identical, and the estimates differ only by rounding."""
    found, right = model.state_dict(), expected.state_dict()
    assert found.keys() == right.keys() and all(torch.equal(found[key], right[key]) for key in right)
    assert_near(model(chunk), expected(chunk))


def assert_half_precision_is_near(model: SeparationModel, precision: torch.dtype, decibels: float) -> None:
    """In this precision, the SDR to the float32 estimates is higher than this; norms stay in float32."""
    noise = torch.randn(1, model.channels, model.chunk_samples) * 0.1
    with torch.inference_mode():
        exact = model(noise)
        model.prepare(precision)
        assert sdr(exact, model(noise)) > decibels
    assert {p.dtype for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters()} == {torch.float32}


def assert_chunks_are_alone(model: SeparationModel) -> None:
    """An estimate does not depend on the other chunks of the batch."""
    noise = torch.randn(3, model.channels, model.chunk_samples) * torch.tensor([0.01, 0.1, 1.0])[:, None, None]
    with torch.inference_mode():
        alone = torch.cat([model(chunk[None]) for chunk in noise])
        together = model(noise)
    for one, other in zip(alone, together, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()


def write_weights(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in state.items()}, path)  # it refuses tensors that share memory
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".th")
    return path


def quick_model() -> BSRoFormer:
    """A fast random network with one stem: few bands, and frames of 2048 samples."""
    torch.manual_seed(0)
    changes = {"num_stems": 1, "freqs_per_bands": (205,) * 5, "stft_n_fft": 2048, "stft_win_length": 2048}
    config = BSRoFormerConfig(**HYPER_PARAMETERS | changes | {"stft_hop_length": 1024})
    return BSRoFormer(config, identity(["vocals"], name="quick", chunk_samples=352_800)).eval()


class RunsCode:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def convert_to(folder: Path, saved: dict[str, Any], name: str = "x.ckpt") -> tuple[Path, str]:
    """Save a checkpoint and convert it. Returns the converted file and the checkpoint's sha256."""
    folder.mkdir(exist_ok=True)
    torch.save(saved, folder / name)
    target = (folder / name).with_suffix(".safetensors")
    convert(folder / name, target)
    return target, hashlib.sha256((folder / name).read_bytes()).hexdigest()
