"""How much longer songs take beside another busy process, as Markdown.

    PYTHONPATH=. python tests/bench/beside_work.py MODEL... [--chunks 6] [--rounds 3] [--precision P] [--attention A]

The busy process spins on one thread at the same priority. Each round separates chunks of noise once without it and once
beside it, through the engine, as the command line does; times are medians. Weights are random unless --model-path names
real ones. The machine must do nothing else meanwhile. Not for Windows, which cannot stop a process for a while.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import save_file

from separation import EngineOptions, Separator, load_model  # before PyTorch, which reads a variable that this sets
from separation.checkpoints.build import random_weights
from separation.device import choose_precision
from separation.engine.chunk_plan import ChunkPlan

import torch  # isort: skip

CPU = torch.device("cpu")


@contextmanager
def busy_process() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that spins; it is stopped at first."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        process.send_signal(signal.SIGSTOP)
        try:
            yield process
        finally:
            process.kill()


def seconds_alone_and_beside(job: Callable[[], object], rounds: int) -> tuple[float, float]:
    """The median times of a job without and beside a busy process."""
    alone, beside = [], []
    with busy_process() as process:
        for _ in range(rounds):
            alone.append(seconds(job))
            process.send_signal(signal.SIGCONT)
            beside.append(seconds(job))
            process.send_signal(signal.SIGSTOP)
    return statistics.median(alone), statistics.median(beside)


def seconds(job: Callable[[], object]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def noise_of(plan: ChunkPlan, n_chunks: int) -> torch.Tensor:
    """A song of so many chunks, `[2, T]`."""
    n_samples = plan.chunk_hop * n_chunks
    while len(plan.starts(n_samples)) > n_chunks:
        n_samples -= plan.chunk_hop
    return torch.randn(2, max(1, n_samples), generator=torch.Generator().manual_seed(0)) * 0.1


def separator(model: str, checkpoint: Path | None, precision: str, attention: str) -> Separator:
    """A separator for one model on the CPU, with random weights if no checkpoint is given."""
    with TemporaryDirectory() as folder:
        if checkpoint is None:
            checkpoint = Path(folder) / "random.safetensors"
            save_file(random_weights(model), checkpoint)
        dtype = choose_precision(precision, CPU)
        return Separator.from_model(
            load_model(model, checkpoint=checkpoint, precision=dtype, attention=attention), options=EngineOptions()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--attention", default="auto")
    options = parser.parse_args()
    print("| model | s a chunk | beside a busy process | ratio |\n|---|---|---|---|")
    for name in options.models:
        engine = separator(name, options.model_path, options.precision, options.attention)
        (plan,) = engine.plans.values()
        noise = noise_of(plan, options.chunks)
        engine.separate(noise_of(plan, 2))  # a warm-up
        alone, beside = seconds_alone_and_beside(lambda e=engine, n=noise: e.separate(n), options.rounds)
        per_chunk = [each / options.chunks for each in (alone, beside)]
        print(f"| `{name}` | {per_chunk[0]:.2f} | {per_chunk[1]:.2f} | {beside / alone:.2f} |", flush=True)


if __name__ == "__main__":
    main()
