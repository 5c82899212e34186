"""cache: an estimate is computed once, and a cache hit gives the same files, bit for bit."""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.common import PROJECT, quick_first
from helpers.common import SONG as DEMO_SONG
from helpers.house import imports, modules
from helpers.small_model import small_model
from separation import Cache, CheckpointError, InputError, ModelPool, OutputError, Separator, load_model
from separation.audio.options import OutputOptions
from separation.audio.waveform import StoredSamples, Waveform
from separation.cli.main import main
from separation.cli.parser import build_parser
from separation.engine import cache as cache_module
from separation.engine import recipes
from separation.engine.cache import ENGINE, LIMIT_GIB, LOCK, chosen_cache, default_folder, engine_version
from separation.engine.cached_estimates import EstimateSettings
from separation.engine.options import EngineOptions
from separation.engine.recipes import Recipe, resolve
from separation.models.attention import choose_attention
from separation.system.locks import lock

RATE = 44100
SHORT = EngineOptions(chunk_seconds=4, overlap_seconds=1)
SETTINGS = {"stem": "vocals", "chunk_samples": 4}
FACTS = {"song": "a.wav", "seconds": 1.0, "model": "m", "statistics": [0.1, 0.2, 0.3]}


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool(EngineOptions(device="cpu", precision="fp32"))


@pytest.fixture(scope="module")
def song(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of the demo song, 16 bit."""
    path = tmp_path_factory.mktemp("songs") / "song.wav"
    audio, _ = soundfile.read(DEMO_SONG, dtype="int16", frames=2 * RATE)
    soundfile.write(path, audio, RATE, subtype="PCM_16")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def separator(
    pool: ModelPool, cache: Cache | None, recipe: str | Recipe = "demo", stems: str = "all_4", **options: Any
):
    chosen = {"two_stems": options.pop("two_stems", None)} | ({"stems": stems} if isinstance(recipe, str) else {})
    return Separator(recipe, pool=pool, cache=cache, options=replace(SHORT, **options), **chosen)


def contents(files: dict[str, Path]) -> dict[str, bytes]:
    """The contents of files, without the time of writing, which libsndfile puts into a float WAV's PEAK chunk."""
    found = {stem: path.read_bytes() for stem, path in files.items()}
    return {stem: re.sub(rb"(?s)(PEAK.{8})....", rb"\1", data, count=1) for stem, data in found.items()}


def runs(separator: Separator, song: Path, out: Path, **options: Any) -> tuple[dict[str, bytes], set[str]]:
    """Separate a song; returns the contents of the files, and the models that ran, as seen in the progress."""
    stages: set[str] = set()
    files = separator.separate_file(
        song, out, OutputOptions(**options), progress=lambda share, stage: stages.add(stage)
    )
    return contents(files), stages & set(separator.models)


def state(cache: Cache) -> dict[str, int]:
    """The entries, with numbers that change when an entry is written again."""
    return {path.stem: path.stat().st_ino for path in cache.folder.glob("*.f32")}


# A hit gives the same as a miss


@pytest.mark.parametrize("options", quick_first([{}, {"format": "flac", "gain": 3}], 1))
def test_a_hit_runs_no_model_and_gives_the_same_files_bit_for_bit(
    options: dict[str, Any], pool: ModelPool, song: Path, cache: Cache, tmp_path: Path
) -> None:
    options = dict(options)
    if options.pop("gain", None):  # so loud that all stems must be scaled for FLAC
        audio, _ = soundfile.read(song, dtype="float32")
        song = tmp_path / "loud.wav"
        soundfile.write(song, audio * 3, RATE, subtype="FLOAT")
    cold = runs(separator(pool, None), song, tmp_path / "cold", **options)
    first = runs(separator(pool, cache), song, tmp_path / "first", **options)
    hit = runs(separator(pool, cache), song, tmp_path / "hit", **options)
    assert cold[1] == first[1] == {"demo"} and hit[1] == set()
    assert cold[0] == first[0] == hit[0]


def test_a_cached_waveform_is_the_same_bit_for_bit(cache: Cache, tmp_path: Path) -> None:
    noise = torch.randn(2, 300_000, generator=torch.Generator().manual_seed(0))
    with Waveform(tmp_path) as wave:
        for block in noise.split(77_777, dim=1):  # the last digits of mean and std depend on the blocks
            wave.append(block)
        cache.put(SETTINGS, wave.raw(), wave.n_samples * 8, {"statistics": wave.statistics})
        kept = cache.get(SETTINGS)
        assert kept is not None
        with Waveform(StoredSamples(kept.file, wave.n_samples, kept.facts["statistics"])) as again:
            assert torch.equal(again.read(0, 300_000), noise) and again.sample_rate == RATE
            assert (again.peak, again.mean, again.std) == (wave.peak, wave.mean, wave.std)
    assert cache.entries()  # closing the waveform did not delete the entry


@pytest.mark.slow
def test_a_song_is_identified_by_its_samples_alone(pool: ModelPool, song: Path, cache: Cache, tmp_path: Path) -> None:
    runs(separator(pool, cache), song, tmp_path / "first")
    audio, _ = soundfile.read(song, dtype="int16")
    other = tmp_path / "quite another name.flac"
    with soundfile.SoundFile(other, "w", RATE, 2, subtype="PCM_16", format="FLAC") as file:
        file.title = "A title"
        file.write(audio)
    assert runs(separator(pool, cache), other, tmp_path / "flac")[1] == set()
    audio[RATE, 0] ^= 1  # the smallest possible difference
    soundfile.write(tmp_path / "song.wav", audio, RATE, subtype="PCM_16")
    assert runs(separator(pool, cache), tmp_path / "song.wav", tmp_path / "other")[1] == {"demo"}


@pytest.mark.slow
def test_more_stems_compute_only_the_missing_estimates(
    pool: ModelPool, song: Path, cache: Cache, tmp_path: Path
) -> None:
    runs(separator(pool, cache, stems="vocals_instrumental"), song, tmp_path / "two")
    (vocals,) = state(cache).items()
    all_6 = runs(separator(pool, cache, stems="all_6"), song, tmp_path / "six")
    assert vocals in state(cache).items() and len(state(cache)) == 6
    assert all_6[0] == runs(separator(pool, None, stems="all_6"), song, tmp_path / "cold six")[0]
    all_4 = runs(separator(pool, cache, stems="all_4"), song, tmp_path / "four")
    assert all_4 == (runs(separator(pool, None, stems="all_4"), song, tmp_path / "cold four")[0], set())


@pytest.mark.slow
def test_estimates_that_only_cached_estimates_depend_on_are_neither_read_nor_computed(
    pool: ModelPool, song: Path, cache: Cache, tmp_path: Path
) -> None:
    lines = {"(drums)": "demo", "bass": "demo of drums", "vocals": "demo after drums"}
    chained = resolve("mine", "test", lines)
    first = runs(separator(pool, cache, chained), song, tmp_path / "first")
    drums = next(entry.key for entry in cache.entries() if entry.settings["stem"] == "drums")
    (cache.folder / f"{drums}.json").unlink()
    assert runs(separator(pool, cache, chained), song, tmp_path / "hit") == (first[0], set())
    # When they are needed again, the remaining entries are used, and the result is the same.
    vocals = next(entry.key for entry in cache.entries() if entry.settings["stem"] == "vocals")
    (cache.folder / f"{vocals}.json").unlink()
    assert runs(separator(pool, cache, chained), song, tmp_path / "again") == (first[0], {"demo"})


@pytest.mark.slow
def test_a_model_run_on_another_input_is_a_miss(pool: ModelPool, song: Path, cache: Cache, tmp_path: Path) -> None:
    for source in ("demo after drums", "demo after bass", "demo of bass"):
        recipe = resolve("mine", "test", {"vocals": source, "(drums)": "demo", "(bass)": "demo"})
        cold = runs(separator(pool, None, recipe), song, tmp_path / "cold")
        assert runs(separator(pool, cache, recipe), song, tmp_path / "first") == cold


def test_estimates_that_were_complete_before_a_cancellation_are_cached(
    pool: ModelPool, song: Path, cache: Cache, tmp_path: Path
) -> None:
    chained = resolve("mine", "test", {"drums": "demo", "bass": "demo of drums"})

    def cancel(share: float, stage: str) -> None:
        if cache.entries():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        separator(pool, cache, chained).separate_file(song, tmp_path / "out", progress=cancel)
    assert [entry.settings["stem"] for entry in cache.entries()] == ["drums"]
    assert not list(cache.folder.glob("*.part"))


def test_refreshing_computes_and_stores_everything_again(
    pool: ModelPool, song: Path, cache: Cache, tmp_path: Path
) -> None:
    first = runs(separator(pool, cache), song, tmp_path / "first")
    before = state(cache)
    assert runs(separator(pool, Cache(cache.folder, refresh=True)), song, tmp_path / "anew") == first
    assert set(state(cache)) == set(before) and not set(state(cache).items()) & set(before.items())


# Which options cause a miss

BASE = ("--recipe", "demo", "--stems", "all_6", "--device", "cpu", "--precision", "fp32", "--chunk-size", "4")
BASE += ("--overlap", "1")
HIT, MISS = True, False
# For each option of `separate`, whether another value changes an estimate. The test replaces OTHER and the like.
OPTIONS: dict[str, list[tuple[bool, tuple[str, ...]]]] = {
    "songs": [(HIT, ())],  # other songs are tested above
    "output": [(HIT, ("-o", "OTHER"))],
    "format": [(HIT, ("--format", "flac")), (HIT, ("--format", "mp3"))],
    "sample_rate": [(HIT, ("--sample-rate", "48000")), (HIT, ("--sample-rate", "source"))],
    "wav_depth": [(HIT, ("--wav-depth", "16"))],
    "bitrate": [(HIT, ("--format", "mp3", "--bitrate", "128"))],
    "start": [(HIT, ("--start", "1"))],
    "end": [(HIT, ("--end", "5"))],
    "preview": [(HIT, ("--preview",))],
    "name": [(HIT, ("--name", "{song} {stem}.{ext}"))],
    "reaper": [(HIT, ("--reaper",))],
    "video": [],  # needs a video
    "analyse": [(HIT, ("--analyse",))],
    "only": [(HIT, ("--only", "vocals"))],
    "channels": [(HIT, ("--channels", "mono"))],
    "flac_depth": [(HIT, ("--format", "flac", "--flac-depth", "16"))],
    "report": [(HIT, ("--report",))],
    "overwrite": [(HIT, ("--overwrite",))],
    "accept_damaged": [(HIT, ("--accept-damaged",))],
    "workers": [(HIT, ("--workers", "2"))],
    "gpus": [],  # for machines with several
    "retries": [(HIT, ("--retries", "7"))],
    "summary": [(HIT, ("--summary", "SUMMARY"))],
    "ray": [],  # separates on other machines
    "json": [(HIT, ("--json",))],
    "verbose": [(HIT, ("-v",))],
    "quiet": [(HIT, ("--quiet",))],
    "progress": [(HIT, ("--progress", "json"))],
    "force_refresh": [(MISS, ("--force-refresh",))],
    "stems": [(HIT, ("--stems", "all_4"))],
    "two_stems": [(HIT, ("--two-stems", "piano"))],
    "recipe": [(HIT, ("--recipe", "same")), (MISS, ("--recipe", "other"))],
    "model_name": [(HIT, ("--model-name", "demo"))],
    "model_dir": [(HIT, ("--model-dir", "MODELS", "--model-name", "copy"))],
    "model_path": [(MISS, ("--model-name", "demo", "--model-path", "CHANGED"))],
    "chunk_size": [(MISS, ("--chunk-size", "5"))],
    "overlap": [(MISS, ("--overlap", "2"))],
    "batch_size": [(HIT, ("--batch-size", "1")), (MISS, ("--batch-size", "2"))],
    "device": [(not torch.cuda.is_available(), ("--device", "auto"))],
    "precision": [(MISS, ("--precision", "bf16"))],
    "attention": [
        (HIT, ("--attention", choose_attention("auto", torch.device("cpu"), torch.float32).name)),
        (MISS, ("--attention", "einsum")),
    ],
}


@pytest.fixture(scope="module")
def base(song: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a cache after a run with BASE."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEPARATION_CACHE", str(folder / "cache"))
        assert main(["separate", str(song), "-o", str(folder / "out"), *BASE]) == 0
    return folder / "cache"


def test_the_table_names_every_option_of_separate() -> None:
    options = vars(build_parser().parse_args(["separate", "song", "-o", "out"]))
    assert set(options) - {"command", "parser"} == set(OPTIONS)


@pytest.mark.parametrize(
    "is_hit, option",
    quick_first((case for cases in OPTIONS.values() for case in cases), 2),
    ids=lambda value: " ".join(map(str, [value])),
)
def test_an_option_causes_a_miss_if_and_only_if_it_changes_an_estimate(
    is_hit: bool,
    option: tuple[str, ...],
    base: Path,
    song: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = Cache(Path(shutil.copytree(base, tmp_path / "cache")))
    monkeypatch.setenv("SEPARATION_CACHE", str(cache.folder))
    before = state(cache)
    made = {"OTHER": other_folder, "MODELS": copied_model, "CHANGED": changed_weights, "SUMMARY": summary_file}
    write_recipes(tmp_path / "recipes", monkeypatch)
    arguments = [str(made[word](tmp_path)) if word in made else word for word in option]
    base_options = BASE[4:] if "--model-name" in option else BASE  # a model takes the recipe's place
    assert main(["separate", str(song), "-o", str(tmp_path / "out"), *base_options, *arguments]) == 0
    assert (state(cache) == before) is is_hit


def other_folder(folder: Path) -> Path:
    return folder / "quite" / "another"


def summary_file(folder: Path) -> Path:
    return folder / "songs.csv"


def copied_model(folder: Path) -> Path:
    """A folder with a copy of the demo's YAML and weights under another name."""
    (folder / "models" / "copy").mkdir(parents=True)
    shutil.copy(PROJECT / "weights" / "demo" / "demo.safetensors", folder / "models" / "copy" / "mine.safetensors")
    document = yaml.safe_load((PROJECT / "configs" / "models" / "demo.yaml").read_text(encoding="utf-8"))
    del document["files"]
    (folder / "models" / "copy" / "mine.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    return folder / "models"


def changed_weights(folder: Path) -> Path:
    weights = load_file(PROJECT / "weights" / "demo" / "demo.safetensors")
    name = next(name for name, value in weights.items() if value.is_floating_point())
    weights[name] = weights[name] * 1.001
    save_file(weights, folder / "changed.safetensors")
    return folder / "changed.safetensors"


def write_recipes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write two recipes beside the demo's: one that needs the same estimates, and one that needs others."""
    shutil.copytree(recipes.FOLDER / "demo", folder / "demo")
    for name, source in (("same", "[demo, demo]"), ("other", "demo after drums")):
        (folder / name).mkdir(parents=True)
        (folder / name / "all_6.yaml").write_text(f"vocals: {source}\ndrums: demo\nbass: demo\n", encoding="utf-8")
    monkeypatch.setattr(recipes, "FOLDER", folder)


# The arguments of the Python API that are not part of the key: a new argument must be added here or to the key.
OFFERED = {
    Separator.__init__: {"recipe", "stems", "pool"},
    Separator.from_model: {"model", "only"},
    Separator.separate_file: {"path", "folder", "max_seconds", "accept_damaged", "progress"},
    EngineOptions: {"device", "precision", "attention"},
    OutputOptions: {
        "format",
        "sample_rate",
        "wav_depth",
        "flac_depth",
        "bitrate",
        "channels",
        "excerpt",
        "reaper",
        "name",
        "video",
        "overwrite",
    },
}


@pytest.mark.parametrize("function", OFFERED, ids=lambda function: function.__qualname__)
def test_every_argument_of_the_python_api_is_listed_or_part_of_the_key(function: Callable[..., Any]) -> None:
    decided = {"self", "cache", "two_stems", "options", "batch_size", "chunk_seconds", "overlap_seconds"}
    assert set(inspect.signature(function).parameters) - decided == OFFERED[function]


@pytest.mark.slow
def test_the_key_contains_the_device_the_code_and_everything_in_a_models_yaml(
    pool: ModelPool, song: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied_model(tmp_path) / "copy"

    def is_computed() -> bool:
        before = state(cache)
        model = load_model(folder, device="cpu")
        Separator.from_model(model, cache=cache, two_stems="vocals", options=SHORT).separate_file(song, tmp_path)
        return state(cache) != before

    assert is_computed() and not is_computed()
    document = yaml.safe_load((folder / "mine.yaml").read_text(encoding="utf-8"))
    stems = document["stems"]
    for change in (
        {"inference": {"normalize": True}},
        {"model": document["model"] | {"zero_dc": not document["model"].get("zero_dc", False)}},
        {"stems": [*stems[1:], stems[0]]},
        {"licence": None, "quality": None},
    ):
        changed = {key: value for key, value in (document | change).items() if value is not None}
        (folder / "mine.yaml").write_text(yaml.safe_dump(changed), encoding="utf-8")
        assert is_computed() == ("licence" not in change)
    with monkeypatch.context() as patch:
        patch.setattr("separation.engine.cached_estimates.engine_version", lambda: "another")
        assert is_computed()
    one = separator(pool, cache)
    (estimate, _), *_ = one.recipe.outputs["vocals"]
    assert estimate is not None
    on_cpu, on_mps = (
        EstimateSettings(one.models, one.plans, torch.device(name), batch_size=1).of(estimate, {})
        for name in ("cpu", "mps")
    )
    assert {key for key, value in on_mps.items() if value != on_cpu[key]} == {"device"}


@pytest.mark.slow
def test_the_engine_version_changes_with_each_file_that_computes_and_with_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(
        shutil.copytree(PROJECT / "separation", tmp_path / "separation", ignore=shutil.ignore_patterns("__pycache__"))
    )
    monkeypatch.setattr(cache_module, "__file__", str(package / "engine" / "cache.py"))
    version = engine_version.__wrapped__()
    assert version == engine_version()
    for path in [path for path in package.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        place = path.relative_to(package)
        computes = place.parts[0] in ENGINE or (len(place.parts) == 1 and place.suffix == ".py")
        assert (engine_version.__wrapped__() != version) == computes, place
        path.write_bytes(content)
    (package / "models" / "new.py").write_text("x = 1\n", encoding="utf-8")
    assert engine_version.__wrapped__() != version


def test_every_package_that_the_separator_imports_is_part_of_the_engine_version() -> None:
    reached, waiting = set(), ["separation.engine.separator"]
    while waiting:
        module = waiting.pop()
        if module in modules() and module not in reached:
            reached.add(module)
            waiting += imports(modules()[module])
    folders = {module.split(".")[1] for module in reached if module.count(".") > 1}
    assert folders == {*ENGINE, "analysis", "system"}  # which describe stems and write files, and compute no samples


def test_the_engine_version_names_the_installed_packages_that_compute() -> None:
    assert "torch 2" in engine_version() and "demucs 4" in engine_version()


def test_weights_that_changed_after_they_were_loaded_are_an_error(tmp_path: Path, cache: Cache) -> None:
    weights = copied_model(tmp_path) / "copy" / "mine.safetensors"
    model = load_model(weights.parent, device="cpu")
    os.utime(weights, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"mine\.safetensors has changed since it was loaded"):
        Separator.from_model(model, cache=cache)
    weights.unlink()
    with pytest.raises(CheckpointError, match="can no longer be read"):
        Separator.from_model(model, cache=cache)


def test_a_model_that_was_not_loaded_from_a_file_cannot_use_the_cache(cache: Cache) -> None:
    model = small_model()
    with pytest.raises(CheckpointError, match="turn the cache off"):
        Separator.from_model(model, cache=cache)


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_statistics(path: Path) -> None:
    text = json.loads(path.read_text(encoding="utf-8"))
    text["facts"]["statistics"][0] *= 2
    path.write_text(json.dumps(text), encoding="utf-8")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def exchange(path: Path) -> None:
    """Replace an entry by another complete entry."""
    other = Cache(path.parent / "other")
    other.put({"something": "else"}, [b"1234"], 4, FACTS)
    for file in other.folder.iterdir():
        os.replace(file, path.with_suffix(file.suffix))


@pytest.mark.parametrize(
    "suffix, damage",
    [
        (".f32", flip),
        (".f32", truncate),
        (".json", flip),
        (".json", truncate),
        (".json", replace_statistics),
        (".json", exchange),
        (".json", lambda path: path.write_text("[]")),
        (".json", lambda path: path.write_bytes(b"\xff")),
        (".json", lambda path: path.write_text("[" * 100_000)),
    ],
)
def test_a_damaged_entry_is_removed_with_one_warning(
    suffix: str, damage: Callable[[Path], object], cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.put(SETTINGS, [b"12345678"], 8, FACTS)
    (data,) = cache.folder.glob("*.f32")
    damage(data.with_suffix(suffix))
    for _ in range(2):
        assert cache.get(SETTINGS) is None
    assert not list(cache.folder.glob("*.*"))
    assert caplog.messages == [f"{data} was damaged: removed, the estimate is computed again"]


def test_a_damaged_estimate_is_computed_again(pool: ModelPool, song: Path, cache: Cache, tmp_path: Path) -> None:
    first = runs(separator(pool, cache), song, tmp_path / "first")
    flip(next(cache.folder.glob("*.f32")))
    assert runs(separator(pool, cache), song, tmp_path / "again") == first
    assert runs(separator(pool, cache), song, tmp_path / "hit") == (first[0], set())


@pytest.mark.parametrize("suffix", [".f32", ".json"])
def test_half_an_entry_is_a_miss_and_is_removed_later(suffix: str, cache: Cache) -> None:
    cache.put(SETTINGS, [b"1234"], 4, FACTS)
    (half,) = cache.folder.glob(f"*{suffix}")
    half.unlink()
    assert cache.get(SETTINGS) is None
    cache.put({"another": 1}, [b"1234"], 4, FACTS)
    assert len(list(cache.folder.glob("*.*"))) == 2


@pytest.mark.slow
def test_if_the_folder_cannot_be_used_there_is_one_warning_and_the_song_is_separated(
    pool: ModelPool, song: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    cold = runs(separator(pool, None), song, tmp_path / "cold")
    for _ in range(2):
        cache = Cache(tmp_path / "file")
        assert runs(separator(pool, cache), song, tmp_path / "out") == cold
    words = f"the cache in {tmp_path / 'file'} cannot be used (Not a directory): continuing without it"
    assert caplog.messages == [f"'song.wav': {words}"] * 2
    with pytest.raises(OutputError, match="set SEPARATION_CACHE to another folder"):
        cache.clear()


def test_a_full_disk_is_one_warning_and_leaves_no_partial_files(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "script.py"
    script.write_text(f"""
from separation.engine.cache import Cache
cache = Cache("{disk}/cache")
for number in range(3):
    cache.put({{"number": number}}, [bytes(2**19)] * 4, 2**21, {{}})
    cache.put({{"small": number}}, [bytes(2**10)], 2**10, {{}})
print(*sorted(path.suffix for path in cache.folder.iterdir()))
""")
    commands = f"mount -t tmpfs -o size=1m tmpfs {disk} && PYTHONPATH={PROJECT} exec {sys.executable} {script}"
    ran = subprocess.run(["unshare", "-rm", "sh", "-c", commands], capture_output=True, text=True, check=False)
    if "unshare" in ran.stderr or "mount:" in ran.stderr:
        pytest.skip(f"cannot mount a disk: {ran.stderr.strip()}")
    words = f"the cache in {disk}/cache cannot be used (No space left on device): continuing without it"
    assert ran.stderr.splitlines() == [words]
    assert ran.stdout.split() == [".f32"] * 3 + [".json"] * 3


# The size


def keys_of(cache: Cache) -> set[int]:
    return {entry.settings["number"] for entry in cache.entries()}


def test_the_least_recently_used_entries_are_evicted_and_the_limit_holds(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=14_000)
    for number in range(3):
        cache.put({"number": number}, [bytes(2000)] * 2, 4000, FACTS)
    kept = cache.get({"number": 0})
    assert kept is not None
    kept.file.close()
    cache.put({"number": 3}, [bytes(4000)], 4000, FACTS)
    assert keys_of(cache) == {0, 2, 3}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 14_000
    cache.put({"number": 4}, [bytes(13_000)], 13_000, FACTS)
    assert keys_of(cache) == {4}
    cache.put({"number": 5}, [bytes(15_000)], 15_000, FACTS)
    assert keys_of(cache) == {4}


def test_an_entry_that_is_removed_while_it_is_open_can_be_read_to_its_end(cache: Cache) -> None:
    cache.put(SETTINGS, [b"1234"], 4, FACTS)
    kept = cache.get(SETTINGS)
    cache.clear()
    assert kept is not None
    assert kept.file.read() == b"1234" and kept.facts == FACTS
    kept.file.close()


def test_a_song_whose_stems_do_not_all_fit_into_the_cache_is_not_cached(
    pool: ModelPool, song: Path, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", limit_bytes=3 * 2 * RATE * 8)  # in three stems
    assert runs(separator(pool, cache, stems="all_6"), song, tmp_path / "out")[1] == {"demo"}
    assert not cache.folder.exists()


# Processes


def python(code: str, **options: Any) -> subprocess.Popen[str]:
    prelude = "import os, sys, time\nfrom separation.engine.cache import Cache\n"
    return subprocess.Popen([sys.executable, "-c", prelude + code], cwd=PROJECT, text=True, **options)


def test_killing_a_process_while_it_writes_leaves_no_entry_and_the_next_process_cleans_up(cache: Cache) -> None:
    code = f"""
def blocks():
    yield b"12"
    print("half", flush=True)
    time.sleep(60)
Cache({str(cache.folder)!r}).put({SETTINGS!r}, blocks(), 4, {FACTS!r})
"""
    with python(code, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "half\n"
        cache.put({"another": 1}, [b"1234"], 4, FACTS)
        assert len(list(cache.folder.glob("*.part"))) == 1  # the writer is alive: its file stays
        writer.send_signal(signal.SIGKILL)
    assert cache.get(SETTINGS) is None and len(cache.entries()) == 1
    cache.put({"yet another": 1}, [b"1234"], 4, FACTS)
    assert not list(cache.folder.glob("*.part"))
    assert len(cache.entries()) == 2


@pytest.mark.slow
def test_killing_a_process_at_any_moment_leaves_whole_entries_or_none(cache: Cache) -> None:
    code = f"""
cache = Cache({str(cache.folder)!r}, limit_bytes=200_000)
number = 0
print("begins", flush=True)
while True:
    cache.put({{"number": number % 7}}, [bytes([number % 251]) * 10_000] * 2, 20_000, {{"of": number % 251}})
    number += 1
"""
    for moment in range(12):
        with python(code, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "begins\n"
            time.sleep(0.01 + 0.003 * moment)
            writer.kill()
        for entry in cache.entries():
            kept = cache.get(entry.settings)
            assert kept is not None  # its checksum is right
            with kept.file as file:
                assert file.read() == bytes([kept.facts["of"]]) * 20_000


@pytest.mark.slow
def test_processes_that_share_a_folder_never_read_half_an_entry(cache: Cache) -> None:
    code = f"""
import logging
logging.basicConfig()  # prints the warning about a damaged entry
cache = Cache({str(cache.folder)!r}, limit_bytes=100_000)
own = int(sys.argv[1]) if len(sys.argv) > 1 else os.getpid() % 251
hits = 0
for number in range(150):
    settings = {{"number": number % 6}}
    kept = cache.get(settings)
    if kept is not None:
        hits += 1
        with kept.file as file:
            assert file.read() == bytes([kept.facts["of"]]) * 20_000
    if number % 3 == 0:
        cache.put(settings, [bytes([own]) * 10_000] * 2, 20_000, {{"of": own}})
    if number % 50 == 49:
        cache.clear()
print(hits)
"""
    processes = [python(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
        assert int(output) > 0
    assert not list(cache.folder.glob("*.part"))


@pytest.mark.slow
def test_two_processes_that_separate_the_same_song_both_give_the_right_stems(
    song: Path, cache: Cache, tmp_path: Path
) -> None:
    environment = os.environ | {"SEPARATION_CACHE": str(cache.folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "separation", "separate", str(song), "--json", *BASE]
    both = [
        subprocess.Popen([*command, "-o", str(tmp_path / name)], cwd=PROJECT, env=environment, stdout=subprocess.PIPE)
        for name in ("one", "two")
    ]
    lines = [process.communicate(timeout=120)[0] for process in both]
    files = [{stem: Path(path) for stem, path in json.loads(line)["stems"].items()} for line in lines]
    assert contents(files[0]) == contents(files[1])
    assert len(cache.entries()) == 6
    for entry in cache.entries():
        kept = cache.get(entry.settings)
        assert kept is not None
        with kept.file as file:
            samples = np.frombuffer(file.read(), "<f4").reshape(-1, 2)
        assert np.array_equal(samples, soundfile.read(files[0][entry.settings["stem"]], dtype="float32")[0])


def test_the_lock_delays_writers_but_not_readers(cache: Cache) -> None:
    cache.put(SETTINGS, [b"1234"], 4, FACTS)
    code = f"""
cache = Cache({str(cache.folder)!r})
print(cache.get({SETTINGS!r}) is not None, flush=True)
cache.clear()
print(cache.get({SETTINGS!r}) is not None, flush=True)
"""
    with lock(cache.folder / LOCK):
        writer = python(code, stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == "True\n"
        time.sleep(0.3)
        assert writer.poll() is None
    assert writer.communicate(timeout=60)[0] == "False\n"


# The command line and the environment


def test_the_command_line_lists_and_clears_the_cache(
    base: Path, song: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "cache"))
    mine = {"mine.txt", "lock", "download.part", "download.part.lock", "a.json", "b.f32"}
    for name in mine:
        (folder / name).write_text("mine")
    monkeypatch.setenv("SEPARATION_CACHE", str(folder))
    assert main(["cache", "list"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    attention = load_model("demo").attention
    words = ("0.7 MB", "2 s", "song.wav: ", f" by demo (cpu float32 {attention}", "176400")
    assert all(word in lines[0] for word in words)
    assert total == f"6 estimates in {folder}: 0.00 of 8 GiB"
    assert main(["cache", "list", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out.splitlines()[0])
    assert entry["settings"]["chunk_samples"] == 4 * RATE and entry["song"] == "song.wav"
    assert entry["made"].startswith("20") and entry["bytes"] > 2 * RATE * 8
    assert main(["cache", "clear"]) == 0
    Cache(folder).put(SETTINGS, [b"1234"], 4, FACTS)
    assert main(["cache", "clear"]) == 0
    assert {path.name for path in folder.iterdir()} - {LOCK} == mine
    assert {(folder / name).read_text() for name in mine} == {"mine"}
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"0 estimates in {folder}: 0.00 of 8 GiB"]


@pytest.mark.slow
def test_evaluate_uses_the_estimates_that_separate_cached(
    base: Path, song: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(Path(shutil.copytree(base, tmp_path / "cache")))
    monkeypatch.setenv("SEPARATION_CACHE", str(cache.folder))
    before = state(cache)
    (tmp_path / "references" / "song").mkdir(parents=True)
    for name in ("mixture", "vocals", "drums", "bass", "guitar", "piano", "other"):
        shutil.copy(song, tmp_path / "references" / "song" / f"{name}.wav")
    assert main(["evaluate", "--references", str(tmp_path / "references"), *BASE]) == 0
    assert state(cache) == before


def test_environment_variables_choose_the_folder_and_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEPARATION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "music-separation" / "stems"
    assert chosen_cache(default=False) is None
    found = chosen_cache(default=True, refresh=True)
    assert found is not None and found.folder == default_folder() and found.refresh
    assert found.limit_bytes == int(LIMIT_GIB * 2**30)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "music-separation" / "stems"
    for value, folder in (("on", default_folder()), (str(tmp_path / "here"), tmp_path / "here")):
        monkeypatch.setenv("SEPARATION_CACHE", value)
        found = chosen_cache(default=False)
        assert found is not None and found.folder == folder
    monkeypatch.setenv("SEPARATION_CACHE_GIB", "0.5")
    assert Cache().limit_bytes == 2**29
    for text in ("0", "-1", "nan", "inf", "many"):
        monkeypatch.setenv("SEPARATION_CACHE_GIB", text)
        with pytest.raises(InputError, match="SEPARATION_CACHE_GIB is"):
            Cache()
    for text in ("off", "OFF", "0", "false"):
        monkeypatch.setenv("SEPARATION_CACHE", text)
        assert chosen_cache(default=True) is None
    assert main(["cache", "list"]) == 2


def test_other_users_cannot_read_the_cache(cache: Cache) -> None:
    cache.put(SETTINGS, [b"1234"], 4, FACTS)
    assert {path.stat().st_mode & 0o077 for path in [cache.folder, *cache.folder.glob("*.*")]} == {0}


@pytest.mark.slow
def test_views_and_ensembles_take_their_estimates_from_the_cache(
    pool: ModelPool, song: Path, cache: Cache, tmp_path: Path
) -> None:
    def recipe(vocals: object) -> Recipe:
        return resolve("mine", "test", {"vocals": vocals, "rest": "residual"})

    runs(separator(pool, cache, recipe("demo with 2 shifts")), song, tmp_path / "two")
    before = state(cache)
    assert len(before) == 2
    more = recipe({"max_fft": ["demo with 4 shifts", "demo with polarity"]})
    found = runs(separator(pool, cache, more), song, tmp_path / "more")
    assert before.items() <= state(cache).items() and len(state(cache)) == 5  # the song is shared by all three
    assert found == runs(separator(pool, None, more), song, tmp_path / "cold")
    assert runs(separator(pool, cache, more), song, tmp_path / "again") == (found[0], set())
