"""Headless Chromium, driven through chromedriver by the W3C WebDriver protocol."""

import http.client
import json
import os
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from helpers.served_process import wait_for

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key for references to elements
SHIFT, HOME, LEFT, RIGHT = "\ue008", "\ue011", "\ue012", "\ue014"


class Browser:
    """A fresh Chromium with its profile and log in `folder`, which must be empty."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._log = (folder / "chromedriver.log").open("wb")
        self._process = subprocess.Popen(
            ["chromedriver", f"--port={self.port}"],
            env=os.environ | {"HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(self._answers, "chromedriver's answer")
            options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]}
            logs = {"browser": "ALL", "performance": "ALL"}
            capabilities = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
            session = self._request("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        except BaseException:
            self._end()
            raise
        self._session = f"/session/{session['sessionId']}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._request("DELETE", self._session)
        finally:
            self._end()

    def command(self, path: str, **body: Any) -> Any:
        return self._request("POST", f"{self._session}/{path}", body)

    def developer(self, command: str, **parameters: Any) -> Any:
        """Run a command of the Chrome DevTools Protocol."""
        return self.command("goog/cdp/execute", cmd=command, params=parameters)

    def open(self, page: Path | str) -> None:
        """Open a file or a URL."""
        self.command("url", url=page if isinstance(page, str) else page.resolve().as_uri())

    def choose(self, selector: str, *files: Path) -> None:
        """Choose files in a file input."""
        self.command(f"element/{self.find(selector)[ELEMENT]}/value", text="\n".join(map(str, files)))

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script, the body of a function, and return its result."""
        return self.command("execute/sync", script=script, args=list(arguments))

    def find(self, selector: str) -> Any:
        return self.command("element", using="css selector", value=selector)

    def click(self, selector: str, *, at: float = 0.5, down: float = 0.5, pointer: str = "mouse") -> None:
        """Click an element at these shares of its width and height, or tap it if `pointer` is `touch`."""
        element = self.find(selector)
        script = "arguments[0].scrollIntoView({block: 'center'}); return arguments[0].getBoundingClientRect()"
        box = self.run(script, element)
        place = {"x": round((at - 0.5) * box["width"]), "y": round((down - 0.5) * box["height"])}
        steps = [
            {"type": "pointerMove", "duration": 0, "origin": element, **place},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        action = {"type": "pointer", "id": pointer, "parameters": {"pointerType": pointer}, "actions": steps}
        self.command("actions", actions=[action])

    def press(self, *keys: str) -> None:
        """Press keys together: characters, or the constants above."""
        steps = [{"type": "keyDown", "value": key} for key in keys]
        steps += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self.command("actions", actions=[{"type": "key", "id": "keyboard", "actions": steps}])

    def label(self, selector: str) -> str:
        """The accessible name of an element."""
        path = f"{self._session}/element/{self.find(selector)[ELEMENT]}/computedlabel"
        return str(self._request("GET", path))

    def console(self) -> list[str]:
        """The messages in the console since the last call, including errors."""
        return [entry["message"] for entry in self.command("se/log", type="browser")]

    def requests(self) -> list[str]:
        """The URLs that the pages requested since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.command("se/log", type="performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        return [parameters["request"]["url"] for parameters in sent]

    def _answers(self) -> bool:
        try:
            return bool(self._request("GET", "/status")["ready"])
        except ConnectionError:
            return False

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            value = json.loads(response.read())["value"]
        finally:
            connection.close()
        assert response.status == 200, value["message"]
        return value

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()
