"""Unblend's htdemucs in its own process: it compiles while others work, and measures when told to.

Its compiler takes a minute and would disturb the timings, and its GPU memory is freed with the process. The process
creates the file `ready` once it has compiled, waits for the file `go`, appends rows to the results, and creates the
file `done`. `measure.py` starts one per batch size, since Unblend compiles for one.
"""

import argparse
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peers
from names import HTDEMUCS, HTDEMUCS_FT
from results import Results
from separation.engine.separator import SAMPLE_RATE
from timing import batch_milliseconds, forget_peak, peak_mib, song_seconds
from workloads import Workloads

OVERLAP = 0.25  # of a chunk: the default of Unblend and Demucs
FINE_TUNED = 4  # networks of htdemucs_ft
POLL_SECONDS = 0.05


class Signals:
    """The files that coordinate this process and the one that measures."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        words = ("started", "ready", "go", "done")
        self.started, self.ready, self.go, self.done = (folder / f"unblend_{batch_size}.{word}" for word in words)


def wait_for(path: Path, until: float) -> bool:
    """Wait for a file; returns whether it appeared."""
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(POLL_SECONDS)
    return True


class Compiled:
    """The network in fp16, applied by its own program, for one batch size."""

    def __init__(self, work: Workloads, batch_size: int) -> None:
        self.work = work
        self.batch_size = batch_size
        self.network: Any = peers.build("unblend", HTDEMUCS, work)
        self.apply: Any = peers.unblend_apply()
        if work.device.type == "cuda":
            self.network.to(torch.float16)
            torch.backends.cudnn.benchmark = True  # as its Separator does
            torch.set_float32_matmul_precision("high")
            self.network.enable_compiled_core()
        self.separate([work.song(60)])
        self.separate([work.song(60)])  # the first call warms up, the second captures

    def separate(self, songs: list[Tensor]) -> list[Tensor]:
        """Separate songs, from host memory to host memory."""
        songs = [song.to(self.work.device) for song in songs]
        estimates = self.apply(
            self.network, songs, device=self.work.device, overlap=OVERLAP, chunk_batch_size=self.batch_size
        )
        return [estimate.cpu() for estimate in estimates]


def measure(compiled: Compiled, results: Results) -> None:
    """Time one song, one song with four networks as in htdemucs_ft, several songs, and the network alone."""
    work, device = compiled.work, compiled.work.device
    how = "fp16, compiled" if device.type == "cuda" else "fp32"
    segment = compiled.network.max_allowed_segment  # seconds
    chunk = f"{segment:.3g}, {segment * OVERLAP:.3g}"
    common = {"program": peers.label("unblend"), "how": how, "batch_size": compiled.batch_size, "chunk": chunk}
    one, several = work.song(300), [work.song(120)] * work.many_songs

    def report(model: str, n_songs: int, song_length: int, times: list[float]) -> None:
        seconds = statistics.median(times)
        realtime = n_songs * work.song_seconds(song_length) / seconds
        peak = peak_mib(device)
        results.add("song", model=model, songs=n_songs, seconds=times, times_realtime=realtime, peak_mib=peak, **common)

    forget_peak(device)
    report(HTDEMUCS, 1, 300, song_seconds(lambda: compiled.separate([one]), device, 1 if work.tiny else 3))
    report(HTDEMUCS, len(several), 120, song_seconds(lambda: compiled.separate(several), device, 1))
    four_times = song_seconds(lambda: [compiled.separate([one]) for _ in range(FINE_TUNED)], device, 1)
    report(HTDEMUCS_FT, 1, 300, four_times)
    chunks = work.chunks(2, round(segment * SAMPLE_RATE), compiled.batch_size)
    with torch.inference_mode():
        time_of = batch_milliseconds(lambda: compiled.network(chunks), device, 1 if work.tiny else 7)
    results.add(
        "network",
        model=HTDEMUCS,
        chunk_ms=time_of.device / compiled.batch_size,
        host_chunk_ms=time_of.host / compiled.batch_size,
        **common,
    )


def main() -> None:
    """Compile, wait, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the folder of the results and signals")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--name", required=True, help="the device's name, for the results")
    parser.add_argument("--started", type=float, required=True, help="the clock when all began")
    parser.add_argument("--until", type=float, required=True, help="the clock when all must have ended")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of another program
    results = Results(options.run / "results.jsonl", device=options.name, started=options.started, clock=time.monotonic)
    work = Workloads(options.weights, torch.device(options.device), tiny=options.tiny)
    signals, what = Signals(options.run, options.batch_size), f"unblend, {options.batch_size} chunks at once"
    try:
        if not wait_for(work.config_path(HTDEMUCS), options.until):
            raise TimeoutError(f"no weights of {HTDEMUCS} appeared")
        began = time.monotonic()
        compiled = Compiled(work, options.batch_size)
        results.add("unblend", batch_size=options.batch_size, seconds_to_compile=time.monotonic() - began)
        signals.ready.touch()
        if not wait_for(signals.go, options.until):
            raise TimeoutError("the file `go` did not appear in time")
        measure(compiled, results)
    except peers.MissingPeerError as e:
        results.add("song", what=what, missing=str(e))
    except Exception as e:  # a compiler or GPU may raise anything: the row says what, and the others go on
        results.add("song", what=what, error=f"{type(e).__name__}: {e}"[:400])
        raise
    finally:
        signals.ready.touch()
        signals.done.touch()


if __name__ == "__main__":
    main()
