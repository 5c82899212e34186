"""Cog's real server, started on this project for a test and stopped after it."""

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from conftest import PROJECT


class Server:
    """`python -m cog.server.http` in a process group of its own; `temporary` is where its temporary files go."""

    def __init__(self, temporary: Path, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.temporary = temporary
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the server starts a bare `python`
        environment |= {"PATH": path, "PORT": str(self.port), "TMPDIR": str(temporary)}
        environment |= {"COG_PREDICT_TYPE_STUB": "predict.py:Predictor"}
        self.log = temporary / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"],
                cwd=PROJECT,
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
        try:  # its worker, should that not have ended with it
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        """The answer of the health check once setup is over, well or badly."""
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

    def predict(self, audio: bytes, **inputs: Any) -> dict[str, Any]:
        encoded = f"data:application/octet-stream;base64,{base64.b64encode(audio).decode()}"
        while True:
            status, prediction = self.request("POST", "/predictions", {"input": {"audio": encoded, **inputs}})
            if status != 409:  # the answer to a prediction comes a little before its slot is free again
                break
            time.sleep(0.05)
        assert status == 200
        return prediction
