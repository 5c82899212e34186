"""The measurements on the device, the most valuable first. Each step is a function of a `Bench`.

A step that fails loses only its own rows. Within a step, each model and each peer fails alone.
"""

import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import soundfile
import torch
from torch import Tensor, nn

import peers
from names import DEMO, DRUMSEP, HTDEMUCS, HTDEMUCS_FT, KIM, MDX23C, SCNET, SCNET_XL, SW, UNBLEND_BATCH_SIZES, VIPERX
from results import ENGINE, Results
from separation.engine.selection import Selection
from separation.engine.separator import SAMPLE_RATE, Separator
from separation.evaluation.cold_start import cold_start
from separation.evaluation.metrics import sdr
from separation.models import SeparationModel
from timing import (
    batch_milliseconds,
    busy_share,
    card_of,
    clean_memory,
    exact_float32,
    forget_peak,
    kernels,
    memory_mib,
    peak_mib,
    song_seconds,
)
from unblend_process import Signals, wait_for
from workloads import Workloads

LONG_SONG, SHORT_SONG, MANY_SONGS, BUSY_SONG = 300, 60, 120, 120  # seconds
SMALL_CARD = 6 << 30  # bytes
BATCH_SIZES_OF_PEERS = (8, 1)
SETTLE_SECONDS = 40
MESSAGE_CHARACTERS = 400
# The lowest SDR in dB of fp16 against the same network in float32.
WANTED_SDR = {VIPERX: 60, HTDEMUCS: 60, MDX23C: 40, KIM: 60, SW: 60}
CORRECT = (VIPERX, HTDEMUCS, MDX23C, KIM, SW, SCNET_XL, SCNET, DRUMSEP, DEMO)


@dataclass
class Bench:
    """What a step needs: the models, the results file and the time limit."""

    work: Workloads
    results: Results
    run_folder: Path
    until: float  # on the monotonic clock; nothing starts after this

    @property
    def device(self) -> torch.device:
        return self.work.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> torch.dtype:
        """fp16, or float32 in a dry run on a CPU, where fp16 is slow."""
        return torch.float16 if self.on_gpu else torch.float32

    @property
    def how(self) -> str:
        """The precision's name, for the tables."""
        return "fp16" if self.on_gpu else "fp32"

    @property
    def runs(self) -> int:
        """How often a song or a batch is timed."""
        return 1 if self.work.tiny else 3

    def seconds_left(self) -> float:
        return self.until - time.monotonic()

    @contextmanager
    def attempt(self, step: str, what: str) -> Iterator[None]:
        """Turn a failure in the block into a row, and go on. Frees the GPU's memory first."""
        clean_memory(self.device)
        try:
            yield
        except peers.MissingPeerError as e:
            self.results.add(step, what=what, missing=str(e))
        except Exception as e:  # any peer, kernel or driver may fail in any way; the row records it
            traceback.print_exc()
            self.results.add(step, what=what, error=f"{type(e).__name__}: {e}"[:MESSAGE_CHARACTERS])
            if self.on_gpu:
                torch.cuda.synchronize(self.device)  # raises again if the GPU can no longer be used

    def has_time(self, step: str, what: str) -> bool:
        """Whether there is time to start; adds a row if not."""
        if self.seconds_left() > 0:
            return True
        self.results.add(step, what=what, skipped="the time was up")
        return False


@dataclass(frozen=True)
class Song:
    """What the engine measured on songs, one after another."""

    seconds: list[float]
    chunks: int  # in each
    batch_size: int
    chunk_samples: int

    @property
    def chunk_ms(self) -> float:
        """The time for a song, divided by its chunks."""
        return statistics.median(self.seconds) * 1e3 / self.chunks


# ---------------------------------------------------------------------------------------------------------------------
# Parts of steps


class BatchSizes:
    """Records how many chunks a model gets at once."""

    def __init__(self, model: nn.Module) -> None:
        self._counts: Counter[int] = Counter()
        self._hook = model.register_forward_pre_hook(self._note)

    def _note(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._counts[len(inputs[0])] += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "BatchSizes":
        return self  # copies of the model are recorded too

    def usual(self) -> int:
        """Stop recording; returns the most frequent size, on a tie the larger."""
        self._hook.remove()
        return max(self._counts, key=lambda size: (self._counts[size], size))


def engine_song(bench: Bench, separator: Separator, name: str, song: Tensor, **more: Any) -> Song:
    """Time songs through the engine, from memory to memory, one after another after a warm-up."""
    model = next(iter(separator.models.values()))
    plan = separator.plans[model.name]
    sizes = BatchSizes(model)
    separator.separate(bench.work.song(SHORT_SONG))
    batch_size = sizes.usual()
    forget_peak(bench.device)
    times = song_seconds(lambda: separator.separate(song), bench.device, bench.runs)
    audio_seconds = song.shape[1] / SAMPLE_RATE
    measured = Song(times, len(plan.starts(song.shape[1])), batch_size, plan.chunk_samples)
    bench.results.add(
        "song",
        model=name,
        program=ENGINE,
        how=bench.how,
        songs=1,
        chunk=f"{plan.chunk_samples / SAMPLE_RATE:.3g}, {plan.overlap_samples / SAMPLE_RATE:.3g}",
        batch_size=batch_size,
        seconds=times,
        times_realtime=audio_seconds / statistics.median(times),
        chunk_ms=measured.chunk_ms,
        peak_mib=peak_mib(bench.device),
        **more,
    )
    return measured


def network_time(
    bench: Bench, network: Callable[[Tensor], Tensor], chunks: Tensor, *, reference: Tensor | None = None, **row: Any
) -> float:
    """Milliseconds per chunk of a batch; the row also gets memory and the first chunk's SDR against a reference."""
    clean_memory(bench.device)
    before = memory_mib(bench.device)
    with torch.inference_mode():
        estimates = network(chunks)
        time_of = batch_milliseconds(lambda: network(chunks), bench.device, 1 if bench.work.tiny else 7)
    size = len(chunks)
    score = None
    if reference is not None:
        # Some programs return only whole STFT hops.
        got = estimates[0].float().cpu().reshape(*reference.shape[:-1], -1).flatten(0, -2)
        score = sdr(reference.flatten(0, -2)[:, : got.shape[-1]], got)
    bench.results.add(
        "network",
        batch_size=size,
        chunk_ms=time_of.device / size,
        host_chunk_ms=time_of.host / size,
        peak_mib=peak_mib(bench.device) - before,
        sdr_db=score,
        **row,
    )
    return time_of.device / size


def float32_estimates(bench: Bench, name: str, chunk: Tensor) -> Tensor:
    """The model's own estimates of one chunk in float32, `[S, C, T]` on the CPU."""
    model = bench.work.load(name, torch.float32)
    with torch.inference_mode(), exact_float32():
        return model(chunk)[0].cpu()


def peer_network_ms(bench: Bench, program: str, name: str, chunks: Tensor) -> tuple[str, float]:
    """Time the peer in fp16 autocast at several batch sizes; returns its label and its best milliseconds per chunk."""
    reference = float32_estimates(bench, name, chunks[:1])
    network = peers.Autocast(peers.build(program, name, bench.work), bench.precision)
    label = peers.label(program)
    times = []
    for size in BATCH_SIZES_OF_PEERS[bench.work.tiny :]:
        row = {"model": name, "program": label, "how": f"{bench.how} autocast"}
        times.append(network_time(bench, network, chunks[:size], reference=reference, **row))
    return label, min(times)


def bar(bench: Bench, work: str, ours: float, wanted: float, unit: str, *, at_most: bool = False) -> None:
    """Add a row that says whether our figure reaches the target."""
    met = ours <= wanted if at_most else ours >= wanted
    text = f"{'at most' if at_most else 'at least'} {wanted:g}"
    bench.results.add("bar", work=work, ours=ours, unit=unit, bar=text, met=met)


def ratio_bar(bench: Bench, work: str, ours: float, peer: tuple[str, float], wanted: float) -> None:
    """Add a row with our speed relative to a peer, both in milliseconds per chunk."""
    label, theirs = peer
    ratio = theirs / ours
    text = f"at least {wanted:g} times"
    met = ratio >= wanted
    values = {"ours": ours, "theirs": theirs, "beside": label, "unit": "ms a chunk"}
    bench.results.add("bar", work=work, ratio=ratio, bar=text, met=met, **values)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def environment(bench: Bench) -> None:
    """The card, the programs, and two ceilings: copy bandwidth and matrix product throughput."""
    size, n_bytes = (256, 1 << 20) if bench.work.tiny else (8192, 1 << 30)
    source, target = (torch.empty(n_bytes, dtype=torch.uint8, device=bench.device) for _ in range(2))
    copy = batch_milliseconds(lambda: target.copy_(source), bench.device)
    left, right = (torch.randn(size, size, device=bench.device).to(bench.precision) for _ in range(2))
    product = batch_milliseconds(lambda: left @ right, bench.device)
    properties = torch.cuda.get_device_properties(bench.device) if bench.on_gpu else None
    bench.results.add(
        "environment",
        torch=torch.__version__,
        driver=_driver() if bench.on_gpu else "none",
        capability=f"{properties.major}.{properties.minor}" if properties else "none",
        memory_gib=properties.total_memory >> 30 if properties else 0,
        cudnn=torch.backends.cudnn.version() if bench.on_gpu else "none",
        copy_gb_per_second=2 * n_bytes / copy.device / 1e6,
        product_size=size,
        product_tflops=2 * size**3 / product.device / 1e9,
    )


def _driver() -> str:
    """The version of the NVIDIA kernel driver."""
    path = Path("/proc/driver/nvidia/version")
    words = path.read_text(encoding="utf-8").split() if path.exists() else []
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def correctness(bench: Bench) -> None:
    """Each family in fp16 against float32; whether a batch or a second run changes it; what waits for the GPU."""
    for name in CORRECT:
        if not bench.has_time("correctness", name):
            return
        with bench.attempt("correctness", name):
            model = bench.work.load(name, torch.float32)
            chunks = bench.work.chunks(model.channels, _samples(bench, model), 2 if bench.work.tiny else 4)
            with torch.inference_mode(), exact_float32():
                reference = model(chunks[:1])[0].cpu()
            del model
            model = bench.work.load(name, bench.precision)
            with torch.inference_mode():
                alone, again, together = model(chunks[:1])[0], model(chunks[:1])[0], model(chunks)[0]
            score = sdr(reference.flatten(0, 1), alone.flatten(0, 1).cpu())
            bench.results.add(
                "correctness",
                model=name,
                sdr_db=score,
                batch_sdr_db=sdr(alone.flatten(0, 1).cpu(), together.flatten(0, 1).cpu()),
                repeats=torch.equal(alone, again),
                waits=_host_waits(model, chunks) if bench.on_gpu else [],
            )
            if name in WANTED_SDR:
                bar(bench, f"{name}, {bench.how} to own float32", score, WANTED_SDR[name], "dB")


def _samples(bench: Bench, model: SeparationModel) -> int:
    """The chunk that a model was trained on; in a dry run shorter, if the model allows it."""
    whole = model.chunk_samples
    return whole if model.fixed_chunk or not bench.work.tiny else min(whole, 2 * SAMPLE_RATE)


def _host_waits(model: SeparationModel, chunks: Tensor) -> list[str]:
    """The files and lines where a forward waits for the GPU, from PyTorch's warnings."""
    with warnings.catch_warnings(record=True) as seen, torch.inference_mode():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(chunks)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(one.filename).name}:{one.lineno}" for one in seen if "synchroniz" in str(one.message)]
    return sorted(set(places))


def settle(bench: Bench) -> None:
    """Wait a while for Unblend's compiler, which would disturb the timings; it may hang."""
    began = time.monotonic()
    until = min(bench.until, began + SETTLE_SECONDS)
    here = [signals for size in UNBLEND_BATCH_SIZES if (signals := Signals(bench.run_folder, size)).started.exists()]
    ready = [wait_for(signals.ready, until) for signals in here]
    bench.results.add("settled", seconds=time.monotonic() - began, compilers_at_work=len(ready) - sum(ready))


def viperx(bench: Bench) -> None:
    """The container's default model in its default chunks, against pymss."""
    model = bench.work.load(VIPERX, bench.precision)
    separator = bench.work.separator(model, *((4, 2) if bench.work.tiny else (8, 4)))
    song = bench.work.song(LONG_SONG)
    measured = engine_song(bench, separator, VIPERX, song)
    seconds = statistics.median(measured.seconds)
    bar(bench, "viperx, 5 minutes, 8 s / 4 s", song.shape[1] / SAMPLE_RATE / seconds, 150, "x real-time")
    bar(bench, "viperx, 5 minutes, 8 s / 4 s", seconds, 2.2, "s", at_most=True)
    chunks = bench.work.chunks(2, measured.chunk_samples, max(8, measured.batch_size))
    with bench.attempt("network", VIPERX):
        row: dict[str, Any] = {"model": VIPERX, "program": ENGINE, "how": bench.how}
        network_time(bench, model, chunks[: measured.batch_size], **row)
        network_time(bench, model, chunks[:1], **row)
    with bench.attempt("bar", "viperx beside pymss"):
        peer = peer_network_ms(bench, "pymss", VIPERX, chunks)
        ratio_bar(bench, "viperx: a song of ours, the network alone of", measured.chunk_ms, peer, 1.2)
    with bench.attempt("song", "viperx to files"):
        _to_files(bench, separator, VIPERX, song)
    with bench.attempt("song", "viperx, how busy the GPU is"):
        _busy(bench, separator, VIPERX)


def _to_files(bench: Bench, separator: Separator, name: str, song: Tensor) -> None:
    """From a WAV file to WAV files."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "song.wav"
        soundfile.write(path, song.T.numpy(), SAMPLE_RATE, subtype="PCM_16")
        target = Path(folder) / "stems"
        times = song_seconds(lambda: separator.separate_file(path, target), bench.device, bench.runs)
    seconds = statistics.median(times)
    row = {"model": name, "program": ENGINE, "how": f"{bench.how}, files", "songs": 1, "to_files_seconds": seconds}
    bench.results.add("song", times_realtime=song.shape[1] / SAMPLE_RATE / seconds, **row)


def _busy(bench: Bench, separator: Separator, name: str) -> None:
    if not bench.on_gpu:
        bench.results.add("song", what=f"{name}, how busy the GPU is", skipped="needs a CUDA GPU")
        return
    song = bench.work.song(BUSY_SONG)
    share, launches = busy_share(lambda: separator.separate(song), bench.device)
    row = {
        "model": name,
        "program": ENGINE,
        "how": f"{bench.how}, profiled",
        "songs": 1,
        "busy": share,
        "launches": launches,
    }
    bench.results.add("song", **row)
    bar(bench, f"{name}, GPU busy", share * 100, 95, "%")


def demucs(bench: Bench) -> None:
    """htdemucs and htdemucs_ft against Unblend's, both with an overlap of a quarter of the chunk."""
    with bench.attempt("song", HTDEMUCS):
        model = bench.work.load(HTDEMUCS, bench.precision)
        separator = bench.work.separator(model, 8, 2)
        measured = engine_song(bench, separator, HTDEMUCS, bench.work.song(LONG_SONG))
        chunks = bench.work.chunks(2, measured.chunk_samples, measured.batch_size)
        network_time(bench, model, chunks, model=HTDEMUCS, program=ENGINE, how=bench.how)
        _songs_at_once(bench, separator)
        _busy(bench, separator, HTDEMUCS)
        del model, separator
    with bench.attempt("song", HTDEMUCS_FT):
        separator = bench.work.separator(bench.work.load(HTDEMUCS_FT, bench.precision), 8, 2)
        engine_song(bench, separator, HTDEMUCS_FT, bench.work.song(LONG_SONG))
        del separator
    for batch_size in UNBLEND_BATCH_SIZES[:1] if bench.work.tiny else UNBLEND_BATCH_SIZES:
        what = f"unblend, {batch_size} chunks at once"
        signals = Signals(bench.run_folder, batch_size)
        if signals.started.exists() and bench.has_time("song", what):
            signals.go.touch()
            if not wait_for(signals.done, bench.until):
                bench.results.add("song", what=what, error="it was not done when the time was up")
    _beside_unblend(bench)


def _songs_at_once(bench: Bench, separator: Separator) -> None:
    """Separate several songs at once, a thread each."""
    song, n_songs = bench.work.song(MANY_SONGS), bench.work.many_songs
    forget_peak(bench.device)

    def all_at_once() -> None:
        with ThreadPoolExecutor(n_songs) as threads:
            list(threads.map(separator.separate, [song] * n_songs))

    times = song_seconds(all_at_once, bench.device, 1)
    row = {"model": HTDEMUCS, "program": ENGINE, "how": bench.how, "songs": n_songs, "seconds": times}
    realtime = n_songs * song.shape[1] / SAMPLE_RATE / times[0]
    bench.results.add("song", times_realtime=realtime, peak_mib=peak_mib(bench.device), **row)


def _beside_unblend(bench: Bench) -> None:
    """Compare times real-time; Unblend gets the better of its batch sizes."""
    songs = [row for row in bench.results.rows() if row["step"] == "song" and "times_realtime" in row]
    for name, n_songs in ((HTDEMUCS, 1), (HTDEMUCS, bench.work.many_songs), (HTDEMUCS_FT, 1)):
        alike = [row for row in songs if (row["model"], row.get("songs")) == (name, n_songs) and "seconds" in row]
        ours = max((row["times_realtime"] for row in alike if row["program"] == ENGINE), default=None)
        theirs = [row for row in alike if row["program"] != ENGINE]
        if ours is None or not theirs:
            continue
        best = max(theirs, key=lambda row: row["times_realtime"])
        ratio = ours / best["times_realtime"]
        values = {"ours": ours, "theirs": best["times_realtime"], "beside": best["program"], "unit": "x real-time"}
        work = f"{name}, {n_songs} song{'s' * (n_songs > 1)}"
        bench.results.add("bar", work=work, ratio=ratio, bar="at least 1.2 times", met=ratio >= 1.2, **values)


def roformers(bench: Bench) -> None:
    """BS-RoFormer-SW and Kim's MelBand-RoFormer in chunks of their training length, against pymss."""
    for name in (SW, KIM):
        _beside_pymss(bench, name, 1.5)


def convolutions(bench: Bench) -> None:
    """MDX23C and SCNet XL against pymss."""
    for name in (MDX23C, SCNET_XL):
        _beside_pymss(bench, name, 1.2)


def _beside_pymss(bench: Bench, name: str, wanted: float) -> None:
    if not bench.has_time("song", name):
        return
    with bench.attempt("song", name):
        model = bench.work.load(name, bench.precision)
        chunk_seconds = max(4, bench.work.chunk_seconds(model))
        separator = bench.work.separator(model, chunk_seconds, min(8, chunk_seconds // 2))
        measured = engine_song(bench, separator, name, bench.work.song(LONG_SONG))
        chunks = bench.work.chunks(model.channels, measured.chunk_samples, max(8, measured.batch_size))
        network_time(bench, model, chunks[: measured.batch_size], model=name, program=ENGINE, how=bench.how)
        del model, separator
        clean_memory(bench.device)
        peer = peer_network_ms(bench, "pymss", name, chunks)
        ratio_bar(bench, f"{name}: a song of ours, the network alone of", measured.chunk_ms, peer, wanted)


def small_memory(bench: Bench) -> None:
    """A minute of music on a card of 6 GiB, in short and long chunks, with the engine's own batch size."""
    if not bench.on_gpu:
        bench.results.add("small_memory", what="6 GiB", skipped="needs a CUDA GPU")
        return
    for name in (VIPERX, HTDEMUCS):
        for chunk_seconds in (8, 30) if name == VIPERX else (8,):
            what = f"{name}, {chunk_seconds} s"
            with bench.attempt("small_memory", what), card_of(SMALL_CARD, bench.device):
                separator = bench.work.separator(bench.work.load(name, bench.precision), chunk_seconds, 4)
                sizes = BatchSizes(next(iter(separator.models.values())))
                song = bench.work.song(SHORT_SONG)
                (seconds,) = song_seconds(lambda s=separator, x=song: s.separate(x), bench.device, 1)
                bench.results.add(
                    "small_memory",
                    model=name,
                    card="6 GiB",
                    chunk_seconds=chunk_seconds,
                    batch_size=sizes.usual(),
                    seconds=seconds,
                    peak_mib=peak_mib(bench.device),
                    reserved_mib=torch.cuda.max_memory_reserved(bench.device) >> 20,
                )
                bar(bench, f"{what} chunks, 6 GiB", peak_mib(bench.device), SMALL_CARD >> 20, "MiB", at_most=True)
                del separator


def kernel_profile(bench: Bench) -> None:
    """The kernels that viperx runs for a batch."""
    if not bench.on_gpu:
        bench.results.add("kernels", what="profile", skipped="needs a CUDA GPU")
        return
    model = bench.work.load(VIPERX, bench.precision)
    songs = [row for row in bench.results.rows() if row["step"] == "song" and row.get("model") == VIPERX]
    batch_size = next((row["batch_size"] for row in songs if "batch_size" in row), 8)  # the engine's own choice
    chunks = bench.work.chunks(2, 8 * SAMPLE_RATE, batch_size)
    with torch.inference_mode():
        found = kernels(lambda: model(chunks), bench.device)
    bench.results.add(
        "kernels",
        model=VIPERX,
        batch_size=batch_size,
        kernels=sum(kernel.launches for kernel in found),
        milliseconds=sum(kernel.milliseconds for kernel in found),
    )
    for kernel in found[:10]:
        row = {"kernel": kernel.name, "launches": kernel.launches, "milliseconds": kernel.milliseconds}
        bench.results.add("kernel", model=VIPERX, **row)


def cold(bench: Bench) -> None:
    """The time from a process's start to the first stem's file, and the time to read the weights."""
    selection = Selection(model_name=str(bench.work.config_path(VIPERX)), model_path=bench.work.weights_path(VIPERX))
    started = cold_start(selection, device=str(bench.device), precision=bench.how)
    total = sum(started.stages.values())
    bench.results.add(
        "cold_start",
        model=VIPERX,
        stages=[f"{stage} {seconds:.2f}" for stage, seconds in started.stages.items()],
        total_seconds=total,
        read_seconds=started.plain_read,
    )
    bar(bench, "viperx, cold start to first stem", total, 1.5 * started.plain_read + 3, "s", at_most=True)


def other_programs(bench: Bench) -> None:
    """The networks of audio-separator and MSST in fp16 autocast."""
    chunks = bench.work.chunks(2, (2 if bench.work.tiny else 8) * SAMPLE_RATE, 8)
    for program in ("audio-separator", "msst"):
        if bench.has_time("network", program):
            with bench.attempt("network", program):
                peer_network_ms(bench, program, VIPERX, chunks)


STEPS: dict[str, Callable[[Bench], None]] = {
    step.__name__: step
    for step in (
        environment,
        correctness,
        settle,
        viperx,
        demucs,
        roformers,
        convolutions,
        small_memory,
        kernel_profile,
        cold,
        other_programs,
    )
}
NEEDS_SECONDS = {"cold": 15.0, "settle": 0.0, "environment": 0.0}  # that must remain to start a step; a few by default
USUAL_SECONDS = 8.0


def run_steps(bench: Bench, names: list[str]) -> None:
    """Run these steps in order until the time is up.

    The start of each step is recorded in the run's folder, so that after a crash another process can go on with the
    next step. Raises what `torch.cuda.synchronize` raises once the GPU cannot be used any more.
    """
    for name in names:
        step = STEPS[name]
        with (bench.run_folder / "begun").open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")
        if bench.seconds_left() < NEEDS_SECONDS.get(name, USUAL_SECONDS):
            bench.results.add(name, what="the whole step", skipped="the time was up")
            continue
        print(f"---- {name}, {bench.seconds_left():.0f} s left", flush=True)
        with bench.attempt(name, "the whole step"):
            step(bench)
