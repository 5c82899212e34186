"""The listening page: one HTML file with pictures, levels and scores of a song and its stems, and a player.

This module fills the data into report.html, which draws and plays it. The sound is MP3, which every browser decodes. It
is cut into segments, because a phone has memory for some decoded seconds of each stem but not for a whole song.
"""

import base64
import io
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from separation.audio.decode import decode
from separation.audio.excerpt import Excerpt
from separation.audio.waveform import SAMPLE_RATE, Waveform, in_blocks, read_padded
from separation.errors import AudioError
from separation.models.stft import make_window
from separation.progress import Progress
from separation.report.picture import (
    COLUMNS,
    N_FFT,
    Floats,
    band_filters,
    colour_of,
    level_text,
    magnification,
    spectrogram_base64,
    time_ticks,
)
from separation.system.os_errors import output_errors
from separation.system.output import OutputFolder
from separation.system.record import RECORD
from separation.system.threads import Threads

PAGE = Path(__file__).with_name("report.html")
MAX_SECONDS = 20 * 60  # the longest song; with six stems, its page has about 160 MB
SEGMENT_SAMPLES = 10 * SAMPLE_RATE  # what the player decodes at once
LEAD_SAMPLES = SAMPLE_RATE // 10  # extra sound on both sides of a segment, for decoder delay and cross-fade
MP3_LEVEL = 0.5  # from 0 (best) to 1; about 100 kbit/s, variable
MEASURED = 0.3  # share of the progress bar for decoding and pictures; the rest is for the sound
WAVE_HEIGHT = 96  # height of the loudest sample; waveforms reach from -100 to 100


@dataclass(frozen=True)
class Report:
    """The contents of a listening page.

    Attributes:
        title: the page's title.
        mixture: the song's file.
        stems: stem -> its file.
        scores: stem -> its SDR in dB.
        links: text -> URL of the links at the top of the page.
        record: the name of the record that lists the page.
        excerpt: the part of the song of which these are the stems; None means the whole song.
    """

    title: str
    mixture: Path
    stems: Mapping[str, Path]
    scores: Mapping[str, float] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    record: str = RECORD
    excerpt: Excerpt | None = None


def write_report(report: Report, target: Path, *, overwrite: bool = False, progress: Progress = Progress()) -> None:
    """Write the page to `target`. Memory does not grow with the song. A failed run leaves no file behind.

    Raises:
        AudioError: a file cannot be read or lasts longer than MAX_SECONDS.
        OutputError: the page cannot be written. Without `overwrite`, a file that this program did not write is never
            replaced.
    """
    files = {"mixture": report.mixture, **report.stems}
    folder = OutputFolder(target.parent, overwrite=overwrite, record=report.record)
    with folder as output, ExitStack() as stack, Threads() as pool:
        output.check_targets([target.name], report.mixture)
        waves: list[Waveform] = []
        for path in files.values():
            progress(MEASURED * len(waves) / len(files), f"reading {path.name}")
            try:
                waves.append(
                    stack.enter_context(decode(path, output.work, max_seconds=MAX_SECONDS, accept_damaged=True))
                )
            except AudioError as e:
                raise AudioError(f"cannot make the report of {report.title!r}: {e}") from e
        if report.excerpt is not None:
            start, stop = report.excerpt.samples(waves[0])
            part = stack.enter_context(Waveform(output.work, sample_rate=waves[0].sample_rate))
            for block in in_blocks(waves[0], start, stop):
                part.append(block)
            waves[0] = part
        n_samples = max(wave.n_samples for wave in waves)
        peak = max(wave.peak for wave in waves) or 1.0
        edges = np.linspace(0, n_samples, min(COLUMNS, n_samples) + 1).astype(int).tolist()
        pictures = dict(zip(files, pool.map(lambda wave: _Picture.of(wave, edges), waves), strict=True))
        song = _page_data(report, pictures, n_samples, peak)
        head, tail = PAGE.read_text(encoding="utf-8").split("<!-- sound -->")
        written = output.work / target.name
        with output_errors(target), written.open("w", encoding="utf-8") as page:
            page.write(head.replace("/* song */", json.dumps(song).replace("<", "\\u003c")))
            for number, start in enumerate(range(0, n_samples, SEGMENT_SAMPLES)):
                progress(MEASURED + (1 - MEASURED) * start / n_samples, "writing the report")
                stop = min(start + SEGMENT_SAMPLES, n_samples)
                encode = partial(_mp3_base64, start=start, stop=stop, gain=min(1.0, 1 / peak))
                for index, sound in enumerate(pool.map(encode, waves)):
                    page.write(f'<script type="text/plain" id="sound-{index}-{number}">{sound}</script>\n')
            page.write(tail)
        progress(1.0, "done")
        output.publish({"report": written})


@dataclass(frozen=True)
class _Picture:
    """What the waveform and the spectrogram of a track show in each column, over both channels."""

    low: Floats  # smallest sample, [columns]
    high: Floats  # largest sample, [columns]
    rms: Floats  # [columns]
    level: str
    energy: Floats  # [bands, columns], low bands first

    @classmethod
    def of(cls, wave: Waveform, edges: list[int]) -> "_Picture":
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


def _page_data(report: Report, pictures: Mapping[str, _Picture], n_samples: int, peak: float) -> dict[str, Any]:
    """The data for report.html, without the sound. `peak` is that of all tracks; the first track is the mixture."""
    loudest = max(float(picture.energy.max()) for picture in pictures.values()) or 1.0
    sdrs = {name: f"SDR {sdr:.1f} dB".replace("-", "−") for name, sdr in report.scores.items()}
    tracks = [
        {
            "name": name,
            "mixture": index == 0,
            "colour": colour_of(name, index),
            "facts": [picture.level, *([sdrs[name]] if name in sdrs else [])],
            **picture.drawn(peak, loudest),
        }
        for index, (name, picture) in enumerate(pictures.items())
    ]
    return {
        "title": report.title,
        "seconds": n_samples / SAMPLE_RATE,
        "rate": SAMPLE_RATE,
        "segment": SEGMENT_SAMPLES / SAMPLE_RATE,
        "lead": LEAD_SAMPLES / SAMPLE_RATE,
        "ticks": time_ticks(n_samples / SAMPLE_RATE),
        "tracks": tracks,
        "links": dict(report.links),
    }


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
