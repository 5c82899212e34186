"""Cog's real server running this project, and a web server that it can talk to."""

import base64
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from helpers.common import PROJECT, read

SCHEMA = PROJECT / "tests" / "served" / "openapi.json"
COGLETS_FOLDERS = Path("/tmp/coglet/predictions")  # coglet 0.23.1 creates one per prediction here, whatever TMPDIR says
# The demo weights on one CPU thread: the same everywhere, and slow enough to interrupt.
DEMO = {"SEPARATION_RECIPE": "demo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# What the server prints before it is ready, as regular expressions
SETUP_STEPS = ["Python and its packages", r"device cpu \(.*\), precision .*", "loading demo", "loading all models"]
SETUP_STEPS = [rf"{step}: \d+\.\d s" for step in (*SETUP_STEPS, "running each model once")]
SETUP_STEPS.append(r"ready \d+\.\d s after the start")
ASYNC = {"Prefer": "respond-async"}


def wait_for(condition: Callable[[], object], what: str, *, seconds: float = 90) -> None:
    """Wait until the condition holds. `what` names it in the failure."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.02)


def children(process: int) -> list[int]:
    """The ids of a process's children."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended meanwhile
            found += map(int, task.read_text().split())
    return found


def data_uri(content: bytes, kind: str = "application/octet-stream") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def decoded(uri: str) -> tuple[str, Any]:
    """The media type and the samples `[T, C]` of a data URI."""
    head, _, content = uri.partition(";base64,")
    return head.removeprefix("data:"), read(base64.b64decode(content))


class Server:
    """`python -m cog.server.http` in a process group of its own.

    It runs in a folder of links to the project's files, with the schema that `cog build` would write; without a schema,
    Cog checks no input. `temporary` is the folder of its temporary files, `log` its output. It may download songs from
    this machine, unless `environment` says otherwise.

    Args:
        folder: an empty folder to work in.
        arguments: more command line arguments, such as `--upload-url`.
        environment: more environment variables, such as SEPARATION_RECIPE.
    """

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.temporary, self.log, project = folder / "temporary", folder / "server.log", folder / "project"
        self.temporary.mkdir()
        (project / ".cog").mkdir(parents=True)
        shutil.copyfile(SCHEMA, project / ".cog" / "openapi_schema.json")
        for name in ("predict.py", "separation", "configs", "weights"):
            (project / name).symlink_to(PROJECT / name)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the server runs plain `python`
        environment = {"SEPARATION_LOCAL_URLS": "on"} | environment
        environment |= {"PATH": path, "PORT": str(self.port), "TMPDIR": str(self.temporary)}
        environment |= {"COG_PREDICT_TYPE_STUB": "predict.py:Predictor"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1", *arguments],
                cwd=project,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for prediction in self.predictions():
            shutil.rmtree(COGLETS_FOLDERS / prediction, ignore_errors=True)
        try:  # stop its worker, if that is still running
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    @property
    def worker(self) -> int:
        """The process id of the worker, which runs the Predictor."""
        (worker,) = children(self.process.pid)
        return worker

    def request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Send bytes or JSON. Returns the status and the body, parsed if it is JSON, else as text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            content = body if isinstance(body, bytes) else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"} | (headers or {}))
            response = connection.getresponse()
            answer = response.read().decode()
        finally:
            connection.close()
        try:
            return response.status, json.loads(answer)
        except ValueError:
            return response.status, answer

    def health(self) -> dict[str, Any]:
        """The health check's response after setup has succeeded or failed."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                health = self.request("GET", "/health-check")[1]
            except ConnectionError:
                health = {"status": "STARTING"}
            if health["status"] != "STARTING":
                return health
            time.sleep(0.1)
        raise AssertionError(f"the server did not come up:\n{self.log.read_text()}")

    def post(self, inputs: object, *, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, Any]:
        """POST /predictions; retries while the server is busy."""
        while True:
            status, answer = self.request("POST", "/predictions", {"input": inputs, **fields}, headers)
            if status != 409:  # a response is sent shortly before its slot is free again
                return status, answer
            time.sleep(0.05)

    def predict(self, audio: bytes | str, **inputs: Any) -> dict[str, Any]:
        """Run a prediction on a file's content or a URL."""
        uri = data_uri(audio) if isinstance(audio, bytes) else audio
        status, prediction = self.post({"audio": uri, **inputs})
        assert status == 200
        return prediction

    def start(self, audio: bytes, *, id: str, inputs: dict[str, Any], **fields: Any) -> None:
        """Start a prediction without waiting for it."""
        status, answer = self.post({"audio": data_uri(audio), **inputs}, headers=ASYNC, id=id, **fields)
        assert status == 202
        assert answer == {"id": id, "status": "starting"}

    def cancel(self, id: str) -> int:
        return self.request("POST", f"/predictions/{id}/cancel")[0]

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.request("GET", "/health-check")[1]["status"] == "READY", "the end of the prediction")

    def events(self, about: str) -> list[dict[str, str]]:
        """The log entries of predictions that contain `about`; each has `message` and `prediction_id`."""
        lines = [line for line in self.log.read_text().splitlines() if '"prediction_id"' in line and about in line]
        return [json.loads(line)["fields"] for line in lines]

    def predictions(self) -> list[str]:
        """The ids of all predictions that started, in order."""
        return [event["prediction_id"] for event in self.events("Starting prediction")]

    def printed(self, id: str) -> list[str]:
        """The lines that a prediction has printed so far."""
        return [event["message"] for event in self.events(f'"{id}"') if "source" in event]

    def written(self) -> str:
        """What the worker wrote outside of predictions, without line ends.

        Put together again: coglet ends a line at each 4,096 bytes that it reads.
        """
        lines = [line for line in self.log.read_text().splitlines() if line.endswith('"target":"coglet::user"}')]
        return "".join(json.loads(line)["fields"]["message"] for line in lines)

    def leftovers(self) -> set[str]:
        """The names of the temporary files, without PyTorch's own folder."""
        return {path.name for path in self.temporary.iterdir() if not path.name.startswith("torchinductor")}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


class Receiver:
    """A web server that records every request in `requests`.

    It answers GET from `files`, which maps paths to contents or, for redirects, to other paths. It answers all other
    requests, such as webhooks and uploads, with the status that `answer` returns.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.requests: list[Request] = []
        self.files: dict[str, bytes | str] = {}
        self.answer: Callable[[Request], int] = lambda request: 200
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # http.server's name
                receiver.requests.append(Request("GET", self.path, dict(self.headers), b""))
                file = receiver.files.get(self.path)
                if isinstance(file, str):
                    self.reply(302, b"", location=file)
                else:
                    self.reply(404 if file is None else 200, file or b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, body)
                receiver.requests.append(request)
                self.reply(receiver.answer(request), b"")

            do_PUT = do_POST  # noqa: N815

            def reply(self, status: int, content: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer((address, 0), Handler)
        self.url = f"http://{address}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of the webhooks so far, in order."""
        return [request.json for request in self.requests if request.method == "POST"]

    def wait_for_end(self) -> dict[str, Any]:
        """Wait for the first webhook of a finished prediction and return its body."""
        final = ("succeeded", "failed", "canceled")
        wait_for(lambda: any(body["status"] in final for body in self.bodies()), "the completed webhook")
        return next(body for body in self.bodies() if body["status"] in final)
