"""encoders: stems are encoded in parallel, while the models still run."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from helpers.common import quick_first, slow
from helpers.small_separators import QUICK, Recorder, write
from separation import ModelPool, OutputError, Separator
from separation.audio.encode import encode
from separation.audio.options import OutputOptions
from separation.audio.resample import resample
from separation.audio.waveform import Waveform
from separation.engine import encoders, song_waveforms
from separation.engine.pool import LoadedModels
from separation.engine.recipes import resolve


def test_a_song_can_be_cancelled_while_a_stem_is_encoded(
    pool: ModelPool, clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CancelError(Exception):
        pass

    cancelled, stages = threading.Event(), []

    def cancel(share: float, stage: str) -> None:
        stages.append(stage)
        if stages.count("writing vocals") == 2:
            cancelled.set()
            raise CancelError

    monkeypatch.setattr(encoders, "encode", lambda *_, **__: cancelled.wait(20))
    song = write(tmp_path / "song.wav", clip[:, :10_000])
    with pytest.raises(CancelError):
        Separator("demo", pool=pool, options=QUICK).separate_file(song, tmp_path / "out", progress=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


@pytest.mark.skipif(os.cpu_count() == 1, reason="needs two cores")
def test_stems_are_encoded_in_parallel(
    pool: ModelPool, clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, both = encoders.encode, threading.Barrier(2, timeout=60)

    def encode_together(*arguments: object, **options: object) -> None:
        both.wait()  # fails unless both encoders get here
        encode(*arguments, **options)

    monkeypatch.setattr(encoders, "encode", encode_together)
    song = write(tmp_path / "song.wav", clip[:, :20_000])
    files = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK).separate_file(
        song, tmp_path / "out", OutputOptions(format="mp3")
    )
    assert [path.name for path in files.values()] == ["vocals.mp3", "instrumental.mp3"]


@pytest.mark.parametrize("level", quick_first([0.5, 3.0], 1))
@pytest.mark.parametrize(
    "options",
    [
        {"format": "wav"},
        slow({"format": "wav", "wav_depth": "16"}),
        slow({"format": "flac"}),
        slow({"format": "flac", "flac_depth": "16"}),
        {"format": "mp3"},
        {"format": "flac", "sample_rate": 48000},
    ],
)
def test_encoding_while_the_models_run_gives_the_same_files_as_encoding_afterwards(
    options: dict[str, Any], level: float, clip: Tensor, tmp_path: Path
) -> None:
    recipe = resolve("test", "test", {"vocals": "first", "drums": "first of vocals", "instrumental": "residual"})
    model = Recorder("first", ("vocals", "drums"), 100_000)
    model.gain.data.fill_(0.7)
    separator = Separator(recipe, pool=LoadedModels({model.name: model}), options=QUICK)
    mixture = clip[:, :200_001] * level / clip[:, :200_001].abs().max()
    files = separator.separate_file(write(tmp_path / "song.wav", mixture), tmp_path / "out", OutputOptions(**options))
    assert (files.gain < 1) == (level > 1 and options != {"format": "wav"})
    rate = options.get("sample_rate", 44100)
    depths = {name: value for name, value in options.items() if name.endswith("_depth")}
    for stem, samples in separator.separate(mixture).items():
        expected = tmp_path / f"{stem}.{options['format']}"
        with Waveform(tmp_path) as wave:
            wave.append(samples)
            with resample(wave, rate, tmp_path) if rate != 44100 else wave as at_rate:
                tags = {"title": f"song ({stem})"}
                encode(at_rate, expected, OutputOptions(options["format"], **depths), tags=tags, gain=files.gain)
        assert files[stem].read_bytes() == expected.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"song.wav", "out", *(path.name for path in files.values())}


@pytest.mark.parametrize("sample_rate", [44100, 48000])
def test_every_stem_is_encoded_while_the_model_still_runs(
    sample_rate: int, clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, begun = encoders.encode, {"vocals": threading.Event(), "instrumental": threading.Event()}

    def watched(wave: Waveform, path: Path, *arguments: Any, gain: Callable[[], float], **options: Any) -> None:
        def watched_gain() -> float:
            begun[path.stem].set()
            return gain()

        encode(wave, path, *arguments, gain=watched_gain, **options)

    class Waiting(Recorder):
        def forward(self, chunks: Tensor) -> Tensor:
            if len(self.seen) == 2:  # the third and last: 4 s are with the encoders
                assert all(event.wait(60) for event in begun.values())
            return super().forward(chunks)

    monkeypatch.setattr(encoders, "encode", watched)
    model = Waiting("first", ("vocals",), 100_000)
    recipe = resolve("test", "test", {"vocals": "first", "instrumental": "residual"})
    separator = Separator(recipe, pool=LoadedModels({model.name: model}), options=QUICK)
    song = write(tmp_path / "song.wav", clip)
    separator.separate_file(song, tmp_path / "out", OutputOptions(format="flac", sample_rate=sample_rate))
    assert len(model.seen) == 3


@pytest.mark.parametrize("where", ["an encoder", "a sum", "the input of a run", slow("the end of that input")])
def test_an_error_on_another_thread_ends_the_run_with_that_error(
    where: str, clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def fail(*_: object, **__: object) -> Iterator[Tensor]:
        failed.set()
        raise OutputError("the disk is full")

    def fail_at_the_end(total: Any) -> Iterator[Tensor]:
        yield total.read(0, total.n_samples)[:, 1:]
        time.sleep(0.1)  # the run waits
        raise OutputError("the disk is full")

    class Slow(Recorder):
        def forward(self, chunks: Tensor) -> Tensor:
            assert failed.wait(60)
            time.sleep(0.05)
            return super().forward(chunks)

    if where == "an encoder":
        monkeypatch.setattr(encoders, "encode", fail)
    else:
        monkeypatch.setattr(song_waveforms._WeightedSum, "blocks", fail_at_the_end if "end" in where else fail)
    lines = {"vocals": "first", "drums": "first after vocals"}
    if "input" not in where:
        lines = {"vocals": "first", "instrumental": "residual"}
    model = Slow("first", ("vocals", "drums"), 100_000)
    recipe = resolve("test", "test", lines)
    separator = Separator(recipe, pool=LoadedModels({model.name: model}), options=QUICK)
    if where != "an encoder":  # a sum is begun when it is asked for
        failed.set()
    song = write(tmp_path / "song.wav", clip.repeat(1, 8))
    with pytest.raises(OutputError, match="the disk is full"):
        separator.separate_file(song, tmp_path / "out")
    chunks = len(separator.plans["first"].starts(8 * clip.shape[1]))
    assert len(model.seen) == chunks if "end" in where else len(model.seen) < chunks
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


def test_once_a_stem_clips_encoding_stops_until_the_gain_is_known(
    clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, gains = encoders.encode, []

    def watched(*arguments: Any, gain: Callable[[], float] | float, **options: Any) -> None:
        def watched_gain() -> float:
            gains.append(gain() if callable(gain) else gain)
            return gains[-1]

        encode(*arguments, gain=watched_gain, **options)

    monkeypatch.setattr(encoders, "encode", watched)
    recipe = resolve("test", "test", {"vocals": "first", "instrumental": "residual"})
    separator = Separator(recipe, pool=LoadedModels({"first": Recorder("first", ("vocals",), 100_000)}), options=QUICK)
    mixture = clip * 0.1
    mixture[:, 0] = 2.0
    files = separator.separate_file(
        write(tmp_path / "song.wav", mixture), tmp_path / "out", OutputOptions(format="flac")
    )
    assert files.gain == pytest.approx(0.5)
    assert gains == [files.gain] * 2 * -(-mixture.shape[1] // 65536)
