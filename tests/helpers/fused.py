"""Whether the fused layers of fused.cpp are available."""

import pytest

from separation.models.kernels.native import NotFusedError, library


def why_not_fused() -> str:
    """Why the fused layers are not available, or an empty string if they are."""
    try:
        library()
    except NotFusedError as e:
        return str(e)
    return ""


needs_fused = pytest.mark.skipif(bool(why_not_fused()), reason=f"needs the fused layers: {why_not_fused()}")
