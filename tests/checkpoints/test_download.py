"""Downloads from a server on 127.0.0.1: retries, resumes, redirects and checks."""

import hashlib
import threading
import time
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request

import pytest

from helpers.bad_servers import FAILURES, SILENT_SECONDS, failing
from helpers.weights_server import CONTENT, SHA256, Server, names_in, run_at_once, unstated, weight_file
from separation.checkpoints import download, keys
from separation.checkpoints.download import fetch
from separation.errors import CheckpointError, DownloadError, OutputError


def test_a_missing_file_is_downloaded_and_verified_once(server: Server, weights: Path) -> None:
    path = fetch(weight_file(server.url), quiet=True)
    assert path == weights / "sub" / "weights.bin" and path.read_bytes() == CONTENT
    assert names_in(weights) == ["weights.bin", "weights.bin.verified"]
    assert fetch(weight_file(server.url), quiet=True) == path
    assert server.ranges == [None]


def test_a_missing_file_without_a_url_is_named(weights: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no_such\.bin is missing and has no url"):
        fetch(weight_file(None, name="no_such.bin"))


def test_progress_goes_to_stderr_unless_quiet(
    server: Server, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(weight_file(server.url, name="a.bin"))
    shown = capsys.readouterr()
    assert "a.bin: 100%" in shown.err and shown.out == ""
    fetch(weight_file(server.url, name="b.bin"), quiet=True)
    assert capsys.readouterr() == ("", "")


def test_two_processes_download_a_file_once(server: Server, weights: Path) -> None:
    server.delay_seconds = 0.5
    code = f"print(fetch({weight_file(server.url)!r}, quiet=True))"
    answers = run_at_once(weights, [code, code])
    assert answers == [f"{weights / 'sub' / 'weights.bin'}\n"] * 2
    assert server.ranges == [None]
    assert names_in(weights) == ["weights.bin", "weights.bin.verified"]


# Broken connections


def test_a_broken_connection_is_resumed_where_it_broke(server: Server, weights: Path) -> None:
    server.break_after = [300_000, 200_000]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]


def test_a_later_process_resumes_a_partial_download(server: Server, weights: Path) -> None:
    part = weights / "sub" / "weights.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:1000])
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"] and not part.exists()


def test_a_complete_partial_download_is_kept(server: Server, weights: Path) -> None:
    part = weights / "sub" / "weights.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT)
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT


def test_a_download_starts_again_if_the_server_has_no_ranges(server: Server, weights: Path) -> None:
    server.knows_ranges, server.break_after = False, [300_000]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]


def test_retries_end_if_no_attempt_makes_progress(server: Server, weights: Path) -> None:
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


def test_failed_attempts_back_off(server: Server, weights: Path, waits: list[float]) -> None:
    server.break_after = [0] * 20
    with pytest.raises(DownloadError):
        fetch(weight_file(server.url), quiet=True)
    assert waits == [0.5, 1.0, 2.0]


def test_progress_resets_the_backoff(server: Server, weights: Path, waits: list[float]) -> None:
    server.break_after = [0, 0, 1000, 0, 0]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert waits == [0.5, 1.0, 0.5, 0.5, 1.0]


def test_a_busy_server_is_retried_and_a_missing_page_is_not(server: Server, weights: Path) -> None:
    server.statuses = [404]
    with pytest.raises(DownloadError, match=r"weights\.bin is not in .*sub and .*the server answers 404"):
        fetch(weight_file(server.url), quiet=True)
    assert len(server.ranges) == 1
    server.statuses = [503, 429]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT


def test_without_a_network_the_error_names_the_file_the_url_the_folder_and_the_command(
    server: Server, weights: Path
) -> None:
    with Server() as closed:
        url = closed.url
    with pytest.raises(DownloadError) as caught:
        fetch(weight_file(url), quiet=True)
    for part in ("weights.bin", url, str(weights / "sub"), "python -m separation models download some_model"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_download_says_in_words_what_happened(
    name: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RETRY_SECONDS", (0.0,))
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", SILENT_SECONDS)
    with failing(name, tmp_path, monkeypatch) as url, pytest.raises(DownloadError) as caught:
        fetch(weight_file(url), quiet=True)
    assert f"could not be downloaded from {url} ({FAILURES[name]}): put it into that folder" in str(caught.value)


# Files that cannot be written


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


# Hostile servers and folders


def test_wrong_content_from_the_server_is_refused_and_removed(server: Server, weights: Path) -> None:
    server.content = b"x" * len(CONTENT)
    with pytest.raises(CheckpointError, match=r"sent a file that has the sha256 .* instead of"):
        fetch(weight_file(server.url), quiet=True)
    server.content = b"<html>please log in</html>"
    with pytest.raises(CheckpointError, match="has 26 bytes instead of 1,048,576"):
        fetch(weight_file(server.url), quiet=True)
    assert names_in(weights) == []


def test_a_web_page_is_refused_in_place_of_a_file_without_a_sha256(server: Server, weights: Path) -> None:
    server.content = b"\n<!DOCTYPE html><html>please log in</html>"
    with pytest.raises(CheckpointError, match="sent a file that is a web page, not a weights file, and it was removed"):
        fetch(unstated(server.url), quiet=True)
    assert names_in(weights) == []


def test_a_partial_download_without_a_sha256_is_not_resumed(server: Server, weights: Path) -> None:
    (weights / "sub").mkdir(parents=True)
    (weights / "sub" / "weights.bin.part").write_bytes(b"of another version")
    assert fetch(unstated(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == [None]


@pytest.mark.parametrize(
    "target",
    ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "data:,x", "http://[::1", "http://", ""],
)
def test_redirects_elsewhere_are_not_followed(target: str, server: Server, weights: Path) -> None:
    server.redirects = [target] * 20
    with pytest.raises(DownloadError, match=r"weights\.bin is not in .*could not be downloaded") as caught:
        fetch(weight_file(server.url), quiet=True)
    assert "\n" not in str(caught.value)
    assert names_in(weights) == []


def test_redirects_are_followed_up_to_a_limit(server: Server, weights: Path) -> None:
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
def test_redirects_never_lead_from_https_to_http_or_to_ftp(source: str, target: str, is_followed: bool) -> None:
    request, handler = Request(source), download._Redirects()
    if is_followed:
        followed = handler.redirect_request(request, None, 302, "Found", Message(), target)
        assert followed is not None and followed.full_url == target
    else:
        with pytest.raises(HTTPError, match=rf"redirects to '{target}', which is refused"):
            handler.redirect_request(request, None, 302, "Found", Message(), target)


def test_a_response_longer_than_the_file_is_cut_off(
    server: Server, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.announces_length = False
    with pytest.raises(DownloadError, match="the server sends more than 1,000 bytes"):
        fetch(weight_file(server.url, content=CONTENT[:1000]), quiet=True)
    monkeypatch.setitem(keys.LARGEST, "bytes", 5000)
    with pytest.raises(DownloadError, match="the server sends more than 5,000 bytes"):
        fetch(unstated(server.url), quiet=True)
    assert names_in(weights) == []


def test_a_range_that_was_not_requested_is_not_appended(server: Server, weights: Path) -> None:
    server.break_after = [300_000]
    server.content_ranges = ["bytes 0-1048575/1048576", "bytes 0-748575/1048576"]
    assert fetch(weight_file(server.url), quiet=True).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", None]


@pytest.mark.parametrize("suffix", [".part", ".lock"])
def test_downloads_are_not_written_through_symbolic_links(suffix: str, server: Server, weights: Path) -> None:
    weights.mkdir()
    (weights / "mine.txt").write_text("mine")
    (weights / f"x.bin{suffix}").symlink_to(weights / "mine.txt")
    assert fetch(weight_file(server.url, name="x.bin"), quiet=True).read_bytes() == CONTENT
    assert (weights / "mine.txt").read_text() == "mine"
    assert names_in(weights) == ["mine.txt", "x.bin", "x.bin.verified"]


@pytest.mark.slow
def test_a_removed_lock_is_not_trusted(server: Server, weights: Path) -> None:
    """A refused file's lock is removed: a process that waited for it and a later one must not download at once."""
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


# Mirrors


def test_a_mirror_is_tried_when_the_url_fails_and_the_first_address_is_named(
    server: Server, weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.statuses = [404]
    file = weight_file(server.url, mirrors=(f"{server.url}?mirror", f"{server.url}?second"))
    assert fetch(file, quiet=True).read_bytes() == CONTENT
    (said,) = caplog.messages
    assert f"could not be downloaded from {server.url} (the server answers 404" in said
    assert said.endswith(f"; trying the mirror {server.url}?mirror")
    assert len(server.ranges) == 2 and names_in(weights) == ["weights.bin", "weights.bin.verified"]


def test_a_mirror_continues_a_partial_download(server: Server, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RETRY_SECONDS", (0.0,))
    server.break_after = [300_000, 0, 0]  # the url breaks off, the mirror has the rest
    file = weight_file(server.url, mirrors=(f"{server.url}?mirror",))
    assert fetch(file, quiet=True).read_bytes() == CONTENT
    assert server.ranges == [None, *["bytes=300000-"] * 3]


def test_the_checksum_decides_about_a_mirror_too(server: Server, weights: Path) -> None:
    server.content = b"x" * len(CONTENT)
    file = weight_file(server.url, mirrors=(f"{server.url}?mirror",))
    wrong = rf"\?mirror sent a file that has the sha256 \w+ instead of {SHA256}, and it was removed"
    with pytest.raises(CheckpointError, match=wrong):
        fetch(file, quiet=True)
    assert len(server.ranges) == 2 and names_in(weights) == []


def test_a_mirror_must_have_the_recorded_bytes(server: Server, weights: Path) -> None:
    file = unstated(server.url, mirrors=(f"{server.url}?mirror",))
    fetch(file, quiet=True).unlink()
    server.content, server.statuses = b"x" * 1000, [404]
    digests = rf"sha256 {hashlib.sha256(server.content).hexdigest()} instead of {SHA256} of its first download"
    with pytest.raises(CheckpointError, match=digests):
        fetch(file, quiet=True)
    assert "weights.bin" not in names_in(weights)
