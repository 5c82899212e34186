"""One server with the demo recipe for all modules."""

from collections.abc import Iterator

import pytest

from helpers.served_process import DEMO, Receiver, Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), **DEMO) as server:
        assert server.health()["status"] == "READY", server.log.read_text()
        yield server


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver
