"""Triton's cache with a folder of kernels behind it that were compiled elsewhere: `models compile` fills such folders.

Whoever fills the folder runs code here, as with the cache itself: it is only read where SEPARATION_KERNELS names it.
"""

import os
from pathlib import Path

from triton import knobs
from triton.runtime.cache import FileCacheManager


class ShippedCache(FileCacheManager):
    """Looks for a kernel in Triton's cache, then in the folder, which it never writes to and which may have moved."""

    def get_file(self, filename: str) -> str | None:
        return super().get_file(filename) or self._shipped().get(filename)

    def get_group(self, filename: str) -> dict[str, str] | None:
        shipped = self._shipped()
        return super().get_group(filename) or (shipped if filename in shipped else None)

    def _shipped(self) -> dict[str, str]:
        """By name, the paths of the files that the folder has under this key, without Triton's lists of such paths."""
        folder = Path(os.environ["SEPARATION_KERNELS"], self.key)
        files = folder.iterdir() if folder.is_dir() else ()
        return {path.name: str(path) for path in files if path.is_file() and not path.name.startswith("__grp__")}


def use_shipped_kernels() -> None:
    """Have Triton look in the folder that SEPARATION_KERNELS names, if it does and the user has no cache of his own."""
    if os.environ.get("SEPARATION_KERNELS") and knobs.cache.manager_class is None:
        knobs.cache.manager_class = ShippedCache
