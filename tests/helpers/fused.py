"""The fused layers of cpu/fused.cpp in tests."""

import pytest

from separation.cpu import KINDS, Kind, machine, usable_kinds
from separation.models import attention
from separation.models.kernels import fused, lstm_cpu, scnet_cpu, unet_cpu
from separation.models.kernels.native import Library, NotFusedError, library, load


def why_not_fused() -> str:
    """Why the fused layers are not available, or an empty string if they are."""
    try:
        library()
    except NotFusedError as e:
        return str(e)
    return ""


needs_fused = pytest.mark.skipif(bool(why_not_fused()), reason=f"needs the fused layers: {why_not_fused()}")


def _library(kind: Kind) -> Library:
    """The kernels of a kind: its own instructions if this CPU is of the kind, else their emulation."""
    if kind in usable_kinds():
        try:
            return Library(kind, *load(kind), "")
        except NotFusedError as e:  # the system forbids them
            if "let this process use" not in str(e):
                raise
    return Library(kind, *load(kind, emulated=True), "emulated")


def _slow(kind: Kind) -> list[pytest.MarkDecorator]:
    """Of this machine's kinds, only the fastest one and AMX are tested by default: compiling takes seconds."""
    quick = [*[kind for kind in KINDS if kind.machine == machine()][:1], *usable_kinds()[:1]]
    return [] if kind in quick else [pytest.mark.slow]


every_kind = pytest.mark.parametrize("kind", [pytest.param(kind, id=kind.name, marks=_slow(kind)) for kind in KINDS])


def use_kind(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Let the layers compute with the kernels of that kind."""
    used = _library(kind)
    for module in (attention, fused, lstm_cpu, scnet_cpu, unet_cpu):
        monkeypatch.setattr(module, "library", lambda: used)
    return used
