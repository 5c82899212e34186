"""Folders of stems are found and scored, and recordings are subtracted from each other."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from helpers.song_parts import song_parts
from separation.cli.main import main
from separation.errors import InputError
from separation.evaluation.evaluate import Evaluation, evaluate, find_songs, null
from separation.evaluation.metrics import sdr

RATE = 44100


def write(folder: Path, stems: dict[str, np.ndarray], suffix: str = ".wav", rate: int = RATE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, audio in stems.items():
        soundfile.write(folder / f"{stem}{suffix}", audio, rate, **({"subtype": "FLOAT"} if suffix == ".wav" else {}))


def cut(stems: dict[str, np.ndarray], start: float, stop: float) -> dict[str, np.ndarray]:
    return {stem: audio[int(start * RATE) : int(stop * RATE)] for stem, audio in stems.items()}


def mixed(stems: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return stems | {"mixture": np.sum(list(stems.values()), axis=0)}


def with_error(stems: dict[str, np.ndarray], error: float) -> dict[str, np.ndarray]:
    return {stem: (1 + error) * audio for stem, audio in stems.items()}


NUMBER = re.compile(r"-?\d+\.\d+")


def numbers(line: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(line)]


def without_numbers(line: str) -> str:
    return NUMBER.sub("#", line)


def report(references: Path, estimates: Path) -> Evaluation:
    return evaluate(find_songs(references), find_songs(estimates))


def test_without_museval_the_table_says_what_to_install(tmp_path: Path, stems: dict[str, np.ndarray]) -> None:
    write(tmp_path, cut(stems, 0, 2))
    assert "pip install" in str(report(tmp_path, tmp_path)).splitlines()[-1]


@pytest.mark.slow
def test_one_command_separates_and_scores_a_folder_like_musdb18_hq(
    tmp_path: Path, stems: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, start, stop in (("One - First", 0, 5), ("Two - Second", 5, 10), ("Three - Third", 8, 13)):
        write(tmp_path / "musdb18hq" / "test" / name, mixed(cut(stems, start, stop)))
    write(tmp_path / "musdb18hq" / "train" / "Four - Not this", mixed(cut(stems, 0, 5)))
    command = ["evaluate", "--references", str(tmp_path / "musdb18hq" / "test"), "--recipe", "demo", "--stems", "all_4"]
    assert main([*command, "--device", "cpu", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["songs"]) == ["One - First", "Three - Third", "Two - Second"]
    for stem in stems:
        for name, least in (("sdr_musdb_db", 0), ("sdr_mdx23_db", 2), ("si_sdr_db", 0)):
            values = [song[stem][name] for song in printed["songs"].values()]
            assert min(values) > least, (stem, name)
            assert printed["median"][stem][name] == sorted(values)[1]
            assert printed["mean"][stem][name] == pytest.approx(sum(values) / 3, abs=1e-3)


@pytest.mark.slow
def test_the_files_of_separate_score_like_the_engines_output(
    tmp_path: Path, stems: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    references, out = tmp_path / "true", tmp_path / "out"
    write(references / "song", cut(stems, 0, 4))
    write(tmp_path, {"song": mixed(cut(stems, 0, 4))["mixture"]})
    options = ["--recipe", "demo", "--device", "cpu"]
    assert main(["separate", str(tmp_path / "song.wav"), "-o", str(out), *options]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--references", str(references), "--estimates", str(out)]) == 0
    given = capsys.readouterr().out
    assert main(["evaluate", "--references", str(references), *options]) == 0
    again = capsys.readouterr().out  # here the mixture is the sum of the references
    head, *rows, _ = given.splitlines()  # the last line says what to install
    for one, other in zip(given.splitlines(), again.splitlines(), strict=True):
        assert without_numbers(one) == without_numbers(other)
        assert numbers(one) == pytest.approx(numbers(other), abs=0.02)  # the sum is rounded differently
    assert head.split() == ["song", "stem", "SDR", "MUSDB", "SDR", "MDX23", "SI-SDR", "SIR", "SAR"]
    assert [row.split()[:2] for row in rows] == [["song", "instrumental"], ["song", "vocals"]]
    true = sum(audio for stem, audio in cut(stems, 0, 4).items() if stem != "vocals")
    estimate = soundfile.read(out / "song" / "instrumental.wav", dtype="float32")[0]
    assert float(rows[0].split()[3]) == pytest.approx(sdr(torch.from_numpy(true), torch.from_numpy(estimate)), abs=0.01)


def write_song(tmp_path: Path, *without: str) -> list[str]:
    """The reference of a song, its estimate and its mixture as files; the arguments to score them."""
    parts = {name: samples.T for name, samples in song_parts().items() if name not in without}
    write(tmp_path / "true", {"vocals": parts["reference"]} | {k: v for k, v in parts.items() if k == "mixture"})
    write(tmp_path / "estimated", {"vocals": parts["estimate"]})
    return ["evaluate", "--references", str(tmp_path / "true"), "--estimates", str(tmp_path / "estimated")]


def test_all_scores_of_files_equal_those_of_music_source_separation_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = write_song(tmp_path)
    assert main([*command, "--scores", "all", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["songs"].values()
    names = ("bleedless", "fullness", "log_wmse", "l1_freq", "mrstft")
    recorded = [17.4431, 49.1454, 20.0224, 59.5086, 2.3356]  # see test_spectral.py and test_log_wmse.py
    assert [found["vocals"][name] for name in names] == pytest.approx(recorded, abs=2e-4)
    assert list(found["vocals"])[:5] == ["sdr_musdb_db", "sdr_mdx23_db", "si_sdr_db", "sir_db", "sar_db"]


def test_only_the_scores_asked_for_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = write_song(tmp_path)
    assert main([*command, "--scores", "bleedless,fullness,sdr"]) == 0
    head, row = capsys.readouterr().out.splitlines()  # and no hint to install museval
    assert head.split() == ["song", "stem", "SDR", "MUSDB", "SDR", "MDX23", "bleedless", "fullness"]
    assert row.split()[-2:] == ["17.44", "49.15"]
    assert main([*command, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["songs"].values()
    assert list(found["vocals"]) == ["sdr_musdb_db", "sdr_mdx23_db", "si_sdr_db", "sir_db", "sar_db"]


def test_without_a_mixture_log_wmse_is_relative_to_the_sum_of_the_references(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = write_song(tmp_path, "mixture")
    parts = {name: samples.T for name, samples in song_parts().items()}
    write(tmp_path / "true", {"instrumental": parts["mixture"] - parts["reference"]})
    assert main([*command, "--scores", "log_wmse", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["songs"].values()
    assert found["vocals"] == {"log_wmse": pytest.approx(20.0224, abs=2e-4)}


def test_an_unknown_score_is_a_one_line_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--references", "a", "--scores", "sdr,loudness"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'loudness' is not a score: choose from sdr, si_sdr, " in line


@pytest.mark.parametrize("suffix", [".flac", ".mp3"])
def test_estimates_may_be_flac_or_mp3(tmp_path: Path, stems: dict[str, np.ndarray], suffix: str) -> None:
    short = cut(stems, 0, 3)
    write(tmp_path / "true" / "song", short)
    write(tmp_path / "estimated" / "song", with_error(short, -0.1), suffix)
    for score in report(tmp_path / "true", tmp_path / "estimated").songs["song"].values():
        assert score.sdr_mdx23_db == pytest.approx(20, abs=0.1 if suffix == ".flac" else 6)


def test_other_sample_rates_are_scored_at_44100_hertz(tmp_path: Path) -> None:
    seconds = np.arange(2 * 48000) / 48000
    tones = {stem: np.sin(2 * np.pi * pitch * seconds) / 4 for stem, pitch in (("vocals", 440), ("drums", 1000))}
    write(tmp_path / "true", tones, rate=48000)
    write(tmp_path / "estimated", {stem: 0.9 * audio[:: 48000 // 16000] for stem, audio in tones.items()}, rate=16000)
    for score in report(tmp_path / "true", tmp_path / "estimated").songs["true"].values():
        assert score.sdr_mdx23_db == pytest.approx(20, abs=0.1)


def test_an_estimate_of_no_drums_is_scored_and_affects_no_other_score(
    tmp_path: Path, stems: dict[str, np.ndarray]
) -> None:
    short = {stem: audio.copy() for stem, audio in cut(stems, 0, 2).items()}
    short["bass"][RATE:] = 0  # so only the first second counts when scored with the others
    others = sum(audio for stem, audio in short.items() if stem != "drums")
    error = np.repeat([0.9, 0.99], RATE)[:, None]
    estimates = {stem: error * audio for stem, audio in (short | {"no_drums": others}).items()}
    write(tmp_path / "true" / "song", mixed(short))
    write(tmp_path / "five" / "song", estimates)
    estimates.pop("no_drums")
    write(tmp_path / "four" / "song", estimates)
    four, five = (report(tmp_path / "true", tmp_path / name).songs["song"] for name in ("four", "five"))
    assert five.pop("no_drums").sdr_musdb_db == pytest.approx(30, abs=1e-3)
    assert [score.sdr_musdb_db for score in five.values()] == pytest.approx([20] * 4, abs=1e-3)
    assert str(five) == str(four)  # as text, because NaN is not equal to itself


def test_small_differences_in_length_are_padded_or_cut(tmp_path: Path, stems: dict[str, np.ndarray]) -> None:
    short = cut(stems, 0, 2)
    write(tmp_path / "true", short)
    write(tmp_path / "long", cut(stems, 0, 2.09))
    assert report(tmp_path / "true", tmp_path / "long").songs["true"]["bass"].sdr_mdx23_db == math.inf
    write(tmp_path / "short", cut(stems, 0, 1.91))
    assert 0 < report(tmp_path / "true", tmp_path / "short").songs["true"]["bass"].sdr_mdx23_db < 20


@pytest.mark.parametrize("seconds", [1.89, 2.11])
def test_a_difference_in_length_of_more_than_a_tenth_of_a_second_is_an_error(
    seconds: float, tmp_path: Path, stems: dict[str, np.ndarray]
) -> None:
    write(tmp_path / "true", cut(stems, 0, 2))
    write(tmp_path / "estimated", cut(stems, 0, seconds))
    with pytest.raises(InputError, match=r"is 0\.1 s (longer|shorter) than"):
        report(tmp_path / "true", tmp_path / "estimated")


def test_a_no_stem_reference_is_not_part_of_another_reference(tmp_path: Path, stems: dict[str, np.ndarray]) -> None:
    short = cut(stems, 0, 2)
    without = {f"no_{left_out}": sum(short[stem] for stem in short if stem != left_out) for left_out in short}
    write(tmp_path / "true", short | {"no_drums": without["no_drums"]})
    write(tmp_path / "estimated", {"no_bass": without["no_bass"]})
    assert report(tmp_path / "true", tmp_path / "estimated").songs["true"]["no_bass"].sdr_mdx23_db > 100


def test_an_undefined_score_is_shown_as_n_a_and_does_not_count_in_the_median(
    tmp_path: Path, stems: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    short = cut(stems, 0, 2)
    for name, error, silent in (("a", -0.1, "vocals"), ("b", -0.1, ""), ("c", -0.01, "")):
        write(tmp_path / "true" / name, {stem: audio * (stem != silent) for stem, audio in short.items()})
        write(tmp_path / "estimated" / name, with_error(short, error))
    command = ["evaluate", "--references", str(tmp_path / "true"), "--estimates", str(tmp_path / "estimated")]
    assert main(command) == 0
    rows = {tuple(row.split()[:2]): row.split()[2:] for row in capsys.readouterr().out.splitlines()}
    assert rows["a", "vocals"] == ["n/a"] * 5
    assert rows["median", "vocals"][1] == "30.00"
    assert rows["median", "bass"][1] == "20.00"
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["songs"]["a"]["vocals"]["sdr_mdx23_db"] is None
    assert printed["songs"]["a"]["bass"]["si_sdr_db"] == "inf" or printed["songs"]["a"]["bass"]["si_sdr_db"] > 100


def spoil(kind: str, true: Path, estimated: Path) -> None:
    song = estimated / "one"
    if kind == "no estimates":
        shutil.rmtree(song)
    elif kind == "no reference":
        (true / "one" / "bass.wav").unlink()
    elif kind == "no estimate":
        (song / "bass.wav").unlink()
    elif kind == "longer":
        write(song, {"bass": np.zeros((4 * RATE, 2))})
    elif kind == "twice":
        write(song, {"bass": np.zeros((RATE, 2))}, ".flac")
    elif kind == "same name":
        shutil.copytree(song, estimated / "more" / "one")
    elif kind == "empty":
        shutil.rmtree(true)
        true.mkdir()
    elif kind == "no folder":
        shutil.rmtree(true)
    elif kind == "damaged":
        (song / "bass.wav").write_text("words")


@pytest.mark.parametrize(
    "kind, words",
    [
        ("no estimates", ["'one'", "has no estimates", "leave it out"]),
        ("no reference", ["'one'", "no reference", "'bass'"]),
        ("no estimate", ["'one'", "no estimate of 'bass'"]),
        ("longer", ["one is left out", "bass.wav", "1.0 s longer", "'one'"]),
        ("twice", ["'bass.flac' and 'bass.wav'", "the same stem"]),
        ("same name", ["more than one song 'one'"]),
        ("empty", ["has no audio files"]),
        ("no folder", ["is not a folder"]),
        ("damaged", ["bass.wav", "not audio"]),
    ],
)
def test_folders_that_do_not_match_are_a_one_line_error_and_exit_code_2(
    tmp_path: Path, stems: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str], kind: str, words: list[str]
) -> None:
    true, estimated = tmp_path / "true", tmp_path / "estimated"
    for folder in (true, estimated):
        for name in ("one", "two"):
            write(folder / name, cut(stems, 0, 3))
    spoil(kind, true, estimated)
    assert main(["evaluate", "--references", str(true), "--estimates", str(estimated)]) == 2
    captured = capsys.readouterr()
    scored = {row.split()[0] for row in captured.out.splitlines()[1:]} - {"SIR"}  # the first word of the hint
    assert scored == ({"two"} if kind in ("longer", "damaged") else set())
    assert len(captured.err.splitlines()) == 1
    assert all(word in captured.err for word in words), captured.err


def test_missing_references_are_reported_before_anything_is_separated(
    tmp_path: Path, stems: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "song", cut(stems, 0, 3))
    command = ["evaluate", "--references", str(tmp_path), "--recipe", "demo", "--device", "cpu"]
    assert main([*command, "--stems", "all_6"]) == 2
    assert "no reference for the stem 'guitar'" in capsys.readouterr().err


def test_estimates_and_a_recipe_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--references", "a", "--estimates", "b", "--recipe", "demo"]) == 2
    assert "--estimates does not take --recipe" in capsys.readouterr().err


# The null test


def test_null_ignores_the_format_and_measures_different_samples(
    tmp_path: Path, stems: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    short = {stem: np.round(audio * 2**15) / 2**15 for stem, audio in cut(stems, 0, 1).items()}
    write(tmp_path / "a" / "song", short)
    write(tmp_path / "b" / "song", short, ".flac")
    assert main(["null", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.splitlines() == [f"song/{stem}: identical" for stem in sorted(short)]
    write(tmp_path / "a" / "song", {"bass": short["bass"] + 0.001})
    assert main(["null", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "song/bass: peak -60.0 dBFS, RMS -60.0 dBFS"


def test_null_of_stems_and_a_mixture_compares_their_sum(tmp_path: Path, stems: dict[str, np.ndarray]) -> None:
    short = {stem: np.round(audio * 2**15) / 2**15 for stem, audio in cut(stems, 0, 1).items()}
    write(tmp_path / "stems", mixed(short))
    (sum_,) = null(tmp_path / "stems", tmp_path / "stems" / "mixture.wav")
    assert str(sum_) == "sum of bass, drums, other, vocals: identical"
    (tmp_path / "stems" / "bass.wav").unlink()
    (rest,) = null(tmp_path / "stems", tmp_path / "stems" / "mixture.wav")
    assert rest.peak_dbfs == pytest.approx(20 * math.log10(np.abs(short["bass"]).max()), abs=1e-6)
    assert rest.rms_dbfs == pytest.approx(10 * math.log10(np.square(short["bass"], dtype="float64").mean()), abs=1e-6)


@pytest.mark.parametrize(
    "other, rate, words",
    [
        ({"vocals": RATE, "bass": RATE}, RATE, ["has no 'drums'"]),
        ({"vocals": RATE, "drums": RATE + 1}, RATE, ["44100 samples", "44101", "equal length"]),
        ({"vocals": RATE, "drums": RATE}, 48000, ["48000 Hz"]),
        ({}, RATE, ["has no audio files"]),
    ],
)
def test_null_of_recordings_that_do_not_match_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, int], rate: int, words: list[str]
) -> None:
    write(tmp_path / "a", {"vocals": np.zeros((RATE, 2)), "drums": np.zeros((RATE, 2))})
    write(tmp_path / "b", {name: np.zeros((length, 2)) for name, length in other.items()}, rate=rate)
    assert main(["null", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(word in captured.err for word in words), captured.err
