"""Bags: YAML files of Demucs and Ultimate Vocal Remover that combine several networks.

models: [f7e0c4bc, d12395a8]    each is the start of a file name, up to a hyphen
weights: [[1, 0], [0, 1]]       [network][stem]: each network's share of each stem; without it, all shares are equal
segment: 44                     the longest chunk, in seconds
"""

import glob
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from separation.checkpoints.description import Shares, WeightFile
from separation.checkpoints.embedded import embedded_description
from separation.checkpoints.keys import take
from separation.documents import quoted
from separation.errors import CheckpointError

MOST_NETWORKS = 64
SUFFIXES = (".th", ".safetensors")  # of the networks' files, in the order in which they are looked for


def is_bag(document: dict[str, Any]) -> bool:
    """Whether this is a bag's YAML."""
    return "models" in document and not {"model", "audio"} & set(document)


def as_document(bag: dict[str, Any], path: Path) -> tuple[dict[str, Any], Shares]:
    """A bag in the form of a single network's YAML, and the networks' shares.

    Raises CheckpointError for a bag whose networks are missing or do not go together.
    """
    try:
        members = _member_files(path.parent, bag["models"])
        descriptions = [_description(member) for member in members]
        first = descriptions[0]
        for member, description in zip(members, descriptions, strict=True):
            if _kind(description) != _kind(first):
                raise ValueError(
                    "all networks must have the same stems and sample rate, and be htdemucs if one of them is: "
                    f"{members[0].name} and {member.name} differ"
                )
        stems = first["model"]["sources"]
        parts, shares = _roles(bag.get("weights"), stems, len(members))
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from e
    audio = first["audio"]
    if bag.get("segment") is not None:
        samples = take(bag, "segment", int, path) * audio["sample_rate"]
        is_limited = first["architecture"] == "htdemucs"  # its transformer takes no longer chunk than in training
        audio = audio | {"chunk_size": min(samples, audio["chunk_size"]) if is_limited else samples}
    files = [
        WeightFile(name=str(member.absolute()), url=None, bytes=None, sha256=None, stem=stem, checkpoint=path.stem)
        for member, stem in zip(members, parts, strict=True)
    ]
    kinds = {description["architecture"] for description in descriptions}
    architecture = "demucs" if len(kinds) > 1 else first["architecture"]  # Demucs accepts hybrid networks in its bags
    return first | {"architecture": architecture, "audio": audio, "stems": list(stems), "files": files}, shares


def _description(member: Path) -> dict[str, Any]:
    if (description := embedded_description(member)) is None:
        raise ValueError(f"the network {member.name} has no description of itself: use the file that Demucs published")
    return description


def _kind(description: dict[str, Any]) -> tuple[Any, ...]:
    """What all networks of a bag must have in common."""
    has_fixed_chunks = description["architecture"] == "htdemucs"
    return has_fixed_chunks, tuple(description["model"]["sources"]), description["audio"]["sample_rate"]


def _member_files(folder: Path, models: Any) -> list[Path]:
    """The networks' files. Raises ValueError for a list that is not valid and for a file that is not there."""
    if not isinstance(models, list | tuple) or not 0 < len(models) <= MOST_NETWORKS:
        raise ValueError(f"models must be a list of 1 to {MOST_NETWORKS} names, not {quoted(models)}")
    return [_member_file(folder, str(name)) for name in models]


def _member_file(folder: Path, name: str) -> Path:
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"models must name files beside the YAML, not {quoted(name)}")
    for suffix in SUFFIXES:
        for pattern in (f"{name}{suffix}", f"{glob.escape(name)}-*{suffix}"):
            if found := sorted(folder.glob(pattern)):
                return found[0]
    raise ValueError(f"the network {name} is missing: put {name}.th or {name}-….th beside the YAML")


def _roles(weights: Any, stems: Sequence[str], n_networks: int) -> tuple[Sequence[str | None], Shares]:
    """Each network's stem in lowercase, if every network gives one stem only; else None for each, and their shares.

    The shares are empty if all networks have the same. Raises ValueError for weights that are not valid.
    """
    together = [None] * n_networks
    if weights is None:
        return together, ()
    rows = [list(row) if _is_list(row) else [] for row in (weights if _is_list(weights) else [])]
    numbers = [share for row in rows for share in row]
    if [len(row) for row in rows] != [len(stems)] * n_networks or not all(map(_is_share, numbers)):
        raise ValueError(f"weights must be {len(stems)} numbers for each of {n_networks} models, not {quoted(weights)}")
    totals = [sum(column) for column in zip(*rows, strict=True)]
    if not all(totals):
        raise ValueError(f"weights give no model a share of {stems[totals.index(0)]}: correct them")
    named = [[stem for stem, share in zip(stems, row, strict=True) if share] for row in rows]
    if sorted(map(tuple, named)) == sorted((stem,) for stem in stems):
        return [stem.lower() for (stem,) in named], ()
    shares = tuple(tuple(share / total for share, total in zip(row, totals, strict=True)) for row in rows)
    return together, () if len(set(shares)) == 1 else shares


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
