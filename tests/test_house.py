"""The house stays in order: imports only go down, and each outside thing has one door."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import separation
from conftest import PROJECT
from separation import __main__, device, encode, separator
from separation.models import attention

# A module may import from strictly lower floors, and within `models` from its own.
FLOORS = {
    "predict": 5,
    "separation.start": 1.5,
    "separation.process": 1,
    "separation.__main__": 5,
    "separation.cluster": 4.5,
    "separation.find": 4.5,
    "separation.songs": 4,
    "separation.bench": 4,
    "separation.serve": 4,
    "separation.connections": 1,
    "separation.public": 1,
    "separation.remote": 1.5,
    "separation.demo": 4,
    "separation.evaluate": 4,
    "separation.export": 4,
    "separation": 4,
    "separation.separator": 3,
    "separation.encoders": 2.5,
    "separation.output": 0.9,
    "separation.record": 0.8,
    "separation.suffixes": 0,
    "separation.integrity": 1,
    "separation.channels": 1.5,
    "separation.tracks": 1.6,
    "separation.damage": 1,
    "separation.ffmpeg": 1,
    "separation.holes": 1.8,
    "separation.pieces": 0.5,
    "separation.frames": 1.2,
    "separation.flac": 1.2,
    "separation.ogg": 1.2,
    "separation.wavpack": 1.2,
    "separation.chatter": 0.5,
    "separation.mend": 1.8,
    "separation.source": 1.8,
    "separation.sndfile": 1.9,
    "separation.cache": 2,
    "separation.metrics": 2,
    "separation.picture": 3,
    "separation.report": 3.5,
    "separation.about": 3,
    "separation.chunking": 2,
    "separation.checkpoints": 2,
    "separation.state_dict": 1.2,
    "separation.catalogue": 1.4,
    "separation.recipes": 2,
    "separation.decode": 2,
    "separation.resample": 1.8,
    "separation.encode": 1.8,
    "separation.waveform": 1.5,
    "separation.models": 1,
    "separation.gpu": 1,
    "separation.chunk_choice": 0.5,
    "separation.device": 0.5,
    "separation.settings": 0.5,
    "separation.unwrap": 0.5,
    "separation.foreign": 0.5,
    "separation.bags": 0.5,
    "separation.documents": 0,
    "separation.pickles": 0,
    "separation.torch_file": 1,
    "separation.places": 0,
    "separation.about_song": 0.75,
    "separation.memory": 0.5,
    "separation.signals": 0,
    "separation.threads": 0,
    "separation.text": 0,
    "separation.locks": 0,
    "separation.stft": 0,
    "separation.errors": 0,
}


# ffmpeg, a fresh Python, a compiler
PROGRAMS = {"separation.ffmpeg", "separation.bench", "separation.models.kernels.native"}


@cache
def modules() -> dict[str, Path]:
    files = [PROJECT / "predict.py", *(PROJECT / "separation").rglob("*.py")]
    return {".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@cache
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


@pytest.mark.parametrize(
    "library, door",
    [
        ("cog", "predict"),
        ("requests", "separation.remote"),
        ("demucs", "separation.models.htdemucs"),
        ("diffq", "separation.models.htdemucs"),
        ("librosa", "separation.models.mel_band_roformer"),
        ("rotary_embedding_torch", "separation.models.layers"),
        ("ray", "separation.cluster"),
        ("yaml", "separation.documents"),
    ],
)
def test_a_library_has_one_door(library: str, door: str) -> None:
    users = {name for name, path in modules().items() if any(i.split(".")[0] == library for i in imports(path))}
    assert users == {door}


def test_only_two_download_nothing_unpickles_and_few_run_programs() -> None:
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        assert name in ("separation.catalogue", "separation.remote") or "urllib" not in text
        assert not any(word in text for word in ("torch.load(", "pickle.load", "Unpickler("))
        assert name in PROGRAMS or "subprocess" not in text


def test_only_the_container_fetches_songs() -> None:
    assert [name for name, path in modules().items() if "separation.remote" in imports(path)] == ["predict"]


def test_what_is_printed_goes_through_one_function_for_people_and_one_for_json() -> None:
    """The others: a fresh process's JSON, a server's log, and what is said when the command line is over."""
    printing = {
        name: len(re.findall(r"\bprint\(", path.read_text(encoding="utf-8"))) for name, path in modules().items()
    }
    del printing["predict"]  # whose stdout is the prediction's log
    assert {name: count for name, count in printing.items() if count} == {
        "separation.__main__": 2,
        "separation.bench": 2,
        "separation.process": 2,
        "separation.public": 1,
    }


@pytest.mark.parametrize("module", ["separation.bench", "separation.evaluate", "separation.export"])
def test_only_the_command_line_imports_what_measures_and_exports(module: str) -> None:
    users = {name for name, path in modules().items() if module in imports(path)}
    assert users == {"separation.__main__"}


def modules_after(code: str) -> set[str]:
    """What a fresh Python has imported when it has run the code."""
    code += "\nimport sys; print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    return set(ran.stderr.split())


def run_command(*arguments: str) -> str:
    return f"""
from separation.__main__ import main
try:
    main({list(arguments)})
except SystemExit:
    pass
"""


@pytest.mark.parametrize(
    "code",
    [
        "import separation",
        run_command("--help"),
        run_command("separate", "--help"),
        run_command("separate", "song.wav", "-o", "out", "--format", "ogg"),
        run_command("evaluate", "--help"),
        run_command("export", "--help"),
        run_command("models", "list"),
        run_command("models", "show", "nonsense"),
        run_command("cache", "list"),
        run_command("models", "verify", "demo"),
    ],
)
def test_what_separates_nothing_imports_nothing_heavy(code: str) -> None:
    heavy = {"torch", "numpy", "torchaudio", "librosa", "soundfile", "demucs", "scipy", "einops"}
    assert not heavy & modules_after(code)


def test_loading_models_imports_nothing_that_only_training_and_compiling_need() -> None:
    unused = {
        "sympy",
        "torch._dynamo",
        "torch._inductor",
        "librosa",
        "scipy",
        "numba",
        "openunmix",
        "sklearn",
        "pandas",
    }
    code = """
from separation import Separator, catalogue, checkpoints
Separator("demo", "all_4")
checkpoints._build(catalogue.read_config("htdemucs_6s"), ())
"""
    found = modules_after(code)
    assert {"torch", "demucs.htdemucs"} <= found
    assert not unused & found


def test_the_command_line_offers_what_the_engine_does() -> None:
    assert __main__.FORMATS == encode.FORMATS
    assert __main__.SAMPLE_RATES == separator.SAMPLE_RATES
    assert tuple(encode.WAV_DEPTHS) == __main__.WAV_DEPTHS
    assert tuple(encode.FLAC_DEPTHS) == __main__.FLAC_DEPTHS
    defaults = {"wav_depth": encode.WAV_DEPTH, "flac_depth": encode.FLAC_DEPTH, "mp3_bitrate": encode.MP3_BITRATE}
    assert {name: default for name, (_, default) in __main__._ENCODINGS.items()} == defaults
    assert __main__.MP3_BITRATES == encode.MP3_BITRATES
    assert tuple(device.PRECISIONS) == __main__.PRECISIONS
    assert attention.NAMES == __main__.ATTENTIONS


def test_the_public_names_are_pinned_and_there() -> None:
    assert all(callable(getattr(separation, name)) for name in separation.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Kazoo'"):
        separation.Kazoo  # noqa: B018
    assert separation.__all__ == [
        "AudioError",
        "Cache",
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
