"""The script for Replicate, with a server that answers as Replicate's API is documented to."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from helpers.common import PROJECT

SCRIPT = PROJECT / ".github" / "replicate.py"
SCHEMA = json.loads((PROJECT / "tests" / "served" / "openapi.json").read_text(encoding="utf-8"))

specification = importlib.util.spec_from_file_location("replicate_script", SCRIPT)
assert specification is not None and specification.loader is not None
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)

Change = Callable[[dict[str, Any]], object]
CHANGES: list[tuple[Change, list[str]]] = [
    (lambda s: None, []),
    (lambda s: s["Input"]["properties"].pop("two_stems"), ["input two_stems is missing"]),
    (lambda s: s["stems"]["enum"].remove("all_6"), ["input stems no longer accepts all_6"]),
    (lambda s: s["stems"]["enum"].append("all_53"), []),
    (lambda s: s["stems"].update(type="integer"), ["input stems was string and is integer"]),
    (lambda s: s["Input"]["properties"]["audio"].pop("format"), ["input audio was string uri and is string"]),
    (lambda s: s["Input"]["properties"]["overlap"].update(minimum=2), ["input overlap must be at least 2 now"]),
    (lambda s: s["Input"]["properties"]["overlap"].update(minimum=0), []),
    (lambda s: s["Input"]["properties"]["overlap"].update(maximum=7), ["input overlap must be at most 7 now"]),
    (lambda s: s["Input"]["properties"]["overlap"].pop("maximum"), []),
    (lambda s: s["Input"]["properties"]["audio"].update(enum=["a"]), ["input audio no longer accepts any other value"]),
    (lambda s: s["Input"]["required"].append("stems"), ["input stems is required now"]),
    (lambda s: s["Input"]["properties"].update(new={"type": "string", "default": ""}), []),
    (
        lambda s: s.update(Output={"type": "object"}),
        ["the output was array of string uri and is object"],
    ),
]


@pytest.mark.parametrize("change, expected", CHANGES)
def test_changes_that_break_callers_are_found(change: Change, expected: list[str]) -> None:
    published = SCHEMA["components"]["schemas"]
    new = copy.deepcopy(published)
    change(new)
    assert list(script.breaking_changes(published, new)) == expected


class Api(HTTPServer):
    def __init__(self, model: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.requests: list[tuple[str, str, str | None, Any]] = []


class Handler(BaseHTTPRequestHandler):
    server: Api

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = json.loads(body) if body else None
        self.server.requests.append((self.command, self.path, self.headers["Authorization"], found))
        self.send_response(404 if self.path.endswith("/missing") else 200)
        self.end_headers()
        self.wfile.write(json.dumps(self.server.model).encode())

    do_GET = do_PATCH = answer  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        """Prints nothing."""


@pytest.fixture
def api() -> Iterator[Api]:
    with Api({"latest_version": {"openapi_schema": copy.deepcopy(SCHEMA)}}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(api: Api, *arguments: str, **variables: str) -> tuple[int, str]:
    """The exit code and what is printed."""
    base = {"REPLICATE_API_BASE_URL": f"http://127.0.0.1:{api.server_port}", "no_proxy": "127.0.0.1"}
    environment = {**os.environ, **base, "REPLICATE_API_TOKEN": "secret", **variables}
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={name: value for name, value in environment.items() if value},
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_the_published_version_may_be_replaced_by_this_one_unless_callers_would_break(api: Api) -> None:
    assert run(api, "check", "a/b") == (0, "")
    assert api.requests == [("GET", "/v1/models/a/b", "Bearer secret", None)]
    schemas = api.model["latest_version"]["openapi_schema"]["components"]["schemas"]
    schemas["stems"]["enum"].append("all_99")
    code, printed = run(api, "check", "a/b")
    assert code == 1
    assert printed == "input stems no longer accepts all_99: push to another model, or keep what callers use\n"
    api.model["latest_version"] = None  # nothing was ever pushed
    assert run(api, "check", "a/b") == (0, "")


def test_the_page_is_filled_from_its_file(api: Api) -> None:
    assert run(api, "page", "a/b") == (0, "")
    ((command, path, token, fields),) = api.requests
    assert (command, path, token) == ("PATCH", "/v1/models/a/b", "Bearer secret")
    assert set(fields) == {"description", "paper_url", "weights_url", "readme"}  # as Replicate names them
    assert fields["readme"].startswith("# Separate a song into stems\n\nUpload")
    stems = SCHEMA["components"]["schemas"]["stems"]["enum"]
    assert all(f"| `{choice}` |" in fields["readme"] for choice in stems)


def test_mistakes_are_one_sentence(api: Api) -> None:
    code, printed = run(api, "check", "a/missing")
    assert code == 1 and printed.startswith("Replicate cannot be asked about a/missing (HTTP Error 404: Not Found): ")
    code, printed = run(api, "check", "a")
    assert code == 2 and "'a' is not a model's name: use OWNER/NAME" in printed
    code, printed = run(api, "check", "a/b", REPLICATE_API_TOKEN="")
    assert code == 2 and "REPLICATE_API_TOKEN is not set" in printed
