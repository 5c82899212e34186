"""Reading YAML, and fetching files from a server on 127.0.0.1."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request

import pytest

from helpers.common import PROJECT
from helpers.small_model import DOCUMENT, write_yaml
from helpers.weights_server import CONTENT, Server
from separation.checkpoints import catalogue, description, download
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.description import WeightFile
from separation.checkpoints.download import fetch
from separation.checkpoints.files import known_bytes, verify
from separation.errors import CheckpointError, DownloadError, OutputError, RecipeError
from separation.system import places

SHA256 = hashlib.sha256(CONTENT).hexdigest()


def weight_file(url: str | None, content: bytes = CONTENT, **other: Any) -> WeightFile:
    known = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "stem": None}
    return WeightFile(**{"name": "sub/weights.bin", "url": url, "checkpoint": "some_model", **known, **other})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def run_at_once(weights: Path, codes: list[str]) -> list[str]:
    """Runs each code in a process of its own, all from the moment when all are ready; what they printed after it."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "SEPARATION_WEIGHTS": str(weights)}
    start = """
from separation.checkpoints.description import WeightFile
from separation.checkpoints.download import fetch
print("ready", flush=True)
input()
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", start + code],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for code in codes
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(codes), answers
    return [printed for printed, _ in answers]


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
    assert len(server.ranges) == 1 + len(download.RETRY_SECONDS)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client's thread would have slept, in order; the server's own sleeps are left alone."""
    waited: list[float] = []
    client, sleep = threading.current_thread(), time.sleep

    def record(seconds: float) -> None:
        if threading.current_thread() is client:
            waited.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", record)
    monkeypatch.setattr(download, "RETRY_SECONDS", (0.5, 1.0, 2.0))
    return waited


def test_each_attempt_in_vain_is_followed_by_a_longer_wait(server: Server, weights: Path, waits: list[float]) -> None:
    server.break_after = [0] * 20
    with pytest.raises(DownloadError):
        fetch(weight_file(server.url), quiet=True)
    assert waits == [0.5, 1.0, 2.0]


def test_progress_resets_the_wait(server: Server, weights: Path, waits: list[float]) -> None:
    server.break_after = [0, 0, 1000, 0, 0]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert waits == [0.5, 1.0, 0.5, 0.5, 1.0]


def test_a_busy_server_is_asked_again_and_a_missing_page_is_not(server: Server, weights: Path) -> None:
    server.statuses = [404]
    with pytest.raises(DownloadError, match=r"weights\.bin is not in .*sub and .*the server answers 404"):
        fetch(weight_file(server.url), quiet=True)
    assert len(server.ranges) == 1
    server.statuses = [503, 429]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT


def test_wrong_content_from_the_server_is_refused_and_removed(server: Server, weights: Path) -> None:
    server.content = b"x" * len(CONTENT)
    with pytest.raises(CheckpointError, match=r"sent a file that has the sha256 .* instead of"):
        fetch(weight_file(server.url), quiet=True)
    server.content = b"<html>please log in</html>"
    with pytest.raises(CheckpointError, match="has 26 bytes instead of 1,048,576"):
        fetch(weight_file(server.url), quiet=True)
    assert names_in(weights) == []


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
    monkeypatch.setattr(places, "PACKAGE", tmp_path / "project" / "separation")
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


def test_a_full_disk_is_an_output_error(server: Server, weights: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system has no limits on files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write to '.*full\.bin\.part' \(File too large\)"):
            fetch(weight_file(server.url, name="full.bin"), quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_unwritable_folder_is_an_output_error(server: Server, weights: Path) -> None:
    weights.write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="SEPARATION_WEIGHTS"):
        fetch(weight_file(server.url), quiet=True)


def test_two_processes_that_want_one_file_download_it_once(server: Server, weights: Path) -> None:
    server.delay_seconds = 0.5
    code = f"print(fetch({weight_file(server.url)!r}, quiet=True))"
    answers = run_at_once(weights, [code, code])
    assert answers == [f"{weights / 'sub' / 'weights.bin'}\n"] * 2
    assert server.ranges == [None]
    assert names_in(weights) == ["weights.bin", "weights.bin.verified"]


# Hostile servers and folders


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "data:,x", "http://[::1", "http://", ""],
)
def test_a_server_that_leads_to_something_else_is_not_followed(target: str, server: Server, weights: Path) -> None:
    server.redirects = [target] * 20
    with pytest.raises(DownloadError, match=r"weights\.bin is not in .*could not be downloaded") as caught:
        fetch(weight_file(server.url), quiet=True)
    assert "\n" not in str(caught.value)
    assert names_in(weights) == []


def test_a_server_that_leads_on_is_followed_for_a_while(server: Server, weights: Path) -> None:
    server.redirects = ["/elsewhere", server.url]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    server.redirects = [server.url] * 1000
    with pytest.raises(DownloadError, match="the server answers 302"):
        fetch(weight_file(server.url, name="again.bin"), quiet=True)
    assert len(server.redirects) > 980


@pytest.mark.parametrize(
    "source, target, is_followed",
    [
        ("http://a/x", "http://b/x", True),
        ("http://a/x", "https://b/x", True),
        ("https://a/x", "https://b/x", True),
        ("https://a/x", "http://b/x", False),
        ("https://a/x", "ftp://b/x", False),
        ("http://a/x", "ftp://b/x", False),
    ],
)
def test_no_redirect_leads_from_https_to_less_or_to_ftp(source: str, target: str, is_followed: bool) -> None:
    request, handler = Request(source), download._Redirects()
    if is_followed:
        followed = handler.redirect_request(request, None, 302, "Found", Message(), target)
        assert followed is not None and followed.full_url == target
    else:
        with pytest.raises(HTTPError, match=rf"redirects to '{target}', which is refused"):
            handler.redirect_request(request, None, 302, "Found", Message(), target)


def test_a_server_that_does_not_stop_is_stopped(server: Server, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.announces_length = False
    with pytest.raises(DownloadError, match="the server sends more than 1,000 bytes"):
        fetch(weight_file(server.url, content=CONTENT[:1000]), quiet=True)
    monkeypatch.setitem(description.LARGEST, "bytes", 5000)
    with pytest.raises(DownloadError, match="the server sends more than 5,000 bytes"):
        fetch(unstated(server.url), quiet=True)
    assert names_in(weights) == []


def test_another_part_of_the_file_than_was_asked_for_is_not_joined(server: Server, weights: Path) -> None:
    server.break_after = [300_000]
    server.content_ranges = ["bytes 0-1048575/1048576", "bytes 0-748575/1048576"]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", None]


@pytest.mark.parametrize("suffix", [".part", ".lock"])
def test_what_lies_behind_a_symbolic_link_is_not_written_to(suffix: str, server: Server, weights: Path) -> None:
    weights.mkdir()
    (weights / "mine.txt").write_text("mine")
    (weights / f"x.bin{suffix}").symlink_to(weights / "mine.txt")
    assert fetch(weight_file(server.url, name="x.bin"), quiet=True).read_bytes() == CONTENT
    assert (weights / "mine.txt").read_text() == "mine"
    assert names_in(weights) == ["mine.txt", "x.bin", "x.bin.verified"]


def test_neither_the_stamp_nor_the_checksums_are_written_through_a_link(server: Server, weights: Path) -> None:
    weights.mkdir()
    (weights / "mine.txt").write_text("mine")
    (weights / "x.bin.verified").symlink_to("mine.txt")
    assert fetch(weight_file(server.url, name="x.bin"), quiet=True).read_bytes() == CONTENT
    assert fetch(weight_file(server.url, name="x.bin"), quiet=True).exists()  # hashed, for lack of a stamp
    (weights / "checksums.lock.part").symlink_to("mine.txt")
    with pytest.raises(OutputError, match=r"cannot write to '.*checksums\.lock' \(it is a symbolic link"):
        fetch(unstated(server.url), quiet=True)
    assert (weights / "mine.txt").read_text() == "mine"


def test_a_lock_that_another_process_removes_is_not_trusted(server: Server, weights: Path) -> None:
    """A refused file's lock is removed: who waited for it and who comes later must not download at the same time."""
    server.content, server.delay_seconds = b"x" * len(CONTENT), 0.2
    code = f"""
from separation.errors import CheckpointError
try:
    fetch({weight_file(server.url)!r}, quiet=True)
except CheckpointError as e:
    print("has the sha256" in str(e))
"""
    assert run_at_once(weights, [code] * 3) == ["True\n"] * 3
    assert len(server.ranges) == 3 and set(server.ranges) == {None}
    assert names_in(weights) == []


def test_a_page_in_place_of_a_file_of_which_nothing_is_known_is_refused(server: Server, weights: Path) -> None:
    server.content = b"\n<!DOCTYPE html><html>please log in</html>"
    with pytest.raises(CheckpointError, match="sent a file that is a web page, not a weights file, and it was removed"):
        fetch(unstated(server.url), quiet=True)
    assert names_in(weights) == []


def test_half_a_file_of_which_nothing_is_known_is_not_completed_later(server: Server, weights: Path) -> None:
    (weights / "sub").mkdir(parents=True)
    (weights / "sub" / "weights.bin.part").write_bytes(b"of another version")
    assert fetch(unstated(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == [None]


# Files whose sha256 their publishers do not state


def unstated(url: str, name: str = "sub/weights.bin", **known: Any) -> WeightFile:
    return weight_file(url, name=name, **{"bytes": None, "sha256": None} | known)


def test_a_first_downloads_sha256_is_recorded_and_said_and_later_ones_must_match_it(
    server: Server, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch(unstated(server.url), quiet=True)
    (said,) = caplog.messages
    assert SHA256 in said and str(weights / "checksums.lock") in said and "\n" not in said
    assert (weights / "checksums.lock").read_text() == f"{SHA256} {len(CONTENT)} sub/weights.bin\n"
    assert names_in(weights) == ["checksums.lock", "weights.bin", "weights.bin.verified"]
    assert verify(path, unstated(server.url)) is True
    assert known_bytes([unstated(server.url)]) == len(CONTENT)

    path.unlink()
    server.content = b"x" * len(CONTENT)
    with pytest.raises(CheckpointError, match=rf"sent a file that has the sha256 \w+ instead of {SHA256} of its first"):
        fetch(unstated(server.url), quiet=True)
    server.content = CONTENT
    assert fetch(unstated(server.url), quiet=True) == path
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("content, fault", [(b"short", "has 5 bytes"), (b"x" * len(CONTENT), "has the sha256")])
def test_a_file_that_is_no_longer_what_was_downloaded_is_named_with_the_line_that_says_so(
    server: Server, weights: Path, content: bytes, fault: str
) -> None:
    path = fetch(unstated(server.url), quiet=True)
    path.write_bytes(content)
    for check in (lambda: verify(path, unstated(server.url)), lambda: fetch(unstated(server.url), quiet=True)):
        with pytest.raises(CheckpointError, match=rf"{fault} .*of its first download .* remove its line in .*\.lock"):
            check()


def test_a_file_that_nobody_downloaded_has_nothing_to_be_compared_with(weights: Path) -> None:
    path = weights / "weights.bin"
    weights.mkdir()
    path.write_bytes(CONTENT)
    assert fetch(unstated("http://127.0.0.1:1/", "weights.bin")) == path
    assert verify(path, unstated("http://127.0.0.1:1/", "weights.bin")) is False
    assert names_in(weights) == ["weights.bin"]


def test_the_beginning_of_a_sha256_is_compared_and_the_whole_one_recorded(server: Server, weights: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"has the sha256 {SHA256} instead of 00000000, and it was removed"):
        fetch(unstated(server.url, sha256="0" * 8), quiet=True)
    assert not (weights / "checksums.lock").exists()
    path = fetch(unstated(server.url, sha256=SHA256[:8]), quiet=True)
    assert (weights / "checksums.lock").read_text().startswith(SHA256)
    assert verify(path, unstated(server.url, sha256=SHA256[:8]))
    with pytest.raises(CheckpointError, match=rf"has the sha256 {SHA256} instead of 00000000: delete it"):
        verify(path, unstated(server.url, sha256="0" * 8))  # the publisher's word goes before what was recorded


def test_processes_that_record_at_the_same_time_lose_no_line(server: Server, weights: Path) -> None:
    server.content = b"small"
    files = [[unstated(server.url, f"{name}-{number}") for number in range(5)] for name in "abc"]
    run_at_once(weights, [f"for file in {mine!r}: fetch(file, quiet=True)" for mine in files])
    lines = (weights / "checksums.lock").read_text().splitlines()
    assert [line.split()[2] for line in lines] == [f"{name}-{number}" for name in "abc" for number in range(5)]
    assert not list(weights.glob("*.part"))


@pytest.mark.parametrize("line", ["what is this", "0123 5 weights.bin", f"{'0' * 64} many weights.bin"])
def test_a_damaged_line_is_named_by_its_number(weights: Path, line: str) -> None:
    weights.mkdir()
    (weights / "checksums.lock").write_text(f"{'0' * 64} 5 other.bin\n{line}\n")
    with pytest.raises(CheckpointError, match=r"checksums\.lock line 2 is not a sha256, a size in bytes and a name"):
        fetch(unstated("http://127.0.0.1:1/"))


def test_a_lock_file_that_cannot_be_written_or_read_is_one_sentence(server: Server, weights: Path) -> None:
    (weights / "checksums.lock.part").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot write to '.*checksums\.lock'"):
        fetch(unstated(server.url), quiet=True)
    (weights / "checksums.lock").mkdir()
    with pytest.raises(CheckpointError, match=r"checksums\.lock cannot be read .*: delete it"):
        fetch(unstated(server.url), quiet=True)


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
    with pytest.raises(RecipeError, match=r"unknown model 'nonsense': use one of .*demo, .*htdemucs"):
        read_config("nonsense")
    with pytest.raises(RecipeError, match=r"there is no model 'demo' in \.\./models: put a folder demo, "):
        read_config("../models/demo")
    with pytest.raises(RecipeError, match="there is no file"):
        read_config(tmp_path / "nonsense.yaml")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"audio": DOCUMENT["audio"] | {"chunk_sise": 8}}, "unknown key 'audio.chunk_sise'"),
        ({"stems": "vocals"}, "stems must be a list, not 'vocals'"),
        ({"stems": ["vocals", "vocals"]}, "stems must name each stem once"),
        ({"audio": {"sample_rate": 44100}}, "chunk_size is missing: add it as a positive integer"),
        ({"audio": {"chunk_size": 8, "sample_rate": "high"}}, "sample_rate must be a positive integer, not 'high'"),
        ({"architecture": 5}, "architecture must be a string, not 5"),
        ({"stems": ["vocals", "../drums"]}, r"the stem '\.\./drums' cannot be a file's name"),
        ({"audio": {"chunk_size": -8, "sample_rate": 44100}}, "chunk_size must be a positive integer, not -8"),
        ({"files": ["x.ckpt"]}, "each of files must be a section"),
        ({"files": [{"name": "x", "md5": "0"}]}, "unknown key 'md5'"),
        ({"files": [{"name": "x", "is_recorded": True}]}, "unknown key 'is_recorded'"),
        ({"files": [{"name": "../x"}]}, "leads out of the weights folder"),
        ({"files": [{"name": "x", "sha256": "12"}]}, "sha256 must be 64 hexadecimal digits"),
        ({"files": [{"name": "x", "url": "file:///etc/passwd"}]}, "url must begin with https"),
        ({"files": [{"name": "x", "stem": "drums"}, {"name": "y"}]}, "the files must name one stem each"),
    ],
)
def test_a_yaml_that_does_not_make_sense_is_named_with_its_key(
    tmp_path: Path, changes: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "CONFIGS", tmp_path)
    with pytest.raises(CheckpointError, match=rf"small\.yaml: .*{message}"):
        read_config(write_yaml(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"- a list", b"a: [1", b"\xff\xfe\x00", b"a: \x07"])
def test_a_file_that_is_no_yaml_section_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.yaml"):
        read_config(path)
