"""What `models show` says of a checkpoint: how it is run, what it gives, how large it is, and where its files are."""

from pathlib import Path
from typing import Any

from separation.checkpoints import catalogue
from separation.checkpoints.chunk_choice import ChunkChoice


def model_facts(name_or_path: str | Path) -> dict[str, Any]:
    """All that is known of a checkpoint, as JSON has it; nothing is downloaded.

    Samples are at `sample_rate`, in hertz; chunk and overlap are those of `auto`. Raises what `read_config` raises, and
    CheckpointError for a model that cannot be built.
    """
    model = catalogue.read_config(name_or_path)
    from separation.checkpoints.load import count_parameters  # imports PyTorch, which reading a YAML does without

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


def _file_facts(file: catalogue.WeightFile) -> dict[str, Any]:
    path = catalogue.converted_path(file) or catalogue.local_path(file)
    return {
        "name": file.name,
        "stem": file.stem,
        "bytes": catalogue.known_bytes([file]),
        "sha256": catalogue.known_sha256(file) or file.sha256,
        "url": file.url,
        "path": str(path),
        "here": path.exists(),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The same in lines for people."""
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
