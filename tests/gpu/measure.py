"""Measure this engine and its peers on a GPU, in one run: `python tests/gpu/measure.py --seconds 300`.

It runs tests/engine/test_on_gpu.py, then measures, the most valuable rows first: correctness in fp16, BS-RoFormer
viperx, Demucs, other RoFormers, MDX23C and SCNet, a card of 6 GiB, the largest kernels, the cold start, and more peers.
Each row is appended to RUN/results.jsonl at once. The Markdown tables for docs/benchmarks come last, also in
RUN/tables.md. Models have random weights, the same for all programs. A missing program gives a row that says so.

    python tests/gpu/measure.py --tiny --device cpu    # a dry run: every step that a CPU can do, with small models
    python tests/gpu/measure.py --only viperx,cold     # some steps
    python tests/gpu/measure.py --tables results.jsonl # the tables of an earlier run

A machine without a network, but with Python 3.12, PyTorch 2.11, Triton, NumPy, einops, PyYAML, safetensors and pytest,
needs a few more wheels. Download them elsewhere, in the project's root:

    printf '/.whl/\\n/.site/\\n' >> .git/info/exclude
    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl \\
        soundfile==0.14.0 cffi pycparser demucs==4.1.0 julius platformdirs filelock \\
        pymss-core==0.1.14 unblend==1.0.0 audio-separator==0.47.1 bs-roformer-infer==0.1.5 \\
        rotary-embedding-torch==0.9.1 beartype==0.23.1

Then, on the machine, with .whl in the checkout:

    python -m pip install --no-index --no-deps --no-compile --target .site .whl/*.whl
    PYTHONPATH=$PWD/.site python tests/gpu/measure.py --seconds 300

The engine needs the first line of wheels and rotary-embedding-torch. MelBand-RoFormer also needs librosa and its
dependencies. The networks of pymss-core and Unblend need only PyTorch, NumPy and PyYAML; those of audio-separator and
bs-roformer-infer (MSST's) also need the last line.
"""

import argparse
import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

TESTS = "tests/engine/test_on_gpu.py"
HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
sys.path[:0] = [str(PROJECT), str(HERE)]

from results import Results, read, tables  # noqa: E402

MOST_MAKERS = 6  # processes that make random weights
TESTS_SECONDS = 120
SILENT_SECONDS = 90  # without a new row, after which a step counts as hung
GRACE_SECONDS = 15  # for whatever is running when the time is up
POLL_SECONDS = 0.2
RESTARTS = 3
TIME_UP = "the time was up"


@dataclass(frozen=True)
class Run:
    """One run of the command."""

    device: str
    tiny: bool
    folder: Path  # results, logs and signals
    weights: Path
    started: float  # on the monotonic clock, which all processes share
    until: float  # no step starts after this
    only: tuple[str, ...]  # empty: all

    def results(self) -> Results:
        """The results file; each row names the device."""
        name = device_name(self.device)
        return Results(self.folder / "results.jsonl", device=name, started=self.started, clock=time.monotonic)

    def arguments(self) -> list[str]:
        """The arguments that give another process the same run."""
        values = ["--device", self.device, "--run", self.folder, "--weights", self.weights, "--started", self.started]
        values += ["--until", self.until]
        return [*map(str, values), *(["--tiny"] if self.tiny else [])]

    def start(self, script: str, *arguments: str, log: str | None = None) -> subprocess.Popen[bytes]:
        """Start a script of this folder in its own process group; its output goes to the log, if there is one."""
        command = [sys.executable, str(HERE / script), *self.arguments(), *arguments]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context((self.folder / log).open("wb")) if log else None
            return subprocess.Popen(
                command, env=environment(), stdout=output, stderr=output and subprocess.STDOUT, start_new_session=True
            )


def device_name(device: str) -> str:
    """The GPU's name from the driver, without creating a context; without a GPU, the CPU's."""
    if not device.startswith("cuda"):
        return platform.processor() or platform.machine()
    index = device.partition(":")[2] or "0"
    if shutil.which("nvidia-smi") is None:
        return device
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", index]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def environment() -> dict[str, str]:
    """The environment for child processes: PYTHONPATH is this project, then the caller's."""
    path = os.pathsep.join(filter(None, [str(PROJECT), str(HERE), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "SEPARATION_CACHE": "off", "OMP_WAIT_POLICY": "passive"}
    return os.environ | own


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it may have ended on its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    temporary = Path(tempfile.gettempdir())
    parser.add_argument("--seconds", type=float, default=420, help="no step begins later (default: 420)")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="small models and short songs: a dry run")
    parser.add_argument("--only", default="", metavar="STEP,STEP", help="leave the tests and all other steps out")
    parser.add_argument("--run", type=Path, help="folder of the results (default: $OUT, else a temporary one)")
    parser.add_argument("--weights", type=Path, help="folder of the random weights, some 5 GB (default: temporary)")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="only print the tables of a file of results")
    parser.add_argument("--make", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--steps", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.monotonic(), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tables:
        print("\n".join(tables(read(options.tables))))
        return
    size = "_tiny" if options.tiny else ""
    run = Run(
        device=options.device,
        tiny=options.tiny,
        folder=(options.run or Path(os.environ.get("OUT") or temporary / "gpu_measure")).resolve(),
        weights=(options.weights or temporary / f"gpu_measure_weights{size}").resolve(),
        started=options.started,
        until=options.until or options.started + options.seconds,
        only=tuple(filter(None, options.only.split(","))),
    )
    if options.make:
        make(run, options.make)
    elif options.steps:
        measure(run, options.steps)
    else:
        sys.exit(orchestrate(run))


def make(run: Run, names: list[str]) -> None:
    """Write random weights; runs in its own process."""
    import torch

    from workloads import Workloads

    torch.set_num_threads(1)
    Workloads(run.weights, torch.device("cpu"), tiny=run.tiny).make(names)


def measure(run: Run, names: list[str]) -> None:
    """Run these steps; runs in its own process."""
    import torch

    from steps import Bench, run_steps
    from workloads import Workloads

    device = torch.device(run.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    run_steps(Bench(Workloads(run.weights, device, tiny=run.tiny), run.results(), run.folder, run.until), names)


def orchestrate(run: Run) -> int:
    """Run the tests while weights are made, then the steps, then print the tables. Returns 0 if nothing failed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    for path in (run.folder / "results.jsonl", run.folder / "begun", *run.folder.glob("unblend_*.*")):
        path.unlink(missing_ok=True)
    results = run.results()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        makers = start_makers(run)
        processes += makers
        if not run.only or "demucs" in run.only:
            processes += start_unblend(run)
        if not run.only:
            run_tests(run, results)
        for maker in makers:
            if maker.wait() != 0:
                results.add("make", what="random weights", error="a process that makes them failed: see make_*.txt")
        supervise(run, results, processes)
    finally:
        for process in processes:
            end(process)
    lines = list(tables(results.rows()))
    (run.folder / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(["", *lines, "", f"took {time.monotonic() - run.started:.0f} s"]), flush=True)
    return int(any("error" in row or row.get("failed") for row in results.rows()))


def start_makers(run: Run) -> list[subprocess.Popen[bytes]]:
    """Start processes that make the weights, each for its share of the models."""
    from names import MODELS

    count = min(MOST_MAKERS, os.cpu_count() or 1)
    shares = [MODELS[index::count] for index in range(count)]
    return [run.start("measure.py", "--make", *share, log=f"make_{index}.txt") for index, share in enumerate(shares)]


def start_unblend(run: Run) -> list[subprocess.Popen[bytes]]:
    """Start Unblend's processes, which compile while the tests run."""
    from names import UNBLEND_BATCH_SIZES

    processes = []
    for size in UNBLEND_BATCH_SIZES[:1] if run.tiny else UNBLEND_BATCH_SIZES:
        name = device_name(run.device)
        arguments = ["--batch-size", str(size), "--name", name]
        processes.append(run.start("unblend_process.py", *arguments, log=f"unblend_{size}.txt"))
        (run.folder / f"unblend_{size}.started").touch()
    return processes


def run_tests(run: Run, results: Results) -> None:
    """tests/engine/test_on_gpu.py; the row counts passed, failed and skipped tests."""
    report, log = run.folder / "tests.xml", run.folder / "tests.txt"
    command = [
        sys.executable,
        "-m",
        "pytest",
        TESTS,
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "required_plugins=",
        "-o",
        "addopts=-m 'not slow'",  # in one process, without plugins
        f"--junitxml={report}",
    ]
    report.unlink(missing_ok=True)
    try:
        with log.open("wb") as output:
            subprocess.run(
                command,
                cwd=PROJECT,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=TESTS_SECONDS,
                check=False,
            )
    except subprocess.TimeoutExpired:
        results.add("tests", what=TESTS, error=f"not done after {TESTS_SECONDS} s: see tests.txt")
        return
    if not report.exists():
        results.add("tests", what=TESTS, error=f"pytest made no report: {log.read_text()[-300:]}")
        return
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        case.get("name", "") for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    results.add("tests", passed=passed, failed=len(failed), skipped_tests=skipped, names=failed)


def supervise(run: Run, results: Results, processes: list[subprocess.Popen[bytes]]) -> None:
    """Run the steps in a process. If a step crashes it or hangs, go on with the next step in another process."""
    from names import STEPS

    left = [name for name in STEPS if not run.only or name in run.only]
    for _ in range(RESTARTS):
        process = run.start("measure.py", "--steps", *left)
        processes.append(process)
        why = watch(run, process, results.path)
        begun = (run.folder / "begun").read_text(encoding="utf-8").split() if (run.folder / "begun").exists() else []
        if why is None:
            return
        reached = [name for name in left if name in begun]
        if not reached:
            results.add("steps", what="all", error=f"no step began: {why}")
            return
        results.add(reached[-1], what="the rest of the step", **{"skipped" if why == TIME_UP else "error": why})
        left = left[left.index(reached[-1]) + 1 :]
        if not left or time.monotonic() > run.until:
            return


def watch(run: Run, process: subprocess.Popen[bytes], results: Path) -> str | None:
    """Wait for the steps' process. Returns why it failed, or None."""
    size, changed = -1, time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        if results.exists() and results.stat().st_size != size:
            size, changed = results.stat().st_size, now
        if now > run.until + GRACE_SECONDS:
            end(process)
            return TIME_UP
        if now > changed + SILENT_SECONDS:
            end(process)
            return f"no new figure for {SILENT_SECONDS} s: it hung"
        time.sleep(POLL_SECONDS)
    return None if process.returncode == 0 else f"the process ended with {process.returncode}"


if __name__ == "__main__":
    main()
