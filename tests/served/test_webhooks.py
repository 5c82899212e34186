"""The webhooks of predictions: events, order and retries.

coglet 0.23.1 does not wait for the response to one webhook before it sends the next, except for the final one. They may
overtake each other, so the tests sort them by content.
"""

import itertools
import time
from typing import Any

import pytest

from helpers.common import METRICS, PROGRESS_LINE, quick_first, song
from helpers.served_process import ASYNC, Receiver, Request, Server, data_uri, wait_for

SHORT = {"chunk_size": 4, "overlap": 1}


def percents(logs: str) -> list[int]:
    return [int(match[1]) for line in logs.splitlines() if (match := PROGRESS_LINE.match(line))]


def run(server: Server, receiver: Receiver, seconds: float, *, least: int, **fields: Any) -> list[dict[str, Any]]:
    """Run a prediction and return the bodies of its webhooks (at least `least`), sorted by progress."""
    inputs = SHORT | {"output_format": "mp3"}  # small bodies, which arrive at once
    server.start(song(seconds, format="FLAC"), id="hooked", inputs=inputs, webhook=receiver.url, **fields)
    server.wait_until_idle()
    if "completed" in fields.get("webhook_events_filter", ["completed"]):
        receiver.wait_for_end()
    wait_for(lambda: len(receiver.requests) >= least, f"{least} webhooks")
    time.sleep(0.3)  # time for unexpected ones to arrive
    return sorted(
        receiver.bodies(),
        key=lambda body: (body["status"] != "processing", len(body.get("output", [])), len(body["logs"])),
    )


@pytest.mark.slow
def test_all_events_are_sent_with_progress_in_the_logs(server: Server, receiver: Receiver) -> None:
    bodies = run(server, receiver, 90, least=6)  # takes some seconds
    assert {body["id"] for body in bodies} == {"hooked"}
    start, *logs, one, two, completed = bodies
    assert start == {"id": "hooked", "logs": "", "metrics": {}, "status": "processing"}
    assert all(set(body) == {"id", "logs", "metrics", "status"} for body in logs)
    assert all(body["status"] == "processing" for body in (*logs, one, two))
    assert [len(body["output"]) for body in (one, two)] == [1, 2]  # one more stem each time
    assert set(completed) == {"id", "logs", "metrics", "output", "status"}
    assert completed["status"] == "succeeded"
    assert completed["output"] == two["output"]
    assert {*METRICS, "predict_time"} == set(completed["metrics"])
    # Each has the whole log so far. They are sent at most every half second, although lines come more often.
    assert 2 <= len(logs) <= completed["metrics"]["predict_time"] / 0.5 + 1
    for earlier, later in itertools.pairwise(bodies):
        assert later["logs"].startswith(earlier["logs"])
    assert percents(logs[-1]["logs"])[-1] > (percents(logs[0]["logs"]) or [0])[-1]
    assert percents(completed["logs"])[0] == 0 and percents(completed["logs"])[-1] == 100
    assert completed["logs"].splitlines()[0] == "decoding" and completed["logs"].splitlines()[-2] == "done"


@pytest.mark.parametrize(
    "events, statuses, outputs",
    quick_first(
        [
            (["output"], ["processing", "processing"], [1, 2]),
            (["start", "completed"], ["processing", "succeeded"], [0, 2]),
            ([], [], []),
            (["start"], ["processing"], [0]),
            (["completed"], ["succeeded"], [2]),
            (["completed", "output"], ["processing", "processing", "succeeded"], [1, 2, 2]),
        ],
        1,
    ),
)
def test_only_the_chosen_events_are_sent(
    server: Server, receiver: Receiver, events: list[str], statuses: list[str], outputs: list[int]
) -> None:
    bodies = run(server, receiver, 1, least=len(statuses), webhook_events_filter=events)
    assert [body["status"] for body in bodies] == statuses
    assert [len(body.get("output", [])) for body in bodies] == outputs


@pytest.mark.slow
def test_logs_are_sent_while_the_prediction_runs(server: Server, receiver: Receiver) -> None:
    bodies = run(server, receiver, 9, least=1, webhook_events_filter=["logs"])
    assert bodies
    assert {body["status"] for body in bodies} == {"processing"}
    assert all(body["logs"].startswith("decoding\n") and "output" not in body for body in bodies)


def test_an_unknown_event_is_answered_422_with_the_known_ones(server: Server, receiver: Receiver) -> None:
    status, answer = server.post({}, webhook=receiver.url, webhook_events_filter=["finished"])
    assert status == 422
    assert "expected one of `start`, `output`, `logs`, `completed`" in answer
    assert receiver.requests == []


def test_the_completed_event_of_a_failed_prediction_has_its_error(server: Server, receiver: Receiver) -> None:
    server.start(b"words", id="failing", inputs=SHORT, webhook=receiver.url, webhook_events_filter=["completed"])
    completed = receiver.wait_for_end()
    assert completed["status"] == "failed"
    assert "is not audio" in completed["error"]
    assert "output" not in completed


def test_a_synchronous_prediction_calls_its_webhook_too(server: Server, receiver: Receiver) -> None:
    status, prediction = server.post(
        {"audio": data_uri(song(1)), **SHORT}, webhook=receiver.url, webhook_events_filter=["completed"]
    )
    assert status == 200
    completed = receiver.wait_for_end()
    for answer in (completed, prediction):
        assert answer["metrics"].pop("predict_time") > 0  # measured twice, so slightly different
    assert completed == prediction


@pytest.mark.slow
def test_only_completed_is_retried_while_the_receiver_fails(server: Server, receiver: Receiver) -> None:
    def two_failures(request: Request) -> int:
        return 500 if len(receiver.requests) <= 3 else 200  # start, and completed twice

    receiver.answer = two_failures
    server.start(song(1), id="again", inputs=SHORT, webhook=receiver.url, webhook_events_filter=["start", "completed"])
    wait_for(lambda: len(receiver.requests) >= 4, "the last try")
    time.sleep(1)  # another retry would come after 0.8 s
    bodies = receiver.bodies()
    assert [body["status"] for body in bodies] == ["processing", "succeeded", "succeeded", "succeeded"]
    assert bodies[1] == bodies[2] == bodies[3]


@pytest.mark.parametrize("refusal", quick_first([400, 401, 404], 1))
def test_completed_is_not_retried_if_the_receiver_refuses_it(server: Server, receiver: Receiver, refusal: int) -> None:
    receiver.answer = lambda request: refusal
    bodies = run(server, receiver, 1, least=1, webhook_events_filter=["completed"])
    assert len(bodies) == 1


@pytest.mark.parametrize("webhook", quick_first(["http://127.0.0.1:9/nobody", "not a url"], 1))
def test_an_unreachable_webhook_does_no_harm(server: Server, webhook: str) -> None:
    status, prediction = server.post({"audio": data_uri(song(1)), **SHORT}, webhook=webhook)
    assert status == 200
    assert prediction["status"] == "succeeded"
    assert server.post({"audio": data_uri(song(1)), **SHORT}, headers=ASYNC, webhook=webhook)[0] == 202
    server.wait_until_idle()
