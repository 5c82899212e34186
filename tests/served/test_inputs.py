"""Valid inputs are accepted, and all others get an error with the right status."""

import json
from typing import Any

import numpy as np
import pytest

from helpers.common import quick_first, read, song
from helpers.served_process import SCHEMA, Receiver, Server, data_uri, decoded

SHORT = {"chunk_size": 4, "overlap": 1}
MOST_BYTES = 100 * 2**20  # coglet's limit on the body of a request
SCHEMAS = json.loads(SCHEMA.read_text(encoding="utf-8"))["components"]["schemas"]


# Sources of songs


@pytest.mark.parametrize(
    "path", quick_first(["/song.wav", "/song", "/song.flac?token=1", "/my%20song.txt", "/a/.hidden"], 2)
)
def test_a_url_is_a_song_whatever_its_name(server: Server, receiver: Receiver, path: str) -> None:
    content = song(1, format="FLAC" if ".flac" in path else "WAV")
    receiver.files[path] = content
    prediction = server.predict(f"{receiver.url}{path}", **SHORT)
    assert prediction["status"] == "succeeded", prediction["error"]
    vocals, instrumental = (decoded(uri)[1] for uri in prediction["output"])
    assert np.abs(vocals + instrumental - read(content)).max() <= 1e-6
    assert [request.path for request in receiver.requests] == [path]


def test_a_redirect_is_followed(server: Server, receiver: Receiver) -> None:
    receiver.files = {"/here": "/there.wav", "/there.wav": song(1)}
    assert server.predict(f"{receiver.url}/here", **SHORT)["status"] == "succeeded"
    assert [request.path for request in receiver.requests] == ["/here", "/there.wav"]


def test_a_redirect_loop_fails(server: Server, receiver: Receiver) -> None:
    receiver.files["/song.wav"] = "/song.wav"
    assert server.predict(f"{receiver.url}/song.wav", **SHORT)["status"] == "failed"
    assert 1 < len(receiver.requests) < 50


@pytest.mark.parametrize("kind", quick_first(["audio/wav", "audio/mpeg", "text/plain"], 1))
def test_a_data_uri_is_a_song_whatever_its_media_type(server: Server, kind: str) -> None:
    assert server.predict(data_uri(song(1), kind), **SHORT)["status"] == "succeeded"


@pytest.mark.parametrize(
    "files, said",
    [
        ({}, "404"),
        ({"/song.wav": b""}, "empty (0 bytes)"),
        ({"/song.wav": b"words, words, words\n" * 100}, "is not audio"),
        ({"/song.wav": song(1)[:3000]}, "from 0.01 s on): get the file again"),
    ],
    ids=["missing", "empty", "words", "cut"],
)
def test_a_url_without_a_complete_song_fails_with_a_one_line_error(
    server: Server, receiver: Receiver, files: dict[str, bytes | str], said: str
) -> None:
    receiver.files = files
    prediction = server.predict(f"{receiver.url}/song.wav", **SHORT)
    assert prediction["status"] == "failed"
    assert "output" not in prediction
    assert said in prediction["error"] and "--" not in prediction["error"]
    assert "\n" not in prediction["error"] and str(server.temporary) not in prediction["error"]


@pytest.mark.parametrize(
    "content, inputs, said",
    [
        (b"words, words, words\n" * 100, {}, "is not audio"),
        (b"", {}, "is empty (0 bytes)"),
        (None, {"chunk_size": 4, "overlap": 8}, "overlap (8 s) must be smaller than the chunk size (4 s)"),
    ],
)
def test_a_bad_song_or_option_fails_with_a_one_line_error(
    server: Server, content: bytes | None, inputs: dict[str, Any], said: str
) -> None:
    before = server.leftovers()
    prediction = server.predict(song(1) if content is None else content, **inputs)
    assert prediction["status"] == "failed"
    assert said in prediction["error"]
    assert prediction["error"].startswith("Prediction failed: Async prediction failed: ")  # coglet's words
    assert "\n" not in prediction["error"] and str(server.temporary) not in prediction["error"]
    assert prediction["logs"] in ("", f"decoding\n  0%|{' ' * 20}| 0/20\n")
    assert server.leftovers() <= before


# Wrong values


def wrong_values() -> list[tuple[str, object]]:
    """For every input in the schema: other types, null, an unknown choice, the nearest values out of range."""
    wrong: list[tuple[str, object]] = []
    for name, described in SCHEMAS["Input"]["properties"].items():
        wrong += [(name, ["a list"]), (name, None)]
        described = SCHEMAS[name] if "allOf" in described else described
        wrong += [(name, True)] if described["type"] != "boolean" else [(name, "true"), (name, 1)]
        wrong += [(name, "8")] if described["type"] in ("integer", "number") else []
        wrong += [(name, 8.5)] if described["type"] == "integer" else []
        if "enum" in described:
            wrong += [(name, "unknown" if described["type"] == "string" else 1)]
        wrong += [
            (name, int(described[end]) + step) for end, step in (("minimum", -1), ("maximum", 1)) if end in described
        ]
    return wrong


@pytest.mark.parametrize("name, value", wrong_values())
def test_a_wrong_value_is_answered_422_with_its_name(server: Server, name: str, value: object) -> None:
    status, answer = server.post({"audio": "https://127.0.0.1/song.wav", name: value})
    assert status == 422
    assert {tuple(error["loc"]) for error in answer["detail"]} == {("body", "input", name)}
    assert all(error["msg"] for error in answer["detail"])


@pytest.mark.parametrize("inputs", [{}, {"stems": "all_4"}, None])
def test_a_missing_song_is_answered_422_with_its_name(server: Server, inputs: object) -> None:
    status, answer = server.post(inputs)
    assert status == 422
    assert answer == {
        "detail": [{"loc": ["body", "input", "audio"], "msg": "Field required", "type": "value_error.missing"}]
    }


def test_all_wrong_values_are_named_at_once(server: Server) -> None:
    status, answer = server.post({"stems": "all_5", "overlap": 77, "sample_rate": 1})
    assert status == 422
    assert sorted(error["loc"][-1] for error in answer["detail"]) == ["audio", "overlap", "sample_rate", "stems"]


def test_the_ends_of_a_range_are_accepted(server: Server) -> None:
    for chunk_size, overlap in ((4, 1), (30, 8)):
        assert "is empty" in server.predict(b"", chunk_size=chunk_size, overlap=overlap)["error"]  # predict was called


def test_an_unknown_input_is_ignored_silently(server: Server) -> None:
    prediction = server.predict(song(1), stem="vocals", **SHORT)
    assert prediction["status"] == "succeeded"
    assert len(prediction["output"]) == 2
    assert prediction["logs"].splitlines()[0] == "decoding"


# Malformed requests


@pytest.mark.parametrize("body", [b"", b"{", b"audio=song.wav"])
def test_a_body_that_is_not_json_is_answered_400(server: Server, body: bytes) -> None:
    status, answer = server.request("POST", "/predictions", body)
    assert status == 400
    assert "JSON" in answer


@pytest.mark.parametrize("body", [b"[]", b"null", b'{"input": 5}', b'{"input": {}, "webhook": 5}'])
def test_json_of_another_shape_is_answered_422(server: Server, body: bytes) -> None:
    assert server.request("POST", "/predictions", body)[0] == 422


def test_a_body_of_another_media_type_is_answered_415(server: Server) -> None:
    assert server.request("POST", "/predictions", b"{}", {"Content-Type": "text/plain"})[0] == 415


@pytest.mark.parametrize("n_bytes, status", [(MOST_BYTES, 422), (MOST_BYTES + 1, 413)])
def test_a_body_beyond_100_mib_is_answered_413(server: Server, n_bytes: int, status: int) -> None:
    assert server.request("POST", "/predictions", b'{"input": {}}'.ljust(n_bytes))[0] == status


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("POST", "/predictions/unknown/cancel", 404),
        ("GET", "/predictions", 405),
        ("GET", "/predictions/unknown", 405),
        ("DELETE", "/predictions/unknown", 405),
        ("GET", "/nothing", 404),
    ],
)
def test_unknown_paths_and_methods_are_answered_404_or_405(server: Server, method: str, path: str, status: int) -> None:
    assert server.request(method, path)[0] == status
