"""The figures of the engine's speed are consistent."""

import json
import mmap
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.fused import needs_fused
from helpers.small_model import HYPER_PARAMETERS, chunks, small_model, write_yaml
from separation.cli.main import main
from separation.evaluation import bench as bench_module
from separation.models.attention import choose_attention, itemwise_attention
from separation.models.layers import Attention


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads would only wait for each other while tests run in parallel."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def engine(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    """The output of `bench --json`."""
    assert main(["bench", "--device", "cpu", "--seconds", "5", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_engines_figures_are_consistent(capsys: pytest.CaptureFixture[str]) -> None:
    chunks = ("--chunk-size", "4", "--overlap", "1")
    found = engine(capsys, "--recipe", "demo", "--stems", "all_4", "--precision", "fp32", *chunks)
    expected = choose_attention("auto", torch.device("cpu"), torch.float32).name
    assert found["models"] == {"demo": expected} and found["weights"] == "own"
    assert found["chunk_seconds"] == {"demo": 4} and found["overlap_seconds"] == {"demo": 1}
    assert found["chunks"] == 2  # from -1 to 3 s and from 2 to 6 s: 5 s of music with 1 s of reflection at both ends
    assert len(found["run_seconds"]) == 3
    assert found["median_seconds"] == pytest.approx(statistics.median(found["run_seconds"]), abs=1e-3)
    assert found["mean_seconds"] == pytest.approx(statistics.mean(found["run_seconds"]), abs=1e-3)
    assert found["times_realtime"] == pytest.approx(5 / found["median_seconds"], rel=0.01)
    assert found["seconds_per_chunk"] == pytest.approx(found["median_seconds"] / 2, rel=0.01)
    speed = found["gflop"] / found["median_seconds"]
    assert found["ceiling_share"] == pytest.approx(speed / found["ceiling_gflop_per_second"], rel=0.02, abs=1e-3)
    # 0 if earlier tests in this process needed more memory, which is reused.
    assert 0 <= found["memory_above_model_mib"] < found["peak_memory_mib"]
    assert found["sdr_db"]["demo"] > 90  # float32 against float32, by another attention
    assert "device cpu (requested), precision fp32" in found["device"]


@pytest.mark.slow
def test_attention_batch_size_and_precision_are_those_requested(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--precision", "bf16", "--attention", "einsum", "--batch-size", "2")
    found = engine(capsys, "--recipe", "demo", "--chunk-size", "4", "--overlap", "1", "--runs", "1", *options)
    assert found["models"] == {"demo": "einsum"} and found["batch_size"] == 2
    assert 25 < found["sdr_db"]["demo"] < 80
    assert "precision bf16" in found["device"]


@pytest.mark.slow
def test_a_model_without_a_checkpoint_is_measured_with_random_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"freqs_per_bands": [25] * 41, "stft_n_fft": 2048, "stft_win_length": 2048, "stft_hop_length": 1024}
    path = write_yaml(tmp_path, model=HYPER_PARAMETERS | sizes)
    options = ["--random-weights", "--device", "cpu", "--precision", "fp32", "--seconds", "1", "--runs", "1"]
    assert main(["bench", "--model-name", str(path), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines[:9]] == [
        "models",
        "weights",
        "chunks",
        "runs",
        "times real-time",
        "s per chunk",
        "of the ceiling",
        "peak memory",
        "SDR to float32",
    ]
    assert (
        "small (attention sdpa)" in lines[0]
        and "random" in lines[1]
        and "0.09288 s with 0.04644 s of overlap" in lines[2]
    )


def test_the_operations_counted_are_those_of_products_and_attention() -> None:
    model = small_model()
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = itemwise_attention  # PyTorch does not count SDPA on the CPU
    _, operations, products = bench_module._reference(model, chunks(1024))
    frames, bands, stems, dim, heads, dim_head, width = 1024 // 16 + 1, 11, 2, 16, 2, 8, 12
    inner = heads * dim_head
    layer = dim * 3 * inner + dim * heads + inner * dim + 2 * dim * 4 * dim
    linear = 2 * frames * bands * layer  # over time and over bands
    linear += frames * bands * (width * dim + stems * (dim * 4 * dim + 4 * dim * 2 * width))
    assert sum(rows * size_in * size_out * count for (rows, size_in, size_out), count in products.items()) == linear
    attention = heads * 2 * dim_head * (bands * frames**2 + frames * bands**2)
    assert operations == 2 * (linear + attention)


@needs_fused
def test_the_ceiling_of_fused_layers_is_that_of_the_bare_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, model = torch.device("cpu"), small_model(dim=32, dim_head=32)
    monkeypatch.setattr(bench_module, "BARE_SECONDS", 0.05)
    assert bench_module._bare_speed([model], cpu) is None
    model.prepare(torch.float32, attention="fused")
    speed = bench_module._bare_speed([model], cpu)
    assert speed is not None and speed > 1e8
    assert bench_module._bare_speed([model], torch.device("cuda")) is None


def test_the_ceiling_is_measured_on_the_largest_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()

    def linear(x: torch.Tensor, weight: torch.Tensor) -> None:
        assert x.dtype == weight.dtype == torch.bfloat16
        seen.add((*x.shape, weight.shape[0]))

    monkeypatch.setattr(nn.functional, "linear", linear)
    products = {(100, 64, 64): 10, (100, 64, 32): 10, (10, 8, 8): 20}
    assert bench_module._products_speed(products, torch.bfloat16, torch.device("cpu")) > 0
    assert seen == {(100, 64, 64), (100, 64, 32)}  # the third is less than a tenth of all


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak of a process")
def test_the_peak_of_memory_counts_from_its_last_reset() -> None:
    device, mib = torch.device("cpu"), 2**20
    bench_module.reset_peak_memory(device)
    with mmap.mmap(-1, 400 * mib) as large:  # unlike a tensor's, this memory surely goes back to the system
        large.write(b"1" * (400 * mib))
    now, peak = bench_module.memory_bytes(device)
    assert peak - now > 350 * mib
    bench_module.reset_peak_memory(device)
    now, peak = bench_module.memory_bytes(device)
    assert 0 <= peak - now < 50 * mib


@pytest.mark.parametrize(
    "options, words",
    [
        (("--seconds", "0"), "seconds is 0: choose a whole number from 1 up"),
        (("--runs", "0"), "runs is 0: choose a whole number from 1 up"),
        (("--overlap", "8"), "must be smaller than the chunk of demo"),
        (("--model-name", "demo", "--model-path", "x.ckpt", "--random-weights"), "cannot be combined"),
        (("--cold-start", "--runs", "2"), "--cold-start does not take --runs"),
        (("--cold-start", "--attention", "einsum"), "--cold-start does not take --attention"),
    ],
)
def test_an_impossible_benchmark_is_a_one_line_error(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = [] if "--model-name" in options else ["--recipe", "demo"]
    assert main(["bench", *recipe, "--device", "cpu", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and words in captured.err
