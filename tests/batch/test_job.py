"""The settings in a record are the options that decide what the stems' files contain, and no others."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import DEMO, DEMO_RECIPE, settings_of, settings_of_parsed
from helpers.common import PROJECT
from separation.cli.parser import build_parser
from separation.engine import selection
from separation.engine.recipes import load_recipe

# What existing records hold for `--recipe demo` and for MODEL_OPTIONS. If this changes, finished songs are separated
# again.
ESTIMATE = "(Estimate(run=Run(model='demo', input=((None, 1.0),)), stem='vocals'), {})"
RECIPE = {
    "precision": "auto",
    "model_name": None,
    "model_dir": None,
    "model_path": None,
    "attention": "auto",
    "two_stems": None,
    "format": "wav",
    "sample_rate": 44100,
    "wav_depth": "32f",
    "recipe": "demo",
    "stems": "vocals_instrumental",
    "sources": {
        "vocals": f"({ESTIMATE.format(1.0)},)",
        "instrumental": f"((None, 1.0), {ESTIMATE.format(-1.0)})",
    },
    "chunks": {"demo": [352800, 176400]},
    "weights": {"demo/demo.safetensors": "e9b307729fd3a66b82723e58dfcc631ffa5b600d3a0562b0f9fa5d8e56026bef"},
}
MODEL = {
    "precision": "fp32",
    "model_name": "demo",
    "model_dir": str(PROJECT / "configs" / "models"),
    "model_path": None,
    "attention": "sdpa",
    "two_stems": "drums",
    "format": "mp3",
    "sample_rate": "source",
    "mp3_bitrate": 320,
    "chunks": {"configs/models/demo": [396900, 132300]},
    "weights": {"demo/demo.safetensors": "e9b307729fd3a66b82723e58dfcc631ffa5b600d3a0562b0f9fa5d8e56026bef"},
}
MODEL_OPTIONS = ("--model-dir", "configs/models", "--model-name", "demo", "--two-stems", "drums", "--precision", "fp32")
MODEL_OPTIONS += ("--attention", "sdpa", "--format", "mp3", "--sample-rate", "source")
MODEL_OPTIONS += ("--chunk-size", "9", "--overlap", "3")


@pytest.mark.parametrize("options, expected", [(("--recipe", "demo"), RECIPE), (MODEL_OPTIONS, MODEL)])
def test_settings_are_spelt_as_in_the_records_of_earlier_versions(
    options: tuple[str, ...], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PROJECT)
    assert json.loads(json.dumps(settings_of(*options))) == expected


def test_the_weights_of_a_users_own_model_are_told_apart_by_size_and_time(tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes((PROJECT / "weights" / "demo" / "demo.safetensors").read_bytes())
    options = ("--model-name", "demo", "--model-path", str(own))
    before = settings_of(*options)
    facts = own.stat()
    assert before["weights"]["own.safetensors"] == [facts.st_size, facts.st_mtime_ns]
    assert settings_of(*options) == before
    os.utime(own, ns=(0, 0))
    assert settings_of(*options) != before


def test_a_recipe_that_was_edited_has_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings_of(*DEMO)
    monkeypatch.setattr(selection, "find_recipe", lambda name, choice, **rest: load_recipe("sw", choice, **rest))
    assert settings_of(*DEMO) != before


def test_views_and_rules_of_a_recipe_are_part_of_the_settings(tmp_path: Path) -> None:
    found = []
    for line in ("demo", "demo with polarity", "{max: [demo, residual]}", "{min: [demo, residual]}"):
        (tmp_path / "mine.yaml").write_text(f"bass: demo\nvocals: {line}")
        found.append(settings_of("--recipe", str(tmp_path / "mine.yaml"))["sources"])
    assert found[0]["vocals"] == f"({ESTIMATE.format(1.0)},)"
    assert all(found.count(sources) == 1 for sources in found)


def test_the_same_chunks_are_the_same_settings_however_they_are_chosen() -> None:
    for options in (("--chunk-size", "8"), ("--overlap", "4"), ("--chunk-size", "8", "--overlap", "4")):
        assert settings_of(*DEMO_RECIPE, *options) == settings_of(*DEMO_RECIPE)


OTHER: dict[str, tuple[str, ...]] = {  # each option of `separate`, with another value than the default
    "stems": ("--stems", "all_4"),
    "recipe": ("--recipe", "sw"),
    "two_stems": ("--two-stems", "drums"),
    "model_name": ("--model-name", "demo"),
    "model_dir": ("--model-dir", "configs/models", "--model-name", "demo"),
    "model_path": ("--model-name", "demo", "--model-path", "weights/demo/demo.safetensors"),
    "chunk_size": ("--chunk-size", "9"),
    "overlap": ("--overlap", "3"),
    "attention": ("--attention", "sdpa"),
    "precision": ("--precision", "fp32"),
    "format": ("--format", "flac"),
    "sample_rate": ("--sample-rate", "48000"),
    "wav_depth": ("--wav-depth", "16"),
    "bitrate": ("--format", "mp3", "--mp3-bitrate", "192"),
    "channels": ("--channels", "source"),
    "name": ("--name", "{song} ({stem}).{ext}"),
    "reaper": ("--reaper",),
    "video": ("--video", "vocals"),
    "only": ("--only", "vocals"),
    "flac_depth": ("--format", "flac", "--flac-depth", "16"),
    "device": ("--device", "cpu"),
    "batch_size": ("--batch-size", "3"),
    "workers": ("--workers", "3"),
    "gpus": ("--gpus", "0,1"),
    "retries": ("--retries", "7"),
    "summary": ("--summary", "songs.csv"),
    "ray": ("--ray", "auto"),
    "analyse": ("--analyse",),
    "report": ("--report",),
    "json": ("--json",),
    "quiet": ("--quiet",),
    "progress": ("--progress", "json"),
    "verbose": ("-v",),
    "force_refresh": ("--force-refresh",),
    "overwrite": ("--overwrite",),
    "accept_damaged": ("--accept-damaged",),
    "start": ("--start", "1:20"),
    "end": ("--end", "1:50"),
    "preview": ("--preview",),
    "output": ("-o", "elsewhere"),
    "songs": ("another.wav",),
}

SAME = {"songs", "output", "name", "verbose", "json", "analyse", "report", "force_refresh", "overwrite"}
SAME |= {"quiet", "progress", "accept_damaged", "device", "batch_size", "workers", "gpus", "retries", "summary", "ray"}


def parsed(*options: str) -> argparse.Namespace:
    return build_parser().parse_args(["separate", "-o", "y", "x.wav", *options])


@pytest.mark.parametrize("option", sorted(set(vars(parsed())) - {"command", "parser"}))
def test_each_option_changes_the_settings_if_it_changes_the_stems(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    usual, other = parsed(), parsed(*OTHER[option])
    assert getattr(usual, option) != getattr(other, option)
    assert (settings_of_parsed(usual) == settings_of_parsed(other)) == (option in SAME)
