"""Precompiled kernels are looked up after Triton's own cache, in a folder that is only read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton")
from triton import knobs

from separation.models.kernels.precompiled import PrecompiledCache, use_precompiled_kernels


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a precompiled kernel under the key `key`, while Triton's own cache is empty."""
    folder = tmp_path / "kernels"
    (folder / "key").mkdir(parents=True)
    for name in ("norm.cubin", "norm.json", "__grp__norm.json"):
        (folder / "key" / name).write_text("precompiled")
    monkeypatch.setenv("SEPARATION_KERNELS", str(folder))
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path / "cache")
        yield folder


def test_a_precompiled_file_is_found(folder: Path) -> None:
    cache = PrecompiledCache("key")
    assert cache.get_file("norm.cubin") == str(folder / "key" / "norm.cubin")
    assert cache.get_group("norm.json") == {name: str(folder / "key" / name) for name in ("norm.cubin", "norm.json")}


def test_a_kernel_that_is_not_precompiled_is_not_found(folder: Path) -> None:
    assert PrecompiledCache("key").get_file("rotate.cubin") is None
    assert PrecompiledCache("another").get_group("norm.json") is None


def test_tritons_own_cache_comes_first_and_takes_what_is_written(folder: Path) -> None:
    cache = PrecompiledCache("key")
    own = cache.put(b"compiled here", "norm.cubin")
    assert cache.get_file("norm.cubin") == own and Path(own).read_bytes() == b"compiled here"
    assert (folder / "key" / "norm.cubin").read_text() == "precompiled"


def test_the_folder_is_used_only_if_it_is_named_and_no_other_cache_is_configured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_precompiled_kernels()
    assert knobs.cache.manager_class is PrecompiledCache
    other = type("OtherCache", (PrecompiledCache,), {})
    knobs.cache.manager_class = other
    use_precompiled_kernels()
    assert knobs.cache.manager_class is other
    knobs.cache.manager_class = None
    monkeypatch.delenv("SEPARATION_KERNELS")
    use_precompiled_kernels()
    assert knobs.cache.manager_class is None
