"""What to do with songs, and what became of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from separation.analysis.facts import SongAnalysis
from separation.audio.beside import names_beside
from separation.audio.options import OutputOptions
from separation.batch.urls import Location
from separation.checkpoints.catalogue import files_for, read_config
from separation.checkpoints.description import WeightFile
from separation.checkpoints.files import file_state, local_path
from separation.engine.options import EngineOptions
from separation.engine.recipe_lines import PLAIN
from separation.engine.recipes import Combination, Ensemble, Estimate
from separation.engine.selection import Selection
from separation.system.names import Place


@dataclass(frozen=True)
class Origin:
    """Where a song's file comes from, if its path relative to the stems does not say that.

    Args:
        path: its address in a store, or its absolute path.
        n_bytes, tag: its size and its checksum in the store; an empty tag for a local file.
    """

    path: str
    n_bytes: int = 0
    tag: str = ""


@dataclass(frozen=True)
class AnySong:
    """A song, the folder for its stems, and the place of the stems there; each may be in an object store."""

    path: Location
    folder: Location
    place: Place = field(default_factory=Place)
    origin: Origin | None = None

    def absolute(self) -> Self:
        """The song with absolute paths."""
        path = self.path.absolute() if isinstance(self.path, Path) else self.path
        return replace(self, path=path, folder=self.folder.absolute() if isinstance(self.folder, Path) else self.folder)

    def analysed(self, analysis: SongAnalysis | None) -> Self:
        """The song with its names, if they hold the tempo or the key, and these are known."""
        if analysis is None or not self.place.needs_analysis:
            return self
        return replace(self, place=self.place.analysed(analysis.tempo_bpm, analysis.key))

    def stem_names(self, job: "Job") -> dict[str, str]:
        """The names of the stems' files in the folder, by stem. Raises InputError if two are equal."""
        return self.place.names(job.stems, job.output.format) | names_beside(
            Path(self.path.name), self.place, job.output
        )


@dataclass(frozen=True)
class Song(AnySong):
    """A song's file, the folder for its stems, and the place of the stems there."""

    path: Path
    folder: Path

    @property
    def page(self) -> Path:
        """The path of the listening page."""
        return self.folder / self.place.beside("html")


@dataclass(frozen=True)
class Job:
    """What to do with each song.

    Args:
        settings: everything that decides the content of the stems' files; see `stem_settings`.
        stems: the stems to write, which are known before a model is loaded, each with the names of its models.
        output: how to write them.
        accept_damaged: also separate songs that lack a large or unknown part.
        needs_picture: with `output.video`, a song without a picture fails, rather than getting only its stems.
        analyse: also find the tempo and the key, and measure the loudness.
        report: also write a listening page.
    """

    settings: dict[str, Any]
    stems: Mapping[str, str] = field(default_factory=dict)
    output: OutputOptions = OutputOptions()
    accept_damaged: bool = False
    needs_picture: bool = False
    analyse: bool = False
    report: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a song.

    Attributes:
        path: the song's file. This and the other paths may be addresses in an object store.
        status: `done`, `skipped` because it was done before, or `failed`.
        error: why it failed.
        stems: the paths of the stems' files, by stem.
        facts: `duration_seconds`, `elapsed_seconds` and `gain`; empty if the song has no stems.
        analysis: tempo, key and loudness, if they were asked for, now or in an earlier run.
        page: the path of the listening page.
        warnings: the warnings about the song; for a skipped song, those of the run that made its stems.
        source: the song's file when it was separated, as in a record: its size in `bytes`, its `sha256` and others.
        may_pass: whether it failed for a reason that may pass.
        tries: how often this run tried it.
    """

    path: Location
    status: str
    error: str = ""
    stems: Mapping[str, Location] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    analysis: SongAnalysis | None = None
    page: Location | None = None
    warnings: list[str] = field(default_factory=list)
    source: Mapping[str, Any] = field(default_factory=dict)
    may_pass: bool = False
    tries: int = 0


def stem_settings(selection: Selection, engine: EngineOptions, output: OutputOptions) -> dict[str, Any]:
    """Everything that decides the content of the stems' files, as a JSON object.

    Options that only decide where or how fast a song is separated are left out. Records hold this object, and a song is
    skipped if its record has an equal one. If a key or a value is spelt differently, finished songs are separated
    again.

    Raises InputError, such as RecipeError, for a selection or chunk length that cannot be used.
    """
    models = selection.models()
    descriptions = {name: read_config(name) for name in models}
    settings: dict[str, Any] = {
        "model_name": selection.model_name,
        "model_dir": _resolved(selection.model_dir),
        "model_path": _resolved(selection.model_path),
        "two_stems": selection.two_stems,
        **({"only": selection.only} if selection.only else {}),
        "precision": engine.precision,
        "attention": engine.attention,
        "chunks": {name: list(description.chunks(engine.chunks)) for name, description in descriptions.items()},
        "format": output.format,
        "sample_rate": output.sample_rate,
        **output.encoding,
    }
    if output.video:
        settings["video"] = output.video
    if output.reaper:
        settings["reaper"] = True
    if output.channels != "stereo":
        settings["channels"] = output.channels
    residuals = [description.residual for description in descriptions.values() if description.residual]
    if output.excerpt is not None:
        settings["excerpt"] = output.excerpt.as_json()
    if selection.model is None:
        recipe = selection.load()
        sources = {stem: _text(source) for stem, source in recipe.outputs.items()}
        settings |= {"recipe": recipe.name, "stems": selection.stems or recipe.choice, "sources": sources}
    elif residuals:
        settings["residual"] = residuals[0]
    files = [file for name, stems in models.items() for file in files_for(descriptions[name], stems)]
    return settings | {"weights": _weights(files, selection.model_path)}


def _weights(files: list[WeightFile], model_path: Path | None) -> dict[str, Any]:
    """The checksum of each file; for files without a known checksum, their size and modification time."""
    weights: dict[str, Any] = {file.name: file.sha256 for file in files}
    unknown = [local_path(file) for file in files if file.url is None and file.sha256 is None]
    paths = [path for path in ([model_path] if model_path else unknown) if path.exists()]
    return weights | {path.name: list(file_state(path)) for path in paths}


def _resolved(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _text(parts: Combination) -> str:
    """A weighted sum as text. Records hold it, so the names in it stay as they are."""
    terms = [f"({_part_text(part)}, {weight!r})" for part, weight in parts]
    return f"({', '.join(terms)}{',' if len(terms) == 1 else ''})"


def _part_text(part: Estimate | Ensemble | None) -> str:
    if part is None:
        return "None"
    if isinstance(part, Ensemble):
        return f"Ensemble(rule={part.rule!r}, parts=({', '.join(map(_text, part.parts))}))"
    run = part.run
    view = "" if run.view == PLAIN else f", view={tuple(run.view)}"
    return f"Estimate(run=Run(model={run.model!r}, input={_text(run.input)}{view}), stem={part.stem!r})"
