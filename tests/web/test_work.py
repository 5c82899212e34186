"""The work on a song: a part and then the rest, the weights that are missing, and what is told meanwhile."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.common import read, song
from helpers.weights_server import CONTENT, Server, weight_file
from separation import Separator
from separation.checkpoints import download
from separation.checkpoints.description import WeightFile
from separation.engine.cache import Cache
from separation.engine.options import EngineOptions
from separation.engine.pool import ModelPool
from separation.errors import InputError
from separation.models.base import SeparationModel
from separation.web import work
from separation.web.order import Order
from separation.web.queued import QueuedSong
from separation.web.work import Worker

CPU = EngineOptions(device="cpu")
Told = list[tuple[float, str, float | None]]


def queued(folder: Path, content: bytes, **choice: Any) -> QueuedSong:
    """A song whose file has arrived."""
    order = Order.read({"name": "song.wav", "recipe": "demo", "stems": "vocals_instrumental", "format": "wav"} | choice)
    folder.mkdir()
    one = QueuedSong(folder.name, order, len(content), folder)
    one.path.parent.mkdir()
    one.path.write_bytes(content)
    return one


@pytest.fixture(scope="module")
def pool() -> ModelPool:
    return ModelPool(CPU)


@pytest.mark.slow
def test_the_whole_song_reuses_what_its_part_computed_and_is_the_same(pool: ModelPool, tmp_path: Path) -> None:
    content, n_chunks = song(30), 0
    (tmp_path / "song.wav").write_bytes(content)
    plain = Separator("demo", "vocals_instrumental", pool=pool)
    plain.separate_file(tmp_path / "song.wav", tmp_path / "plain")
    cached = Worker(pool, Cache(tmp_path / "cache"), 60)

    def count(model: SeparationModel, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal n_chunks
        n_chunks += len(inputs[0])

    hook = pool.get("demo", ("vocals",)).register_forward_hook(count)
    try:
        part = queued(tmp_path / "part", content, part=[4, 26])
        cached.work(part, lambda share, stage, left: None)
        of_part, n_chunks = n_chunks, 0
        whole = queued(tmp_path / "whole", content)
        cached.work(whole, lambda share, stage, left: None)
        of_rest, n_chunks = n_chunks, 0
        Worker(pool, None, 60).work(queued(tmp_path / "alone", content), lambda share, stage, left: None)
    finally:
        hook.remove()
    assert 0 < of_part < n_chunks and 0 < of_rest < n_chunks
    assert part.analysis is None and whole.analysis is not None  # a part may have another key
    for stem in ("vocals.wav", "instrumental.wav"):
        expected = read(tmp_path / "plain" / stem)
        np.testing.assert_array_equal(read(whole.files[stem]), expected)
        np.testing.assert_array_equal(read(part.files[stem]), expected[4 * 44100 : 26 * 44100])


@pytest.fixture
def source(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightFile]:
    """A weights file that can be downloaded, and that every model needs."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        file = weight_file(server.url)
        monkeypatch.setattr(work, "missing", lambda name, stems: [file])
        yield file
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_stages_are_in_words_and_the_next_song_has_a_time_from_the_start(
    pool: ModelPool, tmp_path: Path, source: WeightFile, weights: Path
) -> None:
    worker, told = Worker(pool, None, 60), list[Told]()
    for name in ("first", "second"):
        told.append([])
        worker.work(queued(tmp_path / name, song(2)), lambda share, stage, left: told[-1].append((share, stage, left)))
    downloading = [share for share, stage, _ in told[0] if stage.startswith("Downloading")]
    assert (weights / source.name).read_bytes() == CONTENT
    assert len(downloading) > 2 and downloading == sorted(downloading) and downloading[-1] == 1
    stages = list(dict.fromkeys(stage for _, stage, _ in told[0]))
    assert stages == [
        "Downloading Demo, once",
        "Loading the models",
        "Reading the song",
        "Separating with Demo",
        "Writing the stems",
        "Finding tempo and key",
        "Making the listening page",
    ]
    shares = [share for share, _, _ in told[0]][len(downloading) :]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0, 1)
    assert told[0][len(downloading)][2] is None  # nothing has been measured yet
    assert all(left is not None and left >= 0 for _, _, left in told[1])


@pytest.mark.parametrize(
    "url, told, logged",
    [
        (
            "http://127.0.0.1:9/",
            "could not be downloaded: connect the server to the internet",
            "the connection was refused",
        ),
        (None, "are missing or wrong: do what the server's log says, or choose another model", "has no url"),
    ],
)
def test_weights_that_cannot_be_had_fail_the_song_in_words(
    url: str | None,
    told: str,
    logged: str,
    weights: Path,
    pool: ModelPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(download, "RETRY_SECONDS", ())
    monkeypatch.setattr(work, "missing", lambda name, stems: [weight_file(url)])
    with pytest.raises(InputError, match=f"^the weights of Demo {told}") as refused, caplog.at_level("WARNING"):
        Worker(pool, None, 60).work(queued(tmp_path / "song", song(1)), lambda share, stage, left: None)
    assert str(weights) not in str(refused.value)
    assert logged in caplog.text and str(weights) in caplog.text
