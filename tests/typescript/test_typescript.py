"""The TypeScript client and the webhook Worker compile strictly and pass their tests against the real coglet.

Both, and their tests, are the .ts files beside this one. This module starts the containers that they need.
"""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.common import needs_npm, song
from helpers.served_process import Server

pytestmark = [pytest.mark.slow, needs_npm]

HERE = Path(__file__).parent


def run(folder: Path, *command: str, **environment: str) -> str:
    """The output of a command. If it fails, the output is the failure's message."""
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


@pytest.fixture
def served(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment variables for the tests: two containers with the demo recipe, one as on Replicate, and two songs."""
    (tmp_path / "song.flac").write_bytes(song(2, format="FLAC"))
    (tmp_path / "long_song.flac").write_bytes(song(90, format="FLAC"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gateway_port = free.getsockname()[1]
    for name in ("plain", "uploading"):
        (tmp_path / name).mkdir()
    upload_url = f"http://127.0.0.1:{gateway_port}/upload"
    with (
        Server(tmp_path / "plain", SEPARATION_RECIPE="demo") as plain,
        Server(tmp_path / "uploading", "--upload-url", upload_url, SEPARATION_RECIPE="demo") as uploading,
    ):
        assert plain.health()["status"] == uploading.health()["status"] == "READY"
        yield {
            "PLAIN_CONTAINER": plain.url,
            "UPLOADING_CONTAINER": uploading.url,
            "GATEWAY_PORT": str(gateway_port),
            "SONG": str(tmp_path / "song.flac"),
            "LONG_SONG": str(tmp_path / "long_song.flac"),
        }


def test_client_and_worker_compile_strictly_and_pass_their_tests(tmp_path: Path, served: dict[str, str]) -> None:
    package = tmp_path / "package"
    shutil.copytree(HERE, package, ignore=shutil.ignore_patterns("node_modules", "build", "*.py", "__pycache__"))
    run(package, "npm", "ci")
    run(package, "npm", "run", "build")
    report = run(package, "npm", "test", **served)
    counts = {name: int(count) for name, count in re.findall(r"^\S+ (tests|pass|skipped) (\d+)$", report, re.MULTILINE)}
    assert counts["tests"] == counts["pass"] > 40 and counts["skipped"] == 0, report


def test_the_lock_file_names_no_registry() -> None:
    lock = (HERE / "package-lock.json").read_text(encoding="utf-8")
    assert '"resolved"' not in lock and '"integrity"' in lock
