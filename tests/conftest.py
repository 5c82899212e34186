"""Shared fixtures, and the distribution of tests over processes."""

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# With several test processes, each computes on one thread. PyTorch reads this when it is imported, also in children.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from helpers.weights_server import Server
from separation import device
from separation.checkpoints import download

os.environ["SEPARATION_CACHE"] = "off"  # so that no test finds another test's estimates

# The files whose slow tests take more than a minute together, the longest ones first
LONGEST = [
    "audio/test_damaged_songs.py",
    "test_docs.py",
    "test_real_music.py",
    "client/test_client.py",
    "test_package.py",
    "bench/test_scaling.py",
    "served/test_lifecycle.py",
    "web/test_page.py",
    "served/test_hostile_requests.py",
    "bench/test_bench_cluster.py",
    "checkpoints/test_fuzzed_models.py",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite; only this one for single files, which others would delay."""
    return 2 if config.args == config.getini("testpaths") else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first: a process that starts one last would work on it alone, for up to five minutes."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in places), LONGEST
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what stays anyway: thousands of tests, which cost each full run 0.4 s."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-gpu-counts", action="store_true", help="write what test_simulated_gpu.py counts to its table"
    )


@pytest.fixture
def gpu_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as PyTorch reports it: 300 bytes in use, a peak of 5000, and of 1000 after the peak is reset."""
    peaks = [5000, 1000]
    monkeypatch.setattr(device, "_earlier_peaks", {})
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: 300)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: peaks[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: peaks.pop(0))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights"
    monkeypatch.setenv("SEPARATION_WEIGHTS", str(folder))
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small models are slower with more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
