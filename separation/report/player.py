"""What the pages with a player share: pictures of tracks, and one HTML file with style, script and sound inside.

The sound is MP3, which every browser decodes. It is cut into segments, because a phone has memory for some decoded
seconds of each track but not for a whole song. A page is a template with places for what the pages share (PARTS), its
data and the sound.
"""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from separation.audio.waveform import SAMPLE_RATE, Waveform, read_padded
from separation.models.stft import make_window
from separation.progress import Progress
from separation.report.picture import (
    COLUMNS,
    N_FFT,
    Floats,
    band_filters,
    level_text,
    magnification,
    spectrogram_base64,
    time_ticks,
)
from separation.system.threads import Threads

FOLDER = Path(__file__).parent
SEGMENT_SAMPLES = 10 * SAMPLE_RATE  # what the player decodes at once
LEAD_SAMPLES = SAMPLE_RATE // 10  # extra sound on both sides of a segment, for decoder delay and cross-fade
MP3_LEVEL = 0.5  # from 0 (best) to 1; about 100 kbit/s, variable
PARTS = {  # what stands for a file of this folder in a template
    "/* style */": "player.css",
    "/* files */": "files.js",
    "/* player */": "player.js",
    "/* tools */": "tools.js",
    "/* stretch */": "stretch.js",
    "<!-- transport -->": "transport.html",
    "<!-- lane -->": "lane.html",
}
FOR_A_SERVER = {  # in a page whose data names a server, as `mix`
    "/* fetched */": "fetched.js",
    "/* served mix */": "served_mix.js",
}
CONNECTS = "; connect-src 'self'"  # what such a page needs of the policy against other connections
WAVE_HEIGHT = 96  # height of the loudest sample; waveforms reach from -100 to 100


@dataclass(frozen=True)
class Picture:
    """What the waveform and the spectrogram of a track show in each column, over both channels."""

    low: Floats  # smallest sample, [columns]
    high: Floats  # largest sample, [columns]
    rms: Floats  # [columns]
    level: str
    energy: Floats  # [bands, columns], low bands first

    @classmethod
    def of(cls, wave: Waveform, edges: list[int]) -> "Picture":
        """Measure a track. Column i covers samples `[edges[i], edges[i + 1])`, at least one."""
        window = make_window("hann", N_FFT, torch.device("cpu"))
        filters = torch.from_numpy(band_filters(wave.sample_rate)).float()
        low, high, squares, energy = [], [], [], []
        for start, stop in pairwise(edges):
            padded = read_padded(wave, start - N_FFT // 2, stop + N_FFT // 2)
            samples = padded[:, N_FFT // 2 : -(N_FFT // 2)]
            low.append(float(samples.min()))
            high.append(float(samples.max()))
            squares.append(float(samples.square().mean()))
            frames = padded.unfold(1, N_FFT, N_FFT // 2) * window  # [2, N, N_FFT]
            energy.append(filters @ torch.fft.rfft(frames).abs().square().mean(dim=(0, 1)))
        mean_square = float(np.average(squares, weights=np.diff(edges)))
        return cls(
            low=np.array(low),
            high=np.array(high),
            rms=np.sqrt(squares),
            level=level_text(10 * math.log10(mean_square) if mean_square else -math.inf),
            energy=torch.stack(energy, dim=1).double().numpy(),
        )

    def drawn(self, peak: float, loudest: float) -> dict[str, Any]:
        """The data for report.html. `peak` fills a waveform's height; energy `loudest` has the brightest colour."""
        magnified = magnification(max(float(self.high.max()), -float(self.low.min())), peak)
        scale = WAVE_HEIGHT * magnified / peak
        outlines = {"low": self.low, "high": self.high, "rms": self.rms}
        return {
            "magnified": magnified,
            "spectrogram": spectrogram_base64(self.energy / loudest),
            **{name: np.round(values * scale).astype(int).tolist() for name, values in outlines.items()},
        }


@dataclass(frozen=True)
class Sound:
    """The tracks of a page and what each is multiplied by. MP3 clips beyond full scale."""

    waves: Sequence[Waveform]
    gains: Sequence[float]

    @property
    def n_samples(self) -> int:
        """The length of the longest track."""
        return max(wave.n_samples for wave in self.waves)

    def pictures(self, pool: Threads) -> list[Picture]:
        """A picture of each track."""
        edges = np.linspace(0, self.n_samples, min(COLUMNS, self.n_samples) + 1).astype(int).tolist()
        return list(pool.map(lambda wave: Picture.of(wave, edges), self.waves))

    def times(self) -> dict[str, Any]:
        """What the player has to know about the sound, in seconds and hertz."""
        seconds = self.n_samples / SAMPLE_RATE
        return {
            "seconds": seconds,
            "rate": SAMPLE_RATE,
            "segment": SEGMENT_SAMPLES / SAMPLE_RATE,
            "lead": LEAD_SAMPLES / SAMPLE_RATE,
            "ticks": time_ticks(seconds),
        }


def write_page(
    path: Path, template: str, data: Mapping[str, Any], sound: Sound, pool: Threads, progress: Progress
) -> None:
    """Fill the data and the sound into a template of this folder and write it to `path`. May raise OSError."""
    text = (FOLDER / template).read_text(encoding="utf-8")
    for place, name in PARTS.items():
        text = text.replace(place, (FOLDER / name).read_text(encoding="utf-8").rstrip())
    for place, name in FOR_A_SERVER.items():
        text = text.replace(place, (FOLDER / name).read_text(encoding="utf-8").rstrip() if data.get("mix") else "")
    text = text.replace(CONNECTS, CONNECTS if data.get("mix") else "")
    head, tail = text.split("<!-- sound -->")
    with path.open("w", encoding="utf-8") as page:
        page.write(head.replace("/* song */", json.dumps(data).replace("<", "\\u003c")))
        for number, start in enumerate(range(0, sound.n_samples, SEGMENT_SAMPLES)):
            progress(start / sound.n_samples, "writing the report")
            encode = _encoder(start, min(start + SEGMENT_SAMPLES, sound.n_samples))
            for index, encoded in enumerate(pool.map(encode, sound.waves, sound.gains)):
                page.write(f'<script type="text/plain" id="sound-{index}-{number}">{encoded}</script>\n')
        page.write(tail)


def _encoder(start: int, stop: int) -> Callable[[Waveform, float], str]:
    return lambda wave, gain: _mp3_base64(wave, start, stop, gain)


def _mp3_base64(wave: Waveform, start: int, stop: int, gain: float) -> str:
    """Samples `[start, stop)` and LEAD_SAMPLES on both sides, times `gain`, as MP3. MP3 clips beyond full scale."""
    samples = read_padded(wave, start - LEAD_SAMPLES, stop + LEAD_SAMPLES) * gain
    file = io.BytesIO()
    soundfile.write(
        file,
        samples.T.numpy(),
        wave.sample_rate,
        format="MP3",
        subtype="MPEG_LAYER_III",
        bitrate_mode="VARIABLE",
        compression_level=MP3_LEVEL,
    )
    return base64.b64encode(file.getvalue()).decode()
