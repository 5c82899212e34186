"""Kernels are compiled without a GPU, few for each model, and found again by a process that looks them up."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.common import PROJECT, below, quick_first
from separation.checkpoints.build import model_for_gpu
from separation.cli.main import main

pytest.importorskip("triton", reason="needs Triton")
from triton import knobs

from separation.models.kernels.compile_ahead import request_kernels, stand_in_driver

# The most kernels that a model's first runs may compile, including the one that tests Triton. Each takes time.
MOST = {
    "mel_band_roformer_kim": 20,
    "bs_roformer_viperx_1297": 15,
    "bs_roformer_sw": 15,
    "htdemucs_ft": 42,
    "htdemucs_6s": 42,
    "mdx23c_instvoc_hq_2": 7,
    "drumsep": 7,
    "scnet": 16,
    "scnet_xl_ihf": 16,
}


@pytest.mark.parametrize("name", quick_first(list(MOST), 1))
def test_a_model_needs_few_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: defaultdict[str, set[str]] = defaultdict(set)

    def note(*, key: str, fn: Any, **facts: Any) -> bool:
        wanted[fn.name].add(str(key))
        return True  # skips the compilation

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    with stand_in_driver(1000, lambda *arguments: None):  # no other test compiles kernels for it
        request_kernels(model_for_gpu(name, torch.float16))
    numbers = {kernel: len(keys) for kernel, keys in wanted.items()}
    assert 0 < sum(numbers.values()) <= MOST[name], numbers


@pytest.fixture(scope="module")
def precompiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's kernels for compute capability 9.0, in a read-only folder that was moved."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("kernels")
    command = [sys.executable, "-m", "separation", "models", "compile", "demo", "--gpu", "90", "-o", folder / "made"]
    ran = subprocess.run(command, cwd=PROJECT, env=os.environ | {"HOME": str(folder)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r": \d+ kernels compiled$", ran.stdout.strip())
    made = (folder / "made").rename(folder / "precompiled")
    for each in (made, *made.rglob("*")):
        each.chmod(each.stat().st_mode & ~0o222)
    return made


def lookups(capability: int, precompiled: Path, tmp_path: Path) -> tuple[dict[str, int], list[Path]]:
    """What a fresh process looks up and compiles with those kernels and an empty cache, and the cache's files."""
    cuda = library_of_the_driver(precompiled, tmp_path)
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "SEPARATION_KERNELS": str(precompiled)}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "LD_LIBRARY_PATH": str(cuda)}
    environment |= {"TRITON_LIBCUDA_PATH": str(cuda)}
    command = [sys.executable, PROJECT / "tests" / "helpers" / "kernel_lookups.py", "demo", str(capability)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    counts: dict[str, int] = json.loads(ran.stdout)
    return counts, [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def library_of_the_driver(precompiled: Path, tmp_path: Path) -> Path:
    """A folder with a libcuda.so.1 that has all functions that the C modules call, and does nothing."""
    from triton.runtime.build import _build

    wanted = set()
    for module in precompiled.rglob("*.so"):
        wanted |= set(re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", module.read_bytes()))
    assert b"cuPointerGetAttribute" in wanted
    folder = tmp_path / "driver"
    folder.mkdir()
    source = folder / "driver.c"
    source.write_text("".join(f"int {name.decode()}(void) {{ return 999; }}\n" for name in sorted(wanted)))
    soname = ["-Wl,-soname,libcuda.so.1"]
    Path(_build("driver", str(source), str(folder), [], [], [], soname)).rename(folder / "libcuda.so.1")
    return folder


@pytest.mark.slow
def test_precompiled_kernels_are_not_compiled_again(precompiled: Path, tmp_path: Path) -> None:
    counts, cached = lookups(90, precompiled, tmp_path)
    assert counts["found"] == len(below(precompiled, "*.cubin")) > 10
    assert (counts["compiled"], counts["built"], cached) == (0, 0, [])


@pytest.mark.slow
def test_kernels_that_are_not_precompiled_go_into_tritons_own_cache(precompiled: Path, tmp_path: Path) -> None:
    before = below(precompiled, "*")
    counts, cached = lookups(80, precompiled, tmp_path)
    assert counts["found"] == 0 < counts["compiled"] == len([path for path in cached if path.suffix == ".cubin"])
    assert counts["built"] == 0  # launchers are the same for all GPUs
    assert below(precompiled, "*") == before


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["models", "compile", "demo", "-o", str(tmp_path / "file")]) == 2
    assert "choose another" in capsys.readouterr().err


def test_without_a_c_compiler_the_error_names_one_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert main(["models", "compile", "demo", "-o", str(tmp_path)]) == 2
    assert "install gcc" in capsys.readouterr().err
