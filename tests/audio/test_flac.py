import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from helpers.sounds import noise
from separation.audio import flac
from separation.audio.flac import FlacSong
from separation.errors import AudioError

N_SAMPLES = 50_000


class UnseekableSound(soundfile.SoundFile):
    """libsndfile cannot seek in a FLAC that begins in the middle of a song."""

    def seekable(self) -> bool:
        return False


def content(n_samples: int = N_SAMPLES) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(n_samples).T.numpy(), 44100, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def only_song(path: Path) -> FlacSong:
    (song,) = flac.find_songs(path)
    return song


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "song.flac").write_bytes(content())
    return tmp_path / "song.flac"


def test_the_format_of_a_song_is_in_its_streaminfo(path: Path) -> None:
    song = only_song(path)
    assert (song.sample_rate, song.channels, song.bits, song.total_samples) == (44100, 2, 16, N_SAMPLES)
    assert (song.start, song.end) == (0, path.stat().st_size)
    assert song.block_samples == 4096
    assert path.read_bytes()[song.first_frame :].startswith(b"\xff\xf8")


def test_joined_songs_are_found_after_a_tag(tmp_path: Path) -> None:
    tag, first = b"ID3\4\0\0\0\0\0\4" + bytes(4), content()
    (tmp_path / "both").write_bytes(tag + first + content(3000))
    songs = flac.find_songs(tmp_path / "both")
    assert [song.total_samples for song in songs] == [N_SAMPLES, 3000]
    assert [song.start for song in songs] == [14, 14 + len(first)] and songs[0].end == songs[1].start


def test_other_files_have_no_songs(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"fLaC\0\0\0\x22")
    (tmp_path / "other").write_bytes(b"RIFF" + bytes(100))
    assert flac.find_songs(tmp_path / "short") == flac.find_songs(tmp_path / "other") == []


def test_an_intact_song_is_one_run_that_ends_as_announced(path: Path) -> None:
    song = only_song(path)
    (run,) = flac.find_runs(path, song, "'song.flac'")
    assert (run.sample, run.n_samples) == (0, N_SAMPLES)
    assert run.ranges == [(song.first_frame, song.end)]
    assert flac.ends_as_announced(path, song)
    assert flac.n_extra_bytes(path, song, [run]) == 0


def test_a_damaged_frame_separates_two_runs_that_are_each_a_valid_file(path: Path, tmp_path: Path) -> None:
    whole = soundfile.read(path, dtype="int16")[0]
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    song = only_song(path)
    first, second = flac.find_runs(path, song, "'song.flac'")
    assert (first.sample, second.sample + second.n_samples) == (0, N_SAMPLES)
    assert second.sample - first.n_samples == 4096
    for run in (first, second):
        pieces = flac.file_of(song, run)
        file = b"".join(piece if isinstance(piece, bytes) else damaged[slice(*piece)] for piece in pieces)
        with UnseekableSound(io.BytesIO(file)) as sound:
            samples = sound.read(run.n_samples, dtype="int16")
        assert np.array_equal(samples, whole[run.sample : run.sample + run.n_samples])


def test_a_song_that_is_cut_short_does_not_end_as_announced(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40_000])
    song = only_song(path)
    (run,) = flac.find_runs(path, song, "'song.flac'")
    assert run.n_samples < N_SAMPLES
    assert not flac.ends_as_announced(path, song)
    assert flac.n_extra_bytes(path, song, [run]) > 0


def test_a_tag_after_the_last_frame_is_not_extra(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"TAG" + bytes(125))
    song = only_song(path)
    runs = flac.find_runs(path, song, "'song.flac'")
    assert sum(run.n_samples for run in runs) == N_SAMPLES
    assert flac.n_extra_bytes(path, song, runs) == 0


def test_a_song_with_too_many_holes_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = bytearray(path.read_bytes())
    for at in range(len(damaged) // 4, len(damaged), len(damaged) // 4):
        damaged[at] ^= 4
    path.write_bytes(damaged)
    monkeypatch.setattr(flac, "_MAX_RUNS", 2)
    with pytest.raises(AudioError, match=r"'song\.flac' is damaged .*: get the file again"):
        flac.find_runs(path, only_song(path), "'song.flac'")
