"""A Triton cache that falls back to a folder of precompiled kernels, as `separation models compile` writes.

The files in that folder are executed, so it is read only if SEPARATION_KERNELS names it.
"""

import os
from pathlib import Path

from triton import knobs
from triton.runtime.cache import FileCacheManager


class PrecompiledCache(FileCacheManager):  # type: ignore[misc]  # Triton has no types
    """Looks a kernel up in Triton's own cache, then in the folder. The folder is never written and may be moved."""

    def get_file(self, filename: str) -> str | None:
        return super().get_file(filename) or self._precompiled().get(filename)

    def get_group(self, filename: str) -> dict[str, str] | None:
        precompiled = self._precompiled()
        return super().get_group(filename) or (precompiled if filename in precompiled else None)

    def _precompiled(self) -> dict[str, str]:
        """The folder's files for this kernel, by name, except the files in which Triton stores absolute paths."""
        folder = Path(os.environ["SEPARATION_KERNELS"], self.key)
        files = folder.iterdir() if folder.is_dir() else ()
        return {path.name: str(path) for path in files if path.is_file() and not path.name.startswith("__grp__")}


def use_precompiled_kernels() -> None:
    """Use the folder that SEPARATION_KERNELS names, unless it is unset or the user has configured another cache."""
    if os.environ.get("SEPARATION_KERNELS") and knobs.cache.manager_class is None:
        knobs.cache.manager_class = PrecompiledCache
