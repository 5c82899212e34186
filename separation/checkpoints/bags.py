"""Bags: YAML files of Demucs and Ultimate Vocal Remover that name several networks, which give the stems together.

models: [f7e0c4bc, d12395a8]    each the beginning of a file's name, up to a hyphen
weights: [[1, 0], [0, 1]]       for each network, its share of each stem; without it all have the same
segment: 44                     seconds of a chunk, at most
"""

import glob
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from separation.documents import shown

MOST_NETWORKS = 64

Shares = tuple[tuple[float, ...], ...]  # for each network, of each stem; they add up to 1 for every stem


def is_bag(document: dict[str, Any]) -> bool:
    """Whether a YAML's content is a bag."""
    return "models" in document and not {"model", "audio"} & set(document)


def member_files(folder: Path, models: Any, suffixes: Sequence[str]) -> list[Path]:
    """The file of each network. Raises ValueError, with the end of a sentence, for what names none."""
    if not isinstance(models, list | tuple) or not 0 < len(models) <= MOST_NETWORKS:
        raise ValueError(f"models must be a list of 1 to {MOST_NETWORKS} names, not {shown(models)}")
    return [_member_file(folder, str(name), suffixes) for name in models]


def _member_file(folder: Path, name: str, suffixes: Sequence[str]) -> Path:
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"models must name files beside it, not {shown(name)}")
    for suffix in suffixes:
        for pattern in (f"{name}{suffix}", f"{glob.escape(name)}-*{suffix}"):
            if found := sorted(folder.glob(pattern)):
                return found[0]
    raise ValueError(f"it needs the network {name}, and there is no {name}.th or {name}-….th beside it: put it there")


def parts(weights: Any, stems: Sequence[str], n_networks: int) -> tuple[list[str] | None, Shares]:
    """For each network the one stem that it is for; or None and each one's shares, none if all are alike.

    Raises ValueError, with the end of a sentence, for what are no shares.
    """
    if weights is None:
        return None, ()
    rows = [list(row) if _is_list(row) else [] for row in (weights if _is_list(weights) else [])]
    numbers = [share for row in rows for share in row]
    if [len(row) for row in rows] != [len(stems)] * n_networks or not all(map(_is_share, numbers)):
        raise ValueError(
            f"weights must hold {len(stems)} numbers for each of {n_networks} models, not {shown(weights)}"
        )
    totals = [sum(column) for column in zip(*rows, strict=True)]
    if not all(totals):
        raise ValueError(f"weights give no model a share of {stems[totals.index(0)]}")
    named = [[stem for stem, share in zip(stems, row, strict=True) if share] for row in rows]
    if sorted(map(tuple, named)) == sorted((stem,) for stem in stems):
        return [stem for (stem,) in named], ()
    shares = tuple(tuple(share / total for share, total in zip(row, totals, strict=True)) for row in rows)
    return None, () if len(set(shares)) == 1 else shares


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
