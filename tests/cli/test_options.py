"""Options that cannot be used, or have no effect, are refused in one line."""

from pathlib import Path

import pytest

from helpers.command_line import assert_refused, separate, write_songs
from separation.cli.main import main


@pytest.mark.parametrize(
    "options, words",
    [
        (("--overlap", "8"), ("overlap (8 s)", "the chunk of demo (8 s)", "a smaller overlap, or auto")),
        (("--overlap", "half"), ("--overlap", "'half' must be auto or a whole number of seconds")),
        (("--chunk-size", "4", "--overlap", "5"), ("overlap", "chunk size")),
        (("--chunk-size", "31"), ("chunk size 31 s", "4 to 30")),
        (("--recipe", "nonsense"), ("nonsense", "demo, ", "standard", "the path of a .yaml file")),
        (("--two-stems", "kazoo"), ("'kazoo'", "vocals, instrumental, drums, bass, other, guitar, piano")),
        (("--two-stems", "kazoo", "--model-name", "demo"), ("'kazoo'", "vocals, drums, bass, guitar, piano, other")),
        (("--stems", "all_7"), ("all_7", "all_4, all_6, vocals_instrumental")),
        (("--format", "wma"), ("wma", "wav")),
        (("--only", "kazoo"), ("'kazoo'", "vocals, instrumental, drums, bass, other, guitar, piano")),
        (("--only", "vocals", "--two-stems", "vocals"), ("--only and --two-stems cannot be combined",)),
        (("--name", "{song}.{ext}"), ("vocals", "instrumental", "put {stem} into the name")),
        (("--name", "../{stem}.{ext}"), ("could lead out of the output folder",)),
        (("--mp3-bitrate", "17", "--format", "mp3"), ("17", "320")),
        (("--batch-size", "-1"), ("--batch-size", "'-1'", "whole number")),
        (("--batch-size", "0"), ("batch size 0", "whole number")),
        (("--device", "abacus"), ("abacus", "auto, cpu, cuda")),
        (("--model-name", "nonsense"), ("nonsense", "models list")),
        (("--no-such-option",), ("--no-such-option", "--help")),
        (("--flac-depth", "24"), ("FLAC depth '24' does not apply to WAV",)),
        (("--mp3-bitrate", "320"), ("bitrate 320 does not apply to WAV",)),
        (("--format", "flac", "--wav-depth", "32f"), ("WAV depth '32f' does not apply to FLAC", "leave it out")),
        (("--format", "flac", "--mp3-bitrate", "320"), ("bitrate 320 does not apply to FLAC",)),
        (("--format", "mp3", "--wav-depth", "16"), ("WAV depth '16' does not apply to MP3",)),
        (("--format", "mp3", "--flac-depth", "16"), ("FLAC depth '16' does not apply to MP3",)),
        (("--format", "flac", "--flac-depth", "32f"), ("--flac-depth", "32f", "16", "24")),
        (("--ray", "auto", "--workers", "2"), ("--ray does not take --workers",)),
        (("--ray", "auto", "--gpus", "0"), ("--ray does not take --gpus",)),
        (("--gpus", "0,0"), ("--gpus", "'0,0' names GPU 0 twice")),
        (("--gpus", "0"), ("--gpus and device 'cpu' cannot be combined",)),
        (("--workers", "0"), ("--workers", "from 1 up")),
        (("--model-name", "demo", "--stems", "all_4"), ("--model-name", "cannot be combined with --stems")),
        (("--model-path", "x.ckpt", "--recipe", "sw"), ("--model-path", "cannot be combined with --recipe")),
        (("--model-dir", "models"), ("--model-dir needs --model-name",)),
        (("--model-path", "x.yaml"), ("x.yaml is a YAML file", "give it as --model-name")),
        (
            ("--model-name", "hdemucs_mmi", "--attention", "sdpa"),
            ("attention sdpa has no effect on hdemucs_mmi", "leave it out"),
        ),
        (("--model-name", "htdemucs", "--precision", "int8"), ("precision int8 has no effect on htdemucs",)),
        (
            ("--precision", "int8", "--attention", "sdpa"),
            ("precision int8 needs attention fused or auto, not sdpa",),
        ),
        (("--model-name", "htdemucs", "--chunk-size", "9"), ("chunk size 9 s alone has no effect on htdemucs",)),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_in_one_line(
    options: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_songs(tmp_path, "song.wav")
    code = separate(tmp_path / "song.wav", "-o", tmp_path / "out", *options)
    assert_refused(code, capsys, tmp_path / "out", *words)


@pytest.mark.parametrize(
    "arguments, words",
    [
        *(
            (("bench", "--cold-start", *other), f"--cold-start does not take {other[0]}")
            for other in (
                ("--runs", "2"),
                ("--seconds", "9"),
                ("--random-weights",),
                ("--batch-size", "2"),
                ("--chunk-size", "9"),
                ("--overlap", "2"),
                ("--attention", "sdpa"),
            )
        ),
        (("bench", "--random-weights", "--model-name", "demo", "--model-path", "x.ckpt"), "cannot be combined"),
        (("bench", "--model-name", "mdx_extra", "--attention", "sdpa"), "attention sdpa has no effect on mdx_extra"),
        (("bench", "--model-name", "htdemucs", "--chunk-size", "9"), "chunk size 9 s alone has no effect on htdemucs"),
        (
            ("evaluate", "--references", ".", "--model-name", "scnet_xl_ihf", "--attention", "sdpa"),
            "attention sdpa has no effect on scnet_xl_ihf",
        ),
        (("export", "demo", "x.onnx", "--random-weights", "--model-path", "x.ckpt"), "cannot be combined"),
        *(
            (("evaluate", "--references", ".", "--estimates", ".", *other), f"--estimates does not take {other[0]}")
            for other in (
                ("--recipe", "sw"),
                ("--stems", "all_4"),
                ("--model-name", "demo"),
                ("--model-dir", "x"),
                ("--model-path", "x.ckpt"),
                ("--chunk-size", "9"),
                ("--overlap", "2"),
                ("--batch-size", "2"),
                ("--attention", "sdpa"),
                ("--device", "cpu"),
                ("--precision", "fp32"),
            )
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_option_without_effect_beside_another_is_refused_in_one_line(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main(arguments), capsys, tmp_path / "out", words)
