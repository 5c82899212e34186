"""Separator with files: formats, levels, tags, cancellation, and what is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from helpers.common import GIVES_BACK, PROJECT, needs_ffmpeg, quick_first
from helpers.small_separators import QUICK, Recorder, random_model, read, write
from helpers.sounds import ffmpeg
from separation import EstimateError, InputError, ModelPool, OutputError, Separator
from separation.audio.metadata import read_metadata
from separation.audio.options import OutputOptions
from separation.engine.pool import LoadedModels
from separation.engine.recipes import resolve
from separation.system.output import OutputFolder
from separation.system.record import RECORD


def test_a_loud_stem_that_is_not_part_of_the_output_does_not_scale_the_others(clip: Tensor, tmp_path: Path) -> None:
    models = {name: Recorder(name, (name,), 100_000) for name in ("louder", "inverted")}
    for name, gain in (("louder", 3.0), ("inverted", -3.0)):
        models[name].gain.data.fill_(gain)
    pool = LoadedModels(models)
    recipe = resolve("test", "test", {"louder": "louder", "inverted": "inverted", "rest": "residual"})
    mixture = clip[:, :100_000] * 0.8 / clip[:, :100_000].abs().max()
    song = write(tmp_path / "song.wav", mixture)
    files = Separator(recipe, two_stems="rest", pool=pool, options=QUICK).separate_file(
        song, tmp_path / "out", OutputOptions(format="flac")
    )
    assert files.gain == 1
    assert (read(files["rest"]) - mixture).abs().max() <= 1e-5
    assert read(files["no_rest"]).abs().max() <= 1e-5


def test_nan_from_a_model_is_an_error_and_leaves_no_file(clip: Tensor, tmp_path: Path) -> None:
    model = random_model(("vocals",))
    with torch.no_grad():
        model.final_norm.gamma.fill_(float("nan"))
    song = write(tmp_path / "song.wav", clip[:, :50_000])
    with pytest.raises(EstimateError, match="NaN or Inf"):
        Separator.from_model(model).separate_file(song, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


def test_a_file_gives_the_stems_that_memory_gives(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    files = separator.separate_file(write(tmp_path / "song.wav", clip), tmp_path / "out")
    expected = separator.separate(clip)
    assert [path.name for path in files.values()] == ["vocals.wav", "instrumental.wav"]
    assert files.duration_seconds == pytest.approx(6)
    for stem, path in files.items():
        assert soundfile.info(path).subtype == "FLOAT"
        assert (read(path) - expected[stem]).abs().max() <= 1e-6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [RECORD, "instrumental.wav", "vocals.wav"]


@pytest.mark.parametrize("format, tolerance", quick_first([("wav", 1e-7), ("flac", 1e-6), ("mp3", 0.05)], 2))
@pytest.mark.parametrize("sample_rate", quick_first([44100, 48000], 1))
def test_every_format_and_rate_has_the_songs_length_and_sums_to_the_mixture(
    pool: ModelPool, clip: Tensor, tmp_path: Path, format: str, tolerance: float, sample_rate: int
) -> None:
    song = write(tmp_path / "song.wav", clip[:, :100_000])
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    files = separator.separate_file(song, tmp_path / "out", OutputOptions(format=format, sample_rate=sample_rate))
    stems = [read(path) for path in files.values()]
    expected = -(-100_000 * sample_rate // 44100)
    assert {stem.shape[1] for stem in stems} == {expected}
    if sample_rate == 44100:
        assert ((stems[0] + stems[1]) * (1 / files.gain) - clip[:, :100_000]).abs().max() <= tolerance


@pytest.mark.slow
def test_loud_stems_are_scaled_by_one_gain_in_flac_and_kept_in_wav(
    pool: ModelPool, clip: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    song = write(tmp_path / "song.wav", clip[:, :100_000] * 4)
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    wav = separator.separate_file(song, tmp_path / "wav")
    assert wav.gain == 1
    assert max(read(path).abs().max() for path in wav.values()) > 1
    flac = separator.separate_file(song, tmp_path / "flac", OutputOptions(format="flac"))
    assert flac.gain < 1
    assert "scaled by" in caplog.text
    for stem, path in flac.items():
        assert read(path).abs().max() <= 1
        assert (read(path) / flac.gain - read(wav[stem])).abs().max() <= 1e-5


def test_a_cancelled_run_leaves_no_file_and_the_next_run_is_right(
    pool: ModelPool, clip: Tensor, tmp_path: Path
) -> None:
    class CancelError(Exception):
        pass

    def cancel(share: float, stage: str) -> None:
        if share > 0.3:
            raise CancelError

    song = write(tmp_path / "song.wav", clip)
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    with pytest.raises(CancelError):
        separator.separate_file(song, tmp_path / "a" / "b", progress=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]
    shares: list[float] = []
    separator.separate_file(song, tmp_path / "out", progress=lambda share, stage: shares.append(share))
    assert shares == sorted(shares)
    assert shares[0] == 0 and shares[-1] == 1


def test_progress_covers_the_whole_job_and_names_each_stage_once(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", clip)
    separator = Separator("demo", "vocals_instrumental", options=QUICK, pool=pool)
    calls: list[tuple[float, str]] = []
    files = separator.separate_file(song, tmp_path / "out", progress=lambda *call: calls.append(call))
    shares = [share for share, _ in calls]
    assert shares == sorted(shares)
    assert calls[0] == (0, "decoding") and calls[-1] == (1, "done")
    stages = list(dict.fromkeys(stage for _, stage in calls))
    assert stages == ["decoding", "demo", "writing vocals", "writing instrumental", "done"]
    last = {stage: share for share, stage in calls}
    assert last["decoding"] == pytest.approx(0.05) and last["demo"] == pytest.approx(0.9)
    assert len({share for share, stage in calls if stage == "decoding"}) > 3
    assert len({share for share, stage in calls if stage == "demo"}) >= 3
    assert 0 < files.elapsed_seconds < 60
    assert files.times_realtime == pytest.approx(6 / files.elapsed_seconds)


def test_a_song_can_be_cancelled_while_it_is_decoded(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    class CancelError(Exception):
        pass

    def cancel(share: float, stage: str) -> None:
        if stage == "decoding" and share > 0:
            raise CancelError

    song = write(tmp_path / "song.wav", clip)
    with pytest.raises(CancelError):
        Separator("demo", pool=pool, options=QUICK).separate_file(song, tmp_path / "out", progress=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


@pytest.mark.slow
def test_an_interrupt_while_stems_are_written_is_not_lost_and_leaves_no_file(
    pool: ModelPool, clip: Tensor, tmp_path: Path
) -> None:
    class CancelError(Exception):
        pass

    def cancel(*_: object) -> None:
        raise CancelError

    def soon(share: float, stage: str) -> None:
        if stage == "writing vocals":
            signal.setitimer(signal.ITIMER_REAL, 0.02)

    song = write(tmp_path / "song.wav", clip)
    before = signal.signal(signal.SIGALRM, cancel)
    try:
        with pytest.raises(CancelError):
            Separator("demo", "all_6", pool=pool, options=QUICK).separate_file(
                song, tmp_path / "out", OutputOptions(format="mp3"), progress=soon
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [path.name for path in tmp_path.iterdir()] == ["song.wav"]


def test_stems_are_published_together_or_not_at_all(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", clip[:, :10_000])
    (tmp_path / "out" / "instrumental.wav" / "in the way").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"instrumental\.wav.*is a folder"):
        Separator("demo", "vocals_instrumental", pool=pool, options=QUICK).separate_file(song, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["instrumental.wav"]


def test_if_publishing_fails_the_older_stems_are_restored(tmp_path: Path) -> None:
    (tmp_path / "vocals.wav").write_text("older")
    with OutputFolder(tmp_path, overwrite=True, record=None) as output:
        (output.work / "vocals.wav").write_text("newer")
        parts = {"vocals": output.work / "vocals.wav", "instrumental": output.work / "not there.wav"}
        with pytest.raises(OutputError, match=r"not there\.wav"):
            output.publish(parts)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("vocals.wav", "older")]


@pytest.mark.slow
def test_newer_stems_replace_older_ones(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", clip[:, :10_000])
    separator = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK)
    for level in (1.0, 0.5):
        write(song, clip[:, :10_000] * level)
        files = separator.separate_file(song, tmp_path / "out")
        assert (read(files["vocals"]) + read(files["instrumental"]) - clip[:, :10_000] * level).abs().max() <= 1e-6
    assert len(list((tmp_path / "out").glob("*.wav"))) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to stop being root")
def test_a_folder_without_permission_is_an_error(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    separator, song = Separator("demo", "all_4", pool=pool, options=QUICK), write(tmp_path / "song.wav", clip[:, :1000])
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(OutputError, match=r"cannot write to .*Permission denied"):
            separator.separate_file(song, tmp_path / "a" / "out")
    finally:
        os.seteuid(0)


def test_an_unwritable_folder_is_an_error_that_names_it(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", clip[:, :1000])
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=r"cannot write to .*file"):
        Separator("demo", "all_4", pool=pool, options=QUICK).separate_file(song, tmp_path / "file" / "out")


MEASURE = """
import re, sys
from pathlib import Path
import torch
from separation import OutputOptions, Separator
from separation.engine.pool import LoadedModels
from separation.engine.recipes import resolve
from separation.models.base import Identity, SeparationModel

class Half(SeparationModel):
    channels = 2

    def __init__(self):
        stems = ("song", "again", "most")
        super().__init__(Identity(name="half", stems=stems, sample_rate=44100, chunk_samples=352800))
        self.gain = torch.nn.Parameter(torch.full((1,), 0.5))

    def forward(self, chunks):
        return (chunks * self.gain).unsqueeze(1).expand(-1, 3, -1, -1)

pool = LoadedModels({"half": Half()})
ensemble = {"max_fft": ["half after song", "half with 2 shifts", "residual after song"]}
recipe = resolve("test", "test", {"(song)": "half", "again": "half after song", "most": ensemble, "other": "residual"})
options = OutputOptions(format="flac", sample_rate=48000)
Separator(recipe, pool=pool).separate_file(sys.argv[1], sys.argv[2], options)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_song(tmp_path: Path) -> None:
    peaks = []
    for seconds in (30, 480):
        song = tmp_path / f"{seconds}.wav"
        with soundfile.SoundFile(song, "w", 44100, 2) as file:
            for _ in range(seconds // 30):
                file.write(torch.randn(30 * 44100, 2).numpy() * 0.1)
        run = [sys.executable, "-c", MEASURE, song, tmp_path / "out"]
        printed = subprocess.run(
            run, cwd=PROJECT, env=os.environ | GIVES_BACK, check=True, capture_output=True, text=True
        ).stdout
        peaks.append(int(printed))
    assert peaks[1] - peaks[0] <= 20_000, peaks  # KiB; the longer song alone has 160 MiB of float32


@pytest.mark.parametrize("title", quick_first(["Größe", ""], 1))
def test_the_stems_have_the_songs_tags_and_titles_with_the_names_of_the_stems(
    title: str, pool: ModelPool, clip: Tensor, tmp_path: Path
) -> None:
    song = tmp_path / "01 song.flac"
    with soundfile.SoundFile(song, "w", 44100, 2) as file:
        file.artist, file.album = "Band", "Album"
        if title:
            file.title = title
        file.write(clip[:, :44_100].T.numpy())
    for format in ("wav", "flac", "mp3"):
        files = Separator("demo", "vocals_instrumental", pool=pool, options=QUICK).separate_file(
            song, tmp_path / format, OutputOptions(format=format)
        )
        for stem, path in files.items():
            with soundfile.SoundFile(path) as file:
                tags = file.title, file.artist, file.album
            assert tags == (f"{title or '01 song'} ({stem})", "Band", "Album")


@pytest.mark.slow
@needs_ffmpeg
def test_a_stem_file_has_the_songs_name_and_its_tracks_sum_to_the_song(
    pool: ModelPool, clip: Tensor, tmp_path: Path
) -> None:
    song = write(tmp_path / "song.wav", clip[:, :100_001])
    separator = Separator("demo", "all_4", pool=pool, options=QUICK)
    files = separator.separate_file(song, tmp_path / "out", OutputOptions("stem.mp4", bitrate="lossless"))
    assert files == {"stems": tmp_path / "out" / "song.stem.mp4"}
    visible = [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    assert visible == ["song.stem.mp4"]
    tracks = []
    for number in range(5):
        ffmpeg(files["stems"], tmp_path / "track.wav", "-map", f"0:a:{number}", "-c:a", "pcm_s24le")
        tracks.append(read(tmp_path / "track.wav"))
    assert (tracks[0] - clip[:, :100_001] * files.gain).abs().max() <= 2.0**-23
    assert (sum(tracks[1:]) - tracks[0]).abs().max() <= 5 * 2.0**-23
    stems = separator.separate(clip[:, :100_001])
    for track, stem in zip(tracks[1:], ("drums", "bass", "other", "vocals"), strict=True):
        assert (track - stems[stem] * files.gain).abs().max() <= 2.0**-22


def test_a_stem_file_of_two_stems_is_refused_before_any_work(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", clip[:, :1000])
    with pytest.raises(InputError, match=r"holds four stems, not 2|needs ffmpeg"):
        Separator("demo", pool=pool, options=QUICK).separate_file(song, tmp_path / "out", OutputOptions("stem.mp4"))
    assert not (tmp_path / "out").exists()


@needs_ffmpeg
def test_tags_cover_and_one_channel_go_from_a_mono_song_to_its_stems(
    pool: ModelPool, clip: Tensor, tmp_path: Path
) -> None:
    write(tmp_path / "plain.wav", clip[:1, :50_000])
    tags = ("-metadata", "title=T", "-metadata", "genre=Rock", "-metadata", "composer=C")
    ffmpeg(tmp_path / "plain.wav", tmp_path / "song.flac", *tags)
    separator = Separator("demo", pool=pool, options=QUICK)
    files = separator.separate_file(
        tmp_path / "song.flac", tmp_path / "out", OutputOptions("flac", channels="source", name="{song}/{stem}.{ext}")
    )
    assert files["vocals"] == tmp_path / "out" / "song" / "vocals.flac"
    assert soundfile.info(files["vocals"]).channels == 1
    found = read_metadata(files["vocals"])
    assert found.tags == {"title": "T (vocals)", "genre": "Rock", "composer": "C"}


def test_a_reaper_project_lies_beside_the_stems_and_names_them(pool: ModelPool, clip: Tensor, tmp_path: Path) -> None:
    song = write(tmp_path / "song.wav", clip[:, :44_100])
    options = OutputOptions(reaper=True, name="{song}/{stem}/{stem}.{ext}")
    files = Separator("demo", pool=pool, options=QUICK).separate_file(song, tmp_path / "out", options)
    assert files["project"] == tmp_path / "out" / "song" / "stems.rpp"
    text = files["project"].read_text()
    for stem in ("vocals", "instrumental"):
        assert files[stem] == tmp_path / "out" / "song" / stem / f"{stem}.wav"
        assert f'FILE "{stem}/{stem}.wav"' in text
    assert text.count("LENGTH 1\n") == 2
    files["project"].write_text(text + " ")  # somebody has worked on it
    with pytest.raises(OutputError, match="already exists"):
        Separator("demo", pool=pool, options=QUICK).separate_file(song, tmp_path / "out", options)


def test_a_song_without_a_picture_gives_no_video_and_is_refused_before_any_work(
    pool: ModelPool, clip: Tensor, tmp_path: Path
) -> None:
    song = write(tmp_path / "song.wav", clip[:, :1000])
    separator = Separator("demo", pool=pool, options=QUICK)
    for video, words in (
        ("vocals", "has no picture|needs ffmpeg"),
        ("drums", "'drums': choose from vocals, instrumental"),
    ):
        with pytest.raises(InputError, match=words):
            separator.separate_file(song, tmp_path / "out", OutputOptions(video=video))
    assert not (tmp_path / "out").exists()
