"""Results as JSON lines, and the Markdown tables made from them.

Each line is an object with `step`, `at` (seconds since the start) and `device`. `error` or `missing` says why a figure
is absent; `skipped` says why a step did not run.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]  # a column's head, and its cell for a row

ENGINE = "this engine"
REASONS = ("error", "missing", "skipped")  # reasons for a row without a figure
SIGNIFICANT = 4  # significant digits


class Results:
    """A results file. Several processes may append to it."""

    def __init__(self, path: Path, *, device: str, started: float, clock: Callable[[], float]) -> None:
        self.path = path
        self._device = device
        self._started = started
        self._clock = clock

    def add(self, step: str, **values: Any) -> None:
        """Append a row, and print it."""
        row = {"step": step, "at": round(self._clock() - self._started, 1), "device": self._device}
        row |= {key: _rounded(value) for key, value in values.items() if value is not None}
        line = json.dumps(row)
        with self.path.open("ab", buffering=0) as file:  # a single write, so that lines of several processes do not mix
            file.write(f"{line}\n".encode())
        print(line, flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return read(self.path)


def read(path: Path) -> list[dict[str, Any]]:
    """Read a results file, without an incomplete last line from a killed process."""
    lines = path.read_text(encoding="utf-8").split(os.linesep) if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]


def _rounded(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN or infinity
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT}g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def number(key: str, digits: int = 1, unit: str = "") -> Callable[[Row], str]:
    """The cell for a number; empty if the row has none."""

    def cell(row: Row) -> str:
        value = row.get(key)
        if value is None:
            return ""
        return f"{value:,.{digits}f}{unit}" if isinstance(value, float | int) else str(value)

    return cell


def text(key: str) -> Callable[[Row], str]:
    """The cell for a text, a list or a boolean."""

    def cell(row: Row) -> str:
        value = row.get(key)
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, list):
            return ", ".join(f"{item:.2f}" if isinstance(item, float) else str(item) for item in value)
        return "" if value is None else str(value).replace("|", "\\|")

    return cell


def table(rows: Iterable[Row], columns: Iterable[Column]) -> Iterator[str]:
    """A Markdown table."""
    columns = list(columns)
    yield f"| {' | '.join(head for head, _ in columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join(cell(row) for _, cell in columns)} |"


BARS: list[Column] = [
    ("work", text("work")),
    ("this engine", number("ours", 2)),
    ("beside", text("beside")),
    ("it", number("theirs", 2)),
    ("unit", text("unit")),
    ("ratio", number("ratio", 2)),
    ("bar", text("bar")),
    ("met", text("met")),
]
CORRECTNESS: list[Column] = [
    ("model", text("model")),
    ("fp16 to own float32, dB", number("sdr_db")),
    ("batch 4 to batch 1, dB", number("batch_sdr_db")),
    ("the same again", text("repeats")),
    ("host waits in a forward", text("waits")),
]
SONGS: list[Column] = [
    ("model", text("model")),
    ("program", text("program")),
    ("how", text("how")),
    ("songs", text("songs")),
    ("chunk s, overlap s", text("chunk")),
    ("chunks at once", text("batch_size")),
    ("seconds, in turn", text("seconds")),
    ("x real-time", number("times_realtime")),
    ("to WAV files, s", number("to_files_seconds", 2)),
    ("GPU busy", lambda row: f"{row['busy']:.0%}" if "busy" in row else ""),
    ("MiB", number("peak_mib", 0)),
]
CHUNKS: list[Column] = [
    ("model", text("model")),
    ("program", text("program")),
    ("how", text("how")),
    ("chunks at once", text("batch_size")),
    ("ms a chunk", number("chunk_ms", 2)),
    ("of which the host needs", number("host_chunk_ms", 2)),
    ("MiB", number("peak_mib", 0)),
    ("to this engine's float32, dB", number("sdr_db")),
]
SMALL_MEMORY: list[Column] = [
    ("model", text("model")),
    ("card", text("card")),
    ("chunk s", text("chunk_seconds")),
    ("chunks at once", text("batch_size")),
    ("seconds for a minute", number("seconds", 2)),
    ("MiB", number("peak_mib", 0)),
    ("MiB reserved", number("reserved_mib", 0)),
]
KERNELS: list[Column] = [
    ("kernel", lambda row: f"`{row['kernel']}`"),
    ("launches", number("launches", 0)),
    ("ms", number("milliseconds", 3)),
]
COLD: list[Column] = [
    ("model", text("model")),
    ("stages, s", text("stages")),
    ("to the first stem, s", number("total_seconds", 2)),
    ("reading the weights alone, s", number("read_seconds", 3)),
]
TESTS: list[Column] = [
    ("passed", number("passed", 0)),
    ("failed", number("failed", 0)),
    ("skipped", number("skipped_tests", 0)),
    ("those that failed", text("names")),
]
MISSING: list[Column] = [
    ("step", text("step")),
    ("what", text("what")),
    ("why there is no figure", lambda row: text(next(key for key in REASONS if key in row))(row)),
]
SECTIONS: list[tuple[str, str, list[Column]]] = [
    ("tests/engine/test_on_gpu.py", "tests", TESTS),
    ("The bars", "bar", BARS),
    ("Correctness: one chunk, random weights", "correctness", CORRECTNESS),
    ("Songs, from memory to memory", "song", SONGS),
    ("Networks alone: medians by CUDA events", "network", CHUNKS),
    ("A card of 6 GiB, in fp16", "small_memory", SMALL_MEMORY),
    ("The ten largest kernels of a batch", "kernel", KERNELS),
    ("Cold start: a fresh process, weights in the page cache", "cold_start", COLD),
]


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """All tables of a run, for docs/benchmarks."""
    measured = [row for row in rows if not any(reason in row for reason in REASONS)]
    for row in measured:
        if row["step"] == "environment":
            yield f"## {row['device']} ({date.today().isoformat()})"
            yield ""
            yield (
                f"torch {row['torch']}, driver {row['driver']}, {row['memory_gib']} GiB. A copy moves "
                f"{row['copy_gb_per_second']:,.0f} GB/s; a product of {row['product_size']} x {row['product_size']} "
                f"matrices in fp16 reaches {row['product_tflops']:,.0f} TFLOP/s."
            )
    for title, step, columns in SECTIONS:
        found = [row for row in measured if row["step"] == step]
        if found:
            yield from ("", f"### {title}", "")
            yield from table(found, columns)
        for row in measured:
            if row["step"] == "kernels" and step == "kernel":
                yield ""
                yield f"{row['kernels']:,} kernels in all, {row['milliseconds']:.1f} ms for {row['batch_size']} chunks."
    absent = [row for row in rows if row not in measured]
    if absent:
        yield from ("", "### Not measured", "")
        yield from table(absent, MISSING)
