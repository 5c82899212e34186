"""Ultimate Vocal Remover's table of models, configs/uvr.yaml: what their files do not say, by a hash of the file.

With it, its models need no YAML beside them. Nothing here imports PyTorch unless weights must be opened.
"""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from separation.documents import read_yaml
from separation.errors import CheckpointError
from separation.system.places import shipped, size_bytes

HASHED_BYTES = 10_000 * 1024  # at the end of a file


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    """For each kind of model, what the table says about a file by its hash."""
    return dict(read_yaml(shipped("configs") / "uvr.yaml"))


def hash_of(path: Path) -> str:
    """The hash by which Ultimate Vocal Remover knows a file, which must exist."""
    with path.open("rb") as file:
        file.seek(max(0, size_bytes(path) - HASHED_BYTES))
        return hashlib.md5(file.read(), usedforsecurity=False).hexdigest()


def yaml_of(weights: Path) -> tuple[str, str | None] | None:
    """The name of the YAML file that these weights need, and the model in configs/models that has its content, if any.

    None if the table does not know the file.
    """
    name = _table()["yaml"].get(hash_of(weights))
    return None if name is None else (name, _table()["configs"].get(name))


def completed(weights: Path, document: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The content that a YAML for these weights needs, of which `document` may be a part; None if it is unknown.

    It comes from the table and from the weights themselves. `document` takes precedence.

    Raises CheckpointError for weights that cannot be used, or if something is neither there nor in the table.
    """
    if weights.suffix == ".onnx":
        return _mdx_net(weights, document or {})
    return None if document is None else dict(document)


def _mdx_net(weights: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    from separation.checkpoints.state_dict import open_weights  # imports PyTorch

    sizes = open_weights(weights).sizes
    assert sizes is not None
    known = _table()["mdx_net"].get(hash_of(weights), {})
    found = {
        "stems": [known["stem"]] if known else [],
        "audio": {"n_fft": known.get("n_fft")},
        "model": {"compensate": known.get("compensate", 1.0)},
    }
    made = _merged(_merged(sizes, found), document)
    audio = made["audio"]
    if not made["stems"] or not isinstance(audio["n_fft"], int):
        raise CheckpointError(
            f"{weights} is an MDX-Net that the table of Ultimate Vocal Remover does not have: put a file "
            f"{weights.stem}.yaml with the lines `stems: [vocals]` and `audio: {{n_fft: 6144}}` beside it, with the "
            f"model's own stem and n_fft, which is at least {2 * audio['dim_f'] - 2} (usual are 4096, 5120, 6144, "
            "7680, 8192 and 16384)"
        )
    frames = audio.pop("dim_t")
    return {**made, "audio": {"chunk_size": audio["hop_length"] * (frames - 1) - audio["n_fft"]} | audio}


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both documents; where both have a value the second's, in sections key by key."""
    sections = {
        key: {**first[key], **value}
        for key, value in second.items()
        if isinstance(value, Mapping) and isinstance(first.get(key), Mapping)
    }
    return {**first, **second, **sections}
