"""Pretends that this CPU has other instructions."""

import platform

import pytest

from separation import cpu
from separation.cpu import Kind


def set_flags(monkeypatch: pytest.MonkeyPatch, machine: str, flags: tuple[str, ...]) -> None:
    """Let the CPU of a Linux machine have these flags."""
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.delenv("SEPARATION_CPU_KIND", raising=False)


def set_kind(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """Let the CPU be of this kind, and of slower ones whose flags it has."""
    set_flags(monkeypatch, kind.machine, kind.cpu_flags)


def kind_of(name: str) -> Kind:
    return next(kind for kind in cpu.KINDS if kind.name == name)
