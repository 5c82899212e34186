"""fused.cpp is compiled once and cached; without it the plain layers run."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.fused import needs_fused
from separation import device
from separation.checkpoints.load import load_model
from separation.models.attention import choose_attention
from separation.models.kernels import native
from separation.models.kernels.native import NotFusedError


def test_int8_without_fused_layers_falls_back_and_says_why(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "bfloat16_instructions", lambda: "avx512_bf16")
    monkeypatch.setattr(device, "bfloat16_instructions", lambda: "avx512_bf16")
    model = load_model("demo", precision="int8")
    assert model.attention == "itemwise" and model.precision == torch.bfloat16
    assert caplog.messages[0].startswith("demo computes in floats, not in int8 (no C++ compiler")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder, which does not exist yet, of a program that has not loaded the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "cache" / "music-separation"
    native.library.cache_clear()


@needs_fused
def test_the_library_is_compiled_once_and_cached(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.library()
    (kept,) = fresh.iterdir()
    assert kept.suffix == ".so"
    native.library.cache_clear()
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))
    native.library()


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
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-std=c++1"))
    with pytest.raises(NotFusedError, match=r"^c\+\+ cannot compile fused\.cpp \(.*error.*-std=c\+\+1"):
        native.library()
    assert list(fresh.iterdir()) == []


def test_without_a_compiler_the_plain_layers_run_and_say_why(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native, "bfloat16_instructions", lambda: "avx512_bf16")
    choice = choose_attention("auto", torch.device("cpu"), torch.bfloat16)
    assert choice.name == "itemwise"
    assert choice.reason.startswith("not fused: no C++ compiler (c++, g++ or clang++) is installed; ")


@pytest.mark.parametrize(
    "instructions, reason",
    [("", "has no AVX-512 BF16"), ("amx_bf16", "has amx_bf16, for which PyTorch is faster")],
)
def test_without_the_instructions_the_plain_layers_run_and_say_why(
    instructions: str, reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "bfloat16_instructions", lambda: instructions)
    choice = choose_attention("auto", torch.device("cpu"), torch.bfloat16)
    assert choice.name == "itemwise"
    assert f"not fused: the CPU {reason}" in choice.reason
