"""The layers of the package: imports only go down, and each library is imported in one place."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest

import separation
from helpers.common import PROJECT, quick_first
from helpers.house import imports, modules
from separation import device
from separation.engine import options
from separation.models import attention

# A package or module imports only from lower floors. There are no import cycles.
FLOORS = {
    "separation": 11,  # the public names
    "separation.__main__": 11,
    "predict": 12,
    "separation.cli": 10,
    "separation.batch": 9,
    "separation.web": 9,
    "separation.report": 8,
    "separation.evaluation": 7,
    "separation.engine": 6,
    "separation.analysis": 5,
    "separation.audio": 4,
    "separation.checkpoints": 4,
    "separation.models": 3,
    "separation.system": 2,
    "separation.device": 2,
    "separation.cpu": 1,
    "separation.documents": 1,
    "separation.settings": 1,
    "separation.progress": 0,
    "separation.errors": 0,
}


# ffmpeg, a fresh Python, a compiler
PROGRAMS = {
    "separation.audio.ffmpeg",
    "separation.audio.ffmpeg_writer",
    "separation.evaluation.cold_start",
    "separation.models.kernels.native",
}


def room(module: str) -> str:
    """The package of a module, or the module where it stands alone."""
    return ".".join(module.split(".")[:2])


def inside(module: str) -> set[str]:
    return {name for name in imports(modules()[module]) if name.split(".")[0] == "separation"}


@pytest.mark.parametrize("module", modules())
def test_imports_only_go_down(module: str) -> None:
    climbing = {name for name in inside(module) if FLOORS[room(name)] >= FLOORS[room(module)]}
    others = {name for name in climbing if room(name) != room(module)}
    if room(module) == "separation.cli":
        others -= {"separation"}  # for the version
    assert not others, f"{module} imports {others}"


def test_no_modules_import_each_other() -> None:
    order = TopologicalSorter({module: inside(module) - {"separation", module} for module in modules()})
    order.prepare()  # raises CycleError


def test_the_packages_are_those_of_the_house_and_hold_every_module() -> None:
    assert {room(module) for module in modules()} == FLOORS.keys()


# The container's inputs.
DICTATED = {"predict.Predictor.run"}


def functions(module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """A module's functions and methods with their full names, except Triton's kernels."""

    definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            inner = f"{name}.{child.name}" if isinstance(child, definitions) else name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                decorators = {ast.unparse(decorator) for decorator in child.decorator_list}
                if not any("triton" in decorator or decorator.endswith("jit") for decorator in decorators):
                    yield inner, child
            yield from walk(child, inner)

    yield from walk(ast.parse(modules()[module].read_text(encoding="utf-8")), module)


@pytest.mark.parametrize("module", modules())
def test_no_function_has_more_than_six_parameters(module: str) -> None:
    for name, function in functions(module):
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        names = [parameter.arg for parameter in parameters if parameter.arg not in ("self", "cls")]
        assert len(names) <= 6 or name in DICTATED, f"{name}({', '.join(names)})"


# Modules without a test file of their own: tests of `*_ops` compare both twins, and `source` holds only data classes.
UNTESTED = ("__init__", "__main__", "source")


@pytest.mark.parametrize("module", modules())
def test_every_module_has_a_test_file_in_the_same_place(module: str) -> None:
    path = modules()[module].relative_to(PROJECT)
    if path.stem in UNTESTED or path.stem.endswith("_triton"):
        return
    inside_package = path.relative_to("separation") if path.parts[0] == "separation" else path
    assert (PROJECT / "tests" / inside_package.with_name(f"test_{path.name}")).is_file()


def test_objects_are_complete_when_they_are_made() -> None:
    for module, path in modules().items():
        assert "cls.__new__" not in path.read_text(encoding="utf-8"), module


@pytest.mark.parametrize(
    "library, door",
    [
        ("cog", "predict"),
        ("requests", "separation.web.remote"),
        ("demucs", "separation.models.demucs_networks"),
        ("diffq", "separation.models.demucs_networks"),
        ("librosa", "separation.models.mel_band_roformer"),
        ("rotary_embedding_torch", "separation.models.layers"),
        ("ray", "separation.batch.cluster"),
        ("fsspec", "separation.batch.stores"),
        ("yaml", "separation.documents"),
    ],
)
def test_a_library_is_imported_in_only_one_module(library: str, door: str) -> None:
    users = {name for name, path in modules().items() if any(i.split(".")[0] == library for i in imports(path))}
    assert users == {door}


def test_only_two_download_nothing_unpickles_and_few_run_programs() -> None:
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        assert name in ("separation.checkpoints.download", "separation.web.remote") or "urllib.request" not in text
        assert not any(word in text for word in ("torch.load(", "pickle.load", "Unpickler("))
        assert name in PROGRAMS or "subprocess" not in text


def test_only_the_container_fetches_songs() -> None:
    assert [name for name, path in modules().items() if "separation.web.remote" in imports(path)] == ["predict"]


def test_what_is_printed_goes_through_one_function_for_people_and_one_for_json() -> None:
    """The others: a child process's JSON, a server's log, and messages after the command line has ended."""
    printing = {
        name: len(re.findall(r"\bprint\(", path.read_text(encoding="utf-8"))) for name, path in modules().items()
    }
    del printing["predict"]  # whose stdout is the prediction's log
    assert {name: count for name, count in printing.items() if count} == {
        "separation.cli.printing": 2,
        "separation.evaluation.cold_start": 2,
        "separation.cli.process": 2,
        "separation.web.errors": 1,
    }


@pytest.mark.parametrize(
    "module",
    [
        "separation.evaluation.cold_start",
        "separation.evaluation.evaluate",
        "separation.checkpoints.export",
    ],
)
def test_only_the_command_line_imports_what_measures_and_exports(module: str) -> None:
    users = {name for name, path in modules().items() if module in imports(path)}
    assert users == {"separation.cli.commands"}


def modules_after(code: str) -> set[str]:
    """The modules that a fresh Python has imported after running the code."""
    code += "\nimport sys; print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    return set(ran.stderr.split())


def run_command(*arguments: str) -> str:
    return f"""
from separation.cli.main import main
try:
    main({list(arguments)})
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    "code",
    quick_first(
        [
            "import separation",
            run_command("--help"),
            run_command("separate", "--help"),
            run_command("separate", "song.wav", "-o", "out", "--format", "ogg"),
            run_command("evaluate", "--help"),
            run_command("export", "--help"),
            run_command("completion", "zsh"),
            run_command("models", "list"),
            run_command("models", "show", "nonsense"),
            run_command("cache", "list"),
            run_command("models", "verify", "demo"),
        ],
        6,
    ),
)
def test_what_separates_nothing_imports_nothing_heavy(code: str) -> None:
    heavy = {"torch", "numpy", "torchaudio", "librosa", "soundfile", "demucs", "scipy", "einops"}
    assert not heavy & modules_after(code)


@pytest.mark.slow
def test_loading_models_imports_nothing_that_only_training_and_compiling_need() -> None:
    unused = {
        "sympy",
        "torch._dynamo",
        "torch._inductor",
        "librosa",
        "scipy",
        "numba",
        "openunmix",
        "sklearn",
        "pandas",
    }
    code = """
from separation import Separator
from separation.checkpoints.build import build
from separation.checkpoints.catalogue import read_config
Separator("demo", "all_4")
build(read_config("htdemucs_6s"))
"""
    found = modules_after(code)
    assert {"torch", "demucs.htdemucs"} <= found
    assert not unused & found


def test_the_command_line_offers_what_the_engine_does() -> None:
    assert ("auto", *device.PRECISIONS) == options.PRECISIONS
    assert options.ATTENTIONS == attention.NAMES


def test_the_public_names_are_pinned_and_there() -> None:
    assert all(callable(getattr(separation, name)) for name in separation.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Kazoo'"):
        separation.Kazoo  # noqa: B018
    assert set(separation.__all__) <= set(dir(separation))  # what interpreters complete
    assert separation.__all__ == [
        "AudioError",
        "Cache",
        "CheckpointError",
        "DownloadError",
        "EngineOptions",
        "EstimateError",
        "Excerpt",
        "InputError",
        "Loudness",
        "ModelPool",
        "OutputError",
        "OutputOptions",
        "RecipeError",
        "SeparationError",
        "SeparationModel",
        "Separator",
        "SongAnalysis",
        "StemFiles",
        "analyse",
        "load_model",
    ]
