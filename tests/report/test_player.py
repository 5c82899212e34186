"""Pages with a player are filled from their templates: shared style and script, data, and sound in segments."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from separation.audio.waveform import SAMPLE_RATE, Waveform
from separation.progress import Progress
from separation.report.player import SEGMENT_SAMPLES, Picture, Sound, write_page
from separation.system.threads import Threads


@pytest.mark.parametrize("template", ["report.html", "compare.html"])
def test_a_page_has_style_script_data_and_sound_inside(template: str, tmp_path: Path) -> None:
    sine = torch.sin(2 * np.pi * 441 * torch.arange(SEGMENT_SAMPLES + 100) / SAMPLE_RATE).expand(2, -1)
    with Waveform(tmp_path) as loud, Waveform(tmp_path) as other, Threads() as pool:
        loud.append(0.8 * sine)
        other.append(0.8 * sine)
        sound = Sound([loud, other], [0.5, 1.0])
        assert sound.times()["seconds"] == (SEGMENT_SAMPLES + 100) / SAMPLE_RATE
        write_page(tmp_path / "page.html", template, {"title": "</script>"}, sound, pool, Progress())
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"/\* (style|player|song) \*/|<!-- sound -->", text)
    assert text.count("class Player ") == 1 and text.count(":root {") == 2 and r'"\u003c/script>"' in text
    pieces = dict(re.findall(r'<script type="text/plain" id="sound-(\d-\d)">([^<]*)<', text))
    assert list(pieces) == ["0-0", "1-0", "0-1", "1-1"]
    halved, whole = (soundfile.read(io.BytesIO(base64.b64decode(pieces[name])))[0] for name in ("0-0", "1-0"))
    assert np.abs(halved).max() == pytest.approx(0.4, rel=0.05)
    assert np.abs(whole).max() == pytest.approx(0.8, rel=0.05)


def test_a_picture_shows_each_column_once(tmp_path: Path) -> None:
    with Waveform(tmp_path) as wave:
        wave.append(torch.tensor([[0.5, 0.5, -1.0, 0.25]]).expand(2, -1))
        picture = Picture.of(wave, [0, 2, 4])
    assert picture.high.tolist() == [0.5, 0.25] and picture.low.tolist() == [0.5, -1.0]
    assert picture.rms.tolist() == pytest.approx([0.5, np.sqrt((1 + 0.0625) / 2)])
