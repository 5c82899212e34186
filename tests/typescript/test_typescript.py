"""The TypeScript client and the Worker for webhooks, compiled strictly and run against the real coglet.

What is tested, and the tests themselves, are the .ts files beside this one; here they get what they need.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from conftest import PROJECT, needs_npm
from served_process import Server

pytestmark = [pytest.mark.slow, needs_npm]

HERE = Path(__file__).parent


class UploadingServer(Server):
    """The same server, which sends each finished stem to `upload_url` and answers with the URLs that it gets there."""

    def __init__(self, temporary: Path, upload_url: str, **environment: str) -> None:
        self.port = free_port()
        self.temporary = temporary
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the server starts a bare `python`
        environment |= {"PATH": path, "PORT": str(self.port), "TMPDIR": str(temporary)}
        environment |= {"COG_PREDICT_TYPE_STUB": "predict.py:Predictor"}
        self.log = temporary / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1", "--upload-url", upload_url],
                cwd=PROJECT,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run(folder: Path, *command: str, **environment: str) -> str:
    """What a command says. Where it fails, that is the test's message."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        text=True,
    )
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this folder, with what it needs from npm."""
    folder = tmp_path_factory.mktemp("typescript") / "package"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("node_modules", "build", "*.py", "__pycache__"))
    run(folder, "npm", "ci")
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The demo recipe's container twice, by itself and as on Replicate, and two songs, as variables for the tests."""
    folder = tmp_path_factory.mktemp("served")
    song, rate = soundfile.read(PROJECT / "weights" / "demo" / "song.flac", dtype="float32")
    soundfile.write(folder / "song.flac", song[: 2 * rate], rate)
    soundfile.write(folder / "long_song.flac", np.tile(song, (2, 1)), rate)
    (folder / "plain").mkdir()
    (folder / "uploading").mkdir()
    gateway_port = free_port()
    upload_url = f"http://127.0.0.1:{gateway_port}/upload"
    with (
        Server(folder / "plain", SEPARATION_RECIPE="demo") as plain,
        UploadingServer(folder / "uploading", upload_url, SEPARATION_RECIPE="demo") as uploading,
    ):
        assert plain.health()["status"] == uploading.health()["status"] == "READY"
        yield {
            "PLAIN_CONTAINER": f"http://127.0.0.1:{plain.port}",
            "UPLOADING_CONTAINER": f"http://127.0.0.1:{uploading.port}",
            "GATEWAY_PORT": str(gateway_port),
            "SONG": str(folder / "song.flac"),
            "LONG_SONG": str(folder / "long_song.flac"),
        }


def test_the_client_the_worker_and_their_tests_compile_strictly_and_pass(package: Path, served: dict[str, str]) -> None:
    run(package, "npm", "run", "build")
    report = run(package, "npm", "test", **served)
    assert "\n# pass" in report and "\n# fail 0\n" in report and "\n# skipped 0\n" in report, report


def test_a_stem_that_was_not_asked_for_does_not_compile(package: Path) -> None:
    source = (package / "types.test.ts").read_text(encoding="utf-8")
    expected = source.count("// @ts-expect-error ")
    assert expected > 10
    (package / "broken.test.ts").write_text(source.replace("// @ts-expect-error ", "// "), encoding="utf-8")
    with pytest.raises(AssertionError) as reason:
        run(package, "npx", "--no-install", "tsc", "--noEmit")
    (package / "broken.test.ts").unlink()
    assert str(reason.value).count("error TS") == expected


def test_the_lock_file_names_no_registry() -> None:
    lock = (HERE / "package-lock.json").read_text(encoding="utf-8")
    assert '"resolved"' not in lock and '"integrity"' in lock
