"""Successful predictions: synchronous and asynchronous, each choice, and how the stems are returned."""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.common import METRICS, STEMS, quick_first, read, song
from helpers.served_process import ASYNC, DEMO, Receiver, Request, Server, data_uri, decoded, wait_for

SHORT = {"chunk_size": 4, "overlap": 1}
KINDS = {"wav": "audio/wav", "mp3": "audio/mpeg", "flac": "audio/flac"}


def test_a_song_alone_gives_stems_that_add_up_to_it(server: Server) -> None:
    prediction = server.predict(song(3))
    assert prediction["status"] == "succeeded"
    stems = [decoded(uri) for uri in prediction["output"]]
    assert [kind for kind, _ in stems] == ["audio/wav"] * 2
    assert [samples.shape for _, samples in stems] == [(132_300, 2)] * 2
    assert np.abs(stems[0][1] + stems[1][1] - read(song(3))).max() <= 1e-6
    assert np.abs(stems[0][1]).max() > 0
    lines = prediction["logs"].splitlines()
    assert lines[:2] == ["decoding", f"  0%|{' ' * 20}| 0/20"]
    assert lines[-2:] == ["done", f"100%|{'█' * 20}| 20/20"]


@pytest.mark.parametrize("stems", STEMS)
@pytest.mark.parametrize("format", quick_first(KINDS, 1))
def test_every_choice_of_stems_and_format_gives_the_right_files(server: Server, stems: str, format: str) -> None:
    prediction = server.predict(song(1), stems=stems, output_format=format, **SHORT)
    assert prediction["status"] == "succeeded"
    files = [decoded(uri) for uri in prediction["output"]]
    assert [kind for kind, _ in files] == [KINDS[format]] * len(STEMS[stems])
    assert {samples.shape for _, samples in files} == {(44_100, 2)}


@pytest.mark.slow
def test_the_response_has_the_metrics_of_the_prediction(server: Server) -> None:
    figures = server.predict(song(20), **SHORT)["metrics"]
    assert set(METRICS) <= set(figures)
    assert figures["audio_seconds"] == 20.0
    assert 0.99 < figures["times_realtime"] / (20 / figures["predict_time"]) < 5  # predict_time includes a little more
    assert 0 < figures["model_load_seconds"] < 60
    assert re.fullmatch(r"cpu|mps|cuda(:\d+)?", figures["device"])
    assert 100 < figures["peak_memory_mib"] < 100_000


@pytest.mark.slow
def test_a_part_of_a_song_and_its_analysis_may_be_asked_for_in_whole_numbers(server: Server) -> None:
    prediction = server.predict(song(5), start=1, end=3, analyse=True, **SHORT)
    assert prediction["status"] == "succeeded", prediction["error"]
    assert {decoded(uri)[1].shape for uri in prediction["output"]} == {(2 * 44_100, 2)}
    assert prediction["metrics"]["audio_seconds"] == 2.0
    assert -60 < prediction["metrics"]["loudness_lufs"] < 0


@pytest.mark.slow
def test_two_stems_are_mp3_files_of_the_requested_bitrate(server: Server) -> None:
    prediction = server.predict(
        song(3), two_stems="drums", output_format="mp3", mp3_bitrate=128, recipe="demo", **SHORT
    )
    assert prediction["status"] == "succeeded", prediction["error"]
    assert len(prediction["output"]) == 2
    for uri in prediction["output"]:
        head, _, content = uri.partition(";base64,")
        assert head == "data:audio/mpeg"
        assert len(base64.b64decode(content)) * 8 / 3000 == pytest.approx(128, rel=0.06)


def test_the_log_of_six_loud_stems_at_another_rate_says_that_they_were_scaled(server: Server) -> None:
    loud = song(1, gain=16)
    prediction = server.predict(loud, stems="all_6", output_format="flac", chunk_size=4.0, overlap=1, sample_rate=48000)
    assert prediction["status"] == "succeeded"
    stems = [decoded(uri) for uri in prediction["output"]]
    assert [samples.shape for _, samples in stems] == [(48_000, 2)] * 6
    assert max(np.abs(samples).max() for _, samples in stems) == pytest.approx(1, abs=1e-3)
    assert "all stems are scaled by" in prediction["logs"]


@pytest.mark.slow
def test_stems_that_are_too_large_for_an_upload_are_announced_before_the_models_run(
    server: Server, receiver: Receiver
) -> None:
    server.start(song(12 * 60, format="FLAC"), id="large", inputs=SHORT, webhook=receiver.url)
    warning = "2 stems of 12.0 minutes as wav are about 254 MB each: an upload may take more than the 25 s"
    wait_for(lambda: any(warning in line for line in server.printed("large")), "the warning")
    printed = server.printed("large")
    assert not any(line == "writing vocals" for line in printed)
    assert server.cancel("large") == 200
    assert "choose output_format flac, about 122 MB a stem" in receiver.wait_for_end()["logs"]


def test_only_the_last_predictions_temporary_files_are_kept(server: Server) -> None:
    server.predict(song(1), **SHORT)
    first = server.leftovers()
    server.predict(song(1), **SHORT)
    second = server.leftovers()
    (gone,), (new,) = first - second, second - first
    assert gone.startswith("stems-") and new.startswith("stems-")


def test_an_asynchronous_prediction_is_answered_202_and_gives_the_same_stems(
    server: Server, receiver: Receiver
) -> None:
    expected = server.predict(song(2), **SHORT)["output"]
    server.start(song(2), id="later", inputs=SHORT, webhook=receiver.url)
    completed = receiver.wait_for_end()
    assert completed["id"] == "later"
    assert completed["status"] == "succeeded"
    for uri, other in zip(completed["output"], expected, strict=True):
        np.testing.assert_array_equal(decoded(uri)[1], decoded(other)[1])
    assert server.request("GET", "/predictions/later")[0] == 405  # only the hosted service can be polled


@pytest.mark.parametrize("prefer", quick_first(["wait", "wait=1", "Respond-Async", "respond-async, wait=5"], 2))
def test_any_other_preference_waits_for_the_finished_prediction(server: Server, prefer: str) -> None:
    status, prediction = server.post({"audio": data_uri(song(1)), **SHORT}, id="preferred", headers={"Prefer": prefer})
    assert status == 200
    assert prediction["id"] == "preferred"
    assert prediction["status"] == "succeeded"


# `--upload-url`


@pytest.fixture(scope="module")
def uploads() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def uploading(tmp_path_factory: pytest.TempPathFactory, uploads: Receiver) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("uploading")
    with Server(folder, "--upload-url", f"{uploads.url}/up", **DEMO) as server:
        assert server.health()["status"] == "READY", server.log.read_text()
        yield server


def test_uploaded_stems_come_in_any_order_and_are_identified_by_file_name(
    server: Server, uploading: Server, uploads: Receiver
) -> None:
    direct = server.predict(song(2), stems="all_4", **SHORT)["output"]  # in the order of the contract
    uploads.requests.clear()

    answered: list[str] = []

    def vocals_last(request: Request) -> int:
        if request.path.endswith("/vocals.wav"):
            wait_for(lambda: len(answered) == 3, "the answers to the other stems")
        answered.append(request.path)
        return 200

    uploads.answer = vocals_last
    status, prediction = uploading.post({"audio": data_uri(song(2)), "stems": "all_4", **SHORT}, id="up")
    assert status == 200
    assert prediction["status"] == "succeeded"
    assert sorted(prediction["output"]) == sorted(f"{uploads.url}/up/{stem}.wav" for stem in STEMS["all_4"])
    assert {request.method for request in uploads.requests} == {"PUT"}
    assert {request.headers["x-prediction-id"] for request in uploads.requests} == {"up"}
    assert {request.headers["content-type"] for request in uploads.requests} == {"audio/wav"}
    by_name = {Path(request.path).stem: read(request.body) for request in uploads.requests}
    for stem, uri in zip(STEMS["all_4"], direct, strict=True):
        np.testing.assert_array_equal(by_name[stem], decoded(uri)[1])


def test_a_refused_upload_fails_only_its_own_prediction(uploading: Server, uploads: Receiver) -> None:
    uploads.answer = lambda request: 500
    failed = uploading.predict(song(1), **SHORT)
    assert failed["status"] == "failed"
    assert failed["error"] == "Failed to upload output: upload returned status 500 Internal Server Error"
    uploads.answer = lambda request: 200
    assert uploading.predict(song(1), **SHORT)["status"] == "succeeded"


def test_webhooks_have_the_urls_of_uploaded_stems(uploading: Server, uploads: Receiver, receiver: Receiver) -> None:
    uploads.answer = lambda request: 200
    status, _ = uploading.post({"audio": data_uri(song(1)), **SHORT}, headers=ASYNC, webhook=receiver.url)
    assert status == 202
    completed = receiver.wait_for_end()
    assert sorted(completed["output"]) == [f"{uploads.url}/up/instrumental.wav", f"{uploads.url}/up/vocals.wav"]
