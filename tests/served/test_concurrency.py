"""Several predictions at once in one server: each gives what it gives alone, and none disturbs another."""

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from helpers.cog_rules import read_runner
from helpers.common import METRICS, PROJECT, song
from helpers.served_process import DEMO, Receiver, Server, data_uri, decoded, wait_for

pytestmark = pytest.mark.slow  # two servers; test_predictions.py has one prediction after the other

SHORT = {"chunk_size": 4, "overlap": 1}
SLOTS = read_runner((PROJECT / "predict.py").read_text(encoding="utf-8"), "Predictor").concurrency
BROKEN = (b"words, words, words\n" * 100, b"", song(2)[:100_000])
# Songs of other lengths and levels, and other stems, formats and rates, so that no mix-up goes unnoticed.
SONGS: list[tuple[bytes, dict[str, Any]]] = [
    (song(1.5, gain=0.5), {"stems": "all_4"}),
    (song(9), {"stems": "vocals_instrumental"}),
    (song(5, gain=0.25), {"stems": "all_6", "output_format": "flac"}),
    (song(20, gain=0.7), {"two_stems": "drums", "sample_rate": 48000}),
    (song(3), {"stems": "all_4", "output_format": "flac"}),
    (song(13, gain=0.1), {"stems": "all_6"}),
    (song(7), {"stems": "all_4", "chunk_size": 5}),
    (song(2), {"two_stems": "piano", "output_format": "flac"}),
]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with as many slots as `cog build` gives the image."""
    with Server(tmp_path_factory.mktemp("many"), **DEMO, COG_MAX_CONCURRENCY=str(SLOTS)) as server:
        assert server.health()["status"] == "READY", server.log.read_text()
        yield server


def separate(server: Server, id: str, number: int) -> dict[str, Any]:
    content, inputs = SONGS[number]
    return server.post({"audio": data_uri(content), **SHORT, **inputs}, id=id)[1]


def samples(prediction: dict[str, Any]) -> list[NDArray[np.float32]]:
    assert prediction["status"] == "succeeded", prediction["error"]
    return [decoded(uri)[1] for uri in prediction["output"]]


def at_once(server: Server, numbers: list[int], name: str) -> list[dict[str, Any]]:
    """Predictions that start together."""
    with ThreadPoolExecutor(len(numbers)) as clients:
        runs = [clients.submit(separate, server, f"{name}-{number}", number) for number in numbers]
        return [run.result() for run in runs]


def check_songs(server: Server, alone: Server, numbers: list[int]) -> None:
    """Each song of several at once has the same samples as alone, and a log and metrics of its own."""
    expected = {number: samples(separate(alone, f"alone-{number}", number)) for number in numbers}
    together = dict(zip(numbers, at_once(server, numbers, "together"), strict=True))
    for number, prediction in together.items():
        for stem, right in zip(samples(prediction), expected[number], strict=True):
            np.testing.assert_array_equal(stem, right)
        assert set(METRICS) <= set(prediction["metrics"])
        seconds = len(expected[number][0]) / SONGS[number][1].get("sample_rate", 44100)
        assert prediction["metrics"]["audio_seconds"] == pytest.approx(seconds, abs=1e-3)
        lines = prediction["logs"].splitlines()
        assert [lines.count(line) for line in ("decoding", "demo", "done")] == [1, 1, 1]
        assert sum("100%|" in line for line in lines) == 1


def test_three_songs_at_once_are_separated_as_alone(many: Server, server: Server) -> None:
    check_songs(many, server, [0, 2, 7])


def test_eight_songs_at_once_are_separated_as_alone(many: Server, server: Server) -> None:
    assert SLOTS == len(SONGS) == 8
    check_songs(many, server, list(range(8)))


def test_one_more_prediction_than_there_are_slots_is_answered_409(many: Server, receiver: Receiver) -> None:
    assert SLOTS
    long = song(240, format="FLAC")
    for number in range(SLOTS):
        many.start(long, id=f"long-{number}", inputs=SHORT)
    status, answer = many.request("POST", "/predictions", {"input": {"audio": data_uri(song(1))}})
    assert (status, answer["error"]) == (409, "At capacity - all prediction slots busy")
    for number in range(SLOTS):
        assert many.cancel(f"long-{number}") == 200
    many.wait_until_idle()
    samples(separate(many, "after", 0))


def test_a_short_song_does_not_wait_for_a_long_one(many: Server, receiver: Receiver) -> None:
    many.start(song(240, format="FLAC"), id="endless", inputs=SHORT, webhook=receiver.url)
    wait_for(lambda: any("10%" in line for line in many.printed("endless")), "the start of the long song")
    samples(separate(many, "short", 0))
    assert receiver.bodies()[-1]["status"] == "processing"
    assert many.cancel("endless") == 200
    assert receiver.wait_for_end()["status"] == "canceled"


def test_broken_songs_fail_beside_others_which_do_not_notice(many: Server, server: Server) -> None:
    expected = samples(separate(server, "alone", 4))
    with ThreadPoolExecutor(6) as clients:
        broken = [clients.submit(many.predict, content, **SHORT) for content in BROKEN]
        whole = [clients.submit(separate, many, f"whole-{number}", 4) for number in range(3)]
        for run in broken:
            failed = run.result()
            assert failed["status"] == "failed"
            assert failed["error"].startswith("Prediction failed: Async prediction failed: AudioError: 'file.bin' ")
        for run in whole:
            for stem, right in zip(samples(run.result()), expected, strict=True):
                np.testing.assert_array_equal(stem, right)


def test_a_broken_song_is_no_cancellation_whatever_its_name(many: Server, receiver: Receiver) -> None:
    receiver.files["/cancelled%20CancelledError.wav"] = b"words, words, words\n" * 100
    failed = many.predict(f"{receiver.url}/cancelled%20CancelledError.wav", **SHORT)
    assert failed["status"] == "failed"
    assert "'canceled CanceledError.wav' is not audio" in failed["error"]


def folders(server: Server) -> set[str]:
    return {name for name in server.leftovers() if name.startswith(("stems-", "song-"))}


def test_twenty_predictions_cancelled_at_random_disturb_no_other_and_leave_nothing(
    many: Server, server: Server, receiver: Receiver
) -> None:
    expected = samples(separate(server, "alone", 4))
    chance = random.Random(0)
    for round in range(5):
        ids = [f"random-{round}-{number}" for number in range(4)]
        with ThreadPoolExecutor(2) as clients:
            whole = [clients.submit(separate, many, f"beside-{round}-{number}", 4) for number in range(2)]
            for id in ids:
                many.start(song(120, format="FLAC"), id=id, inputs=SHORT, webhook=receiver.url)
            for id in chance.sample(ids, 4):
                # While coglet still reads the inputs, a cancelled prediction ends as failed (Input validation error).
                wait_for(lambda id=id: many.printed(id), f"the start of {id}")
                time.sleep(chance.uniform(0, 0.5))
                assert many.cancel(id) == 200
            for run in whole:
                for stem, right in zip(samples(run.result()), expected, strict=True):
                    np.testing.assert_array_equal(stem, right)
    many.wait_until_idle()
    wait_for(lambda: not any(name.startswith("song-") for name in folders(many)), "the end of the cancelled songs")
    # The last predictions' stems stay: those of the other slots.
    wait_for(lambda: len(folders(many)) <= int(SLOTS or 0), "the removal of the stems of cancelled predictions")
    ended = {body["id"]: body["status"] for body in receiver.bodies() if body["status"] != "processing"}
    assert len(ended) == 20 and set(ended.values()) == {"canceled"}


def test_separation_concurrency_limits_the_songs_in_work(
    tmp_path_factory: pytest.TempPathFactory, receiver: Receiver
) -> None:
    folder = tmp_path_factory.mktemp("limited")
    with Server(folder, **DEMO, COG_MAX_CONCURRENCY="3", SEPARATION_CONCURRENCY="1") as limited:
        assert limited.health()["status"] == "READY", limited.log.read_text()
        limited.start(song(120, format="FLAC"), id="first", inputs=SHORT)
        wait_for(lambda: limited.printed("first"), "the first song")
        limited.start(song(1), id="second", inputs=SHORT, webhook=receiver.url)
        time.sleep(0.5)
        assert limited.printed("second") == []
        assert limited.cancel("first") == 200
        assert receiver.wait_for_end()["status"] == "succeeded"


def test_setup_fails_if_the_number_of_songs_is_wrong(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Server(tmp_path_factory.mktemp("wrong"), **DEMO, SEPARATION_CONCURRENCY="many") as wrong:
        health = wrong.health()
        assert health["status"] == "SETUP_FAILED"
        assert "SEPARATION_CONCURRENCY is 'many': set it to a number above 0" in json.dumps(health["setup"])
