"""The kernels are compiled once and cached; without them the plain layers run."""

import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.common import PROJECT
from helpers.cpus import kind_of, set_flags, set_kind
from helpers.fused import needs_fused
from separation import cpu
from separation.checkpoints.load import load_model
from separation.models.attention import choose_attention
from separation.models.kernels import native
from separation.models.kernels.native import NotFusedError
from separation.progress import WAIT

BF16 = kind_of("avx512_bf16")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder, which does not exist yet, of a program that has not loaded the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cpu, "_FLAGS", ("-O0", *cpu._FLAGS[1:]))  # compiles in a quarter of the time
    native.library.cache_clear(), native.load.cache_clear()
    yield tmp_path / "cache" / "music-separation"
    native.library.cache_clear(), native.load.cache_clear()


@pytest.mark.slow
@needs_fused
def test_the_library_is_compiled_once_and_cached_wherever_its_sources_are(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = native.library()
    (kept,) = fresh.iterdir()
    assert kept.suffix == ".so" and kept.name.startswith(f"{first.kind.name}-")
    assert first.origin.startswith("compiled by ")
    native.library.cache_clear(), native.load.cache_clear()
    another_checkout = shutil.copytree(cpu.KERNELS, tmp_path / "cpu")
    monkeypatch.setattr(native, "KERNELS", another_checkout)
    for module in (cpu, native):
        monkeypatch.setattr(module, "SOURCE", another_checkout / cpu.SOURCE.name)
    monkeypatch.setattr(native, "_compile", lambda *_, **__: pytest.fail("compiled again"))
    assert (native.library().kind, native.library().origin) == (first.kind, first.origin)


@needs_fused
def test_who_waits_for_the_compiler_is_told_so(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "_FLAGS", (*cpu._FLAGS, "-std=c++1"))  # fails at once
    with caplog.at_level(WAIT), pytest.raises(NotFusedError):
        native.load(BF16)
    assert caplog.messages == ["compiling the kernels for this CPU (avx512_bf16), only this once: about 20 s"]
    assert caplog.records[0].levelno < logging.WARNING


@pytest.mark.slow
@needs_fused
def test_another_folder_is_used_if_the_cache_cannot_be_written(fresh: Path) -> None:
    fresh.parent.write_text("a file in its place")
    native.library()
    assert len(list(fresh.parents[1].glob("music-separation-*/*.so"))) == 1


@pytest.mark.slow
@needs_fused
def test_a_library_in_a_folder_that_others_can_write_is_not_loaded(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    native.library()
    assert list(fresh.iterdir()) == []
    (elsewhere,) = fresh.parents[1].glob("music-separation-*")
    assert elsewhere.stat().st_mode & 0o777 == 0o700 and list(elsewhere.glob("*.so"))


@needs_fused
def test_the_error_of_a_failing_compiler_is_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_FLAGS", (*cpu._FLAGS, "-std=c++1"))
    with pytest.raises(NotFusedError, match=r"^c\+\+ cannot compile fused\.cpp \(.*error.*-std=c\+\+1"):
        native.library()
    assert list(fresh.iterdir()) == []


def test_without_a_compiler_the_plain_layers_run_and_say_why(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    set_kind(monkeypatch, BF16)
    choice = choose_attention("auto", torch.device("cpu"), torch.bfloat16)
    assert choice.name == "itemwise"
    assert choice.reason.startswith("not fused: no C++ compiler (c++, g++ or clang++) is installed; ")


def test_int8_without_fused_layers_falls_back_and_says_why(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    set_kind(monkeypatch, BF16)
    model = load_model("demo", precision="int8")
    assert model.attention == "itemwise" and model.precision == torch.bfloat16
    assert caplog.messages[0].startswith("demo computes in floats, not in int8 (no C++ compiler")


@pytest.mark.parametrize(
    "machine, flags, reason",
    [
        ("x86_64", ("avx2", "fma"), "the CPU has no f16c"),
        ("riscv64", (), "there are no kernels for riscv64"),
    ],
)
def test_without_the_instructions_the_plain_layers_run_and_say_why(
    machine: str, flags: tuple[str, ...], reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_flags(monkeypatch, machine, flags)
    choice = choose_attention("auto", torch.device("cpu"), torch.bfloat16)
    assert choice.name == "itemwise"
    assert f"not fused: {reason}; " in choice.reason


@needs_fused
def test_the_reason_names_the_kind_and_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """For `-v`."""
    library = native.library()
    choice = choose_attention("auto", torch.device("cpu"), torch.bfloat16)
    assert choice.name == "fused"
    assert f"with kernels for {library.kind.name}, {library.origin}" in choice.reason
    native.library.cache_clear()
    monkeypatch.setenv("SEPARATION_CPU_KIND", library.kind.name)
    assert str(native.library()).endswith("; requested by SEPARATION_CPU_KIND")
    native.library.cache_clear()


OUT_OF_MEMORY = """
import gc, resource
import torch
from separation.models.kernels.fused import FusedTransformer
from separation.models.kernels.scnet_cpu import TimeBranches
from separation.models.layers import Attention, RotaryEmbedding, Transformer
from separation.models.scnet import TimeConvolutions

def make_attention():
    return Attention(64, heads=2, dim_head=32, positions=RotaryEmbedding(32), backend="einsum")

torch.set_grad_enabled(False)
transformer = Transformer(64, depth=1, make_attention=make_attention, norm_output=False)
layer = FusedTransformer(transformer, torch.float32)
x = torch.randn(4, 100_000, 64)
layer._angles(x.shape[1])
branches = TimeBranches(TimeConvolutions(64, 1, 4, 3).layers)
frames = x.view(1, 1, 400_000, 64)
out = torch.empty_like(frames)
for threads in (1, 4):
    torch.set_num_threads(threads)
    for work in (lambda: layer(x), lambda: branches(out, frames, 0)):
        gc.collect()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, resource.RLIM_INFINITY))
        try:
            work()
        except MemoryError as e:
            print(threads, e)
"""


@pytest.mark.slow
@needs_fused
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of memory")
def test_running_out_of_memory_is_an_error_and_does_not_end_the_process() -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    ran = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    for threads in (1, 4):
        assert ran.stdout.count(f"{threads} the C++ layers cannot allocate memory: ") == 2
