"""The kinds of CPUs: which this one is, and how the kernels for each are compiled."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.common import PROJECT
from helpers.cpus import kind_of, set_flags, set_kind
from separation import cpu
from separation.cpu import KINDS, Kind
from separation.errors import InputError

BF16 = kind_of("avx512_bf16")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/cpuinfo")
def test_the_flags_are_those_that_linux_lists() -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    line = next(line for line in lines if line.startswith(("flags", "Features")))
    assert cpu.cpu_flags() == set(line.partition(":")[2].split()) != set()


@pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS")
def test_the_flags_are_those_that_macos_publishes() -> None:
    ran = subprocess.run(["sysctl", "-n", "hw.optional.arm64"], capture_output=True, text=True, check=False)
    assert ("asimd" in cpu.cpu_flags()) == (ran.stdout.strip() == "1")


@pytest.mark.parametrize("name, machine", [("AMD64", "x86_64"), ("arm64", "aarch64"), ("riscv64", "riscv64")])
def test_a_machine_has_one_name(name: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: name)
    assert cpu.machine() == machine


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_cpu_with_the_flags_of_a_kind_is_of_that_kind(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    set_kind(monkeypatch, kind)
    assert cpu.usable_kinds()[0] == kind
    for flag in kind.cpu_flags:
        set_flags(monkeypatch, kind.machine, tuple(set(kind.cpu_flags) - {flag}))
        assert kind.missing_flag() == flag and kind not in cpu.usable_kinds()
    set_flags(monkeypatch, "riscv64", kind.cpu_flags)
    assert cpu.usable_kinds() == [] and cpu.bfloat16_kind() is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_variable_leaves_one_kind(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {flag for each in KINDS if each.machine == kind.machine for flag in each.cpu_flags}
    set_flags(monkeypatch, kind.machine, tuple(flags))
    assert cpu.usable_kinds() == [each for each in KINDS if each.machine == kind.machine]
    monkeypatch.setenv("SEPARATION_CPU_KIND", kind.name)
    assert cpu.usable_kinds() == [kind]
    assert cpu.bfloat16_kind() == (kind if "bf16" in kind.precisions else None)
    monkeypatch.setenv("SEPARATION_CPU_KIND", "")
    assert len(cpu.usable_kinds()) == sum(each.machine == kind.machine for each in KINDS)


@pytest.mark.parametrize(
    "machine, flags, wanted, message",
    [
        ("x86_64", BF16.cpu_flags, "sse9", "no kind of CPU has that name: use avx512_bf16.*, or leave it out"),
        ("aarch64", (), "avx512_bf16", "this CPU is aarch64: leave it out"),
        ("x86_64", ("avx2",), "avx512_bf16", "this CPU has no fma: leave it out"),
    ],
)
def test_a_kind_that_the_cpu_is_not_is_an_error_that_names_the_others(
    machine: str, flags: tuple[str, ...], wanted: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_flags(monkeypatch, machine, flags)
    monkeypatch.setenv("SEPARATION_CPU_KIND", wanted)
    with pytest.raises(InputError, match=f"^SEPARATION_CPU_KIND is '{wanted}', but {message}$"):
        cpu.usable_kinds()


def test_the_compiler_is_the_one_in_cxx_else_the_first_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(name: str) -> str:
        path = tmp_path / name
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return str(path)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert cpu.find_compiler() == []
    clang = install("clang++")
    assert cpu.find_compiler() == [clang]
    gcc = install("g++")
    assert cpu.find_compiler() == [gcc]
    monkeypatch.setenv("CXX", shlex.join(["clang++", "--target=aarch64-linux-gnu"]))
    assert cpu.find_compiler() == ["clang++", "--target=aarch64-linux-gnu"]
    monkeypatch.setenv("CXX", "icpx")
    assert cpu.find_compiler() == []


def test_the_table_of_kinds_needs_no_package() -> None:
    code = "import sys; sys.path.insert(0, '.'); import separation.cpu; print(len(separation.cpu.KINDS))"
    ran = subprocess.run([sys.executable, "-IS", "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert int(ran.stdout) == len(KINDS)
