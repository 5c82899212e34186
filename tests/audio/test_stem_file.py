"""`.stem.mp4`, atom by atom, and decoded track by track."""

import io
import json
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers.common import needs_ffmpeg
from helpers.sounds import TAGS, noise, waveform_of
from separation.audio.decode import decode
from separation.audio.encode import encode
from separation.audio.metadata import read_metadata
from separation.audio.mp4 import atoms, find_atom
from separation.audio.options import LOSSLESS, Bitrate, OutputOptions
from separation.audio.stem_file import (
    COLOURS,
    MIXTURE_TRACK,
    ORDER,
    manifest,
    split_stem_file,
    tracks_of,
    write_stem_file,
)
from separation.errors import InputError

PNG = bytes.fromhex(  # one white pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63f80f00010101003dcc0b9a"
    "0000000049454e44ae426082"
)
N_SAMPLES = 70_001
FREE_FORM = {"bpm": "120.5", "isrc": "DE1234567890", "initialkey": "Am"}


def stems_of(n_samples: int) -> dict[str, Tensor]:
    """Four stems of whole 16-bit steps, and their sum."""
    waves = noise(4 * n_samples, 2).reshape(2, 4, n_samples).mul(2**15).round().div(2**15).unbind(dim=1)
    stems = dict(zip(ORDER, waves, strict=True))
    return {MIXTURE_TRACK: torch.stack([*stems.values()]).sum(dim=0), **stems}


def written(folder: Path, options: OutputOptions, cover: bytes = b"") -> Path:
    paths = {}
    for name, samples in stems_of(N_SAMPLES).items():
        paths[name] = folder / f"{name}.m4a"
        with waveform_of(samples, folder) as wave:
            encode(wave, paths[name], options, tags=TAGS | FREE_FORM, cover=cover)
    write_stem_file(paths, folder / "song.stem.mp4")
    return folder / "song.stem.mp4"


def decoded(path: Path, track: int) -> NDArray[np.float32]:
    options = ["-i", str(path), "-map", f"0:a:{track}", "-f", "f32le", "pipe:1"]
    raw = subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *options], check=True, capture_output=True).stdout
    return np.frombuffer(raw, "<f4").reshape(-1, 2).T


@needs_ffmpeg
def test_with_alac_the_tracks_are_exact_and_the_stems_sum_to_the_mixture(tmp_path: Path) -> None:
    path = written(tmp_path, OutputOptions("m4a", bitrate=LOSSLESS))
    tracks = [decoded(path, number) for number in range(5)]
    for track, samples in zip(tracks, stems_of(N_SAMPLES).values(), strict=True):
        assert np.array_equal(track, samples.numpy())
    assert np.array_equal(sum(tracks[1:]), tracks[0])


@pytest.mark.slow
@needs_ffmpeg
def test_with_aac_the_tracks_are_in_time_and_announce_their_exact_length(tmp_path: Path) -> None:
    path = written(tmp_path, OutputOptions("m4a"))
    for number, samples in enumerate(stems_of(N_SAMPLES).values()):
        track = decoded(path, number)[:, :N_SAMPLES]
        spectra = [np.fft.rfft(wave, 2 * N_SAMPLES) for wave in (track[0], samples.numpy()[0])]
        assert np.fft.irfft(spectra[0] * spectra[1].conj()).argmax() == 0
    with path.open("rb") as file:
        for lists in _children(file, b"moov", b"trak"):
            edits = next(atom for atom in atoms(file, lists[0], lists[1]) if atom.kind == b"edts")
            (edit,) = atoms(file, edits.content, edits.end)
            file.seek(edit.content + 4)
            assert struct.unpack(">III", file.read(12)) == (1, N_SAMPLES, 1024)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("bitrate", [None, LOSSLESS])
def test_a_split_file_has_the_same_tracks_in_time(bitrate: Bitrate | None, tmp_path: Path) -> None:
    path = written(tmp_path, OutputOptions("m4a", bitrate=bitrate), PNG)
    (tmp_path / "split").mkdir()
    files = split_stem_file(path, tracks_of(ORDER), tmp_path / "split")
    assert list(files) == [MIXTURE_TRACK, *ORDER]
    for number, (track, file) in enumerate(files.items()):
        with decode(file, tmp_path) as one, decode(tmp_path / f"{track}.m4a", tmp_path) as before:
            assert one.n_samples == N_SAMPLES
            assert torch.equal(one.read(0, N_SAMPLES), before.read(0, N_SAMPLES)), number


def _children(file: io.BufferedReader, parent: bytes, kind: bytes) -> list[tuple[int, int]]:
    found = find_atom(file, parent)
    return [(atom.content, atom.end) for atom in atoms(file, found.content, found.end) if atom.kind == kind]


@pytest.mark.slow
@needs_ffmpeg
def test_only_the_mixture_is_enabled_and_every_offset_points_into_the_sound(tmp_path: Path) -> None:
    path = written(tmp_path, OutputOptions("m4a"), PNG)
    content = path.read_bytes()
    with path.open("rb") as file:
        assert [atom.kind for atom in atoms(file, 0, len(content))][-1] == b"moov"
        tracks = _children(file, b"moov", b"trak")
        headers = [next(a for a in atoms(file, *track) if a.kind == b"tkhd") for track in tracks]
        assert [content[header.content + 3] & 1 for header in headers] == [1, 0, 0, 0, 0]
        sound = find_atom(file, b"mdat")
    for start, stop in tracks:
        place = content.index(b"stco", start, stop) + 8
        (count,) = struct.unpack(">I", content[place : place + 4])
        offsets = struct.unpack(f">{count}I", content[place + 4 : place + 4 + 4 * count])
        assert count and all(sound.content <= offset < sound.end for offset in offsets)


@pytest.mark.slow
@needs_ffmpeg
def test_the_atom_is_where_programs_look_and_tags_and_cover_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path, OutputOptions("m4a"), PNG)
    with path.open("rb") as file:
        atom = find_atom(file, b"moov", b"udta", b"stem")
        file.seek(atom.content)
        found = json.loads(file.read(atom.end - atom.content))
    assert found["version"] == 1
    assert found["stems"] == [
        {"name": "Drums", "color": "#009E73"},
        {"name": "Bass", "color": "#D55E00"},
        {"name": "Other", "color": "#CC79A7"},
        {"name": "Vocals", "color": "#56B4E9"},
    ]
    assert not found["mastering_dsp"]["compressor"]["enabled"] and not found["mastering_dsp"]["limiter"]["enabled"]
    metadata = read_metadata(path)
    assert metadata.tags == TAGS | FREE_FORM and metadata.cover == PNG


def test_the_tracks_are_the_mixture_and_the_stems_in_the_order_of_dj_programs() -> None:
    assert tracks_of(["vocals", "drums", "bass", "other"]) == ("mixture", "drums", "bass", "other", "vocals")
    assert tracks_of(["kick", "snare", "toms", "rest"]) == ("mixture", "kick", "snare", "toms", "rest")
    with pytest.raises(InputError, match=r"stem.mp4 holds four stems, not 2 \(vocals, .*\): choose stems all_4"):
        tracks_of(["vocals", "instrumental"])


def test_the_manifest_names_each_stem_with_a_colour_of_its_own() -> None:
    stems = json.loads(manifest(["a", "b", "c", "d"]))["stems"]
    assert [stem["name"] for stem in stems] == ["A", "B", "C", "D"]
    assert [stem["color"] for stem in stems] == list(COLOURS)
