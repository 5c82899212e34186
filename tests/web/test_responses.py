"""Responses of the local page's server: headers, byte ranges, archives."""

import io
import zipfile

import pytest

from helpers.page_server import Client, Process, rest


def test_responses_cannot_be_framed_sniffed_or_cached(idle: Client) -> None:
    idle.ask("GET", "/")
    assert "frame-ancestors 'none'" in idle.headers["Content-Security-Policy"]
    assert "default-src 'none'" in idle.headers["Content-Security-Policy"]
    assert idle.headers["X-Content-Type-Options"] == "nosniff"
    assert idle.headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in idle.headers
    assert "Python" not in idle.headers["Server"]


@pytest.mark.parametrize("path", ["/", "/songs/x", "/songs/x/vocals.wav", "/songs/x/stems.zip"])
def test_head_has_the_headers_of_get_and_no_body(idle: Client, path: str) -> None:
    path = path.replace("x", idle.announce(b"1"))
    status, _ = idle.ask("GET", path)
    headers = dict(idle.headers)
    with idle.connect(f"HEAD {path} HTTP/1.1\r\nHOST\r\n\r\n") as connection:
        head, _, content = rest(connection).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0].split()[1] == str(status) and content == b""
    assert dict(line.split(": ", 1) for line in lines[1:]) | {"Date": headers["Date"]} == headers


@pytest.fixture(scope="module")
def stem(server: Process, short: bytes) -> tuple[str, bytes]:
    """The path and the content of a finished stem."""
    id = server.send(short)
    assert server.wait_until_over(id)["state"] == "done"
    path = f"/songs/{id}/vocals.flac"
    status, content = server.ask("GET", path)
    assert status == 200 and len(content) > 1000
    assert "flac" in server.headers["Content-Type"] and server.headers["Accept-Ranges"] == "bytes"
    return path, content


@pytest.mark.parametrize(
    "asked, start, stop",
    [
        ("bytes=0-0", 0, 1),
        ("bytes=100-299", 100, 300),
        ("bytes=900-", 900, None),
        ("bytes=-7", -7, None),
        ("bytes=5-999999999999", 5, None),
        ("bytes=-999999999999", 0, None),
    ],
)
def test_a_range_request_gets_those_bytes_of_the_stem(
    server: Process, stem: tuple[str, bytes], asked: str, start: int, stop: int | None
) -> None:
    path, content = stem
    assert server.ask("GET", path, Range=asked) == (206, content[start:stop])
    first = start % len(content)
    last = first + len(content[start:stop]) - 1
    assert server.headers["Content-Range"] == f"bytes {first}-{last}/{len(content)}"
    assert server.ask("HEAD", path, Range=asked) == (206, b"")
    assert server.headers["Content-Length"] == str(last - first + 1)


@pytest.mark.parametrize("asked", ["bytes={size}-", "bytes=999999999999-", "bytes=-0"])
def test_a_range_outside_the_stem_is_refused(server: Process, stem: tuple[str, bytes], asked: str) -> None:
    path, content = stem
    assert server.ask("GET", path, Range=asked.format(size=len(content))) == (416, b"")
    assert server.headers["Content-Range"] == f"bytes */{len(content)}"


@pytest.mark.parametrize(
    "asked", ["bytes=-", "bytes=9-3", "bytes=0-1,4-5", "lines=1-2", "bytes=a-b", "bytes=" + "9" * 99]
)
def test_an_invalid_or_multiple_range_gets_the_whole_stem(server: Process, stem: tuple[str, bytes], asked: str) -> None:
    assert server.ask("GET", stem[0], Range=asked) == (200, stem[1])


def test_a_download_resumes_only_if_the_stem_is_unchanged(server: Process, stem: tuple[str, bytes]) -> None:
    path, content = stem
    server.ask("HEAD", path)
    tag = server.headers["ETag"]
    assert server.ask("GET", path, Range="bytes=9-", If_Range=tag) == (206, content[9:])
    assert server.ask("GET", path, Range="bytes=9-", If_Range='"another"') == (200, content)
    assert server.ask("GET", path, If_None_Match=tag) == (304, b"")


def test_an_http_1_0_client_gets_the_archive_without_chunks(server: Process, stem: tuple[str, bytes]) -> None:
    path = f"{stem[0].rpartition('/')[0]}/stems.zip"
    with server.connect(f"GET {path} HTTP/1.0\r\nHOST\r\n\r\n") as connection:
        content = rest(connection).partition(b"\r\n\r\n")[2]
    archive = zipfile.ZipFile(io.BytesIO(content))
    assert archive.testzip() is None and archive.read("song/vocals.flac") == stem[1]
