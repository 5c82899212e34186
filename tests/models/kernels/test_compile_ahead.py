"""Kernels are compiled without a GPU, few for each model, and found again by what looks for them as on a GPU."""

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

# Kernels that are compiled at a model's first runs, the one that Triton is tried with among them: each takes time.
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
        return True  # it is not compiled

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    with stand_in_driver(1000, lambda *arguments: None):  # of which no other test has kernels
        request_kernels(model_for_gpu(name, torch.float16))
    numbers = {kernel: len(keys) for kernel, keys in wanted.items()}
    assert 0 < sum(numbers.values()) <= MOST[name], numbers


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's kernels for compute capability 9.0, in a folder that has moved and that nobody writes to."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("kernels")
    command = [sys.executable, "-m", "separation", "models", "compile", "demo", "--gpu", "90", "-o", folder / "made"]
    ran = subprocess.run(command, cwd=PROJECT, env=os.environ | {"HOME": str(folder)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r": \d+ kernels compiled$", ran.stdout.strip())
    made = (folder / "made").rename(folder / "shipped")
    for each in (made, *made.rglob("*")):
        each.chmod(each.stat().st_mode & ~0o222)
    return made


def lookups(capability: int, shipped: Path, tmp_path: Path) -> tuple[dict[str, int], list[Path]]:
    """What a fresh process does with those kernels and an empty cache, and what the cache holds then."""
    cuda = library_of_the_driver(shipped, tmp_path)
    paths = os.pathsep.join([str(PROJECT), str(PROJECT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "SEPARATION_KERNELS": str(shipped)}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "LD_LIBRARY_PATH": str(cuda)}
    environment |= {"TRITON_LIBCUDA_PATH": str(cuda)}
    command = [sys.executable, PROJECT / "tests" / "helpers" / "kernel_lookups.py", "demo", str(capability)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    counts: dict[str, int] = json.loads(ran.stdout)
    return counts, [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def library_of_the_driver(shipped: Path, tmp_path: Path) -> Path:
    """A folder with a libcuda.so.1 that has all that the modules in C want of it, and does nothing."""
    from triton.runtime.build import _build

    wanted = set()
    for module in shipped.rglob("*.so"):
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
def test_nothing_is_compiled_that_was_shipped(shipped: Path, tmp_path: Path) -> None:
    counts, cached = lookups(90, shipped, tmp_path)
    assert counts["found"] == len(below(shipped, "*.cubin")) > 10
    assert (counts["compiled"], counts["built"], cached) == (0, 0, [])


@pytest.mark.slow
def test_what_was_not_shipped_is_compiled_into_tritons_own_cache(shipped: Path, tmp_path: Path) -> None:
    before = below(shipped, "*")
    counts, cached = lookups(80, shipped, tmp_path)
    assert counts["found"] == 0 < counts["compiled"] == len([path for path in cached if path.suffix == ".cubin"])
    assert counts["built"] == 0  # what starts kernels is the same for all GPUs
    assert below(shipped, "*") == before


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["models", "compile", "demo", "-o", str(tmp_path / "file")]) == 2
    assert "choose another" in capsys.readouterr().err


def test_without_a_c_compiler_the_message_names_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert main(["models", "compile", "demo", "-o", str(tmp_path)]) == 2
    assert "install gcc" in capsys.readouterr().err
