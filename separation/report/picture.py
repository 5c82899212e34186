"""An SVG picture of a mixture and its stems: each row has a waveform on the left and a spectrogram on the right.

The file is self-contained: text and waveforms are vectors, spectrograms are embedded PNGs, written here with zlib.
"""

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from separation.errors import InputError
from separation.evaluation.metrics import level_dbfs
from separation.models.stft import Stft
from separation.system.os_errors import output_errors
from separation.system.output import OutputFolder

Floats = NDArray[np.float64]

# Layout, in pixels at the picture's natural size.
WIDTH = 1280
HEADER_HEIGHT = 92
ROW_HEIGHT = 100  # from one row to the next
PANEL_HEIGHT = 86
FOOTER_HEIGHT = 36
NAME_X = 32
WAVE_X, WAVE_WIDTH = 208, 476
SPECTRUM_X, SPECTRUM_WIDTH = 704, 490
FREQUENCY_X = SPECTRUM_X + SPECTRUM_WIDTH + 8
LABEL_CHARACTERS = 21  # of small text that fit beside a waveform

MAGNIFICATIONS = (1, 2, 4)  # quiet waveforms are magnified to be visible

PAGE, PANEL, EDGE, GRID = "#ffffff", "#f5f6fa", "#d9dde7", "#e4e7ef"
INK, SOFT_INK = "#1b2233", "#626b80"
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
STEM_COLOURS = {
    "mixture": "#4a5468",
    "vocals": "#e0446d",
    "instrumental": "#3565d8",
    "drums": "#e8792b",
    "bass": "#7a4fd6",
    "guitar": "#1f9d63",
    "piano": "#1d8fd1",
    "other": "#b8901c",
    "kick": "#c8452f",
    "snare": "#e8792b",
    "toms": "#b8901c",
    "hihat": "#1f9d63",
    "cymbals": "#1d8fd1",
}
OTHER_COLOURS = ("#8a4fa8", "#2a9d9a", "#c25b7c", "#5f7f2e")  # for other names, in turn

# The spectrogram: energy in mel-spaced bands, relative to the loudest band of all rows.
N_FFT = 4096
COLUMNS, BANDS = 760, 130
TOP_HERTZ = 16000
FREQUENCY_TICKS = {200: "200 Hz", 1000: "1 kHz", 4000: "4 kHz", 10000: "10 kHz"}
RANGE_DECIBELS = 70
SHADES = 96  # fewer: a smaller file; more: smoother colours
COLOUR_STOPS = ("#10122b", "#2c1d63", "#6b2a86", "#b53c7c", "#ea6458", "#fba85b", "#fdf3c8")  # from dark to light


@dataclass(frozen=True)
class Row:
    """A row of the picture. `note` is a short line below the level, such as "SDR 7.1 dB"; it may be empty."""

    name: str  # a stem or "mixture"; decides the colour
    audio: Tensor  # [C, T]
    sample_rate: int  # hertz
    note: str = ""


def colour_of(name: str, index: int) -> str:
    """The colour of a row by its name or, for an unknown name, by its index."""
    return STEM_COLOURS.get(name, OTHER_COLOURS[index % len(OTHER_COLOURS)])


def level_text(dbfs: float) -> str:
    """A level as the pictures show it; "silent" for minus infinity."""
    return f"{dbfs:.1f} dBFS".replace("-", "−") if math.isfinite(dbfs) else "silent"


def magnification(own_peak: float, peak: float) -> int:
    """How much to magnify a waveform with `own_peak` so that it fits a panel whose height is `peak`."""
    return max((factor for factor in MAGNIFICATIONS if 0 < own_peak * factor <= peak), default=1)


def spectrogram_base64(energy: Floats) -> str:
    """Relative energy `[bands, columns]` (1 is the loudest; low bands first) as a PNG in base64."""
    decibels = 10 * np.log10(np.maximum(energy, 1e-12))
    shades = np.clip(1 + decibels / RANGE_DECIBELS, 0, 1) * (SHADES - 1)
    return base64.b64encode(_png(np.round(shades[::-1]).astype(np.uint8), _palette())).decode()


def draw(path: Path, rows: Sequence[Row], *, title: str, overwrite: bool = False) -> None:
    """Write the picture to `path` as SVG. The file appears complete or not at all.

    All rows share the scales of time, frequency, decibels and amplitude, so that they can be compared by eye. Quiet
    waveforms are magnified and labelled with the factor. Equal rows give equal files.

    Raises:
        InputError: there are no rows, or a row is not `[channels, samples]` of finite samples.
        OutputError: the file cannot be written. Without `overwrite`, a file that this program did not write is never
            replaced.
    """
    if not rows:
        raise InputError("there are no rows to draw: give at least one")
    for row in rows:
        if row.audio.ndim != 2 or not row.audio.numel():
            raise InputError(f"row {row.name!r} has the shape {list(row.audio.shape)}: give [channels, samples]")
        if not torch.isfinite(row.audio).all():
            raise InputError(f"row {row.name!r} holds NaN or Inf: give finite samples")
    document = "\n".join(_document(rows, title)) + "\n"
    with OutputFolder(path.parent, overwrite=overwrite) as folder:
        folder.check_targets([path.name])
        part = folder.work / path.name
        with output_errors(path):
            part.write_text(document, encoding="utf-8")
        folder.publish({"picture": part})


def _document(rows: Sequence[Row], title: str) -> Iterator[str]:
    """The lines of the SVG."""
    height = HEADER_HEIGHT + ROW_HEIGHT * len(rows) + FOOTER_HEIGHT
    seconds = max(_seconds(row) for row in rows)
    peak = max(float(row.audio.abs().max()) for row in rows) or 1.0
    bands = [_bands(row) for row in rows]
    loudest = max(float(energy.max()) for energy in bands) or 1.0

    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="{FONT}" font-size="13" fill="{SOFT_INK}">'
    )
    yield f"<title>{_text(title, 200)}</title>"
    yield "<defs>"
    for name, width in (("wave", WAVE_WIDTH), ("spectrum", SPECTRUM_WIDTH)):
        yield f'<clipPath id="{name}"><rect width="{width}" height="{PANEL_HEIGHT}" rx="7"/></clipPath>'
    stops = "".join(f'<stop offset="{i / 6:.4f}" stop-color="{stop}"/>' for i, stop in enumerate(COLOUR_STOPS))
    yield f'<linearGradient id="shades">{stops}</linearGradient>'
    yield "</defs>"
    yield (
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="14" fill="{PAGE}" stroke="{EDGE}"/>'
        f'<text x="{NAME_X}" y="45" font-size="22" font-weight="700" fill="{INK}">{_text(title, 80)}</text>'
    )
    for x, caption in ((WAVE_X, "Waveform"), (SPECTRUM_X, "Spectrogram")):
        yield f'<text x="{x}" y="{HEADER_HEIGHT - 13}" font-weight="600">{caption}</text>'
    yield from _legend(SPECTRUM_X + SPECTRUM_WIDTH, HEADER_HEIGHT - 13)

    for index, (row, energy) in enumerate(zip(rows, bands, strict=True)):
        y = HEADER_HEIGHT + index * ROW_HEIGHT
        colour = colour_of(row.name, index)
        share = _seconds(row) / seconds
        yield from _label(row, y, colour)
        yield from _waveform(row, y, colour, peak, share, seconds)
        yield from _spectrogram(energy / loudest, y, share)
    for x, width in ((WAVE_X, WAVE_WIDTH), (SPECTRUM_X, SPECTRUM_WIDTH)):
        yield from _time_axis(x, width, HEADER_HEIGHT + ROW_HEIGHT * len(rows) - ROW_HEIGHT + PANEL_HEIGHT, seconds)
    yield "</svg>"


def _label(row: Row, y: int, colour: str) -> Iterator[str]:
    lines = [level_text(level_dbfs(row.audio)), row.note.replace(" -", " −")]
    yield f'<rect x="{NAME_X}" y="{y + 14}" width="5" height="{PANEL_HEIGHT - 28}" rx="2.5" fill="{colour}"/>'
    x, y = NAME_X + 18, y if row.note else y + 9
    yield f'<text x="{x}" y="{y + 31}" font-size="18" font-weight="700" fill="{INK}">{_text(row.name, 14)}</text>'
    for line, text in enumerate(lines):
        yield f'<text x="{x}" y="{y + 52 + 18 * line}">{_text(text, LABEL_CHARACTERS)}</text>'


def _waveform(row: Row, y: int, colour: str, peak: float, share: float, seconds: float) -> Iterator[str]:
    """The range of the samples over all channels, and inside it the range of +-RMS. `peak` fills the panel."""
    width = WAVE_WIDTH * share
    columns = max(1, round(width))
    samples = row.audio.detach().cpu().float().numpy()
    starts = np.arange(columns) * samples.shape[1] // columns
    low = np.minimum.reduceat(samples.min(axis=0), starts)
    high = np.maximum.reduceat(samples.max(axis=0), starts)
    counts = np.maximum(1, np.diff(starts, append=samples.shape[1]))
    rms = np.sqrt(np.add.reduceat(np.square(samples).mean(axis=0), starts) / counts)

    magnified = magnification(max(high.max(), -low.min()), peak)
    middle = PANEL_HEIGHT / 2
    scale = (middle - 5) / peak * magnified
    yield f'<g transform="translate({WAVE_X} {y})" clip-path="url(#wave)">'
    yield f'<rect width="{WAVE_WIDTH}" height="{PANEL_HEIGHT}" fill="{PANEL}"/>'
    for tick in time_ticks(seconds)[1:]:
        x = WAVE_WIDTH * tick / seconds
        yield f'<path d="M{x:.1f} 0V{PANEL_HEIGHT}" stroke="{GRID}"/>'
    at = (np.arange(columns) + 0.5) * width / columns
    for top, bottom, opacity in ((high, low, 0.45), (rms, -rms, 1.0)):
        forward = [f"{a:.1f} {middle - b * scale:.1f}" for a, b in zip(at, top, strict=True)]
        back = [f"{a:.1f} {middle - b * scale:.1f}" for a, b in zip(at[::-1], bottom[::-1], strict=True)]
        yield (
            f'<path d="M{"L".join(forward + back)}Z" fill="{colour}" fill-opacity="{opacity}" '
            f'stroke="{colour}" stroke-opacity="{opacity}" stroke-width="0.8" stroke-linejoin="round"/>'
        )
    if magnified > 1:
        yield f'<text x="{WAVE_WIDTH - 9}" y="17" font-size="11" text-anchor="end">×{magnified}</text>'
    yield "</g>"


def _spectrogram(energy: Floats, y: int, share: float) -> Iterator[str]:
    """Relative energy `[bands, columns]`, low bands first, as an image with a frequency axis."""
    width = SPECTRUM_WIDTH * share
    yield f'<g transform="translate({SPECTRUM_X} {y})" clip-path="url(#spectrum)">'
    yield f'<rect width="{SPECTRUM_WIDTH}" height="{PANEL_HEIGHT}" fill="{COLOUR_STOPS[0]}"/>'
    yield (
        f'<image width="{width:.1f}" height="{PANEL_HEIGHT}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{spectrogram_base64(energy)}"/>'
    )
    yield "</g>"
    for hertz, label in FREQUENCY_TICKS.items():
        middle = y + PANEL_HEIGHT * (1 - _mel(hertz) / _mel(TOP_HERTZ))
        yield f'<path d="M{FREQUENCY_X - 7} {middle:.1f}h5" stroke="{SOFT_INK}"/>'
        yield f'<text x="{FREQUENCY_X + 3}" y="{middle + 4:.1f}" font-size="12">{label}</text>'


def _legend(right: int, baseline: int) -> Iterator[str]:
    x = right - 40 - 120
    yield f'<text x="{x - 8}" y="{baseline}" font-size="12" text-anchor="end">−{RANGE_DECIBELS}</text>'
    yield f'<rect x="{x}" y="{baseline - 9}" width="120" height="9" rx="2" fill="url(#shades)"/>'
    yield f'<text x="{right - 32}" y="{baseline}" font-size="12">0 dB</text>'


def _time_axis(x: int, width: int, y: int, seconds: float) -> Iterator[str]:
    ticks = time_ticks(seconds)
    decimals = max(0, -math.floor(math.log10(ticks[1]))) if len(ticks) > 1 else 0
    for tick in ticks:
        at = x + width * tick / seconds
        if seconds >= 120:
            label = f"{int(tick) // 60}:{int(tick) % 60:02}"
        else:
            label = f"{tick:.{decimals}f} s" if tick else "0"
        yield f'<path d="M{at:.1f} {y + 3}v5" stroke="{SOFT_INK}"/>'
        yield f'<text x="{at:.1f}" y="{y + 24}" font-size="12" text-anchor="middle">{label}</text>'


def time_ticks(seconds: float) -> list[float]:
    """Up to nine round times in seconds, starting at 0, for labels that end before the picture does."""
    steps = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600)
    decade = 10.0 ** math.floor(math.log10(seconds))
    small = [decade * factor for factor in (0.1, 0.2, 0.5, 1, 2, 5)]
    candidates = small if seconds < 5 else steps
    step = next((candidate for candidate in candidates if seconds / candidate <= 8), 3600 * math.ceil(seconds / 28800))
    return [index * step for index in range(math.floor(0.985 * seconds / step) + 1)]


def _seconds(row: Row) -> float:
    return row.audio.shape[1] / row.sample_rate


def _mel(hertz: Floats | float) -> Floats:
    return np.asarray(2595 * np.log10(1 + np.asarray(hertz) / 700))


def _bands(row: Row) -> Floats:
    """Energy `[BANDS, columns]` in mel-spaced bands up to TOP_HERTZ, low bands first; the mean over channels."""
    audio = row.audio.detach().cpu().float()
    samples = audio.shape[1]
    hop_samples = min(max(samples // COLUMNS, 64), N_FFT // 2)
    padded = torch.nn.functional.pad(audio, (0, max(0, N_FFT - samples)))
    stft = Stft(n_fft=N_FFT, hop_length=hop_samples, win_length=N_FFT)
    power = stft.spectrogram(padded).abs().square().mean(dim=0)  # [F, N]
    power = power[:, : samples // hop_samples + 1]
    energy = torch.from_numpy(band_filters(row.sample_rate)).float() @ power
    if energy.shape[1] > COLUMNS:
        energy = torch.nn.functional.adaptive_avg_pool1d(energy, COLUMNS)
    return energy.double().numpy()


def band_filters(sample_rate: int) -> Floats:
    """The share of each STFT bin that lies in each band, `[BANDS, F]`. Bins and bands are intervals in hertz."""
    edges = 700 * (10 ** (np.linspace(0, _mel(TOP_HERTZ), BANDS + 1) / 2595) - 1)
    bin_hertz = sample_rate / N_FFT
    centres = np.arange(N_FFT // 2 + 1) * bin_hertz
    low = np.maximum(edges[:-1, None], centres - bin_hertz / 2)
    high = np.minimum(edges[1:, None], centres + bin_hertz / 2)
    return np.asarray(np.maximum(0, high - low) / bin_hertz)


def _palette() -> bytes:
    """SHADES colours of three bytes each, interpolated linearly between the stops."""
    stops = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in COLOUR_STOPS])
    at = np.linspace(0, len(stops) - 1, SHADES)
    channels = [np.interp(at, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    return np.round(np.stack(channels, axis=1)).astype(np.uint8).tobytes()


def _png(indices: NDArray[np.uint8], palette: bytes) -> bytes:
    """An image `[H, W]` of palette indices as PNG (ISO/IEC 15948). Lines are stored as differences."""
    height, width = indices.shape
    lines = np.diff(indices, axis=0, prepend=np.zeros((1, width), np.uint8))
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), lines], axis=1)  # filter type 2 ("up")

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits per pixel, palette colours
    pixels = zlib.compress(filtered.tobytes(), 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", header)
        + part(b"PLTE", palette)
        + part(b"IDAT", pixels)
        + part(b"IEND", b"")
    )


def _text(text: str, characters: int) -> str:
    """The text escaped for XML, without unprintable characters, and shortened to `characters`."""
    clean = "".join(character if character.isprintable() else " " for character in text)
    return escape(clean if len(clean) <= characters else clean[: characters - 1].rstrip() + "…")
