"""Make the song that ships with the project: song.flac and its six true stems as OGG Vorbis in stems/.

    PYTHONPATH=. python weights/demo/make_demo_song.py

The mixture is the sum of the stems as they decode, not as they were rendered, so that the files add up: the loss of
the Vorbis encoding is part of the music. Needs what make_song.py needs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from make_song import SAMPLE_RATE, STEMS, Audio, render
from numpy.typing import NDArray

from separation.evaluation.metrics import level_dbfs, sdr

FOLDER = Path(__file__).parent
SEED = 5002  # none of the seeds that the weights are trained or chosen on; 15 s at its tempo
BARS = 8
PEAK = 0.89
VORBIS_COMPRESSION = 0.8  # 0 is the best quality, 1 the smallest file
TAGS = {
    "artist": "separation demo",
    "license": "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
    "comment": (
        "Synthetic. Instruments: FluidR3 GM (Frank Wen, MIT licence). Voice: NIT SONG070 F001 "
        "(HTS Working Group, Nagoya Institute of Technology, CC BY 3.0) sung by Sinsy."
    ),
}


def write(path: Path, audio: NDArray[Any], *, title: str, **options: float | str) -> None:
    """Audio `[T, 2]` to a tagged file, a second at a time: libsndfile's Vorbis encoder overflows its stack on more."""
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, channels=2, **options) as file:
        for name, text in {"title": title, **TAGS}.items():
            setattr(file, name, text)
        for start in range(0, len(audio), SAMPLE_RATE):
            file.write(audio[start : start + SAMPLE_RATE])


def encode(stems: dict[str, Audio], gain: float) -> dict[str, Audio]:
    """Writes every stem, scaled, to stems/<stem>.ogg and returns what those files decode to, in float64."""
    decoded = {}
    for name, stem in stems.items():
        path = FOLDER / "stems" / f"{name}.ogg"
        title = f"Demo song: {name}"
        write(path, stem * gain, title=title, format="OGG", subtype="VORBIS", compression_level=VORBIS_COMPRESSION)
        decoded[name] = soundfile.read(path, dtype="float32")[0].astype(np.float64)
    return decoded


def main() -> None:
    (FOLDER / "stems").mkdir(exist_ok=True)
    song = render(SEED, bars=BARS)
    stems = {name: song[name] for name in STEMS}
    gain = 1.0
    while True:
        decoded = encode(stems, gain)
        mixture = sum(decoded.values(), start=np.zeros_like(song["mixture"], dtype=np.float64))
        peak = float(np.abs(mixture).max())
        if abs(peak - PEAK) < 0.001:
            break
        gain *= PEAK / peak  # Vorbis is not linear: once is nearly, not quite, enough
    samples = np.round(mixture * 2**15).astype(np.int16)
    write(FOLDER / "song.flac", samples, title="Demo song", format="FLAC", subtype="PCM_16", compression_level=1.0)

    print(f"seed {SEED}, {len(mixture) / SAMPLE_RATE:.2f} s, peak {peak:.3f}")
    estimate = torch.from_numpy(mixture.T)
    for name, stem in decoded.items():
        reference = torch.from_numpy(stem.T)
        print(
            f"{name:8s} level {level_dbfs(reference):6.1f} dBFS, the mixture's SDR {sdr(reference, estimate):6.2f} dB"
        )


if __name__ == "__main__":
    main()
