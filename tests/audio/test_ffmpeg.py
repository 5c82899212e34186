import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.common import needs_ffmpeg
from helpers.sounds import assert_refused, ffmpeg, noise, samples_of, write
from separation.audio.waveform import SAMPLE_RATE


@needs_ffmpeg
def test_a_misleading_suffix_does_not_matter_to_ffmpeg(tmp_path: Path) -> None:
    source = write(tmp_path / "source.wav", noise(SAMPLE_RATE))
    path = ffmpeg(source, tmp_path / "song.wav", "-f", "ipod", "-c:a", "aac")
    assert abs(samples_of(path, tmp_path).shape[1] - SAMPLE_RATE) <= 1024


@needs_ffmpeg
def test_a_playlist_cannot_name_other_files(tmp_path: Path) -> None:
    ffmpeg(write(tmp_path / "source.wav", noise(SAMPLE_RATE)), tmp_path / "part.ts", "-c:a", "aac")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    subprocess.run(["ffprobe", "-v", "error", tmp_path / "list.m3u8"], check=True)  # ffmpeg as such follows it
    assert_refused(tmp_path / "list.m3u8", tmp_path, "not audio")


def test_without_ffmpeg_the_error_says_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    (tmp_path / "song.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(1000))
    assert_refused(tmp_path / "song.m4a", tmp_path, "install ffmpeg")
