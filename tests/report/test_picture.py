"""The picture of a mixture and its stems: content, scales, size and errors."""

import base64
import math
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from separation.errors import InputError, OutputError
from separation.report.picture import BANDS, COLUMNS, SHADES, STEM_COLOURS, Row, draw, magnification, time_ticks

SVG = "{http://www.w3.org/2000/svg}"
SAMPLE_RATE = 44100


def noise(seconds: float, gain: float = 0.1) -> torch.Tensor:
    return gain * torch.randn(2, round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))


def drawn(path: Path, rows: list[Row], title: str = "a song") -> ElementTree.Element:
    draw(path, rows, title=title)
    return ElementTree.parse(path).getroot()


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def pixels(root: ElementTree.Element) -> list[np.ndarray]:
    """Palette indices `[H, W]` of all embedded PNGs, decoded without a library."""
    images = []
    for element in root.iter(f"{SVG}image"):
        data = base64.b64decode(element.attrib["href"].removeprefix("data:image/png;base64,"), validate=True)
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        at, parts = 8, {}
        while at < len(data):
            (length,) = struct.unpack_from(">I", data, at)
            kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
            assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + body),)
            parts[kind] = body
            at += 12 + length
        width, height, depth, colours = struct.unpack_from(">IIBB", parts[b"IHDR"])
        assert (depth, colours, len(parts[b"PLTE"])) == (8, 3, 3 * SHADES)
        lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + width)
        assert (lines[:, 0] == 2).all()
        images.append(np.cumsum(lines[:, 1:], axis=0, dtype=np.uint8))
    return images


def test_the_picture_is_svg_with_every_rows_name_level_and_note(tmp_path: Path) -> None:
    rows = [Row(name, noise(1.0), SAMPLE_RATE, f"SDR {index}.5 dB") for index, name in enumerate(STEM_COLOURS)]
    root = drawn(tmp_path / "picture.svg", rows, "Title")
    assert root.tag == f"{SVG}svg"
    shown = texts(root)
    assert {"Title", "−20.0 dBFS", *STEM_COLOURS, *(row.note for row in rows)} <= set(shown)
    assert {"0.2 s", "1 kHz"} <= set(shown)


def test_each_row_has_a_spectrogram_of_the_right_size(tmp_path: Path) -> None:
    root = drawn(tmp_path / "picture.svg", [Row("mixture", noise(3.0), SAMPLE_RATE)] * 2)
    images = pixels(root)
    assert [image.shape for image in images] == [(BANDS, COLUMNS)] * 2
    assert all(image.max() == SHADES - 1 for image in images)


def test_a_sine_is_one_bright_line_at_its_frequency(tmp_path: Path) -> None:
    sine = torch.sin(2 * math.pi * 1000 * torch.arange(SAMPLE_RATE) / SAMPLE_RATE)[None]
    (image,) = pixels(drawn(tmp_path / "picture.svg", [Row("other", sine, SAMPLE_RATE)]))
    brightest = np.argmax(image[:, image.shape[1] // 2])
    mel_share = math.log10(1 + 1000 / 700) / math.log10(1 + 16000 / 700)
    assert abs(brightest - BANDS * (1 - mel_share)) <= 1


@pytest.mark.slow
def test_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    rows = [Row("mixture", noise(2.0), SAMPLE_RATE), Row("vocals", noise(2.0, 0.01), SAMPLE_RATE)]
    draw(tmp_path / "a.svg", rows, title="a song")
    draw(tmp_path / "b.svg", rows, title="a song")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.slow
def test_seven_rows_of_noise_stay_under_a_megabyte_and_a_half(tmp_path: Path) -> None:
    draw(tmp_path / "a.svg", [Row("mixture", noise(20.0), SAMPLE_RATE)] * 7, title="the worst to compress")
    assert (tmp_path / "a.svg").stat().st_size < 1_500_000


@pytest.mark.parametrize("samples", [1, 2, 700, 4095, 4097])
def test_short_audio_is_drawn(tmp_path: Path, samples: int) -> None:
    audio = torch.ones(1, samples)
    root = drawn(tmp_path / "picture.svg", [Row("mixture", audio, 8000), Row("other", 0 * audio, 8000)])
    assert "silent" in texts(root)


def test_the_spectrogram_of_audio_shorter_than_a_frame_reaches_its_end(tmp_path: Path) -> None:
    (image,) = pixels(drawn(tmp_path / "picture.svg", [Row("mixture", noise(0.02), SAMPLE_RATE)]))
    assert image[:, -1].max() > SHADES // 2


def test_a_quiet_waveform_is_labelled_with_its_magnification(tmp_path: Path) -> None:
    rows = [Row("mixture", noise(1.0), SAMPLE_RATE), Row("vocals", noise(1.0, 0.04), SAMPLE_RATE)]
    assert [text for text in texts(drawn(tmp_path / "picture.svg", rows)) if text.startswith("×")] == ["×2"]


def test_a_waveform_that_is_as_high_as_its_panel_but_for_rounding_is_not_magnified() -> None:
    assert magnification(0.9652709364891052, 0.9652709364891051) == 1
    assert magnification(0.0, 0.0) == magnification(0.0, 1.0) == 1
    assert magnification(0.25, 1.0) == 4


def test_any_text_gives_valid_xml_and_long_text_is_shortened(tmp_path: Path) -> None:
    odd = '<b> & "it\'s" \x00\x1b\udce9 🎵'
    row = Row(odd, noise(0.5), SAMPLE_RATE, "a note that is far too long for its place")
    shown = texts(drawn(tmp_path / "picture.svg", [row], odd))
    assert shown[0] == '<b> & "it\'s"     🎵'
    assert "a note that is far t…" in shown


@pytest.mark.parametrize(
    "seconds, ticks",
    [
        (10.1, [0, 2, 4, 6, 8]),  # a tick at 10 s would be at 99%
        (10.2, [0, 2, 4, 6, 8, 10]),  # 98%
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8.01, [0, 2, 4, 6]),
        (240, [0, 30, 60, 90, 120, 150, 180, 210]),
        (0.5, [0, 0.1, 0.2, 0.3, 0.4]),
        (4.9, [0, 1, 2, 3, 4]),
        (40 * 3600, [0, 18000, 36000, 54000, 72000, 90000, 108000, 126000]),
    ],
)
def test_ticks_are_round_times_clear_of_the_end(seconds: float, ticks: list[float]) -> None:
    assert time_ticks(seconds) == pytest.approx(ticks)


def test_rows_that_cannot_be_drawn_are_an_input_error(tmp_path: Path) -> None:
    for rows, words in (
        ([], "give at least one"),
        ([Row("drums", torch.zeros(100), SAMPLE_RATE)], r"'drums' has the shape \[100\]"),
        ([Row("drums", torch.zeros(2, 0), SAMPLE_RATE)], r"\[2, 0\]"),
        ([Row("drums", torch.full((2, 9), math.nan), SAMPLE_RATE)], "'drums' holds NaN"),
    ):
        with pytest.raises(InputError, match=words):
            draw(tmp_path / "picture.svg", rows, title="a song")
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_an_output_error_and_leaves_no_file(tmp_path: Path) -> None:
    rows = [Row("drums", noise(0.1), SAMPLE_RATE)]
    (tmp_path / "file").touch()
    (tmp_path / "folder.svg").mkdir()
    for path in (tmp_path / "file" / "a.svg", tmp_path / "folder.svg"):
        with pytest.raises(OutputError, match=r"cannot write|is a folder: remove it"):
            draw(path, rows, title="a song")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.svg"]
