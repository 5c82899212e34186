"""The metadata in pyproject.toml is right, and an installed wheel works."""

import ast
import importlib.metadata
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import separation
from helpers.common import PROJECT, SONG, slow
from helpers.fused import needs_fused
from helpers.house import imports, modules
from separation.cpu import KINDS, find_compiler, machine, usable_kinds

# Packages that others install. Triton has wheels only for Linux, where PyTorch depends on it.
INDIRECT = {"triton": "torch", "onnx-ir": "onnxscript", "numba": "librosa", "fsspec": "s3fs"}
USERS_TEN = [
    "cog",
    "torch",
    "torchaudio",
    "numpy",
    "librosa",
    "soundfile",
    "pyyaml",
    "einops",
    "rotary-embedding-torch",
    "demucs",
]
SHIPPED = ("demo.safetensors", "song.flac", "README.md", "stems/vocals.ogg", "stems/piano.ogg")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def pins() -> dict[str, Requirement]:
    text = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    return requirements(text.splitlines())


# ---------------------------------------------------------------------------------------------------------------------
# Import


@pytest.mark.parametrize(
    "before, own, expected",
    [
        ("", None, "passive"),
        ("", "active", "active"),
        slow(("import torch", None, "None")),  # it would only affect the processes that this one starts
    ],
)
def test_importing_the_package_makes_idle_threads_sleep_unless_it_is_too_late_or_the_user_says_otherwise(
    before: str, own: str | None, expected: str
) -> None:
    code = f"""
import os, sys
{before}
loaded_before = "torch" in sys.modules
import separation
print(os.environ.get("OMP_WAIT_POLICY"))
assert ("torch" in sys.modules) == loaded_before  # PyTorch reads the variable when it is imported
"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": own} if own else {}
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert run.stdout.split() == [expected], run.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Dependencies


def test_the_dependencies_are_the_packages_that_are_imported(project: dict[str, Any]) -> None:
    distributions = importlib.metadata.packages_distributions()
    top_level = {name.split(".")[0] for path in modules().values() for name in imports(path)}
    outside = top_level - set(sys.stdlib_module_names) - {"separation"}
    imported = {canonicalize_name(distributions.get(name, [name])[0]) for name in outside} - set(INDIRECT)
    metadata = project["project"]
    optional = [line for lines in metadata["optional-dependencies"].values() for line in lines]
    imported |= {"onnx", "s3fs", "gcsfs"}  # onnxscript needs onnx, fsspec the others
    assert imported == set(requirements(metadata["dependencies"] + optional))


def test_only_the_container_needs_a_server(project: dict[str, Any]) -> None:
    metadata = project["project"]
    assert "cog" not in requirements(metadata["dependencies"])
    assert set(requirements(metadata["optional-dependencies"]["container"])) == {"cog", "requests", "urllib3"}


def test_the_container_pins_versions_within_the_ranges_of_the_package(project: dict[str, Any]) -> None:
    ranges = requirements(project["project"]["dependencies"])
    server = requirements(project["project"]["optional-dependencies"]["container"])
    assert all("==" not in str(range_) and range_.specifier for range_ in ranges.values())
    assert set(USERS_TEN) <= set(pins())
    assert set(pins()) == {*ranges, *server}
    for name, pin in pins().items():
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert Version(exact.version) in (ranges | server)[name].specifier, name


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def test_the_version_is_written_in_one_place(project: dict[str, Any]) -> None:
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "separation.__version__"}
    assert Version(separation.__version__) > Version("0")


def test_the_changelog_starts_with_the_current_version() -> None:
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\S+) - \d{4}-\d{2}-\d{2}$", text, re.MULTILINE)
    assert versions[0] == separation.__version__
    assert versions == sorted(versions, key=Version, reverse=True)


def test_the_workflow_pushes_with_the_cog_that_the_container_is_tested_with() -> None:
    workflow = (PROJECT / ".github" / "workflows" / "cog.yml").read_text(encoding="utf-8")
    (version,) = re.findall(r"cog-version: v(\S+)", workflow)
    assert str(pins()["cog"].specifier) == f"=={version}"


@pytest.mark.parametrize("name", ["client.yml", "cog.yml", "tests.yml", "wheel.yml"])
def test_workflows_only_read_and_use_actions_of_a_given_major_version(name: str) -> None:
    text = (PROJECT / ".github" / "workflows" / name).read_text(encoding="utf-8")
    assert "\npermissions:\n  contents: read\n" in text
    used = re.findall(r"uses: (\S+)", text)
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", action) for action in used)


def test_the_files_that_ci_runs_again_for_other_cpus_are_there() -> None:
    text = (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
    named = re.findall(r"tests/[\w/]+\.py", text)
    for start, names in re.findall(r"(tests/[\w/]+)\{([\w,]+)\}\.py", text):
        named += [f"{start}{name}.py" for name in names.split(",")]
    assert len(named) > 10
    assert [name for name in named if not (PROJECT / name).is_file()] == []


def test_the_wheel_lists_all_packages(project: dict[str, Any]) -> None:
    folders = [path.parent for path in (PROJECT / "separation").rglob("__init__.py")]
    named = {".".join(folder.relative_to(PROJECT).parts) for folder in folders}
    assert named | {"separation.configs", "separation.weights"} == set(project["tool"]["setuptools"]["packages"])


def test_the_wheel_takes_every_config(project: dict[str, Any]) -> None:
    configs = PROJECT / "configs"
    patterns = project["tool"]["setuptools"]["package-data"]["separation.configs"]
    taken = {path for pattern in patterns for path in configs.glob(pattern)}
    assert taken == {path for path in configs.rglob("*") if path.is_file()}


def test_mypy_checks_for_the_oldest_python(project: dict[str, Any]) -> None:
    assert project["project"]["requires-python"] == f">={project['tool']['mypy']['python_version']}"


# ---------------------------------------------------------------------------------------------------------------------
# The wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, because building leaves files behind."""
    if Version(importlib.metadata.version("setuptools")) < Version("77"):
        pytest.skip("needs setuptools 77 or later (pip install -r requirements-dev.txt)")
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, folder)
    unwanted = shutil.ignore_patterns("__pycache__", "*.verified")
    for name in ("separation", "configs", "weights/demo"):
        shutil.copytree(PROJECT / name, folder / name, ignore=unwanted)
    (folder / "weights" / "mine.ckpt").write_bytes(b"downloaded by a user")
    return folder


def build(source: Path, kind: str, target: Path) -> Path:
    """Build a `wheel` or an `sdist` with the build backend of the project."""
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    ran = subprocess.run([sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, check=True)
    return target / ran.stdout.decode().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a fresh environment with the wheel. It has the packages of this one, but not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-warn-script-location", str(wheel)], check=True
    )
    return folder / "bin"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An empty home, and no variable that points to the checkout."""
    (tmp_path / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "PYTHON", "SEPARATION"))}
    return kept | {"HOME": str(tmp_path / "home")}


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def files_in(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


@pytest.mark.slow
def test_the_wheel_contains_the_package_the_configs_and_the_demo_and_nothing_else(wheel: Path) -> None:
    folders = {"separation": "separation", "configs": "separation/configs"}
    expected = {
        f"{target}/{path.relative_to(PROJECT / folder).as_posix()}"
        for folder, target in folders.items()
        for path in (PROJECT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = set(files_in(wheel))
    assert expected <= names
    assert {f"separation/weights/demo/{name}" for name in SHIPPED} <= names
    kernels = {name for name in names if name.endswith(".so")}
    others = {name for name in names - expected - kernels if "dist-info/" not in name}
    assert all(name.startswith("separation/weights/demo/") and not name.endswith(".py") for name in others)


@pytest.mark.slow
@pytest.mark.skipif(not find_compiler(), reason="needs a C++ compiler")
def test_the_wheel_has_the_kernels_of_every_kind_of_its_machine(wheel: Path) -> None:
    folder = "separation/models/kernels/cpu"
    kinds = {f"{folder}/{kind.name}.so" for kind in KINDS if kind.machine == machine()}
    assert {name for name in files_in(wheel) if name.endswith(".so")} == kinds
    assert wheel.name.endswith("-any.whl") == (not kinds)


@pytest.mark.slow
@needs_fused
def test_an_installed_wheel_needs_no_compiler(installed: Path, empty: Path, environment: dict[str, str]) -> None:
    command = [str(installed / "separation"), "separate", str(SONG), "--recipe", "demo", "-o", "stems", "-v"]
    ran = subprocess.run(
        [*command, "--device", "cpu"],
        cwd=empty,
        env=environment | {"PATH": str(installed), "SEPARATION_CACHE": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    (kind, *_) = usable_kinds()
    assert f"attention fused (the fastest that works here, with kernels for {kind.name}, from the wheel" in ran.stderr


@pytest.mark.slow
def test_without_a_compiler_the_wheel_has_no_kernels_and_the_build_says_so(source: Path, tmp_path: Path) -> None:
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_wheel({str(tmp_path)!r}))"
    python = [sys.executable, "-c", code]
    without = os.environ | {"PATH": str(tmp_path), "CXX": ""}
    ran = subprocess.run(python, cwd=source, env=without, capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in files_in(wheel) if name.endswith(".so")]
    assert "the wheel has no CPU kernels" in ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="needs aarch64-linux-gnu-g++")
def test_a_compiler_for_arm_builds_a_wheel_for_arm(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "aarch64-linux-gnu-g++")
    wheel = build(source, "wheel", tmp_path)
    assert wheel.name.endswith("-py3-none-linux_aarch64.whl")
    libraries = {Path(name).stem: content for name, content in files_in(wheel).items() if name.endswith(".so")}
    assert set(libraries) == {kind.name for kind in KINDS if kind.machine == "aarch64"}
    assert {int.from_bytes(content[18:20], "little") for content in libraries.values()} == {183}  # EM_AARCH64


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build(source, "sdist", tmp_path)
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    again = build(next((tmp_path / "unpacked").iterdir()), "wheel", tmp_path)
    assert files_in(again) == files_in(wheel)


@pytest.mark.slow
def test_the_installed_command_needs_neither_a_network_nor_a_writable_installation(
    installed: Path, empty: Path, environment: dict[str, str]
) -> None:
    package = next(installed.parent.glob("lib/python*/site-packages/separation"))
    command = [str(installed / "separation"), "demo", "--device", "cpu"]
    shut = f"mount --bind {package} {package} && mount -o remount,bind,ro {package}"
    try_it = subprocess.run(["unshare", "-rnm", "sh", "-c", shut], capture_output=True, check=False)
    if try_it.returncode == 0:
        command = ["unshare", "-rnm", "sh", "-c", f'{shut} && exec "$@"', "sh", *command]
    before = sorted(package.rglob("*"))
    ran = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "picture: stems/stems.svg" in ran.stdout
    assert len(list((empty / "stems" / "all_6").glob("*.wav"))) == 6
    if try_it.returncode == 0:
        assert sorted(package.rglob("*")) == before


@pytest.mark.slow
def test_the_installed_command_prints_its_own_name_and_version(
    installed: Path, empty: Path, environment: dict[str, str]
) -> None:
    def output(*command: str) -> str:
        ran = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=True)
        return ran.stdout

    script, python = str(installed / "separation"), str(installed / "python")
    assert output(script, "--version") == output(python, "-m", "separation", "--version")
    assert output(script, "--version") == f"separation {separation.__version__}\n"
    assert output(python, "-c", "import importlib.metadata as m; print(m.version('music-separation'))") == (
        f"{separation.__version__}\n"
    )
    assert output(script, "--help").startswith("usage: separation [")
    assert output(python, "-m", "separation", "--help").startswith("usage: python -m separation [")
    assert "bs_roformer_viperx_1297" in output(script, "models", "list")
    folder = output(python, "-c", "from separation.system.places import weights_folder; print(weights_folder())")
    assert folder == f"{environment['HOME']}/.local/share/music-separation/weights\n"


@pytest.fixture
def served(installed: Path, empty: Path, environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    command = [str(installed / "separation"), "serve", "--port", "0", "--no-browser", "--device", "cpu"]
    with subprocess.Popen(command, cwd=empty, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_the_installed_command_ends_on_a_signal(served: "subprocess.Popen[str]") -> None:
    assert served.stdout is not None
    url, _, words = served.stdout.readline().partition(" ")
    assert words.startswith("is the page")
    with urlopen(url) as page:
        assert b"class Region" in page.read()
    served.send_signal(signal.SIGHUP)
    assert served.wait(60) == 128 + signal.SIGHUP


@pytest.mark.parametrize("name", separation.__all__)
def test_type_checkers_need_to_infer_nothing_about_a_public_class(name: str) -> None:
    """Every parameter, result and public attribute that is set in `__init__` has an annotation."""
    public = getattr(separation, name)
    if not isinstance(public, type) or issubclass(public, Exception):
        return
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(public))).body
    assert isinstance(tree, ast.ClassDef)
    declared = {
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        assert function.returns and all(a.annotation for a in arguments if a.arg not in ("self", "cls")), function.name
        for node in ast.walk(function) if function.name == "__init__" else []:
            targets = node.targets if isinstance(node, ast.Assign) else []
            attributes = [target.attr for target in targets if isinstance(target, ast.Attribute)]
            assert all(name.startswith("_") or name in declared for name in attributes), attributes
