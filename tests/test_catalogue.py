"""Reading YAML, and fetching files from a server on 127.0.0.1."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from separation import catalogue
from separation.catalogue import WeightFile, fetch, read_config, verify
from separation.errors import CheckpointError, DownloadError, OutputError, RecipeError
from small_model import write_yaml

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path, with the faults that a test asks for; `ranges` logs the Range headers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.knows_ranges = True
        self.break_after: list[int] = []  # of each answer in turn, the bytes after which the connection closes
        self.statuses: list[int] = []  # of each answer in turn, an error to give instead
        self.delay_seconds = 0.0
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/weights.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        time.sleep(server.delay_seconds)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.knows_ranges else 0
        if asked and start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if asked and server.knows_ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.break_after:
            body = body[: server.break_after.pop(0)]
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(catalogue, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def weight_file(url: str | None, content: bytes = CONTENT, **other: Any) -> WeightFile:
    known = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "stem": None}
    return WeightFile(**{"name": "sub/weights.bin", "url": url, "checkpoint": "some_model", **known, **other})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# Fetching


def test_a_missing_file_is_downloaded_verified_and_left_alone_in_its_folder(server: Server, weights: Path) -> None:
    path = fetch(weight_file(server.url), quiet=True)
    assert path == weights / "sub" / "weights.bin" and path.read_bytes() == CONTENT
    assert names_in(weights) == ["weights.bin", "weights.bin.verified"]
    assert fetch(weight_file(server.url), quiet=True) == path
    assert server.ranges == [None]


def test_a_broken_connection_is_resumed_where_it_broke(server: Server, weights: Path) -> None:
    server.break_after = [300_000, 200_000]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]


def test_a_part_that_an_earlier_process_left_is_resumed(server: Server, weights: Path) -> None:
    part = weights / "sub" / "weights.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1000])
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"] and not part.exists()


def test_a_part_that_was_complete_is_taken(server: Server, weights: Path) -> None:
    part = weights / "sub" / "weights.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT)
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT


def test_a_server_without_ranges_makes_it_start_from_zero(server: Server, weights: Path) -> None:
    server.knows_ranges, server.break_after = False, [300_000]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]


def test_a_connection_that_breaks_every_time_is_given_up(server: Server, weights: Path) -> None:
    server.break_after = [0] * 20
    with pytest.raises(DownloadError, match="the connection broke after 0 of 1,048,576 bytes"):
        fetch(weight_file(server.url), quiet=True)
    assert len(server.ranges) == 1 + len(catalogue.RETRY_SECONDS)


def test_a_busy_server_is_asked_again_and_a_missing_page_is_not(server: Server, weights: Path) -> None:
    server.statuses = [404]
    with pytest.raises(DownloadError, match=r"weights\.bin is not in .*sub and .*the server answers 404"):
        fetch(weight_file(server.url), quiet=True)
    assert len(server.ranges) == 1
    server.statuses = [503, 429]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT


def test_wrong_content_from_the_server_is_refused_and_removed(server: Server, weights: Path) -> None:
    server.content = b"x" * len(CONTENT)
    with pytest.raises(CheckpointError, match=r"gave a file that has the sha256 .* instead of"):
        fetch(weight_file(server.url), quiet=True)
    server.content = b"<html>please log in</html>"
    with pytest.raises(CheckpointError, match="has 26 bytes instead of 1,048,576"):
        fetch(weight_file(server.url), quiet=True)
    assert not any(name.startswith("weights.bin") for name in names_in(weights) if not name.endswith(".lock"))


def test_no_network_names_the_file_the_url_the_folder_and_the_command(server: Server, weights: Path) -> None:
    with Server() as closed:
        url = closed.url
    with pytest.raises(DownloadError) as caught:
        fetch(weight_file(url), quiet=True)
    for part in ("weights.bin", url, str(weights / "sub"), "python -m separation models download some_model"):
        assert part in str(caught.value)


def test_a_missing_file_without_url_is_named(weights: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no_such\.bin is missing and has no url"):
        fetch(weight_file(None, name="no_such.bin"))


def test_a_file_without_url_is_also_found_beside_the_project(weights: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(catalogue, "PROJECT", tmp_path / "project")
    shipped = tmp_path / "project" / "weights" / "shipped.bin"
    shipped.parent.mkdir(parents=True)
    shipped.write_bytes(CONTENT)
    assert fetch(weight_file(None, name="shipped.bin")) == shipped


@pytest.mark.parametrize(
    "content, fault", [(b"short", "has 5 bytes instead of"), (b"x" * len(CONTENT), "has the sha256")]
)
def test_an_altered_file_is_named_with_what_to_do(weights: Path, content: bytes, fault: str) -> None:
    path = weights / "sub" / "weights.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{fault}.*delete it, then run .*models download some_model"):
        fetch(weight_file("http://127.0.0.1/"))
    with pytest.raises(CheckpointError, match=fault):
        verify(path, weight_file("http://127.0.0.1/"))
    assert path.read_bytes() == content


def test_a_verified_file_is_hashed_again_only_after_a_change(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights / "sub" / "weights.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    file = weight_file("http://127.0.0.1/")
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: hashed.append(1) or digest(*args))
    for _ in range(3):
        fetch(file)
    assert len(hashed) == 1
    path.write_bytes(b"x" * len(CONTENT))
    with pytest.raises(CheckpointError, match="sha256"):
        fetch(file)


def test_a_folder_that_takes_no_stamp_costs_a_hash_and_no_error(weights: Path) -> None:
    path = weights / "sub" / "weights.bin"
    (weights / "sub" / "weights.bin.verified").mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch(weight_file("http://127.0.0.1/")) == path


def test_progress_goes_to_stderr_unless_quiet(
    server: Server, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(weight_file(server.url, name="a.bin"))
    shown = capsys.readouterr()
    assert "a.bin: 100%" in shown.err and shown.out == ""
    fetch(weight_file(server.url, name="b.bin"), quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_output_error(server: Server, weights: Path) -> None:
    weights.mkdir()
    (weights / "full.bin.part").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"full\.bin\.part cannot be written \(No space left on device\)"):
        fetch(weight_file(server.url, name="full.bin"), quiet=True)


def test_an_unwritable_folder_is_an_output_error(server: Server, weights: Path) -> None:
    weights.write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="SEPARATION_WEIGHTS"):
        fetch(weight_file(server.url), quiet=True)


def test_two_processes_that_want_one_file_download_it_once(server: Server, weights: Path) -> None:
    server.delay_seconds = 0.5
    script = (
        "import sys; from separation.catalogue import WeightFile, fetch; print('ready', flush=True); input();"
        f"print(fetch({weight_file(server.url)!r}, quiet=True))"
    )
    command = [sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(catalogue.PROJECT), "SEPARATION_WEIGHTS": str(weights)}
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:  # both at once, as soon as both are ready
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0] for process in processes]
    assert answers == [f"{weights / 'sub' / 'weights.bin'}\n"] * 2
    assert server.ranges == [None]
    assert names_in(weights) == ["weights.bin", "weights.bin.verified"]


# Reading YAML


def test_a_python_tuple_loads_and_no_other_python_tag_does(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    text = "architecture: bs_roformer\nstems: [vocals]\naudio: {sample_rate: 44100, chunk_size: 8}\nmodel:\n"
    path.write_text(text + "  freqs_per_bands: !!python/tuple\n    - 2\n    - [3, 4]\n")
    assert read_config(path).hyper_parameters == {"freqs_per_bands": (2, [3, 4])}
    ran = tmp_path / "ran"
    for tag in (
        f"!!python/object/apply:os.mkdir ['{ran}']",
        "!!python/object:os.PathLike {}",
        "!!python/name:os.system",
    ):
        path.write_text(text + f"  dim: {tag}\n")
        with pytest.raises(CheckpointError, match=rf"model\.yaml line 5 .*{tag.split()[0].removeprefix('!!')}"):
            read_config(path)
    assert not ran.exists()


def test_an_unknown_model_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="unknown model 'nonsense': use one of bs_roformer_viperx_1297, demo, htdemucs"
    ):
        read_config("nonsense")
    with pytest.raises(RecipeError, match="unknown model"):
        read_config("../models/demo")
    with pytest.raises(RecipeError, match="there is no file"):
        read_config(tmp_path / "nonsense.yaml")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"stems": "vocals"}, "stems must be a list, not 'vocals'"),
        ({"stems": ["vocals", "vocals"]}, "stems must name each stem once"),
        ({"audio": {"chunk_size": 8}}, "sample_rate must be a whole number above 0, and is missing"),
        ({"audio": {"chunk_size": -8, "sample_rate": 44100}}, "chunk_size must be a whole number above 0, not -8"),
        ({"files": ["x.ckpt"]}, "each of files must be a section"),
        ({"files": [{"name": "x", "md5": "0"}]}, "unknown key 'md5'"),
        ({"files": [{"name": "../x"}]}, "leads out of the weights folder"),
        ({"files": [{"name": "x", "sha256": "12"}]}, "sha256 must be 64 digits"),
        ({"files": [{"name": "x", "url": "file:///etc/passwd"}]}, "url must begin with https"),
        ({"files": [{"name": "x"}, {"name": "y"}]}, "the files must name one stem each"),
    ],
)
def test_a_yaml_that_does_not_make_sense_is_named_with_its_key(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"small\.yaml: .*{message}"):
        read_config(write_yaml(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"- a list", b"a: [1", b"\xff\xfe\x00", b"a: \x07"])
def test_a_file_that_is_no_yaml_section_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.yaml"):
        read_config(path)
