"""The npm package in client/ builds, packs and passes its tests against the real coglet.

Its tests, and what they need, are the .ts files beside this one. They import the package as npm packs and installs it.
This module starts the containers that they need.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import separation
from helpers.common import PROJECT, needs_npm, song
from helpers.served_process import Server

HERE = Path(__file__).parent
CLIENT = PROJECT / "client"
NOT_COPIED = shutil.ignore_patterns("node_modules", "build", "dist", "*.tgz", "*.py", "__pycache__")


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


def manifest() -> dict[str, Any]:
    return json.loads((CLIENT / "package.json").read_text(encoding="utf-8"))


def test_the_package_has_the_version_and_the_licence_of_the_project() -> None:
    assert manifest()["version"] == separation.__version__
    assert (CLIENT / "LICENSE").read_bytes() == (PROJECT / "LICENSE").read_bytes()


@pytest.mark.parametrize("folder", [CLIENT, HERE], ids=["client", "tests"])
def test_the_lock_file_names_no_registry(folder: Path) -> None:
    lock = (folder / "package-lock.json").read_text(encoding="utf-8")
    assert '"resolved"' not in lock and '"integrity"' in lock


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that `npm pack` makes in a copy of client/."""
    client = tmp_path_factory.mktemp("package") / "client"
    shutil.copytree(CLIENT, client, ignore=NOT_COPIED)
    run(client, "npm", "ci")
    run(client, "npm", "pack")
    (found,) = client.glob("*.tgz")
    return found


@pytest.mark.slow
@needs_npm
def test_the_package_holds_every_module_twice_and_nothing_else(package: Path) -> None:
    modules = [path.stem for path in (CLIENT / "src").glob("*.ts")]
    expected = {f"dist/{kind}/{name}{end}" for kind in ("esm", "cjs") for name in modules for end in (".js", ".d.ts")}
    expected |= {"dist/cjs/package.json", "package.json", "README.md", "LICENSE"}
    expected |= {"worker/worker.ts", "worker/schema.sql"}
    with tarfile.open(package) as packed:
        assert {name.removeprefix("package/") for name in packed.getnames()} == expected
    assert package.name == f"music-separation-{separation.__version__}.tgz"
    assert package.stat().st_size < 50_000


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
            "PLAIN_LOG": str(plain.log),
            "UPLOADING_CONTAINER": uploading.url,
            "GATEWAY_PORT": str(gateway_port),
            "PROJECT": str(PROJECT),
            "SONG": str(tmp_path / "song.flac"),
            "LONG_SONG": str(tmp_path / "long_song.flac"),
        }


@pytest.mark.slow
@needs_npm
def test_client_worker_and_samples_pass_their_tests(tmp_path: Path, package: Path, served: dict[str, str]) -> None:
    tests = tmp_path / "tests"
    shutil.copytree(HERE, tests, ignore=NOT_COPIED)
    run(tests, "npm", "ci")
    run(tests, "npm", "install", "--no-save", str(package))
    for name in ("worker.ts", "schema.sql"):
        shutil.copy(tests / "node_modules" / "music-separation" / "worker" / name, tests)
    run(tests, "npm", "run", "build")
    report = run(tests, "npm", "test", **served)
    counts = {name: int(count) for name, count in re.findall(r"^\S+ (tests|pass|skipped) (\d+)$", report, re.MULTILINE)}
    assert counts["tests"] == counts["pass"] > 70 and counts["skipped"] == 0, report
