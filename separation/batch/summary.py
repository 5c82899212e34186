"""A summary of a run over many songs: a table as CSV, or as a page that can be sorted."""

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from separation.analysis.facts import MIXTURE
from separation.batch.job import Outcome
from separation.batch.urls import Location
from separation.errors import InputError
from separation.system.os_errors import output_errors
from separation.system.output import OutputFolder
from separation.system.text import shown

SUFFIXES: tuple[str, ...] = (".csv", ".html")
STATUSES: tuple[str, ...] = ("failed", "left", "done", "skipped")  # in the order of a page
# The columns of a CSV file; one for each stem follows.
COLUMNS: tuple[str, ...] = (
    *("song", "status", "tries", "error", "warnings", "duration_seconds", "elapsed_seconds", "times_realtime"),
    *("recipe", "gain", "tempo_bpm", "key", "integrated_lufs", "range_lu", "true_peak_dbtp"),
    *("song_bytes", "song_sha256", "page"),
)

_TEMPLATE = Path(__file__).with_name("summary.html")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # what starts a formula in spreadsheets


@dataclass(frozen=True)
class Summary:
    """What became of the songs of a run.

    Args:
        outcomes: one for each song; `left` is the status of songs that an interrupted run did not come to.
        recipe: the recipe or model.
        elapsed_seconds: how long the run took.
    """

    outcomes: Sequence[Outcome]
    recipe: str = ""
    elapsed_seconds: float = 0.0

    @property
    def stems(self) -> list[str]:
        """The stems of all songs, in order."""
        return list(dict.fromkeys(stem for outcome in self.outcomes for stem in outcome.stems))

    def rows(self) -> Iterator[dict[str, Any]]:
        """A value for each column; None where there is none."""
        for outcome in self.outcomes:
            facts, analysis = outcome.facts, outcome.analysis
            loudness = analysis.loudness[MIXTURE].as_json() if analysis else {}
            yield {
                "song": outcome.path,
                "status": outcome.status,
                "tries": outcome.tries,
                "error": outcome.error or None,
                "warnings": "; ".join(outcome.warnings) or None,
                "duration_seconds": _rounded(facts.get("duration_seconds")),
                "elapsed_seconds": _rounded(facts.get("elapsed_seconds")),
                "times_realtime": _rounded(facts["duration_seconds"] / facts["elapsed_seconds"]) if facts else None,
                "recipe": self.recipe or None,
                "gain": facts.get("gain"),
                "tempo_bpm": analysis.as_json()["tempo_bpm"] if analysis else None,
                "key": analysis.key if analysis else None,
                **{name: loudness.get(name) for name in ("integrated_lufs", "range_lu", "true_peak_dbtp")},
                "song_bytes": outcome.source.get("bytes"),
                "song_sha256": outcome.source.get("sha256"),
                "page": outcome.page,
                **{f"{stem}_file": outcome.stems.get(stem) for stem in self.stems},
            }

    def csv(self) -> str:
        """The table as RFC 4180 says. No cell starts a formula."""
        text = StringIO()
        writer = csv.DictWriter(text, [*COLUMNS, *(f"{stem}_file" for stem in self.stems)])
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in self.rows())
        return text.getvalue()

    def html(self, folder: Path) -> str:
        """A page for a folder, with links relative to it."""
        text = _TEMPLATE.read_text(encoding="utf-8")
        ordered = sorted(self.outcomes, key=lambda outcome: STATUSES.index(outcome.status))
        analysed = any(outcome.analysis for outcome in ordered)
        names = ["Song", "Status", "Tries", "Music", "Work", "Speed"]
        names += ["Tempo", "Key", "LUFS"] if analysed else []
        heads = (f'<th scope="col"><button type="button">{name}</button></th>' for name in names)
        of_each = replace(self, outcomes=ordered).rows()
        rows = [_page_row(one, row, folder, analysed=analysed) for one, row in zip(ordered, of_each, strict=True)]
        parts = {
            "totals": "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in self._totals()),
            "heads": f'{"".join(heads)}<th scope="col">Files</th>',
            "rows": "\n".join(rows),
        }
        for name, content in parts.items():
            text = text.replace(f"<!-- {name} -->", content)
        return text

    def _totals(self) -> Iterator[tuple[str, str]]:
        counts = Counter(outcome.status for outcome in self.outcomes)
        for status in ("done", "skipped", "failed", "left"):
            if counts[status] or status in ("done", "failed"):
                yield status.capitalize(), str(counts[status])
        done = [outcome.facts["duration_seconds"] for outcome in self.outcomes if outcome.status == "done"]
        yield "Music", _clock(sum(done))
        yield "Time", _clock(self.elapsed_seconds)
        if done and self.elapsed_seconds > 0:
            yield "Speed", f"{sum(done) / self.elapsed_seconds:.1f} × real-time"
        if self.recipe:
            yield "Recipe", escape(self.recipe)


def check(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Check before any work that summaries can be written.

    Raises:
        InputError: a name ends neither in .csv nor in .html, or is given twice.
        OutputError: a folder cannot be written to, or has such a file that this program did not write.
    """
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise InputError(f"summary {str(path)!r} is neither .csv nor .html: end its name in one of them")
        if paths.count(path) > 1:
            raise InputError(f"summary {str(path)!r} is given twice: leave one of them out")
        with OutputFolder(path.parent, overwrite=overwrite) as output:
            output.check_targets([path.name])


def write(summary: Summary, path: Path, *, overwrite: bool) -> None:
    """Write a summary as CSV or HTML, by the suffix. The file appears complete or not at all.

    Raises OutputError if it cannot be written, or is in place of a file that this program did not write.
    """
    with OutputFolder(path.parent, overwrite=overwrite) as output:
        part = output.work / path.name
        is_csv = path.suffix.lower() == ".csv"
        text = summary.csv() if is_csv else summary.html(path.parent)
        with output_errors(path):  # Excel takes a file without a byte order mark for one in a Windows encoding
            encoding = "utf-8-sig" if is_csv else "utf-8"
            part.write_text(text, encoding=encoding, errors="backslashreplace", newline="")
        output.publish({"summary": part})


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula. A path stays the path of the same file."""
    if isinstance(value, Path):  # `-` is the song from stdin
        return f"./{value}" if str(value).startswith(_FORMULA) and str(value) != "-" else str(value)
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value


def _page_row(outcome: Outcome, row: dict[str, Any], folder: Path, *, analysed: bool) -> str:
    """A song's row of the page."""
    notes = "".join(
        f"<p class={kind}>{_text(text)}</p>"
        for kind, text in (("error", outcome.error), *(("warning", warning) for warning in outcome.warnings))
        if text
    )
    cells = [
        f'<th scope="row" data-sort="{_text(outcome.path)}"><span>{_text(outcome.path)}</span>{notes}</th>',
        f'<td data-sort="{STATUSES.index(outcome.status)}"><b class="{outcome.status}">{outcome.status}</b></td>',
        _number(row["tries"]),
        _number(row["duration_seconds"], _clock),
        _number(row["elapsed_seconds"], _clock),
        _number(row["times_realtime"], "{:.1f} ×".format),
    ]
    if analysed:
        cells += [
            _number(row["tempo_bpm"], "{:.1f}".format),
            f'<td class=key data-sort="{_text(row["key"] or "")}">{_text(_with_signs(row["key"] or ""))}</td>',
            _number(row["integrated_lufs"], lambda lufs: f"{lufs:.1f}".replace("-", "−")),
        ]
    files = {**({"listen": outcome.page} if outcome.page else {}), **outcome.stems}
    links = " ".join(_link(name, path, folder) for name, path in files.items())
    return f"<tr>{''.join(cells)}<td class=files>{links}</td></tr>"


def _with_signs(key: str) -> str:
    """A key such as "Bb minor" as musicians write it: "B♭ minor"."""
    return key[:2].replace("#", "♯").replace("b", "♭") + key[2:]


def _number(value: float | None, form: Any = str) -> str:
    return "<td></td>" if value is None else f'<td class=number data-sort="{value}">{form(value)}</td>'


def _link(name: str, path: Location, folder: Path) -> str:
    """A link to a file; only the name of one in an object store, which browsers cannot open."""
    if not isinstance(path, Path):
        return f"<span>{_text(name)}</span>"
    try:
        target = Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive of Windows
        return f'<a href="{escape(path.absolute().as_uri())}">{_text(name)}</a>'
    return f'<a href="{quote(os.fsencode(target))}">{_text(name)}</a>'


def _text(value: object) -> str:
    """Text for HTML, without control characters."""
    return escape(shown(str(value)))


def _clock(seconds: float) -> str:
    """A duration such as 1:02:03 h, 3:20 or 0:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d}"
