"""Print the size of models' ONNX files, and the time for a chunk in ONNX Runtime and here.

PYTHONPATH=. python tests/bench/onnx_speed.py FOLDER MODEL... [--model-path FILE] [--rounds 3] [--cpu-time]

Weights are random unless --model-path names real ones. Missing files are written to FOLDER. Each round runs each
program once; the time is the median over the rounds. On a busy machine, use --cpu-time: it counts the CPU time of all
threads.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from safetensors.torch import save_file

from separation.checkpoints.build import random_weights
from separation.checkpoints.export import export, spectrogram_of
from separation.checkpoints.load import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print("| model | chunk | MB | ONNX Runtime | PyTorch fp32 | bf16 |\n|---|---|---|---|---|---|")
    for name in options.models:
        print(row(name, options.folder, options.model_path, options.rounds, clock), flush=True)


def row(name: str, folder: Path, checkpoint: Path | None, rounds: int, clock: Callable[[], float]) -> str:
    if checkpoint is None:
        checkpoint = folder / f"{name}.safetensors"
        if not checkpoint.exists():
            save_file(random_weights(name), checkpoint)
    path = folder / f"{name}.onnx"
    if not path.exists():
        print(export(name, path, checkpoint=checkpoint))
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = torch.get_num_threads()
    threads.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads must not spin
    session = onnxruntime.InferenceSession(path, threads, providers=["CPUExecutionProvider"])
    models = {dtype: load_model(name, checkpoint=checkpoint, precision=dtype) for dtype in ("fp32", "bf16")}
    model = models["fp32"]
    length = model.input_samples(model.chunk_samples) or model.chunk_samples
    chunk = torch.randn(1, model.channels, length) * 0.1
    transform = model.transform(length)
    inputs = {"waveform": chunk.numpy()}
    if transform is not None:
        inputs["spectrogram"] = spectrogram_of(chunk, transform).numpy()
    inputs = {value.name: inputs[value.name] for value in session.get_inputs()}
    jobs: dict[str, Callable[[], object]] = {"ONNX Runtime": lambda: session.run(None, inputs)}
    jobs |= {dtype: lambda model=model: model(chunk) for dtype, model in models.items()}
    seconds: dict[str, list[float]] = {job: [] for job in jobs}
    with torch.inference_mode():
        for _ in range(rounds):
            for job, run in jobs.items():
                started = clock()
                run()
                seconds[job].append(clock() - started)
    times = " | ".join(f"{statistics.median(values):.2f}" for values in seconds.values())
    return f"| `{name}` | {length / model.sample_rate:.1f} s | {path.stat().st_size / 1e6:.0f} | {times} |"


if __name__ == "__main__":
    main()
