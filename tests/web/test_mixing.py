"""Mixes of a song's stems: what may be asked for, and that they are exact."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.common import needs_ffmpeg, read
from helpers.page_server import Process, idle_server
from helpers.sounds import noise, samples_of, write
from helpers.videos import picture, video
from separation.audio.excerpt import Excerpt
from separation.errors import InputError
from separation.web.mixing import Mix
from separation.web.order import Order
from separation.web.queued import WORK_PREFIX, QueuedSong

N_SAMPLES = 44_100


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


@pytest.fixture
def clip(tmp_path: Path) -> QueuedSong:
    """A video whose stems are here."""
    stems = {"vocals": noise(N_SAMPLES), "instrumental": noise(2 * N_SAMPLES)[:, :N_SAMPLES]}
    made = video(tmp_path / "clip.mp4", write(tmp_path / "song.wav", stems["vocals"]))
    order, id = Order("Höhle.mp4", "wav", "demo", "vocals_instrumental"), "clip" * 5 + "ab"
    one = QueuedSong(id, order, made.stat().st_size, tmp_path / "songs" / id, "done", is_video=True)
    one.path.parent.mkdir(parents=True)
    made.rename(one.path)
    (one.folder / "stems").mkdir()
    for stem, samples in stems.items():
        one.files[f"{stem}.wav"] = write(one.folder / "stems" / f"{stem}.wav", samples)
    one.save()
    return one


@needs_ffmpeg
def test_a_mix_is_the_sound_of_the_songs_video(clip: QueuedSong, tmp_path: Path) -> None:
    with idle_server(tmp_path / "songs") as (client, _, _):
        assert client.status(clip.id)["video"] == ["vocals", "instrumental"]
        status, content = client.ask("GET", f"/songs/{clip.id}/video?instrumental=1")
        assert status == 200 and client.headers["Content-Type"] == "video/mp4"
        assert client.headers["Content-Disposition"].endswith("''H%C3%B6hle%20-%20instrumental.mp4")
        (tmp_path / "new.mp4").write_bytes(content)
        assert picture(tmp_path / "new.mp4") == picture(clip.path)
        sound, stem = (samples_of(path, tmp_path) for path in (tmp_path / "new.mp4", clip.files["instrumental.wav"]))
        n_samples = min(sound.shape[1], N_SAMPLES)
        assert n_samples > N_SAMPLES - 1024
        error, level = (sound - stem)[:, :n_samples].square().mean(), stem.square().mean()
        assert error < 0.25 * level  # AAC of noise; with another stem, it would be 2
        assert client.ask("GET", f"/songs/{clip.id}/video?instrumental=1&vocals=0.5")[0] == 200
        assert client.headers["Content-Disposition"].endswith("''H%C3%B6hle%20-%20mix.mp4")
    assert [path.name for path in clip.folder.iterdir() if path.name.startswith(WORK_PREFIX)] == []


@needs_ffmpeg
def test_a_video_needs_a_picture_its_file_ffmpeg_and_a_whole_mix(
    clip: QueuedSong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(query: str) -> tuple[int, Any]:
        with idle_server(tmp_path / "songs") as (client, _, _):
            return client.ask("GET", f"/songs/{clip.id}/video?{query}")

    assert ask("vocals=1&start=1") == (400, "a video is written whole: leave out start and end")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask("vocals=1") == (400, "a video needs ffmpeg: install it, or choose wav, flac or mp3")
    clip.path.unlink()
    assert ask("vocals=1") == (410, "the files of 'Höhle.mp4' are not here any more: send it again")
    clip.is_video = False
    clip.save()
    assert ask("vocals=1") == (404, "'Höhle.mp4' is no video that was separated whole: save a mix")


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
        assert ask(id) == (410, "the files of 'song.wav' are not here any more: send it again")
        client.ask("DELETE", f"/songs/{id}")
        assert ask(id) == (404, "this song is no longer on the server: send it again")
