"""The documents: samples run, links resolve, and everything that a user can set, choose or read is named.

A sample runs if the line before it is the comment `<!-- run -->`, which readers do not see. `<!-- run slow -->` makes
it a slow test. `<!-- run on the demo model -->` replaces the recipes and models in it by the demo's, which ships.
"""

import argparse
import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import soundfile
import yaml

import separation
from helpers import models_table
from helpers.common import METRICS, PROJECT, SONG
from helpers.pyright import needs_pyright, pyright
from separation import EngineOptions, OutputOptions
from separation.checkpoints import catalogue
from separation.cli.main import main
from separation.cli.parser import build_parser
from separation.engine import recipes

DOCUMENTS = sorted(
    [*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md"), PROJECT / "weights" / "demo" / "README.md"]
)
README = PROJECT / "README.md"
COMMAND_LINE, PYTHON = PROJECT / "docs" / "command-line.md", PROJECT / "docs" / "python.md"
MOST_LINES = 200  # of the README
SECONDS = 5  # of the songs that samples separate

FENCE = re.compile(r"^ *```(\w*)$")
MARKER = re.compile(r"<!-- run( slow)?( on the demo model)? -->")
HEADING = re.compile(r"^(#{1,6}) (.+)$", re.MULTILINE)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]*)\)")
# A file or a folder that stands alone or in a command: `tests/bench/knobs.py`, `python tests/bench/knobs.py SONGS`.
FILE = re.compile(r"`(?:PYTHONPATH=\. )?(?:python |pytest (?:-m slow )?)?((?:[a-z_.]+/)+[a-z_.*]*)[ `]")
BLOCK = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"^\| *(`[^|]*?) *\| *([^|]*?) *\|", re.MULTILINE)  # of a table: its first two cells

# Replacements that run a sample on the demo's weights.
ON_DEMO: list[tuple[str, str]] = [
    (r"separation separate (?!.*--(recipe|model-name))", "separation separate --recipe demo "),
    (r"--recipe \w+", "--recipe demo"),
    (r"--model-name \w+", "--model-name demo"),
    (r'"standard"|"bs_roformer_viperx_1297"', '"demo"'),
    (r'device="cuda", precision="fp16"', 'device="cpu", precision="fp32"'),
]


@dataclass(frozen=True)
class Sample:
    """A block of code in a document."""

    document: Path
    line: int
    language: str
    text: str
    marker: re.Match[str] | None

    @property
    def place(self) -> str:
        return f"{self.document.relative_to(PROJECT)}:{self.line}"

    @property
    def code(self) -> str:
        text = self.text
        for pattern, replacement in ON_DEMO if self.marker and self.marker[2] else []:
            text = re.sub(pattern, replacement, text)
        return text


@cache
def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


@cache
def samples(document: Path) -> list[Sample]:
    found: list[Sample] = []
    lines = text_of(document).splitlines()
    number = 0
    while number < len(lines):
        if fence := FENCE.match(lines[number]):
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
            marker = MARKER.fullmatch(lines[number - 1].strip())
            text = "\n".join(lines[number + 1 : end])
            found.append(Sample(document, number + 1, fence[1], text, marker))
            number = end
        number += 1
    return found


def prose(document: Path) -> str:
    """A document without its code."""
    return re.sub(r"`[^`]+`", "", BLOCK.sub("", text_of(document)))


def section(document: Path, title: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    text = text_of(document)
    match = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert match, f"{document.name} has no heading {title!r}"
    rest = text[match.end() :]
    end = re.search(rf"^#{{1,{len(match[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def marked(language: str) -> list[Any]:
    found = [sample for document in DOCUMENTS for sample in samples(document) if sample.marker]
    return [
        pytest.param(sample, id=sample.place, marks=[pytest.mark.slow] if sample.marker and sample.marker[1] else [])
        for sample in found
        if sample.language == language
    ]


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that samples use: songs, a folder of songs, and the true stems of one."""
    folder = tmp_path_factory.mktemp("songs")
    audio, rate = soundfile.read(SONG, frames=SECONDS * 44100)
    for name in ("song.flac", "song.mp3", "music/first.flac", "music/album/second.flac"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, audio, rate)
    (folder / "true" / "song").mkdir(parents=True)
    for stem in SONG.with_name("stems").glob("*.ogg"):
        audio, rate = soundfile.read(stem, frames=SECONDS * 44100)
        soundfile.write(folder / "true" / "song" / f"{stem.stem}.flac", audio, rate)
    return folder


@pytest.fixture
def working_folder(songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `songs` as the current folder, with the command `separation` and an empty cache."""
    folder = tmp_path / "desk"
    for path in songs.rglob("*.*"):
        target = folder / path.relative_to(songs)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
    program = tmp_path / "bin" / "separation"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m separation "$@"\n')
    program.chmod(0o755)
    paths = [str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(paths))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("SEPARATION_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    return folder


def test_every_mark_stands_before_a_sample_that_can_be_run() -> None:
    for document in DOCUMENTS:
        runnable = [sample for sample in samples(document) if sample.marker]
        marks = re.findall("<!--(?! models: | end of models)", text_of(document))  # those are of tables
        assert len(marks) == len(runnable), document
        assert {sample.language for sample in runnable} <= {"sh", "python"}
    assert len(marked("sh")) > 5 and len(marked("python")) > 5


@pytest.mark.parametrize("sample", marked("sh"))
def test_a_shell_sample_runs(sample: Sample, working_folder: Path) -> None:
    ran = subprocess.run(["sh", "-eu", "-c", sample.code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{sample.place}\n{sample.code}\n{ran.stderr}"


@pytest.mark.parametrize("sample", marked("python"))
def test_a_python_sample_runs(sample: Sample, working_folder: Path) -> None:
    exec(compile(sample.code, sample.place, "exec"), {"__name__": "sample"})


@pytest.mark.slow
@needs_pyright
def test_strict_type_checking_accepts_the_python_samples(tmp_path: Path) -> None:
    config = {"typeCheckingMode": "strict", "reportUnusedImport": "none"}  # one only lists what there is to import
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
    written = {f"line_{sample.line}.py": sample.text for sample in samples(PYTHON) if sample.language == "python"}
    for name, text in written.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = pyright(tmp_path)
    assert found["summary"]["filesAnalyzed"] == len(written) > 10
    assert [(each["file"], each["range"]["start"], each["message"]) for each in found["generalDiagnostics"]] == []


def written_commands() -> Iterator[tuple[str, str]]:
    """Every command in a document, with its place; also those in prose and in samples that are not run."""
    for document in DOCUMENTS:
        for sample in samples(document):
            for line in sample.text.replace("\\\n", " ").splitlines():
                if match := re.search(r"(?:^|&& |exec |\$ )(?:python -m )?separation (.*)", line):
                    yield sample.place, re.sub(r" [<>] \S+", "", match[1])  # without redirections
        for match in re.finditer(r"`(?:python -m )?separation (-?[a-z][^`]*)`", text_of(document)):
            yield str(document.relative_to(PROJECT)), match[1]


@pytest.mark.parametrize("place, command", list(written_commands()))
def test_every_command_in_a_document_exists(place: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        build_parser().parse_args(shlex.split(command, comments=True))
    except SystemExit as e:
        if e.code:
            pytest.fail(f"{place}: {command}\n{capsys.readouterr().err}")


# ---------------------------------------------------------------------------------------------------------------------
# Links


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = [title for _, title in HEADING.findall(BLOCK.sub("", text_of(document)))]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(document: Path) -> list[str]:
    return LINK.findall(prose(document).replace("\n", " "))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in links(document):
        target, _, anchor = link.partition("#")
        if "://" in link:
            parts = urlsplit(link)
            assert parts.scheme == "https" and "." in parts.netloc, f"{document.name}: {link}"
            continue
        path = (document.parent / target).resolve() if target else document
        assert path.is_file() and path.is_relative_to(PROJECT), f"{document.name}: {link} is no file"
        assert not anchor or anchor in anchors(path), f"{document.name}: {link} is no heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_file_of_the_project_that_is_named_is_there(document: Path) -> None:
    rooms = {path.name for path in (PROJECT / "separation").iterdir() if path.is_dir()}
    for name in FILE.findall(text_of(document)):
        first = name.split("/")[0]
        if first in rooms | {".ci", ".github", "client", "configs", "separation", "tests", "weights"}:
            found = [path for folder in (PROJECT, PROJECT / "separation") for path in folder.glob(name)]
            assert found, f"{document.name}: {name} is no file"


def test_every_document_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    left = [README]
    while left:
        document = left.pop()
        if document not in reached and document.is_file():
            reached.add(document)
            targets = (link.partition("#")[0] for link in links(document) if "://" not in link)
            left += [(document.parent / target).resolve() for target in targets if target.endswith(".md")]
    assert {path for path in DOCUMENTS if path.is_relative_to(PROJECT / "docs")} <= reached


# ---------------------------------------------------------------------------------------------------------------------
# Options


def commands(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    """The parsers of all commands by their names, such as `models list`."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        return {name: parser}
    return {
        command: found
        for action in below
        for word, child in action.choices.items()
        for command, found in commands(child, f"{name} {word}".strip()).items()
    }


COMMANDS = commands(build_parser())
SHARED = ("Device options", "Model options")


def options(command: str) -> list[argparse.Action]:
    return [action for action in COMMANDS[command]._actions if action.option_strings and action.dest != "help"]


def option_tables(command: str) -> list[str]:
    """The command's section, and the sections about shared options that name it."""
    shared = [section(COMMAND_LINE, title) for title in SHARED]
    return [section(COMMAND_LINE, command), *(text for text in shared if f"`{command}`" in text.split("\n\n")[1])]


def rows(text: str) -> dict[str, str]:
    """The documented default of each option."""
    return {option: default for cell, default in ROW.findall(text) for option in re.findall(r"`(-[\w-]+)`", cell)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented_with_its_default_and_choices(command: str) -> None:
    texts = option_tables(command)
    documented = {option: default for text in texts for option, default in rows(text).items()}
    for action in options(command):
        name = action.option_strings[-1]
        assert set(action.option_strings) <= set(documented), f"{command} {name} is in no table"
        default = "required" if action.required else action.default
        if default not in (None, False):
            assert str(default) in documented[name], f"{command} {name}: the default is {default}"
        for choice in action.choices or ():
            assert any(re.search(rf"(?<!\w){choice}(?!\w)", text) for text in texts), f"{command} {name} {choice}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_option_exists(command: str) -> None:
    known = {name for action in options(command) for name in action.option_strings}
    for text in option_tables(command):
        assert set(rows(text)) <= known


def test_every_command_has_an_entry_and_the_programs_own_options_are_named() -> None:
    entries = section(COMMAND_LINE, "Command line")
    assert {command.split()[0] for command in COMMANDS} == set(re.findall(r"^\| \[`(\w+)`\]", entries, re.MULTILINE))
    own = {name for action in build_parser()._actions for name in action.option_strings if name.startswith("--")}
    assert all(f"{name}`" in entries for name in own)


# ---------------------------------------------------------------------------------------------------------------------
# Environment variables, recipes, models


def variables() -> set[str]:
    """The environment variables that the code reads or sets, and those of the container."""
    found: set[str] = set()
    for path in (PROJECT / "predict.py", *(PROJECT / "separation").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"SEPARATION_[A-Z_]+[A-Z]", node.value))
            for name in _of_environment(node):
                found |= {name.value} if isinstance(name, ast.Constant) and isinstance(name.value, str) else set()
    for path in (PROJECT / "separation").rglob("*.cpp"):
        found |= set(re.findall(r'getenv\("(\w+)"\)', path.read_text(encoding="utf-8")))
    container = yaml.safe_load((PROJECT / "cog.yaml").read_text(encoding="utf-8"))
    return found | {entry.partition("=")[0] for entry in container["environment"]}


def _of_environment(node: ast.AST) -> list[ast.expr]:
    """The names in `os.environ[NAME]`, `os.environ.get(NAME)`, `NAME in os.environ` and the like."""

    def is_environment(expression: ast.expr) -> bool:
        return ast.unparse(expression) == "os.environ"

    if isinstance(node, ast.Subscript) and is_environment(node.value):
        return [node.slice]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_environment(node.func.value):
        return node.args[:1]
    if isinstance(node, ast.Compare) and is_environment(node.comparators[-1]):
        return [node.left]
    if isinstance(node, ast.BinOp) and is_environment(node.left) and isinstance(node.right, ast.Dict):
        return [key for key in node.right.keys if key is not None]
    return []


def test_every_environment_variable_is_documented_and_every_documented_one_is_read() -> None:
    text, read = text_of(PROJECT / "docs" / "environment.md"), variables()
    documented = {name for cell, _ in ROW.findall(text) for name in re.findall(r"`(\w+)`", cell)}
    assert read - documented == set()
    assert {name for name in documented if name.startswith("SEPARATION_")} <= read


def test_every_recipe_and_choice_of_stems_is_documented() -> None:
    about_recipes = section(PROJECT / "docs" / "recipes.md", "Recipes")
    for name in recipes.names():
        assert f"| `{name}` |" in about_recipes
        assert all(f"| `{choice}` |" in about_recipes for choice in recipes.choices(name))


def test_the_tables_of_models_are_those_of_their_yaml_files() -> None:
    text = text_of(models_table.DOCUMENT)
    assert all(text.count(f"| `{name}` |") == 1 for name in models_table.shipped())
    assert text == models_table.written(text), "run PYTHONPATH=.:tests python tests/helpers/models_table.py"


# ---------------------------------------------------------------------------------------------------------------------
# Fields of --json

Objects = Callable[..., list[dict[str, Any]]]
NO_DESCENT = {"hyper_parameters"}  # each model has its own


@pytest.fixture
def objects(working_folder: Path, capfd: pytest.CaptureFixture[str]) -> Objects:
    """Runs the command with --json; returns the objects that it prints."""

    def run(*arguments: str) -> list[dict[str, Any]]:
        capfd.readouterr()
        assert main([*arguments, "--json"]) in (0, 2)
        return [json.loads(line) for line in capfd.readouterr().out.splitlines()]

    return run


def field_names(value: Any, data: set[str]) -> set[str]:
    """The keys of an object, at any depth, except those that are data: names of stems, models and songs."""
    if isinstance(value, list):
        return set().union(*(field_names(item, data) for item in value))
    if not isinstance(value, dict):
        return set()
    inner = [field_names(item, data) for key, item in value.items() if key not in NO_DESCENT]
    return (set(value) - data).union(*inner)


def check_fields(command: str, found: list[dict[str, Any]]) -> None:
    text = section(COMMAND_LINE, f"`{command} --json`")
    models = [catalogue.read_config(name) for name in catalogue.available()]
    stems = {stem for model in models for stem in (*model.stems, str(model.residual))}
    names = field_names(found, stems | {"mean", "instrumental", "demo", "song"} - set().union(*found))
    assert names <= set(re.findall(r"`([\w -]+)`", text))
    columns = {name for cell, _ in ROW.findall(text) for name in re.findall(r"`(\w+)`", cell)}
    assert columns <= names, "documented, but not there"


def test_a_damaged_songs_error_is_as_documented(objects: Objects, working_folder: Path) -> None:
    Path("03.flac").write_bytes(Path("song.flac").read_bytes()[:100_000])
    (failed,) = objects("separate", "03.flac", "-o", "out", "--recipe", "demo")
    fault = failed["error"].partition("): ")[0]

    def without_numbers(text: str) -> str:
        return re.sub(r"\d+\.\d+", "0", text)

    assert without_numbers(fault) in without_numbers(section(COMMAND_LINE, "Which songs"))


@pytest.mark.slow
def test_the_fields_of_separate_are_documented(objects: Objects, working_folder: Path) -> None:
    Path("broken.flac").write_bytes(Path("song.flac").read_bytes()[:9000])
    found = objects("separate", "song.flac", "broken.flac", "-o", "out", "--recipe", "demo", "--report", "--analyse")
    check_fields("separate", sorted(found, key=lambda line: line["status"]))
    check_fields("cache list", objects("cache", "list"))


def test_the_fields_about_models_are_documented(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "broken.yaml").write_text("audio: 3")
    monkeypatch.setenv("SEPARATION_MODELS", str(tmp_path / "models"))
    found = objects("models", "list")
    assert any("error" in line for line in found)
    monkeypatch.delenv("SEPARATION_MODELS")
    check_fields("models list", found)
    check_fields("models show", objects("models", "show", "htdemucs_ft"))


@pytest.mark.slow
def test_the_fields_of_what_measures_are_documented(objects: Objects, working_folder: Path) -> None:
    check_fields("bench", objects("bench", "--recipe", "demo", "--seconds", "1", "--runs", "1"))
    check_fields("bench --cold-start", objects("bench", "--recipe", "demo", "--cold-start"))
    compare = ("bench", "--recipe", "demo", "--seconds", "2", "--compare-precision", "song.flac")
    check_fields("bench --compare-precision", objects(*compare))
    check_fields("evaluate", objects("evaluate", "--references", "true", "--estimates", "true"))


# ---------------------------------------------------------------------------------------------------------------------
# Python and the container


def test_every_public_name_is_documented() -> None:
    names = re.findall(r"\w+", " ".join(re.findall(r"```python\n.*?```|`[^`]+`", text_of(PYTHON), re.DOTALL)))
    assert set(separation.__all__) <= set(names)


@pytest.mark.parametrize("options", [EngineOptions, OutputOptions])
def test_every_field_of_the_options_is_documented_with_its_default(options: Any) -> None:
    table = text_of(PYTHON).partition(f"| `{options.__name__}` |")[2].partition("\n\n")[0]
    documented = {name: default for cell, default in ROW.findall(table) for name in re.findall(r"`(\w+)`", cell)}
    assert {field.name for field in fields(options)} == set(documented)
    for field in fields(options):
        default = repr(field.default).replace("'", '"')
        assert field.default is None or default in documented[field.name], field.name


def test_the_containers_inputs_and_metrics_are_documented_with_defaults_and_choices() -> None:
    text = section(PROJECT / "docs" / "deploy.md", "Deploy")
    schemas = json.loads((PROJECT / "tests" / "served" / "openapi.json").read_text(encoding="utf-8"))
    schemas = schemas["components"]["schemas"]
    for name, about in schemas["Input"]["properties"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        choices = schemas[name]["enum"] if name in schemas else []
        choices += [about["default"]] if "default" in about else []
        choices = [json.dumps(choice) if isinstance(choice, bool) else choice for choice in choices]
        choices += [int(about[key]) for key in ("minimum", "maximum") if key in about]
        assert {str(choice) for choice in choices} <= set(re.findall(r"\w+", row)), name
    assert all(f"| `{metric}` |" in text for metric in METRICS)


# ---------------------------------------------------------------------------------------------------------------------
# The README


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= MOST_LINES


def test_the_readme_names_every_extra() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = " ".join(section(README, "Install").split())
    assert all(f"`{name}` (" in text for name in project["optional-dependencies"])


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    (sample,) = (s for s in samples(README) if s.text in section(README, "Try it on a fresh machine"))
    said = [command for line in sample.text.splitlines() for command in line.split(" && ")]
    run = (PROJECT / ".ci" / "run").read_text(encoding="utf-8").replace("pip install --quiet", "pip install")
    lines = [line.removeprefix("$without_network ").partition(" --output ")[0] for line in run.splitlines()]
    assert len(said) == 4 and set(said) <= set(lines)
