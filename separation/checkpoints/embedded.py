"""Descriptions inside weights files: of Demucs, each network's class and arguments; of an MDX-Net, its arguments."""

from fractions import Fraction
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from separation.checkpoints import uvr
from separation.documents import DocumentError, first_line, read_json, read_safetensors_header
from separation.errors import CheckpointError
from separation.system.memory import enough_memory
from separation.system.places import size_bytes

OLD_CLASS = "demucs.model.Demucs"  # of versions 1 and 2


def embedded_description(weights: Path) -> dict[str, Any] | None:
    """The description inside a weights file, in the form of a YAML's content; None if there is none.

    Raises CheckpointError for a damaged file or description.
    """
    if weights.suffix != ".safetensors":
        from separation.checkpoints.state_dict import open_weights  # imports PyTorch

        stored = open_weights(weights)
        return stored.description if stored.sizes is None else uvr.mdx_net(weights, {})
    metadata = safetensors_metadata(weights)
    if not {"klass", "kwargs"} <= set(metadata):
        return None
    try:
        arguments = read_json(metadata["kwargs"], hook=_fraction_as_text)
        rate, segment = arguments["samplerate"], arguments["segment"]
        if isinstance(segment, str) and "/" not in segment:  # "1e999999999" would take hours
            raise ValueError(segment)
        chunk_samples = int(Fraction(segment) * rate)
    except (DocumentError, ArithmeticError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise CheckpointError(f"{weights} has a damaged description of its network: put its YAML beside it") from e
    return {
        "architecture": "demucs_v2" if metadata["klass"] == OLD_CLASS else metadata["klass"].rpartition(".")[2].lower(),
        "audio": {"sample_rate": rate, "chunk_size": chunk_samples},
        "model": arguments,
    }


def _fraction_as_text(value: dict[str, Any]) -> Any:
    return f"{value['numerator']:d}/{value['denominator']:d}" if value.get("_type") == "fraction" else value


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises CheckpointError if its header is damaged."""
    try:
        read_safetensors_header(path)  # checks the header's size, which the library does not
        with enough_memory(str(path)), safe_open(path, framework="np") as opened:
            return opened.metadata() or {}
    except (DocumentError, SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path} ({size_bytes(path):,} bytes) is damaged, incomplete or not a safetensors checkpoint "
            f"({first_line(e)}): delete it and get it again"
        ) from e
