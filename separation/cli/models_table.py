"""The table of `models list`, for terminals of 100 columns."""

from collections.abc import Sequence

from separation.checkpoints import files
from separation.checkpoints.description import Checkpoint
from separation.checkpoints.facts import TASKS, ranking_test
from separation.checkpoints.listing import Entry, Filter

COLUMNS = 100
OWN = "models without a task"


def table(entries: Sequence[Entry], wanted: Filter) -> list[str]:
    """The lines of the table: a group for each task, by the first task of each model, unless the order is by quality.

    `*` marks models that are downloaded.
    """
    if not entries:
        return []
    stem = wanted.ranked_stem
    rows = [_cells(entry, stem) for entry in entries]
    header = ["NAME", *([stem.upper()] if stem else []), "MB", "LICENCE"]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [_line("", header, "STEMS", widths)]
    room = COLUMNS - len(lines[0]) + len("STEMS")
    groups = {"": [*entries]} if stem or wanted.task else _by_task(entries)
    cells = {entry.model.name: row for entry, row in zip(entries, rows, strict=True)}
    for title, group in groups.items():
        lines += ["", title] if title else []
        lines += [
            _line("*" if entry.is_here else "", cells[entry.model.name], _stems(entry.model, room), widths)
            for entry in group
        ]
    notes = ["* is downloaded"] if any(entry.is_here for entry in entries) else []
    figures = [entry.model.facts.ranking_sdr(stem) for entry in entries] if stem else []
    if stem and any(figures):
        notes.append(f"{stem.upper()} is the SDR of {stem} in dB on {ranking_test(stem)}")
    if None in figures:
        rest = "such a model may still be better" if any(figures) else "the order is that of the names"
        notes.append(f"-: no published figure on {ranking_test(stem or '')}; {rest}")
    return [*lines, "", *notes] if notes else lines


def _line(mark: str, cells: Sequence[str], stems: str, widths: Sequence[int]) -> str:
    """A row: the name to the left, figures to the right, the licence to the left."""
    name, *figures, licence = cells
    name_width, *figure_widths, licence_width = widths
    right = "  ".join(f"{text:>{width}}" for text, width in zip(figures, figure_widths, strict=True))
    return f"{mark:1} {name:{name_width}}  {right}  {licence:{licence_width}}  {stems}".rstrip()


def _cells(entry: Entry, stem: str | None) -> list[str]:
    facts, n_bytes = entry.model.facts, files.known_bytes(entry.model.files)
    figure = facts.ranking_sdr(stem) if stem else None
    ranking = [] if stem is None else ["-" if figure is None else f"{figure:.2f}"]
    return [entry.model.name, *ranking, f"{n_bytes / 1e6:.0f}" if n_bytes else "?", facts.licence_class]


def _stems(model: Checkpoint, room: int) -> str:
    """The stems, with the residual in brackets if there is room; their number if there is not even room for them."""
    stems = ", ".join(model.stems)
    texts = [f"{stems} ({model.residual})"] if model.residual else []
    return next((text for text in (*texts, stems) if len(text) <= room), f"{len(model.stems)} stems")


def _by_task(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {title: [] for title in (*(f"{key}: {TASKS[key]}" for key in TASKS), OWN)}
    for entry in entries:
        tasks = entry.model.facts.tasks
        groups[f"{tasks[0]}: {TASKS[tasks[0]]}" if tasks else OWN].append(entry)
    return {title: group for title, group in groups.items() if group}
