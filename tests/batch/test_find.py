"""Files, folders and globs give the expected songs, and a note says what was skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import common
from helpers.common import needs_ffmpeg
from separation.audio.decode import decode
from separation.batch.find import Found, find
from separation.batch.job import Song
from separation.cli.main import main
from separation.errors import InputError
from separation.system.record import RECORD, Record, Written

DEMO = ("--recipe", "demo", "--device", "cpu")


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def write_stems(folder: Path, *names: str) -> None:
    make(folder, *names)
    (folder / RECORD).write_text(Record(files=[Written.of(name, folder / name) for name in names]).text())


def found_in(folder: Path, *given: str, output: str = "out") -> tuple[dict[str, str], Found]:
    """What is found, as the paths of songs and of their folders, below the folder and below the output."""
    found = find([str(folder / text) for text in given], folder / output)
    songs = {os.path.relpath(song.path, folder): os.path.relpath(song.folder, folder / output) for song in found.songs}
    return songs, found


def test_the_structure_of_a_folder_is_kept_without_hidden_files_other_suffixes_and_stems(tmp_path: Path) -> None:
    music = tmp_path / "music"
    make(music, "b.WAV", "a/1. intro.flac", "a/deep/c.mp3", ".hidden.wav", ".trash/d.wav", "cover.jpg", "stems/e.wav")
    found = find([str(music)], music / "stems")
    assert found.songs == [
        Song(music / "b.WAV", music / "stems" / "b"),
        Song(music / "a" / "1. intro.flac", music / "stems" / "a" / "1. intro"),
        Song(music / "a" / "deep" / "c.mp3", music / "stems" / "a" / "deep" / "c"),
    ]
    assert not found.failed


@pytest.mark.parametrize(
    "given, expected",
    [
        (["*.wav"], {"x.wav": "x"}),
        (["a/*"], {"a/y.wav": "y", "a/b/z.flac": "b/z"}),  # a folder that matches counts with everything below it
        (["**/*.wav"], {"x.wav": "x", "a/y.wav": "a/y"}),  # not the output folder
        (["**"], {"x.wav": "x", "a/y.wav": "a/y", "a/b/z.flac": "a/b/z"}),
        (["a/**/*.flac"], {"a/b/z.flac": "b/z"}),
        (["*/**"], {"a/y.wav": "a/y", "a/b/z.flac": "a/b/z"}),  # only folders
        (["*/"], {"a/y.wav": "a/y", "a/b/z.flac": "a/b/z"}),
        (["a/[bc]/?.flac"], {"a/b/z.flac": "b/z"}),
        (["a", "a/y.wav"], {"a/y.wav": "y", "a/b/z.flac": "b/z"}),  # once
        (["picture.jpg"], {"picture.jpg": "picture"}),  # named itself
        (["*/../x.wav"], {"a/../x.wav": "x"}),  # never above the output folder
    ],
)
def test_files_folders_and_globs_give_these_songs(
    given: list[str], expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "x.wav", "a/y.wav", "a/b/z.flac", "a/notes.txt", "picture.jpg", "out/w/bass.wav")
    monkeypatch.chdir(tmp_path)
    found = find(given, Path("out"))
    assert {str(song.path): str(song.folder.relative_to("out")) for song in found.songs} == expected
    assert not found.failed


@pytest.mark.parametrize(
    "given, expected",
    [
        ("odd [1].wav", {"odd [1].wav": "odd [1]"}),
        ("Album [2020]", {"Album [2020]/a.wav": "a", "Album [2020]/CD [1]/b.wav": "CD [1]/b"}),
        ("Album [2020]/*.wav", {"Album [2020]/a.wav": "a"}),
        ("Album [2020]/CD [1]/*", {"Album [2020]/CD [1]/b.wav": "b"}),
        ("*/CD [1]/b.wav", {"Album [2020]/CD [1]/b.wav": "Album [2020]/CD [1]/b"}),  # also behind a wildcard
        ("**/CD [1]/*", {"Album [2020]/CD [1]/b.wav": "Album [2020]/CD [1]/b"}),
        ("wh?t*/*.wav", {"wh?t*/c.wav": "c"}),
        ("Album [02]*", {"Album 0/d.wav": "Album 0/d"}),  # no such name: a pattern
    ],
)
def test_a_path_that_exists_is_taken_literally_even_with_wildcards(
    given: str, expected: dict[str, str], tmp_path: Path
) -> None:
    make(tmp_path, "odd [1].wav", "Album [2020]/a.wav", "Album [2020]/CD [1]/b.wav", "Album 0/d.wav", "wh?t*/c.wav")
    make(tmp_path, "what/e.wav", "odd 1.wav")
    songs, found = found_in(tmp_path, given)
    assert songs == expected
    assert not found.failed


def test_the_output_folder_may_be_above_the_songs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "x.wav", "a/y.wav")
    monkeypatch.chdir(tmp_path)
    assert find(["*.wav"], Path(".")).songs == [Song(Path("x.wav"), Path("x"))]
    assert find(["a"], Path(".")).songs == [Song(Path("a/y.wav"), Path("y"))]


@pytest.mark.parametrize(
    "given, error",
    [
        ("nothing.wav", "'{}' does not exist: check the path"),
        ("good.wav/nothing.wav", "'{}' does not exist: check the path"),
        ("x" * 300, "'{}' cannot be read (File name too long): check the path"),
        ("gone.wav", "'{}' is a link to 'elsewhere.wav', which does not exist: check the path"),
        ("*.ogg", "'{}' has no audio file: check the path"),
        ("empty", "'{}' has no audio file: check the path"),
        ("none/[ab]*.wav", "'{folder}/none' in '{}' does not exist: check the path"),
        ("stems/song", "'{}' has only stems that this program made: give the songs they came from"),
        ("stems", "'{}' has only stems that this program made: give the songs they came from"),
        ("stems/*/*.wav", "'{}' has only stems that this program made: give the songs they came from"),
    ],
)
def test_what_cannot_be_a_song_fails_with_the_reason_and_the_whole_path(given: str, error: str, tmp_path: Path) -> None:
    make(tmp_path, "good.wav")
    (tmp_path / "gone.wav").symlink_to("elsewhere.wav")
    (tmp_path / "empty").mkdir()
    write_stems(tmp_path / "stems" / "song", "vocals.wav", "stems.html")
    songs, found = found_in(tmp_path, given)
    path = tmp_path / given
    assert not songs
    assert [(each.path, each.error) for each in found.failed] == [(path, error.format(path, folder=tmp_path))]


@pytest.mark.parametrize("address", ["https://example.com/song.mp3", "HTTP://x/*.wav?a=[1]", "ftp://music/song.wav"])
def test_a_url_is_refused(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["separate", address, "-o", str(tmp_path / "out"), *DEMO]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {address!r} is a URL: download the song and give its file, or pipe it into `-`\n"
    )


def test_songs_that_would_share_a_folder_all_fail_and_say_what_to_do(tmp_path: Path) -> None:
    make(tmp_path, "good.wav", "twice.wav", "twice.flac", "a/twice.wav")
    songs, found = found_in(tmp_path, "good.wav", "twice.wav", "twice.flac", "a")
    assert list(songs) == ["good.wav"]
    assert [outcome.path.relative_to(tmp_path) for outcome in found.failed] == [
        Path("twice.wav"),
        Path("twice.flac"),
        Path("a/twice.wav"),
    ]
    assert len({outcome.error for outcome in found.failed}) == 1
    assert all(str(outcome.path) in found.failed[0].error for outcome in found.failed)
    assert found.failed[0].error.endswith("separate each with its own -o")


@pytest.mark.parametrize("platform, clash", [("linux", False), ("darwin", True), ("win32", True)])
def test_names_that_the_disk_takes_for_equal_clash(
    platform: str, clash: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, "a/Caf\u00e9.wav", "b/cafe\u0301.wav")
    monkeypatch.setattr(sys, "platform", platform)
    songs, found = found_in(tmp_path, "a", "b")
    assert (len(songs), len(found.failed)) == ((0, 2) if clash else (2, 0))


def test_the_folder_of_the_songs_is_refused_as_the_output(tmp_path: Path) -> None:
    make(tmp_path, "a/song.wav")
    with pytest.raises(InputError, match="is both the output folder and a folder of songs"):
        find([str(tmp_path / "a")], tmp_path / "a" / ".." / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_fails(tmp_path: Path) -> None:
    make(tmp_path, "a/x.wav", "y.wav")
    (tmp_path / "a").chmod(0)
    try:
        songs, found = found_in(tmp_path, ".")
        named = find([str(tmp_path / "a" / "x.wav")], tmp_path / "out").failed
        globbed = find([str(tmp_path / "a" / "*.wav")], tmp_path / "out").failed
    finally:
        (tmp_path / "a").chmod(0o700)
    assert list(songs) == ["y.wav"]
    (failed,) = found.failed
    assert failed.path == tmp_path / "a"
    assert failed.error == f"cannot read the folder {str(failed.path)!r} (Permission denied): check its permissions"
    assert globbed == [failed]
    assert "x.wav' cannot be read (Permission denied)" in named[0].error


def test_stems_beside_songs_are_not_songs(tmp_path: Path) -> None:
    make(tmp_path, "1.wav")
    write_stems(tmp_path / "stems" / "1", "vocals.wav", "instrumental.wav")
    for given in (".", "**/*.wav", "**"):
        songs, found = found_in(tmp_path, given)
        assert list(songs) == ["1.wav"]
        assert not found.failed and not found.note()


def test_skipped_files_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "music", "cover.jpg", "a/cover.JPG", "notes.txt", "README", ".hidden.jpg")
    monkeypatch.chdir(tmp_path)
    assert main(["separate", "music", "music/**/*", "-o", "out", *DEMO]) == 2
    assert caplog.messages == [
        "skipped 4 files without a suffix of audio or video (.jpg 2, .txt 1, no suffix 1): "
        "name a file or folder to include it"
    ]


def test_five_of_many_skipped_suffixes_are_named(tmp_path: Path) -> None:
    make(tmp_path, *(f"x.{letter}" for letter in "abcdef"))
    note = found_in(tmp_path, ".")[1].note()
    assert "6 files" in note and "(.a 1, .b 1, .c 1, .d 1, .e 1, …)" in note


def test_linked_folders_are_skipped_unless_named(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/x.wav", "music/y.wav")
    (tmp_path / "music" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "music" / "circle").symlink_to(tmp_path / "music")
    for given in ("music", "music/**", "music/**/*.wav"):
        songs, found = found_in(tmp_path, given)
        assert songs == {"music/y.wav": "y"}
        assert found.note().startswith(f"skipped 2 linked folders ({str(tmp_path / 'music' / 'circle')!r}, …): ")
    for given in ("music/link", "music/li*"):
        songs, found = found_in(tmp_path, given)
        assert list(songs) == ["music/link/x.wav"] and not found.note()


def test_a_linked_file_is_a_song(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/x.wav")
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "y.wav").symlink_to(tmp_path / "elsewhere" / "x.wav")
    assert found_in(tmp_path, "music")[0] == {"music/y.wav": "y"}


VIDEO = {".avi": (), ".mpg": (), ".wmv": (), ".ts": (), ".flv": (), ".3gp": ("-ar", "8000", "-ac", "1", "-c:a", "aac")}


@pytest.mark.slow
@needs_ffmpeg
def test_videos_in_a_folder_are_songs(tmp_path: Path) -> None:
    (tmp_path / "song.wav").write_bytes(common.song(0.3))
    (tmp_path / "videos").mkdir()
    for suffix, options in VIDEO.items():
        target = tmp_path / "videos" / f"of{suffix}{suffix}"
        subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "song.wav", *options, target], check=True)
    songs, found = found_in(tmp_path, "videos")
    assert set(songs.values()) == {f"of{suffix}" for suffix in VIDEO} and not found.note()
    for song in found.songs:
        with decode(song.path, tmp_path) as wave:
            assert wave.n_samples > 0.2 * wave.sample_rate
