"""The house stays in order: imports only go down, and each outside thing has one door."""

import ast
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
# A module may import from strictly lower floors, and within `models` from its own.
FLOORS = {
    "predict": 5,
    "separation.__main__": 5,
    "separation.demo": 4,
    "separation": 4,
    "separation.separator": 3,
    "separation.output": 2.5,
    "separation.integrity": 1,
    "separation.metrics": 2,
    "separation.picture": 3,
    "separation.chunking": 2,
    "separation.checkpoints": 2,
    "separation.recipes": 2,
    "separation.audio": 2,
    "separation.models": 1,
    "separation.device": 1,
    "separation.stft": 0,
    "separation.errors": 0,
}


def modules() -> dict[str, Path]:
    files = [PROJECT / "predict.py", *(PROJECT / "separation").rglob("*.py")]
    return {".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            known = modules()
            found |= {full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    return found


def floor(module: str) -> int:
    return FLOORS["separation.models" if module.startswith("separation.models.") else module]


@pytest.mark.parametrize("module", modules())
def test_imports_only_go_down(module: str) -> None:
    for imported in imports(modules()[module]):
        if imported.split(".")[0] != "separation":
            continue
        same_room = module.startswith("separation.models") and imported.startswith("separation.models")
        assert same_room or floor(imported) < floor(module), f"{module} imports {imported}"


@pytest.mark.parametrize("library, allowed", [("cog", {"predict"}), ("demucs", {"separation.models.htdemucs"})])
def test_a_library_has_one_door(library: str, allowed: set[str]) -> None:
    users = {name for name, path in modules().items() if any(i.split(".")[0] == library for i in imports(path))}
    assert users == allowed


def test_only_checkpoints_downloads_or_unpickles_and_only_audio_runs_programs() -> None:
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        assert name == "separation.checkpoints" or not any(w in text for w in ("torch.load(", "urllib", "pickle.load"))
        assert name == "separation.audio" or "subprocess" not in text


def test_the_public_names_are_pinned() -> None:
    import separation

    assert separation.__all__ == [
        "AudioError",
        "CheckpointError",
        "DownloadError",
        "EstimateError",
        "InputError",
        "ModelPool",
        "OutputError",
        "RecipeError",
        "SeparationError",
        "Separator",
        "load_model",
    ]
