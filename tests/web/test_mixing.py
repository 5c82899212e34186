"""Mixes of a song's stems: what may be asked for, and that they are exact."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.common import read
from helpers.page_server import Process, idle_server
from separation.audio.excerpt import Excerpt
from separation.errors import InputError
from separation.web.mixing import Mix
from separation.web.queued import WORK_PREFIX


@pytest.mark.parametrize(
    "query, levels, part",
    [
        ("vocals=0.5&drums=1", {"vocals": 0.5, "drums": 1}, Excerpt()),
        ("vocals=1&drums=0&start=1.5&end=3", {"vocals": 1}, Excerpt(1.5, 3)),
        ("lead+vocals=1&start=1", {"lead vocals": 1}, Excerpt(1)),
    ],
)
def test_a_query_has_levels_and_times(query: str, levels: dict[str, float], part: Excerpt) -> None:
    assert Mix.read(query) == Mix(levels, part)


@pytest.mark.parametrize(
    "query, words",
    [
        ("", "no stem of the mix is audible"),
        ("vocals", "must be levels of stems, such as"),
        ("vocals=loud", "must be levels of stems"),
        ("&".join(f"s{number}=1" for number in range(101)), "must be levels of stems"),
        ("vocals=-1", "the level of 'vocals' is -1: choose one from 0 to 16"),
        ("vocals=nan", "the level of 'vocals' is nan"),
        ("vocals=inf", "the level of 'vocals' is inf"),
        ("vocals=0", "no stem of the mix is audible"),
        ("vocals=1&start=3&end=2", "is empty"),
        ("vocals=1&start=nan", "cannot start at nan s"),
    ],
)
def test_a_wrong_query_is_an_error(query: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Mix.read(query)


def test_a_mix_is_the_exact_sum_of_the_stems_files(server: Process, short: bytes) -> None:
    id = server.send(short, "Höhle.wav", format="wav")
    server.wait_until_over(id)
    vocals, instrumental = (
        read(server.ask("GET", f"/songs/{id}/{stem}.wav")[1]).astype(np.float64) for stem in ("vocals", "instrumental")
    )
    status, mix = server.ask("GET", f"/songs/{id}/mix.wav?vocals=0.1&instrumental=0.7")
    assert status == 200 and server.headers["Content-Type"] == "audio/wav"
    assert server.headers["Content-Disposition"].endswith("''H%C3%B6hle%20-%20mix.wav")
    np.testing.assert_array_equal(read(mix), (0.1 * vocals + 0.7 * instrumental).astype(np.float32))
    mix = server.ask("GET", f"/songs/{id}/mix.wav?instrumental=1&start=0.5&end=0.75")[1]
    np.testing.assert_array_equal(read(mix), instrumental[22_050:33_075].astype(np.float32))
    status, message = server.ask("GET", f"/songs/{id}/mix.wav?drums=1")
    assert (status, message) == (400, "'Höhle.wav' has no stem 'drums': choose from vocals, instrumental")
    status, message = server.ask("GET", f"/songs/{id}/mix.wav?vocals=1&start=9")
    assert status == 400 and "starts after the song's end" in message
    assert not [path for path in (server.songs / id).rglob("*") if path.name.startswith((WORK_PREFIX, "mix"))]


@pytest.mark.slow
def test_a_mix_without_stems_is_refused(tmp_path: Path, short: bytes) -> None:
    with idle_server(tmp_path) as (client, songs, _):
        id, waiting = client.send(short), client.announce(short)
        threading.Thread(target=songs.run, daemon=True).start()
        client.wait_until_over(id)

        def ask(id: str) -> tuple[int, Any]:
            return client.ask("GET", f"/songs/{id}/mix.wav?vocals=1")

        assert ask(waiting) == (404, "'song.wav' has no stems yet: go back to the page")
        (tmp_path / id / "stems" / "vocals.flac").unlink()
        assert ask(id) == (410, "the stems of 'song.wav' are not here any more: send it again")
        client.ask("DELETE", f"/songs/{id}")
        assert ask(id) == (404, "this song is no longer on the server: send it again")
