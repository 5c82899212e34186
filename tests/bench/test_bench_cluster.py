"""cluster.py loses no song on a cluster with failures."""

import pytest

import cluster

pytestmark = pytest.mark.slow


def test_each_song_is_done_once_although_workers_nodes_and_the_store_fail() -> None:
    for package in ("ray", "s3fs", "moto.server", "flask"):
        pytest.importorskip(package)
    figures = cluster.measure(n_songs=30, n_nodes=3, n_kills=2)
    assert (figures["songs"], figures["objects"]) == (30, 90)
    assert (figures["workers killed"], figures["nodes removed"], figures["nodes added"]) == (2, 2, 1)
