"""The facts about a checkpoint that `models show` prints."""

from pathlib import Path
from typing import Any

from separation.checkpoints.catalogue import read_config
from separation.checkpoints.chunk_choice import ChunkChoice
from separation.checkpoints.description import WeightFile
from separation.checkpoints.files import converted_path, known_bytes, known_sha256, local_path


def model_facts(name_or_path: str | Path) -> dict[str, Any]:
    """A checkpoint's facts, for JSON. Downloads nothing.

    `chunk_samples` and `overlap_samples` are those of `auto`, at `sample_rate` hertz. Raises what `read_config` raises,
    and CheckpointError for a model that cannot be built.
    """
    model = read_config(name_or_path)
    from separation.checkpoints.build import count_parameters  # imports PyTorch, only if there is such a model

    chunk_samples, overlap_samples = model.chunks(ChunkChoice())
    architecture, parameters = count_parameters(model)
    return {
        "name": model.name,
        "architecture": architecture,
        "stems": list(model.stems),
        "sample_rate": model.sample_rate,
        "chunk_samples": chunk_samples,
        "overlap_samples": overlap_samples,
        "parameters": parameters,
        "licence": model.licence,
        "quality": model.quality,
        "files": [_file_facts(file) for file in model.files],
    }


def _file_facts(file: WeightFile) -> dict[str, Any]:
    path = converted_path(file) or local_path(file)
    return {
        "name": file.name,
        "stem": file.stem,
        "bytes": known_bytes([file]),
        "sha256": known_sha256(file) or file.sha256,
        "url": file.url,
        "path": str(path),
        "here": path.exists(),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts as a table for people."""
    rate, chunk_samples, overlap_samples = (facts[key] for key in ("sample_rate", "chunk_samples", "overlap_samples"))
    chunks = f"{chunk_samples} samples ({chunk_samples / rate:.4g} s), {overlap_samples} of overlap"
    rows = {
        "name": facts["name"],
        "architecture": facts["architecture"],
        "stems": ", ".join(facts["stems"]),
        "sample rate": f"{rate} Hz",
        "chunks": chunks,
        "parameters": f"{facts['parameters']:,}",
        "licence": facts["licence"],
        "quality": facts["quality"],
    }
    lines = [f"{name:12}  {value}" for name, value in rows.items()]
    for file in facts["files"]:
        size = f"{file['bytes']:,} bytes" if file["bytes"] else "of unknown size"
        stem = f" ({file['stem']})" if file["stem"] else ""
        lines.append(f"{'file':12}  {file['name']}{stem}, {size}, {'here' if file['here'] else 'not here'}")
        lines += [f"{'':12}  {key} {file[key]}" for key in ("path", "url", "sha256") if file[key]]
    return "\n".join(lines)
