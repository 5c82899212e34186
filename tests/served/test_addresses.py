"""By default, neither Cog nor the predictor downloads from the server's own machine."""

from collections.abc import Iterator

import pytest

from helpers.served_process import DEMO, Receiver, Server

pytestmark = pytest.mark.slow  # a server of its own; web/test_remote.py has all addresses


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("closed"), **DEMO, SEPARATION_LOCAL_URLS="") as server:
        assert server.health()["status"] == "READY", server.log.read_text()
        yield server


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"])
def test_a_url_of_the_servers_own_machine_is_refused(closed: Server, receiver: Receiver, host: str) -> None:
    receiver.files["/song.wav"] = b"secret"
    port = receiver.url.rpartition(":")[2]
    prediction = closed.predict(f"http://{host}:{port}/song.wav")
    assert prediction["status"] == "failed"
    assert prediction["error"].endswith(
        ", a loopback address, which this server does not download from: give a public URL, "
        "or set SEPARATION_LOCAL_URLS=on on the server if its network is trusted"
    )
    assert f"InputError: 'song.wav' is at '{host.strip('[]')}'" in prediction["error"] or "ffff" in host
    assert receiver.requests == []


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:{port}/health-check", "http://169.254.169.254/latest/meta-data/", "http://0.0.0.0:{port}/"],
)
def test_the_server_itself_and_the_clouds_metadata_are_refused(closed: Server, url: str) -> None:
    prediction = closed.predict(url.format(port=closed.port))
    assert prediction["status"] == "failed"
    assert ", which this server does not download from: " in prediction["error"]
