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
        "published_stems": list(model.published_stems),
        "residual": model.residual,
        "sample_rate": model.sample_rate,
        "chunk_samples": chunk_samples,
        "overlap_samples": overlap_samples,
        "parameters": parameters,
        **model.facts.as_json(),
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
        "mirrors": list(file.mirrors),
        "path": str(path),
        "here": path.exists(),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts as a table for people."""
    rate, chunk_samples, overlap_samples = (facts[key] for key in ("sample_rate", "chunk_samples", "overlap_samples"))
    chunks = f"{chunk_samples} samples ({chunk_samples / rate:.4g} s), {overlap_samples} of overlap"
    rows = {
        "name": facts["name"],
        "title": facts["title"],
        "author": facts["author"],
        "task": ", ".join(facts["tasks"]),
        "warning": facts["warning"],
        "architecture": facts["architecture"],
        "stems": _stems(facts),
        "residual": facts["residual"],
        "sample rate": f"{rate} Hz",
        "chunks": chunks,
        "parameters": f"{facts['parameters']:,}",
        "licence": f"{facts['licence']}{f' ({source})' if (source := facts['licence_source']) else ''}",
        "quality": facts["quality"].split("; "),
        "source": facts["source"],
    }
    lines = []
    for name, value in rows.items():
        values = value if isinstance(value, list) else [value] if value else []
        lines += [f"{label:12}  {text}" for label, text in zip([name, *[""] * len(values)], values, strict=False)]
    for file in facts["files"]:
        size = f"{file['bytes']:,} bytes" if file["bytes"] else "of unknown size"
        stem = f" ({file['stem']})" if file["stem"] else ""
        lines.append(f"{'file':12}  {file['name']}{stem}, {size}, {'here' if file['here'] else 'not here'}")
        lines += [f"{'':12}  {key} {file[key]}" for key in ("path", "url", "sha256") if file[key]]
        lines += [f"{'':12}  mirror {url}" for url in file["mirrors"]]
    return "\n".join(lines)


def _stems(facts: dict[str, Any]) -> str:
    """The stems, each with its published name if that differs by more than case."""
    stems, published = facts["stems"], facts["published_stems"] or facts["stems"]
    pairs = zip(stems, published, strict=True)
    return ", ".join(stem if stem == name.lower() else f"{stem} (published as {name})" for stem, name in pairs)
