"""An MDX-Net gives what ONNX Runtime gives for the same file, and a song what its authors' program gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from separation import CheckpointError, Separator, load_model
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
from separation.engine.chunk_plan import ChunkPlan
from separation.engine.chunking import ReadyModel, separate
from separation.engine.options import EngineOptions
from separation.engine.song_waveforms import Samples
from separation.evaluation.metrics import sdr
from separation.models.mdx_net import MDXNet

onnx = pytest.importorskip("onnx", reason="needs onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

from helpers.mdx_nets import AUDIO, SMALL, MDXNetGraph, small_mdx_net  # noqa: E402  # needs onnx

NAMES = [f"mdx_net_{name}" for name in ("kim_vocal_2", "voc_ft", "inst_hq_3", "inst_hq_4", "inst_hq_5", "karaoke_2")]


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def by_onnxruntime(path: Path, spectrum: Tensor) -> Tensor:
    """The spectrogram `[B, C, F, N]` that the file's network gives, complex as the mixture's."""
    parts = torch.view_as_real(spectrum).permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()
    (found,) = onnxruntime.InferenceSession(path).run(None, {"input": parts.numpy()})
    return torch.view_as_complex(torch.from_numpy(found).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2).contiguous())


def chunk_by_onnxruntime(path: Path, chunk: Tensor, bins: int) -> Tensor:
    """A chunk `[C, T]` through PyTorch's own transforms and ONNX Runtime, as in Ultimate Vocal Remover."""
    window = torch.hann_window(AUDIO["n_fft"])
    transform: dict[str, Any] = {"n_fft": AUDIO["n_fft"], "hop_length": AUDIO["hop_length"], "window": window}
    spectrum = torch.stft(chunk, **transform, return_complex=True)
    kept = spectrum[None, :, :bins].clone()
    kept[:, :, :3] = 0
    estimate = torch.zeros_like(spectrum)
    estimate[:, :bins] = by_onnxruntime(path, kept)[0]
    return torch.istft(estimate, **transform)


@pytest.mark.parametrize("form", [{}, {"folded": False}, {"bias": True, "copies": True}], ids=str)
@pytest.mark.parametrize("sizes", [{}, {"scales": 3, "layers": 1, "kernel": 5}, {"features": 4, "narrow": 8}], ids=str)
def test_a_chunk_equals_onnx_runtimes(tmp_path: Path, form: dict, sizes: dict) -> None:
    model = small_mdx_net(tmp_path, compensate=1.25, form=form, **sizes)
    chunk = torch.randn(2, 2, model.input_samples(1)) * 0.1
    with torch.inference_mode():
        got = model(chunk)
    expected = torch.stack([chunk_by_onnxruntime(tmp_path / "small.onnx", each, SMALL["bins"]) for each in chunk])
    assert got.shape == (2, 1, *chunk.shape[1:])
    assert_close(got[:, 0], 1.25 * expected)


def test_a_song_equals_chunks_without_their_margins(tmp_path: Path) -> None:
    """As KUIELAB's own inference: chunks with margins of half a window, and silence around the song."""
    model, path = small_mdx_net(tmp_path), tmp_path / "small.onnx"
    kept, margin = model.chunk_samples, AUDIO["n_fft"] // 2
    assert kept == 16 * 15 - 80
    mixture = torch.randn(2, 5 * kept) * 0.1
    padded = torch.nn.functional.pad(mixture, (margin, margin))
    chunks = [padded[:, start : start + kept + 2 * margin] for start in range(0, mixture.shape[-1], kept)]
    expected = torch.cat([chunk_by_onnxruntime(path, each, SMALL["bins"])[:, margin:-margin] for each in chunks], -1)
    plan = ChunkPlan(kept, 0, model.reflects_border, model.input_samples)
    for batch_size in (1, 3):
        blocks = separate(ReadyModel(model, 1, batch_size), Samples.of(mixture), plan)
        assert_close(torch.cat(list(blocks), dim=-1)[0], expected)


def test_a_song_of_any_length_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    model = small_mdx_net(tmp_path)
    for length in (1, 50, 1234):
        mixture = torch.randn(2, length) * 0.1
        found = [
            Separator.from_model(model, options=EngineOptions(batch_size=size)).separate(mixture)["vocals"]
            for size in (1, 4)
        ]
        assert found[0].shape == mixture.shape
        assert_close(found[1], found[0])


@pytest.mark.parametrize("precision, decibels", [(torch.bfloat16, 25), (torch.float16, 45)])
def test_half_precision_stays_close_to_float32(tmp_path: Path, precision: torch.dtype, decibels: float) -> None:
    model = small_mdx_net(tmp_path)
    chunk = torch.randn(1, 2, model.input_samples(1)) * 0.1
    with torch.inference_mode():
        exact = model(chunk)
        model.prepare(precision)
        assert sdr(exact, model(chunk)) > decibels


@pytest.mark.parametrize(
    "audio, message",
    [
        ({"chunk_size": 165}, "chunk_size 165 and n_fft 80 are not a whole number of 16"),
        ({"chunk_size": 176}, "17 frames .* must be multiples of 4"),
        ({"n_fft": 48, "chunk_size": 192}, "dim_f at most 25"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(tmp_path: Path, audio: dict, message: str) -> None:
    path = MDXNetGraph().write(tmp_path / "small.onnx")
    document = {"stems": ["vocals"], "audio": AUDIO | audio}
    path.with_suffix(".yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


@pytest.mark.parametrize("name", [*NAMES, "mdx_net_reverb_hq_foxjoy"])
def test_the_public_checkpoints_have_their_published_size(name: str) -> None:
    """The files have some kilobytes more than the weights, for names and the graph."""
    description = read_config(name)
    model = build(description, ())
    assert isinstance(model, MDXNet) and description.files[0].bytes is not None
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert 0 < description.files[0].bytes - weights < 100_000
    assert model.config.frames == (512 if "reverb" in name else 256)
