"""Hostile and mistaken requests to Cog's real server get clear errors and nothing else."""

import base64
import gzip
import http.server
import io
import random
import resource
import shutil
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from helpers import served_process
from helpers.common import PROJECT, SONG, needs_ffmpeg, quick_first
from helpers.served_process import Server, data_uri, wait_for

LIMIT_MIB = 2


def wav(seconds: float) -> bytes:
    """The start of the demo song."""
    samples, rate = soundfile.read(SONG, dtype="float32", frames=int(seconds * 44100))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


class HostileServer(Server):
    """Cog's server with the demo recipe and no other weights in SEPARATION_WEIGHTS."""

    def __init__(self, temporary: Path, **environment: str) -> None:
        self.weights = Path(environment["SEPARATION_WEIGHTS"])
        super().__init__(temporary, SEPARATION_RECIPE="demo", **environment)


class Web(http.server.BaseHTTPRequestHandler):
    requested: list[str]

    def do_GET(self) -> None:
        self.requested.append(self.path)
        address = "http://{}:{}".format(*self.server.server_address[:2])
        locations = {"/to-file": "file:///etc/passwd", "/to-ftp": "ftp://127.0.0.1/x", "/to-song": f"{address}/a/song"}
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(302 if self.path in locations else 200)
        if self.path in locations:
            self.send_header("Location", locations[self.path])
            self.send_header("Content-Length", "0")
        elif self.path in ("/gzip", "/packed-song"):
            self.send_header("Content-Encoding", "gzip")
        elif self.path == "/short" or (self.path == "/once-short" and self.requested.count(self.path) == 1):
            self.send_header("Content-Length", str(10 * 2**30))
        self.end_headers()
        try:
            self.wfile.writelines(self.body())
        except OSError:
            return  # the client has closed the connection

    def body(self) -> Iterator[bytes]:
        if self.path == "/endless":
            while True:
                yield bytes(2**16)
        elif self.path == "/gzip":
            packer = zlib.compressobj(9, zlib.DEFLATED, 31)
            while True:
                yield packer.compress(bytes(2**22))
        elif self.path == "/dripping":
            while True:
                yield b"x"
                time.sleep(0.05)
        elif self.path == "/packed-song":
            yield gzip.compress(wav(1))
        elif self.path.startswith("/words"):
            yield b"words, words, words\n" * 100
        else:
            yield wav(1)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def web() -> Iterator[tuple[str, list[str]]]:
    """The URL of a web server and the list of the paths requested from it."""
    handler = type("Handler", (Web,), {"requested": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler.requested
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, web: tuple[str, list[str]]) -> Iterator[HostileServer]:
    """A server with low limits."""
    folder = tmp_path_factory.mktemp("server")
    weights = tmp_path_factory.mktemp("weights")
    environment = {"SEPARATION_WEIGHTS": str(weights), "https_proxy": web[0]}
    environment |= {"SEPARATION_MAX_MIB": str(LIMIT_MIB), "SEPARATION_MAX_SECONDS": "60"}
    with HostileServer(folder, **environment) as server:
        assert server.health()["status"] == "READY", server.log.read_text()
        yield server


def answer(server: HostileServer, audio: Any, **inputs: Any) -> dict[str, Any]:
    """Run a prediction. Its error and its log must not name a path on the server, and a failed one leaves no file."""
    status, prediction = server.post({"audio": audio, **inputs})
    assert status == 200
    told = prediction.get("error", "").replace(str(audio), "") + prediction["logs"]
    for folder in (server.temporary, server.temporary.parent, server.weights, PROJECT, "/tmp", "site-packages"):
        assert str(folder) not in told
    if prediction["status"] == "failed":
        assert "\n" not in prediction["error"]
        assert list(server.temporary.glob("song-*")) + list(server.temporary.glob("tmp*")) == []
        assert not [path for path in server.temporary.rglob("*") if path.is_file() and path != server.log]
    return prediction


def error(server: HostileServer, audio: Any, **inputs: Any) -> str:
    prediction = answer(server, audio, **inputs)
    assert prediction["status"] == "failed", prediction
    return prediction["error"]


def assert_works(server: HostileServer, audio: str | None = None) -> None:
    """A prediction succeeds. `audio` is the URL of `wav(1)`; without it, that is uploaded."""
    prediction = answer(server, audio or data_uri(wav(1)))
    assert prediction["status"] == "succeeded", prediction
    stems = [soundfile.read(io.BytesIO(base64.b64decode(uri.partition(",")[2])))[0] for uri in prediction["output"]]
    assert np.abs(sum(stems) - soundfile.read(io.BytesIO(wav(1)))[0]).max() <= 1e-6


# Sources of songs


@pytest.mark.parametrize(
    "audio",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "../../etc/passwd",
        str(SONG),
        "weights/demo/song.flac",
        f"file://{SONG}",
        "ftp://127.0.0.1/song.wav",
        "s3://bucket/song.wav",
        "gopher://127.0.0.1/song.wav",
        "HTTP://127.0.0.1/song.wav",
        "DATA:audio/wav;base64,aGVsbG8=",
        "",
    ],
)
def test_only_http_https_and_uploads_are_accepted(audio: str, server: HostileServer) -> None:
    message = f"audio is {audio!r}: give a URL that begins with http:// or https:// in lower case, or a file"
    assert error(server, audio).endswith(f"InputError: {message}")


@pytest.mark.parametrize("path", quick_first(["a/song", "to-song", "packed-song"], 1))
def test_a_song_from_a_url_a_redirect_or_with_a_content_encoding_is_separated(
    path: str, server: HostileServer, web: tuple[str, list[str]]
) -> None:
    assert_works(server, f"{web[0]}/{path}")


@pytest.mark.parametrize("path", ["to-file", "to-ftp"])
def test_a_redirect_to_another_scheme_is_refused(path: str, server: HostileServer, web: tuple[str, list[str]]) -> None:
    assert f"'{path}' could not be downloaded (it is no http or https URL): check the URL" in error(
        server, f"{web[0]}/{path}"
    )


@pytest.mark.parametrize(
    "path, name",
    quick_first(
        [
            ("words.mp3", "words.mp3"),
            ("words/x", "x"),
            ("words/..%2F..%2Fetc%2Fpasswd", ".._.._etc_passwd".strip(".")),
            ("words/%2e%2e", "song"),
            ("words/", "song"),
            ("words/%00%0Ax", "_\\nx"),
            ("words/" + "x" * 1000, "x" * 199 + "~"),
        ],
        3,
    ),
)
def test_a_downloaded_file_keeps_its_name_without_folders(
    path: str, name: str, server: HostileServer, web: tuple[str, list[str]]
) -> None:
    assert f"AudioError: '{name}' is not audio" in error(server, f"{web[0]}/{path}")


@pytest.mark.parametrize(
    "url, reason",
    [
        ("{web}/missing", "'missing' could not be downloaded (the web server answers 404)"),
        ("{web}/short", "'short' could not be downloaded (the connection was closed early)"),
        ("http://127.0.0.1:1/x", "'x' could not be downloaded (the connection was refused)"),
        ("http://127.0.0.1:99999/x", "'x' could not be downloaded (it is not a valid URL)"),
        ("http://" + "a" * 100 + ".com/x", "'x' could not be downloaded (it is not a valid URL)"),
        ("http://", "'song' could not be downloaded (it is not a valid URL)"),
    ],
)
def test_a_failed_download_has_a_one_line_error(
    url: str, reason: str, server: HostileServer, web: tuple[str, list[str]]
) -> None:
    assert f"InputError: {reason}: check the URL" in error(server, url.replace("{web}", web[0]))


@pytest.mark.slow
def test_a_download_that_breaks_off_once_is_started_anew(server: HostileServer, web: tuple[str, list[str]]) -> None:
    prediction = answer(server, f"{web[0]}/once-short")
    assert prediction["status"] == "succeeded"
    assert (
        "'once-short' could not be downloaded (the connection was closed early); trying once more\n"
        in prediction["logs"]
    )
    assert web[1].count("/once-short") == 2


# Limits


@pytest.mark.slow
@pytest.mark.parametrize("path", ["endless", "gzip"])
def test_an_endless_download_stops_at_the_limit(path: str, server: HostileServer, web: tuple[str, list[str]]) -> None:
    message = f"AudioError: '{path}' has more than 2 MiB, the limit here: send a smaller file"
    assert error(server, f"{web[0]}/{path}").endswith(message)
    assert_works(server)


def test_an_upload_over_the_limit_is_refused(server: HostileServer) -> None:
    assert "'file.bin' has more than 2 MiB" in error(server, data_uri(bytes(LIMIT_MIB * 2**20 + 1)))
    assert "is not audio" in error(server, data_uri(bytes(LIMIT_MIB * 2**20)))


@pytest.mark.slow
def test_a_download_can_be_cancelled(server: HostileServer, web: tuple[str, list[str]]) -> None:
    assert_works(server)
    answers: list[dict[str, Any]] = []

    def put() -> None:
        body = {"input": {"audio": f"{web[0]}/dripping"}}
        while (ended := server.request("PUT", "/predictions/dripping", body))[0] == 409:
            time.sleep(0.05)
        answers.append(ended[1])

    n_requested = len(web[1])
    thread = threading.Thread(target=put)
    thread.start()
    try:
        wait_for(lambda: len(web[1]) > n_requested, "the request for the song")
        wait_for(lambda: len(list(server.temporary.glob("song-*/dripping"))) == 1, "the song's file")
    finally:
        assert server.request("POST", "/predictions/dripping/cancel")[0] == 200
        thread.join(60)
    assert [ended["status"] for ended in answers] == ["canceled"]
    wait_for(lambda: not any(server.temporary.glob("song-*")), "the end of the song's thread")
    assert_works(server)


def test_decoding_a_small_file_to_hours_stops_at_the_limit(server: HostileServer) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8000 * 3600, dtype=np.int16), 8000, format="FLAC")
    content = bytearray(file.getvalue())
    assert "is longer than 60 s, the limit here" in error(server, data_uri(bytes(content)))
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])  # STREAMINFO's number of samples: unknown
    assert "is longer than 60 s, the limit here" in error(server, data_uri(bytes(content)))


@needs_ffmpeg
@pytest.mark.parametrize("target", [f"file://{SONG}", str(SONG), "{web}/words"])
def test_a_playlist_reads_neither_other_files_nor_the_network(
    target: str, server: HostileServer, web: tuple[str, list[str]]
) -> None:
    n_requested = len(web[1])
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n".replace("{web}", web[0])
    assert "'file.bin' is not audio" in error(server, data_uri(playlist.encode()))
    assert len(web[1]) == n_requested


@pytest.mark.slow
def test_a_damaged_mp3_is_one_warning_in_the_log_without_decoder_messages(server: HostileServer) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros((20 * 44100, 2)), 44100, format="MP3")
    content = bytearray(file.getvalue())
    content[3000:3000] = random.Random(0).randbytes(2000)
    logs = answer(server, data_uri(bytes(content)))["logs"]
    assert logs.count("'file.bin' is damaged (") == 1
    assert "MPEG" not in logs and "mpg123" not in logs


# Failures of the server


def test_a_recipe_other_than_the_servers_downloads_nothing(server: HostileServer, web: tuple[str, list[str]]) -> None:
    n_requested = len(web[1])
    message = "RecipeError: recipe 'standard' is not on this server, which runs 'demo': leave recipe at 'default'"
    for inputs in ({}, {"stems": "all_6"}, {"two_stems": "drums"}):
        assert error(server, data_uri(wav(1)), recipe="standard", **inputs).endswith(message)
    assert len(web[1]) == n_requested and list(server.weights.iterdir()) == []


def assert_operator_reads(message: str, server: HostileServer) -> None:
    deadline = time.monotonic() + 60  # the log and the response are written concurrently
    while message not in server.written() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert message in server.written()


SERVER_FAILED = "Error: the server failed ({}): try again, or ask its operator to read the log"


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit, where", [(2**15, "[Errno 27] File too large"), (2**18, "cannot write to '{temporary}/stems-")]
)
def test_a_full_disk_is_reported_without_paths_and_logged_with_them(
    limit: int, where: str, server: HostileServer
) -> None:
    before = resource.prlimit(server.worker, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        assert "Error: the server's disk is full: free some space there" in error(server, data_uri(wav(1)))
    finally:
        resource.prlimit(server.worker, resource.RLIMIT_FSIZE, before)
    assert_operator_reads(where.format(temporary=server.temporary), server)
    assert_works(server)


@pytest.mark.slow
def test_a_missing_temporary_folder_is_reported_without_its_path(server: HostileServer) -> None:
    elsewhere = server.temporary.with_name("elsewhere")
    server.temporary.rename(elsewhere)
    try:
        message = error(server, data_uri(wav(1)))
    finally:
        elsewhere.rename(server.temporary)
    assert message.endswith("Separation" + SERVER_FAILED.format("No such file or directory"))
    assert_operator_reads(f"No such file or directory: '{server.temporary}/song-", server)
    for stems in server.temporary.glob("stems-*"):
        shutil.rmtree(stems)  # the previous prediction's stems, which could not be removed
    assert_works(server)


@pytest.mark.slow
def test_wrong_weights_are_reported_without_their_path(server: HostileServer) -> None:
    path = server.weights / "model_bs_roformer_ep_317_sdr_12.9755.ckpt"
    path.write_bytes(b"altered")
    try:
        message = error(server, data_uri(wav(1)), recipe="standard")
    finally:
        path.unlink()
    assert message.endswith("Checkpoint" + SERVER_FAILED.format("CheckpointError"))
    assert_operator_reads(f"{path} has 7 bytes instead of 639,331,213", server)
    assert_works(server)


@pytest.mark.slow
def test_weights_that_cannot_be_downloaded_are_reported_without_their_folder(
    tmp_path: Path, web: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    project, temporary, weights = tmp_path / "project", tmp_path / "temporary", tmp_path / "weights"
    for folder in (project, temporary, weights):
        folder.mkdir()
    for name in ("predict.py", "cog.yaml", "separation", "weights"):
        (project / name).symlink_to(PROJECT / name)
    shutil.copytree(PROJECT / "configs", project / "configs")
    (project / "configs" / "recipes" / "demo" / "all_6.yaml").write_text("drums: htdemucs_6s\n")
    monkeypatch.setattr(served_process, "PROJECT", project)
    with HostileServer(temporary, SEPARATION_WEIGHTS=str(weights), https_proxy=web[0]) as server:
        assert server.health()["status"] == "READY", server.log.read_text()
        message = error(server, data_uri(wav(1)), stems="all_6")
        assert "DownloadError: the server could not download the models' weights: " in message
        assert_operator_reads(f"5c90dfd2.safetensors is not in {weights}/htdemucs_6s and could not be", server)
        assert_works(server)
