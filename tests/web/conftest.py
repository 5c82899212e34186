"""Servers of the local page."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.common import song
from helpers.page_server import Client, Process, idle_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server that separates songs, for all modules; at the end, it must stop without an error or leftover files."""
    running = Process(tmp_path_factory.mktemp("served"))
    yield running
    code, said = running.stop(signal.SIGTERM)
    assert (code, said) == (128 + signal.SIGTERM, "")
    assert running.leftovers() == []


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Client]:
    """A client of a server that separates nothing."""
    with idle_server(tmp_path) as (client, _, _):
        yield client


@pytest.fixture(scope="session")
def short() -> bytes:
    """A song of two seconds."""
    return song(2)
