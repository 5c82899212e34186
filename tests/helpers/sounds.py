"""Makes noise, writes it to files, and decodes files or sees them refused."""

import resource
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from separation.audio.decode import decode
from separation.audio.waveform import SAMPLE_RATE, Waveform
from separation.errors import AudioError


def noise(n_samples: int, channels: int = 2, *, level: float = 0.1) -> Tensor:
    """`[C, n]` float32, the same for each call with the same length."""
    samples = torch.randn(channels, n_samples, generator=torch.Generator().manual_seed(n_samples)) * level
    return samples.clamp(-0.999, 0.999)


def write(path: Path, samples: Tensor, sample_rate: int = SAMPLE_RATE, **options: object) -> Path:
    soundfile.write(path, samples.T.numpy(), sample_rate, **options)
    return path


def write_mp3(path: Path, samples: Tensor, sample_rate: int = SAMPLE_RATE, *, mode: str = "CONSTANT") -> Path:
    options = {"format": "MP3", "subtype": "MPEG_LAYER_III", "compression_level": 0.4, "bitrate_mode": mode}
    return write(path, samples, sample_rate, **options)


def ffmpeg(source: Path, target: Path, *options: str) -> Path:
    subprocess.run(
        ["ffmpeg", "-nostdin", "-y", "-v", "error", "-i", str(source), *options, str(target)],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return target


def samples_of(path: Path, folder: Path, **options: int) -> Tensor:
    """All samples of a decoded file. Asserts that nothing is left in the folder."""
    before = set(folder.iterdir())
    with decode(path, folder, **options) as waveform:
        samples = waveform.read(0, waveform.n_samples)
    assert set(folder.iterdir()) == before
    return samples


def waveform_of(
    samples: Tensor, folder: Path, sample_rate: int = SAMPLE_RATE, tags: Mapping[str, str] | None = None
) -> Waveform:
    waveform = Waveform(folder, sample_rate=sample_rate, channels=samples.shape[0], tags=tags)
    waveform.append(samples)
    return waveform


def assert_refused(path: Path | str, folder: Path, words: str) -> None:
    """Asserts that the error is one line with the file's name and the words, and that no file is left."""
    before = set(folder.iterdir())
    with pytest.raises(AudioError) as caught:
        decode(path, folder)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert ": " in message and not message.endswith(".")
    assert str(folder) not in message
    assert Path(path).name in message or repr(Path(path).name) in message
    assert set(folder.iterdir()) == before


@contextmanager
def disk_full_after(n_bytes: int) -> Iterator[None]:
    """No file can grow beyond `n_bytes`. A write that tries to fails as on a full disk, with another errno."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


TAGS = {"title": "Füße 日本 🎵", "artist": 'It\'s "quoted"', "album": "Žluťoučký"}
