"""Every channel is mixed to the side of its loudspeaker, in every format that names loudspeakers."""

import io
import logging
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from helpers.common import quick_first
from separation.audio.channels import _CORE_AUDIO, _FFMPEG, FFMPEG_LAYOUTS, layout_of_file
from separation.audio.decode import decode
from separation.audio.reader import ByteReader
from separation.errors import AudioError

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
RATE = 8000
STEP = 50  # samples: each channel sounds this long, one after the other
LEVEL = 0.5

# What each loudspeaker of a WAV's mask, from the lowest bit up, gives to the left and to the right (ITU-R BS.775).
DB3, DB6 = 0.5**0.5, 0.5
GIVES = [
    ("FL", (1, 0)),
    ("FR", (0, 1)),
    ("FC", (DB3, DB3)),
    ("LFE", (0, 0)),
    ("BL", (DB3, 0)),
    ("BR", (0, DB3)),
    ("FLC", (1, 0)),
    ("FRC", (0, 1)),
    ("BC", (DB6, DB6)),
    ("SL", (DB3, 0)),
    ("SR", (0, DB3)),
    ("TC", (DB6, DB6)),
    ("TFL", (DB3, 0)),
    ("TFC", (DB6, DB6)),
    ("TFR", (0, DB3)),
    ("TBL", (DB3, 0)),
    ("TBC", (DB6, DB6)),
    ("TBR", (0, DB3)),
]
BITS = {name: 1 << bit for bit, (name, _) in enumerate(GIVES)}
LAYOUTS = [layout for layout in FFMPEG_LAYOUTS.values() if set(layout.split("+")) <= BITS.keys() and layout != "FC"]


def mask_of(layout: str) -> int:
    return sum(BITS[name] for name in layout.split("+"))


def in_turn(channels: int) -> Tensor:
    """`[C, n]`: the channels sound one after the other."""
    return torch.eye(channels).repeat_interleave(STEP, dim=1) * LEVEL


def levels(path: Path, channels: int, *, step: int = STEP) -> Tensor:
    """`[C, 2]`: the gains of the channels of a file made of `in_turn`, to the left and to the right."""
    with decode(path, path.parent, sample_rate=None) as waveform:
        samples = waveform.read(0, waveform.n_samples)
    return samples[:, step // 2 :: step].T[:channels] / LEVEL


def expected(gives: Sequence[tuple[float, float]]) -> Tensor:
    matrix = torch.tensor(gives, dtype=torch.float32)
    return matrix / matrix.abs().sum(dim=0).max()


def of_layout(layout: str) -> Tensor:
    by_name = dict(GIVES)
    return expected([by_name[name] for name in layout.split("+")])


# --- writers: 16-bit files whose channels sound in turn, with a mask


def pcm(channels: int, order: str) -> bytes:
    return (in_turn(channels).T.numpy() * 2**15).astype(order + "i2").tobytes()


def chunk(kind: bytes, content: bytes, size: str) -> bytes:
    return kind + struct.pack(size, len(content)) + content


PCM_FORMAT = bytes.fromhex("0100000000001000800000aa00389b71")
W64_END = bytes.fromhex("f3acd3118cd100c04f8edb8a")


def wave_format(channels: int, mask: int, order: str = "<", subformat: bytes = PCM_FORMAT) -> bytes:
    fields = 0xFFFE, channels, RATE, RATE * channels * 2, channels * 2, 16, 22, 16, mask
    if order == ">":
        subformat = struct.pack(">IHH", *struct.unpack("<IHH", subformat[:8])) + subformat[8:]
    return struct.pack(order + "HHIIHHHHI", *fields) + subformat


def wav(path: Path, channels: int, mask: int) -> None:
    content = b"WAVE" + chunk(b"fmt ", wave_format(channels, mask), "<I") + chunk(b"data", pcm(channels, "<"), "<I")
    path.write_bytes(chunk(b"RIFF", content, "<I"))


def rifx(path: Path, channels: int, mask: int) -> None:
    content = chunk(b"fmt ", wave_format(channels, mask, ">"), ">I") + chunk(b"data", pcm(channels, ">"), ">I")
    path.write_bytes(chunk(b"RIFX", b"WAVE" + content, ">I"))


def unfinished_wav(path: Path, channels: int, mask: int) -> None:
    """A WAV by a program that cannot go back to fill in the sizes."""
    wav(path, channels, mask)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"data" + struct.pack("<I", len(pcm(channels, "<"))), b"data\xff\xff\xff\xff"))


def rf64(path: Path, channels: int, mask: int) -> None:
    data = pcm(channels, "<")
    sizes = struct.pack("<QQQI", 60 + 8 + 28 + len(data), len(data), len(data) // 2 // channels, 0)
    content = b"WAVE" + chunk(b"ds64", sizes, "<I") + chunk(b"fmt ", wave_format(channels, mask), "<I")
    path.write_bytes(b"RF64\xff\xff\xff\xff" + content + b"data\xff\xff\xff\xff" + data)


def w64(path: Path, channels: int, mask: int) -> None:
    def part(kind: bytes, content: bytes) -> bytes:
        return kind + W64_END + struct.pack("<q", 24 + len(content)) + content + bytes(-len(content) % 8)

    content = b"wave" + W64_END + part(b"fmt ", wave_format(channels, mask)) + part(b"data", pcm(channels, "<"))
    start = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
    path.write_bytes(start + struct.pack("<q", 24 + len(content)) + content)


BITMAP = 1 << 16  # Apple's tag for a mask


def core_audio(tag: int, mask: int = 0, labels: Sequence[int] = ()) -> bytes:
    descriptions = b"".join(struct.pack(">II3f", label, 0, 0, 0, 0) for label in labels)
    return struct.pack(">III", tag, mask, len(labels)) + descriptions


def caf(path: Path, channels: int, layout: bytes) -> None:
    description = struct.pack(">d4sIIIII", RATE, b"lpcm", 0, channels * 2, 1, channels, 16)
    chunks = [(b"desc", description), (b"chan", layout), (b"data", bytes(4) + pcm(channels, ">"))]
    path.write_bytes(b"caff\0\1\0\0" + b"".join(chunk(kind, content, ">q") for kind, content in chunks))


def aiff(path: Path, channels: int, layout: bytes, *, layout_last: bool = False) -> None:
    common = struct.pack(">hIh", channels, channels * STEP, 16) + bytes.fromhex("400bfa00000000000000")  # 8000 Hz
    chunks = [(b"CHAN", layout), (b"COMM", common), (b"SSND", bytes(8) + pcm(channels, ">"))]
    chunks = chunks[1:] + chunks[:1] if layout_last else chunks
    content = b"".join(chunk(kind, content, ">I") for kind, content in chunks)
    path.write_bytes(chunk(b"FORM", b"AIFF" + content, ">I"))


def flac(path: Path, channels: int, mask: int | str) -> None:
    soundfile.write(path, in_turn(channels).T.numpy(), RATE, format="FLAC", subtype="PCM_16")
    content = path.read_bytes()
    after_info = 4 + 4 + 34
    comments = [b"TITLE=x" * 9, b"waveformatextensible_channel_mask=" + f"{mask:#x}".encode(), b"1" * 49]
    block = struct.pack("<I", 4) + b"test" + struct.pack("<I", len(comments))
    block += b"".join(chunk(b"", comment, "<I") for comment in comments)
    is_last, info = content[4] & 128, bytes([content[4] & 127])
    rest = content[after_info:]
    kinds = bytes([4 | is_last]) + len(block).to_bytes(3, "big") + block
    if not is_last:  # replaces libFLAC's own comments, because there may be only one block
        assert rest[0] & 127 == 4
        kinds = bytes([4 | rest[0] & 128]) + kinds[1:]
        rest = rest[4 + int.from_bytes(rest[1:4], "big") :]
    path.write_bytes(content[:4] + info + content[5:after_info] + kinds + rest)


def id3_flac(path: Path, channels: int, mask: int) -> None:
    flac(path, channels, mask)
    path.write_bytes(b"ID3\4\0\0" + bytes([0, 0, 0, 20]) + bytes(20) + path.read_bytes())


WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "wav": wav,
    "rifx": rifx,
    "unfinished wav": unfinished_wav,
    "rf64": rf64,
    "w64": w64,
    "caf": lambda path, channels, mask: caf(path, channels, core_audio(BITMAP, mask)),
    "aiff": lambda path, channels, mask: aiff(path, channels, core_audio(BITMAP, mask)),
    "aiff, layout last": lambda path, channels, mask: aiff(path, channels, core_audio(BITMAP, mask), layout_last=True),
    "flac": flac,
    "flac after ID3": id3_flac,
}


@pytest.mark.parametrize("container", WRITERS)
def test_every_layout_up_to_7_1_is_mixed_down_by_its_loudspeakers(container: str, tmp_path: Path) -> None:
    for layout in LAYOUTS:
        channels = layout.count("+") + 1
        WRITERS[container](tmp_path / "song", channels, mask_of(layout))
        assert (levels(tmp_path / "song", channels) - of_layout(layout)).abs().max() < 1e-3, layout


@pytest.mark.parametrize("name, gives", GIVES)
def test_every_loudspeaker_besides_left_and_right_is_mixed_to_its_side(
    name: str, gives: tuple[float, float], tmp_path: Path
) -> None:
    mask = BITS["FL"] | BITS["FR"] | BITS[name]
    channels = mask.bit_count()
    wav(tmp_path / "song.wav", channels, mask)
    wanted = expected([(1, 0), (0, 1), gives][:channels])
    assert (levels(tmp_path / "song.wav", channels) - wanted).abs().max() < 1e-3


def test_the_centre_of_l_r_c_s_is_mixed_to_both_sides_and_the_warning_names_the_layout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wav(tmp_path / "song.wav", 4, 0x107)
    assert levels(tmp_path / "song.wav", 4)[2].tolist() == pytest.approx([0.3204, 0.3204], abs=1e-3)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("'song.wav' has 4 channels (L R C S), which are mixed down to stereo")


@pytest.mark.parametrize(
    "channels, mask",
    [(4, 0), (4, 0x3F), (4, 0x7), (3, 1 << 31), (6, 0x80000000), (3, 7 << 20), (2, BITS["LFE"] | 1 << 25)],
    ids=["none", "more bits", "fewer bits", "all", "all of 6", "unknown bits", "nothing for either side"],
)
def test_a_useless_mask_is_ignored_and_the_warning_says_so(
    channels: int, mask: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wav(tmp_path / "song.wav", channels, mask)
    usual = {2: "FL+FR", 3: "FL+FR+FC", 4: "FL+FR+SL+SR", 6: "FL+FR+FC+LFE+SL+SR"}[channels]
    assert (levels(tmp_path / "song.wav", channels) - of_layout(usual)).abs().max() < 1e-3
    assert ("not named in the file" in caplog.text) == (channels > 2)


def test_an_unknown_loudspeaker_is_heard_on_both_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wav(tmp_path / "song.wav", 3, 0x3 | 1 << 20)
    assert (levels(tmp_path / "song.wav", 3) - expected([(1, 0), (0, 1), (DB6, DB6)])).abs().max() < 1e-3
    assert "(L R ?)" in caplog.text


@pytest.mark.parametrize("name", BITS)
def test_one_channel_is_mono_whatever_its_loudspeaker(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wav(tmp_path / "song.wav", 1, BITS[name])
    assert levels(tmp_path / "song.wav", 1).tolist() == [[1, 1]]
    assert not caplog.records


@pytest.mark.parametrize("mask", [BITS["FL"] | BITS["FR"], BITS["BL"] | BITS["BR"], BITS["FLC"] | BITS["FRC"]])
def test_a_pair_of_loudspeakers_is_stereo_to_the_last_bit(
    mask: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wav(tmp_path / "song.wav", 2, mask)
    assert levels(tmp_path / "song.wav", 2).tolist() == [[1, 0], [0, 1]]
    assert not caplog.records


def test_two_channels_that_are_not_a_pair_are_mixed_by_their_loudspeakers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wav(tmp_path / "song.wav", 2, BITS["FL"] | BITS["FC"])
    assert (levels(tmp_path / "song.wav", 2) - expected([(1, 0), (DB3, DB3)])).abs().max() < 1e-3
    assert "'song.wav' has 2 channels (L C)" in caplog.text


# Apple's tags whose channels stand in another order than a mask's.
TAGS = {
    114: "FC FL FR",
    122: "FL FR SL SR FC LFE",
    123: "FL FC FR SL SR LFE",
    127: "FC FLC FRC FL FR SL SR LFE",
    133: "FL FR LFE",
    144: "FC FL FR SL SR BL BR BC",
    179: "FLC FC FRC FL FR SL BC SR",
}


@pytest.mark.parametrize("write", [caf, aiff])
@pytest.mark.parametrize("tag", TAGS)
def test_the_channel_orders_of_core_audio_are_known(
    tag: int, write: Callable[[Path, int, bytes], None], tmp_path: Path
) -> None:
    names = TAGS[tag].split()
    write(tmp_path / "song", len(names), core_audio(tag << 16 | len(names)))
    assert (levels(tmp_path / "song", len(names)) - of_layout("+".join(names))).abs().max() < 1e-3


@pytest.mark.parametrize(
    "labels, gives",
    [
        ((3, 1, 2), [(DB3, DB3), (1, 0), (0, 1)]),
        ((2, 1), [(0, 1), (1, 0)]),
        ((1, 2, 33, 34, 35, 36), [(1, 0), (0, 1), (DB3, 0), (0, DB3), (1, 0), (0, 1)]),
        ((204, 205), [(1, 1), (1, -1)]),
        ((1, 2, 3, 38, 39), [(1, 0), (0, 1), (DB3, DB3), (0, 0), (0, 0)]),
        ((42, 42), [(1, 0), (0, 1)]),
        ((0x10000, 0x10001, 0x10002), [(1, 0), (0, 1), (DB3, DB3)]),
    ],
    ids=["C L R", "R L", "rear and wide", "mid and side", "with a stereo mix beside", "two monos", "discrete"],
)
@pytest.mark.parametrize("write", [caf, aiff])
def test_labelled_channels_are_mixed_to_their_sides(
    write: Callable[[Path, int, bytes], None],
    labels: Sequence[int],
    gives: list[tuple[float, float]],
    tmp_path: Path,
) -> None:
    write(tmp_path / "song", len(labels), core_audio(0, labels=labels))
    assert (levels(tmp_path / "song", len(labels)) - expected(gives)).abs().max() < 1e-3


@pytest.mark.parametrize("n_bytes", range(0, 32, 4))
def test_a_truncated_layout_is_ignored(n_bytes: int, tmp_path: Path) -> None:
    caf(tmp_path / "song.caf", 3, core_audio(0, labels=[3, 1, 2])[:n_bytes])
    assert (levels(tmp_path / "song.caf", 3) - of_layout("FL+FR+FC")).abs().max() < 1e-3


def test_a_chunk_of_an_impossible_size_ends_the_search(tmp_path: Path) -> None:
    caf(tmp_path / "song.caf", 3, core_audio(114 << 16 | 3))
    content = (tmp_path / "song.caf").read_bytes()
    for n_bytes in (2**63 - 1, -1, 2**40):
        broken = io.BytesIO(content.replace(b"chan", b"junk" + struct.pack(">q", n_bytes) + b"chan"))
        assert str(layout_of_file(ByteReader(broken), 3, "'song.caf'")) == "L R C"


def test_damaged_headers_give_some_layout_and_no_error(tmp_path: Path) -> None:
    dice, songs = random.Random(12), []
    for writer in WRITERS.values():
        writer(tmp_path / "song", 4, 0x107)
        songs.append((tmp_path / "song").read_bytes())
    songs.append(b"OggS\0\2" + bytes(21) + b"\1\x13OpusHead\1\4" + bytes(6) + b"\2" + bytes(400))
    for _ in range(3000):
        song = bytearray(dice.choice(songs))
        for _ in range(dice.randint(1, 6)):
            at = dice.randrange(200)
            removed = dice.choice((0, 1, 4, 8))
            song[at : at + removed] = dice.choice((b"", b"\x7f" + b"\xff" * 7, bytes(8), dice.randbytes(4)))
        layout = layout_of_file(ByteReader(io.BytesIO(bytes(song))), 4, "'song'")
        assert len(layout.speakers) == 4
        assert np.isfinite(layout.to_stereo()).all()


def test_an_ambisonic_wav_is_mixed_to_left_and_right(tmp_path: Path) -> None:
    subformat = bytes.fromhex("010000002107d3118644c8c1ca000000")
    content = chunk(b"fmt ", wave_format(4, 0, subformat=subformat), "<I") + chunk(b"data", pcm(4, "<"), "<I")
    (tmp_path / "song.amb").write_bytes(chunk(b"RIFF", b"WAVE" + content, "<I"))
    wanted = expected([(2**0.5, 2**0.5), (0, 0), (1, -1), (0, 0)])
    assert (levels(tmp_path / "song.amb", 4) - wanted).abs().max() < 1e-3


def test_nine_channels_with_a_mask_are_refused(tmp_path: Path) -> None:
    wav(tmp_path / "song.wav", 9, 0x1FF)
    with pytest.raises(AudioError, match="9 channels"):
        decode(tmp_path / "song.wav", tmp_path)


# --- by ffmpeg


def ffmpeg(*arguments: str) -> str:
    ran = subprocess.run(
        ["ffmpeg", "-nostdin", "-y", "-v", "error", *arguments], check=True, capture_output=True, text=True
    )
    return ran.stdout


LONG_STEP = 4800  # samples, for lossy codecs


def tones(path: Path, layout: str) -> Path:
    """A WAV at 48 kHz with a tone in each channel, one after the other."""
    channels = layout.count("+") + 1
    tone = torch.sin(torch.arange(LONG_STEP) * 0.05) * LEVEL
    samples = (torch.eye(channels)[:, :, None] * tone).flatten(1)
    soundfile.write(path, samples.T.numpy(), 48000, format="WAVEX", subtype="PCM_16")
    content = bytearray(path.read_bytes())
    at = content.index(b"fmt ") + 8 + 20
    content[at : at + 4] = struct.pack("<I", mask_of(layout))
    path.write_bytes(content)
    return path


def tone_levels(path: Path, channels: int) -> Tensor:
    with decode(path, path.parent, sample_rate=48000) as waveform:
        samples = waveform.read(0, waveform.n_samples)[:, : channels * LONG_STEP]
    tones = samples.unflatten(1, (channels, LONG_STEP))[..., LONG_STEP // 4 : LONG_STEP // 2]
    return (tones.square().mean(dim=-1).sqrt() / (LEVEL * DB3)).T


OTHER_FORMATS = {
    ".mka": ("flac", "quad", "quad(side)", "4.0", "5.0", "5.1(side)", "6.1(back)", "7.1"),
    ".wv": ("wavpack", "2.1", "4.0", "4.1", "6.1(back)", "7.1", "7.1(wide)"),
    ".m4a": ("alac", "3.0", "4.0", "5.0", "5.1", "6.1(back)", "7.1(wide)"),
    ".aac": ("aac", "3.0", "4.0", "5.0", "5.1"),
    ".ac3": ("ac3", "3.0", "4.0", "quad", "5.0(side)", "5.1(side)"),
    ".mp4": ("aac", "4.0", "5.1"),
    ".mov": ("pcm_s16le", "quad", "4.0", "5.1", "7.1(wide)"),
    ".ogg": ("libvorbis", "quad", "5.0", "5.1", "7.1"),
    ".opus": ("libopus", "quad", "5.0", "5.1", "7.1"),
    ".webm": ("libopus", "quad", "5.1", "7.1"),
    ".caf": ("alac", "4.0", "5.1", "7.1(wide)"),
}


@needs_ffmpeg
@pytest.mark.parametrize(
    "suffix, layout",
    quick_first([(suffix, layout) for suffix, (_, *layouts) in OTHER_FORMATS.items() for layout in layouts], 2),
)
def test_files_of_ffmpeg_are_mixed_down_by_their_loudspeakers(suffix: str, layout: str, tmp_path: Path) -> None:
    names = FFMPEG_LAYOUTS[layout]
    channels = names.count("+") + 1
    codec = OTHER_FORMATS[suffix][0]
    if codec not in ffmpeg("-encoders"):
        pytest.skip(f"this ffmpeg has no encoder {codec}")
    path = tmp_path / f"song{suffix}"
    rate = ("-b:a", "512k") if codec in ("aac", "ac3", "libopus") else ()
    family = ("-mapping_family", "1") if codec == "libopus" else ()
    ffmpeg("-i", str(tones(tmp_path / "source.wav", names)), "-c:a", codec, *rate, *family, str(path))
    assert (tone_levels(path, channels) - of_layout(names)).abs().max() < 0.02


@needs_ffmpeg
def test_the_mask_of_a_flac_in_ogg_is_used(tmp_path: Path) -> None:
    source = tones(tmp_path / "source.wav", "FL+FR+FC+BC")
    mask = ("-metadata", "WAVEFORMATEXTENSIBLE_CHANNEL_MASK=0x107")
    ffmpeg("-i", str(source), "-c:a", "flac", *mask, str(tmp_path / "song.oga"))
    assert (tone_levels(tmp_path / "song.oga", 4) - of_layout("FL+FR+FC+BC")).abs().max() < 1e-3


@needs_ffmpeg
@pytest.mark.parametrize(
    "tag, layout", quick_first([(114, "3.0"), (122, "5.1(side)"), (124, "5.1(side)"), (121, "5.1(side)")], 2)
)
def test_the_channel_order_of_a_mov_is_used(tag: int, layout: str, tmp_path: Path) -> None:
    names = _CORE_AUDIO[tag].split()
    movie, source = tmp_path / "song.mov", tones(tmp_path / "source.wav", FFMPEG_LAYOUTS[layout])
    ffmpeg("-i", str(source), "-c:a", "pcm_s16le", str(movie))
    content = bytearray(movie.read_bytes())
    at = content.index(b"chan") + 8
    content[at : at + 4] = struct.pack(">I", tag << 16 | len(names))
    movie.write_bytes(content)
    order = {speaker: name for name, speaker in reversed(_FFMPEG.items())}
    assert (tone_levels(movie, len(names)) - of_layout("+".join(order[name] for name in names))).abs().max() < 2e-3


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("family, gives", [(2, [(1, 1), (1, -1), (0, 0), (0, 0)]), (255, None)])
def test_opus_without_loudspeakers_is_ambisonic_or_the_usual_layout(
    family: int, gives: list[tuple[float, float]] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if "libopus" not in ffmpeg("-encoders"):
        pytest.skip("this ffmpeg has no encoder libopus")
    source = tones(tmp_path / "source.wav", "FL+FR+BL+BR")
    for suffix in (".opus", ".mka"):
        path = tmp_path / f"song{suffix}"
        ffmpeg("-i", str(source), "-c:a", "libopus", "-mapping_family", str(family), "-b:a", "512k", str(path))
        wanted = expected(gives).abs() if gives else of_layout("FL+FR+SL+SR")
        assert (tone_levels(path, 4) - wanted).abs().max() < 0.03
    assert ("not named in the file" in caplog.text) == (gives is None)


@needs_ffmpeg
def test_the_names_of_layouts_are_those_of_ffmpeg() -> None:
    text = ffmpeg("-layouts")
    listed = [line.split() for line in text[text.index("DECOMPOSITION") :].splitlines()[1:] if line]
    up_to_8 = {name: channels for name, channels in listed if channels.count("+") < 8}
    assert up_to_8.items() <= FFMPEG_LAYOUTS.items()
    names = [line.split()[0] for line in text[: text.index("Standard")].splitlines()[2:] if line]
    assert set(names) <= _FFMPEG.keys()


def probed(path: Path) -> set[str]:
    """ffmpeg's names of a file's channels."""
    command = ["ffprobe", "-v", "error", "-show_entries", "stream=channel_layout", "-of", "csv=p=0", str(path)]
    layout = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return set(FFMPEG_LAYOUTS.get(layout, layout.partition("(")[2].rstrip(")")).split("+"))


@needs_ffmpeg
@pytest.mark.slow
def test_the_layouts_of_core_audio_have_the_channels_that_ffmpeg_knows(tmp_path: Path) -> None:
    # The two name the surround channels at the sides and at the back differently.
    sides = {place + side: "S" + side for place in ("B", "W", "SD") for side in "LR"} | {"BIL": "FL", "BIR": "FR"}
    compared = 0
    for tag, layout in _CORE_AUDIO.items():
        speakers = layout.split()
        caf(tmp_path / "song.caf", len(speakers), core_audio(tag << 16 | len(speakers)))
        known = probed(tmp_path / "song.caf")
        if known in ({""}, {"unknown"}) or "Mid" in speakers:
            continue
        ours = {name for name, speaker in _FFMPEG.items() if speaker in speakers}
        assert {sides.get(name, name) for name in known} == {sides.get(name, name) for name in ours}, tag
        compared += 1
    assert compared > 40
