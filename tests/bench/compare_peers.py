"""This engine beside other programs: the same weights, the same song and the same chunks, one variable at a time.

    python tests/bench/compare_peers.py --folder DIR --install     # once: a venv a program, from the package index
    python tests/bench/compare_peers.py --folder DIR --check       # measure, then check that all do the same work

The BS-RoFormer is the full-size viperx layout with random weights, in chunks of 8 s with 4 s of overlap; with
`--htdemucs FILE.safetensors`, its genuine weights, that model is measured too, in its chunks of 7.8 s with a quarter of
overlap. Each program runs in its own process, through its public API, from a file to files; a round runs each of
them once. Every call of a model is timed, after a warm-up on a little noise. Results are appended to DIR/results.jsonl.
The tables summarise the whole file, except runs during which other processes were busy. Linux only.
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
SAMPLE_RATE = 44100
ROFORMER, DEMUCS = "bs_roformer_viperx_1297", "htdemucs"
CHUNK_SECONDS, OVERLAP_SECONDS = 8, {ROFORMER: 4, DEMUCS: 2}  # Demucs' own default is a quarter of the chunk
CKPT = "model_bs_roformer_ep_317_sdr_12.9755.ckpt"  # audio-separator's name for the layout
PEAK = 0.85  # of the song: audio-separator scales louder ones down
PACKAGES = {
    "audio-separator": "audio-separator[cpu]==0.47.1",
    "pymss": "pymss==2.1.12",
    "demucs": "demucs==4.1.0",
    "demucs-infer": "demucs-infer==4.4.0",
}
TORCH = "torch==2.11.0"  # the same for all
DISTURBED = 0.2  # cores in use by other processes, on average: a run with more does not count


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A program at one setting."""

    name: str
    program: str  # a key of PACKAGES, or "ours"
    model: str
    setting: str  # for the table
    autocast: bool = False  # whether bfloat16 autocast is put around the program from outside
    options: dict[str, Any] = field(default_factory=dict)


CONTENDERS = [
    Contender(name="ours", program="ours", model=ROFORMER, setting="default"),
    Contender(
        name="ours-int8", program="ours", model=ROFORMER, setting="--precision int8", options={"precision": "int8"}
    ),
    Contender(
        name="ours-itemwise",
        program="ours",
        model=ROFORMER,
        setting="without a compiler (--attention itemwise)",
        options={"attention": "itemwise"},
    ),
    Contender(
        name="ours-fp32", program="ours", model=ROFORMER, setting="--precision fp32", options={"precision": "fp32"}
    ),
    Contender(name="audio-separator", program="audio-separator", model=ROFORMER, setting="default"),
    Contender(
        name="audio-separator-autocast",
        program="audio-separator",
        model=ROFORMER,
        setting="--use_autocast",
        options={"use_autocast": True},
    ),
    Contender(
        name="audio-separator-compile",
        program="audio-separator",
        model=ROFORMER,
        setting="--use_autocast and torch.compile",
        options={"use_autocast": True, "use_torch_compile": True},
    ),
    Contender(name="pymss", program="pymss", model=ROFORMER, setting="default"),
    Contender(name="pymss-autocast", program="pymss", model=ROFORMER, setting="within bf16 autocast", autocast=True),
    Contender(name="ours-htdemucs", program="ours", model=DEMUCS, setting="default"),
    Contender(
        name="ours-htdemucs-itemwise",
        program="ours",
        model=DEMUCS,
        setting="without a compiler (--attention itemwise)",
        options={"attention": "itemwise"},
    ),
    Contender(
        name="ours-htdemucs-fp32",
        program="ours",
        model=DEMUCS,
        setting="--precision fp32",
        options={"precision": "fp32"},
    ),
    Contender(name="demucs", program="demucs", model=DEMUCS, setting="shifts 0"),
    Contender(
        name="demucs-autocast", program="demucs", model=DEMUCS, setting="shifts 0, within bf16 autocast", autocast=True
    ),
    Contender(name="demucs-infer", program="demucs-infer", model=DEMUCS, setting="shifts 0"),
    Contender(
        name="demucs-infer-autocast",
        program="demucs-infer",
        model=DEMUCS,
        setting="shifts 0, within bf16 autocast",
        autocast=True,
    ),
]
FLOAT32 = ("audio-separator", "pymss", "demucs", "demucs-infer")  # contenders whose output must equal our float32


# ---------------------------------------------------------------------------------------------------------------------
# In a program's own process


@dataclass(frozen=True, kw_only=True)
class Job:
    """The task of a program's process, as JSON values."""

    program: str
    folder: str  # weights and configurations
    song: str
    output: str  # for the stems and the log
    warm_up_samples: int
    autocast: bool
    options: dict[str, Any]
    model: str
    weights: str
    network: dict[str, Any]  # the hyper-parameters


class Calls:
    """Records when a model is called, and with what."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.inputs: list[Any] = []
        self.first_output: Any = None

    def watch(self, model: Any) -> None:
        model.register_forward_pre_hook(self._before)
        model.register_forward_hook(self._after)

    def _before(self, _: Any, arguments: tuple[Any, ...]) -> None:
        self.inputs.append(arguments[0].detach().cpu().float().numpy())
        self._started = time.monotonic()

    def _after(self, _: Any, arguments: tuple[Any, ...], output: Any) -> None:
        self.seconds.append(time.monotonic() - self._started)
        if self.first_output is None:
            self.first_output = output.detach().cpu().float().numpy()

    def hops(self) -> list[int | None]:
        """Samples between the starts of neighbouring chunks; None if they do not overlap."""
        import numpy as np

        hops: list[int | None] = []
        for before, after in zip(self.inputs, self.inputs[1:], strict=False):
            before, after = (chunk.reshape(-1, chunk.shape[-1])[0] for chunk in (before, after))
            windows = np.lib.stride_tricks.sliding_window_view(before, 64)
            found = np.flatnonzero((windows == after[:64]).all(axis=1))
            hops.append(int(found[0]) if len(found) else None)
        return hops


def run_job(job: Job) -> dict[str, Any]:
    """Load a program's model, separate the song and record time and memory."""
    started = time.monotonic()
    import torch

    load: Callable[[Job], tuple[Any, Callable[[], None]]] = {
        "ours": _load_ours,
        "audio-separator": _load_audio_separator,
        "pymss": _load_pymss,
        "demucs": _load_demucs,
        "demucs-infer": _load_demucs,
    }[job.program]
    model, separate = load(job)
    loaded = time.monotonic()
    calls = Calls()
    with torch.autocast("cpu", torch.bfloat16) if job.autocast else contextlib.nullcontext():
        with torch.inference_mode():
            noise = torch.randn(1, 2, job.warm_up_samples) * 0.1
            if job.options.get("use_autocast"):
                with torch.autocast("cpu"):
                    model(noise)
            else:
                model(noise)
        calls.watch(model)
        ready, others_before = time.monotonic(), _others_seconds()
        separate()
        done, others = time.monotonic(), _others_seconds() - others_before
    import numpy as np

    np.savez(Path(job.output) / "first_chunk.npz", input=calls.inputs[0], output=calls.first_output)
    return {
        "load_seconds": loaded - started,
        "warm_up_seconds": ready - loaded,
        "separate_seconds": done - ready,
        "call_seconds": calls.seconds,
        "chunk_shapes": sorted({chunk.shape for chunk in calls.inputs}),
        "hops": calls.hops(),
        "peak_mib": _peak_mib(),
        "others_cores": others / (done - ready),
    }


def _peak_mib() -> int:
    """The peak memory of this process; `getrusage` would start at its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) >> 10


def _others_seconds() -> float:
    """CPU seconds that other processes have used since the machine started."""
    user, nice, system, _idle, _wait, *interrupts_and_stolen = map(
        int, Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    )
    busy = (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def _load_ours(job: Job) -> tuple[Any, Callable[[], None]]:
    sys.path.insert(0, str(PROJECT))
    from separation import EngineOptions, Separator, load_model
    from separation.device import choose

    options = {"precision": "auto", "attention": "auto"} | job.options
    model = load_model(
        job.model,
        checkpoint=job.weights,
        device="cpu",
        precision=choose("cpu", options["precision"]).precision,
        attention=options["attention"],
    )
    separator = Separator.from_model(
        model, options=EngineOptions(chunk_seconds=CHUNK_SECONDS, overlap_seconds=OVERLAP_SECONDS[job.model])
    )
    return model, lambda: _no_result(separator.separate_file(job.song, job.output))


def _load_audio_separator(job: Job) -> tuple[Any, Callable[[], None]]:
    from audio_separator.separator import Separator

    separator = Separator(
        log_level=logging.WARNING,
        model_file_dir=job.folder,
        output_dir=job.output,
        mdxc_params={
            "segment_size": 801,  # frames of 441 samples, from its YAML; used for songs below 10 s
            "override_model_segment_size": False,
            "batch_size": 1,
            "overlap": 2,  # it is a divisor of the chunk
            "pitch_shift": 0,
        },
        **job.options,
    )
    separator.load_model(Path(job.weights).name)
    return separator.model_instance.model_run, lambda: _no_result(separator.separate(job.song))


def _load_pymss(job: Job) -> tuple[Any, Callable[[], None]]:
    from pymss import MSSeparator

    separator = MSSeparator(
        model_type="bs_roformer",
        model_path=job.weights,
        config_path=str(Path(job.weights).with_suffix(".yaml")),
        device="cpu",
        store_dirs={"vocals": job.output},
        inference_params={"batch_size": 1},
    )

    def separate() -> None:
        if not separator.process_folder(job.song):
            raise RuntimeError("pymss separated nothing: see its log")

    return separator.model, separate


def _load_demucs(job: Job) -> tuple[Any, Callable[[], None]]:
    """Both packages have the same API. Their files name the network's class, so each package gets its own file."""
    import torch
    from safetensors.torch import load_file

    package = job.program.replace("-", "_")
    api = importlib.import_module(f"{package}.api")
    network = importlib.import_module(f"{package}.htdemucs").HTDemucs
    repository = Path(job.folder) / job.program
    file = repository / "genuine.th"
    if not file.exists():
        repository.mkdir(exist_ok=True)
        arguments = job.network | {"segment": Fraction(job.network["segment"])}
        package_of_weights = {"klass": network, "args": (), "kwargs": arguments, "state": load_file(job.weights)}
        torch.save(package_of_weights, file)
    separator = api.Separator(device="cpu", model=file.stem, repo=repository, shifts=0, overlap=0.25)

    def separate() -> None:
        _, stems = separator.separate_audio_file(Path(job.song))
        for stem, samples in stems.items():
            api.save_audio(
                samples, str(Path(job.output) / f"{stem}.wav"), samplerate=SAMPLE_RATE, as_float=True, clip="none"
            )

    return separator._model, separate


def _no_result(_: object) -> None:
    pass


# ---------------------------------------------------------------------------------------------------------------------
# In the project's own process


def main() -> None:
    """Install, measure, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="for venvs, weights and results")
    parser.add_argument("--install", action="store_true", help="make the programs' venvs in DIR with pip, and stop")
    parser.add_argument("--htdemucs", type=Path, metavar="FILE", help="genuine weights of htdemucs, .safetensors")
    parser.add_argument("--seconds", type=int, default=30, help="of music (default: 30)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3; 0 only prints what was measured before")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help=", ".join(c.name for c in CONTENDERS))
    parser.add_argument("--check", action="store_true", help="compare the float32 programs' first chunk with ours")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job = Job(**json.loads(options.job))
        answer = run_job(job)
        (Path(job.output) / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
        return
    folder = options.folder.resolve()
    if options.install:
        install(folder)
        return
    sys.path.insert(0, str(PROJECT))
    wanted = [
        c for c in CONTENDERS if (c.name in options.only if options.only else c.name != "audio-separator-compile")
    ]
    wanted = [c for c in wanted if c.model != DEMUCS or options.htdemucs]
    prepare(folder, options.seconds)
    for number in range(options.rounds):
        for contender in wanted:
            result = measure(contender, folder, options.seconds, options.htdemucs)
            note(folder, result)
            print(f"round {number + 1}, {contender.name}: {summary(result)}", file=sys.stderr, flush=True)
    if options.check:
        for contender in wanted:
            if contender.name in FLOAT32:
                note(folder, check(contender, folder, options.htdemucs))
    for line in tables(folder):
        print(line)


def install(folder: Path) -> None:
    """Create a venv for each program, with the same PyTorch."""
    for program, requirement in PACKAGES.items():
        venv = folder / "venvs" / program
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        more = ["safetensors", "numpy"]  # for the weights, and for this file
        subprocess.run([str(venv / "bin" / "python"), "-m", "pip", "install", requirement, TORCH, *more], check=True)


def prepare(folder: Path, seconds: int) -> None:
    """Write the random checkpoint, its YAML in the community's form, audio-separator's list of files, and the song.

    Existing files stay.
    """
    import numpy as np
    import soundfile
    import torch

    from separation.checkpoints.build import random_weights
    from separation.checkpoints.catalogue import CONFIGS

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / CKPT
    if not checkpoint.exists():
        torch.save(random_weights(ROFORMER), checkpoint)
    published = (CONFIGS / f"{ROFORMER}.yaml").read_text(encoding="utf-8")
    sections = published[published.index("audio:") :]
    inference = "inference:\n  batch_size: 1\n  dim_t: 801\n  num_overlap: 2\n"
    checkpoint.with_suffix(".yaml").write_text(sections + inference, encoding="utf-8")
    kinds = ("vr", "mdx", "mdx_vip", "demucs", "mdx23c", "mdx23c_vip", "roformer")
    known: dict[str, dict[str, Any]] = {
        f"{kind.removesuffix('_vip')}_download{'_vip' * kind.endswith('_vip')}_list": {} for kind in kinds
    }
    known["roformer_download_list"] = {"Roformer Model: BS-Roformer-Viperx-1297": {CKPT: f"{Path(CKPT).stem}.yaml"}}
    (folder / "download_checks.json").write_text(json.dumps(known), encoding="utf-8")
    song = song_path(folder, seconds)
    if not song.exists():
        samples, _ = soundfile.read(PROJECT / "weights" / "demo" / "song.flac", dtype="float32")
        samples = np.resize(samples, (seconds * SAMPLE_RATE, 2))
        soundfile.write(song, samples * np.float32(PEAK / np.abs(samples).max()), SAMPLE_RATE, subtype="FLOAT")


def song_path(folder: Path, seconds: int) -> Path:
    """The path of the song of that length."""
    return folder / f"song_{seconds}s.wav"


def measure(contender: Contender, folder: Path, seconds: int, htdemucs: Path | None) -> dict[str, Any]:
    """Run a contender once in a fresh process."""
    from separation.checkpoints.catalogue import read_config

    ours = contender.program == "ours"
    python = Path(sys.executable) if ours else folder / "venvs" / contender.program / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{contender.program} is not installed in {folder}: run this with --install first")
    output = folder / "stems" / contender.name
    output.mkdir(parents=True, exist_ok=True)
    whole_chunk = contender.model == DEMUCS or contender.options.get("use_torch_compile")  # it compiles for one length
    job = Job(
        program=contender.program,
        folder=str(folder),
        song=str(song_path(folder, seconds)),
        output=str(output),
        warm_up_samples=read_config(contender.model).chunk_samples if whole_chunk else SAMPLE_RATE,
        autocast=contender.autocast,
        options=contender.options,
        model=contender.model,
        weights=str(htdemucs.resolve() if htdemucs and contender.model == DEMUCS else folder / CKPT),
        network=read_config(DEMUCS).hyper_parameters,
    )
    with (output / "log.txt").open("w", encoding="utf-8") as log:
        started = time.monotonic()
        ran = subprocess.run([str(python), __file__, "--folder", str(folder), "--job", json.dumps(asdict(job))],
                             cwd=output, stdout=log, stderr=log, check=False)  # fmt: skip
        elapsed = time.monotonic() - started
    if ran.returncode != 0:
        raise SystemExit(f"{contender.name} failed: see {output / 'log.txt'}")
    answer = json.loads((output / "answer.json").read_text(encoding="utf-8"))
    return {"name": contender.name, "audio_seconds": seconds, "process_seconds": elapsed, **answer}


def check(contender: Contender, folder: Path, htdemucs: Path | None) -> dict[str, Any]:
    """The SDR of a program's first chunk against our float32 output for the same chunk."""
    import numpy as np
    import torch

    from separation import load_model
    from separation.evaluation.metrics import sdr

    found = np.load(folder / "stems" / contender.name / "first_chunk.npz")
    chunk, theirs = torch.from_numpy(found["input"]), torch.from_numpy(found["output"])
    weights = htdemucs if contender.model == DEMUCS else folder / CKPT
    model = load_model(contender.model, checkpoint=weights)
    with torch.inference_mode():
        ours = model(chunk)
    return {"name": contender.name, "sdr_db": sdr(ours.reshape(2, -1), theirs.reshape(2, -1))}


def note(folder: Path, result: dict[str, Any]) -> None:
    """Append to the results."""
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def summary(result: dict[str, Any]) -> str:
    """A run in one line."""
    calls = result["call_seconds"]
    return (
        f"{result['separate_seconds']:.1f} s, of which {len(calls)} chunks of {statistics.median(calls):.2f} s "
        f"({result['chunk_shapes'][0][-1]} samples, hops {sorted(set(result['hops']), key=str)}); "
        f"process {result['process_seconds']:.1f} s; others had {result['others_cores']:.2f} cores"
    )


def tables(folder: Path) -> Iterator[str]:
    """A table of medians for each model and song length."""
    file = folder / "results.jsonl"
    results = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    scores = {result["name"]: result["sdr_db"] for result in results if "sdr_db" in result}
    runs = [result for result in results if result.get("others_cores", DISTURBED) < DISTURBED]
    yield f"{sum('others_cores' in result for result in results) - len(runs)} disturbed runs are left out"
    for model in (ROFORMER, DEMUCS):
        contenders = [c for c in CONTENDERS if c.model == model]
        for seconds in sorted({run["audio_seconds"] for run in runs}):
            rows = {
                c.name: [run for run in runs if run["name"] == c.name and run["audio_seconds"] == seconds]
                for c in contenders
            }
            if not any(rows.values()):
                continue
            yield f"\n{model}, {seconds} s of music\n"
            yield "| program | setting | s a chunk | ratio | chunks | s the song | ratio | MiB | runs | SDR dB |"
            yield "|---|---|---|---|---|---|---|---|---|---|"
            mine = rows[contenders[0].name]
            for contender in contenders:
                if not (measured := rows[contender.name]):
                    continue
                chunk, song = _chunk_seconds(measured), _song_seconds(measured)
                cells = [
                    PACKAGES.get(contender.program, "this engine"),
                    contender.setting,
                    f"{chunk:.2f}",
                    f"{chunk / _chunk_seconds(mine):.2f}" if mine else "-",
                    str(len(measured[-1]["call_seconds"])),
                    f"{song:.1f}",
                    f"{song / _song_seconds(mine):.2f}" if mine else "-",
                    str(max(run["peak_mib"] for run in measured)),
                    str(len(measured)),
                    f"{scores[contender.name]:.0f}" if contender.name in scores else "",
                ]
                yield f"| {' | '.join(cells)} |"


def _chunk_seconds(runs: list[dict[str, Any]]) -> float:
    """The time of a model's call: the median of each run's median."""
    return statistics.median(statistics.median(run["call_seconds"]) for run in runs)


def _song_seconds(runs: list[dict[str, Any]]) -> float:
    """The time from the song's file to the stems' files, with the model loaded."""
    return statistics.median(run["separate_seconds"] for run in runs)


if __name__ == "__main__":
    main()
