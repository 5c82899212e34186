"""YAML files: this project's, hostile ones, and the forms that the community publishes, with made-up values.

The community's keys are those of Music-Source-Separation-Training (MSST), Ultimate Vocal Remover (UVR) and
audio-separator.
"""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.common import SHARED, needs_shared
from helpers.small_model import DOCUMENT, assert_same_model, small_model, write_weights, write_yaml
from separation.checkpoints import catalogue
from separation.checkpoints.about import model_facts
from separation.checkpoints.build import random_weights
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.description import Checkpoint
from separation.checkpoints.load import load_model
from separation.documents import read_yaml
from separation.errors import CheckpointError

MSST_ROFORMER = """
audio:
  chunk_size: 4096
  dim_f: 32
  dim_t: 257 # don't work (use in model)
  hop_length: 16 # don't work (use in model)
  n_fft: 64
  num_channels: 2
  sample_rate: 44100
  min_mean_abs: 0.000

model:
  dim: 16
  depth: 1
  stereo: true
  num_stems: 1
  time_transformer_depth: 1
  freq_transformer_depth: 1
  linear_transformer_depth: 0
  freqs_per_bands: !!python/tuple
    - 3
    - 3
    - 3
    - 3
    - 3
    - 3
    - 3
    - 3
    - 3
    - 3
    - 3
  dim_head: 8
  heads: 2
  attn_dropout: 0.1
  ff_dropout: 0.1
  flash_attn: true
  dim_freqs_in: 33
  stft_n_fft: 64
  stft_hop_length: 16
  stft_win_length: 64
  stft_normalized: false
  mask_estimator_depth: 2
  multi_stft_resolution_loss_weight: 1.0
  multi_stft_resolutions_window_sizes: !!python/tuple
  - 64
  - 32
  multi_stft_hop_size: 7
  multi_stft_normalized: False
  use_torch_checkpoint: False # less memory
  skip_connection: False

training:
  batch_size: 3
  gradient_accumulation_steps: 1
  grad_clip: 0
  instruments: ['Vocals', 'other']
  patience: 3
  reduce_factor: 0.9
  target_instrument: Vocals
  num_epochs: 3
  augmentation_type:
  optimizer: adam
  lr: 1.0e-5
  use_amp: true

augmentations:
  enable: true
  mixup_probs: !!python/tuple
    - 0.3
    - 0.03
  all:
    channel_shuffle: 0.5

loss_multistft:
  fft_sizes:
  - 64
  window: "hann_window"

inference:
  batch_size: 2
  dim_t: 301
  num_overlap: 3
  normalize: false
"""


MSST_DEMUCS = """
audio:
  chunk_size: 44100 # samplerate * segment
  min_mean_abs: 0.001
  hop_length: 1024

training:
  batch_size: 3
  segment: 1
  shift: 1
  samplerate: 44100
  channels: 2
  normalize: true
  instruments: ['drums', 'bass']
  target_instrument: null
  use_amp: true

augmentations:
  enable: true

inference:
  num_overlap: 3
  batch_size: 3

model: htdemucs

htdemucs:  # the arguments of the class
  channels: 8
  channels_time:
  growth: 2
  num_subbands: 1
  nfft: 2048
  wiener_residual: false
  cac: true
  depth: 4
  multi_freqs: []
  dconv_init: 1e-3
  bottom_channels: 0
  t_layers: 1
  t_heads: 2
  t_lr:
"""


UVR_MDX23C = """
audio:
  chunk_size: 8190
  dim_f: 64
  dim_t: 64
  hop_length: 130
  n_fft: 256
  num_channels: 2
  sample_rate: 44100
  min_mean_abs: 0.01
model:
  act: gelu
  bottleneck_factor: 2
  growth: 8
  norm: InstanceNorm
  num_blocks_per_scale: 1
  num_channels: 8
  num_scales: 2
  num_subbands: 2
  scale:
  - 2
  - 2
training:
  batch_size: 3
  coarse_loss_clip: true
  grad_clip: null
  instruments:
  - Kick
  - Snare
  - Hh
  lr: 9.0e-05
  q: 0.4
  target_instrument: null
inference:
  batch_size: 1
  dim_t: 101
  num_overlap: 8
"""


UVR_ROFORMER = """
audio:
  chunk_size: 4096
  dim_f: 32
  dim_t: 257
  hop_length: 16
  n_fft: 64
  num_channels: 2
  sample_rate: 44100
  min_mean_abs: 000
model:
  dim: 16
  depth: 1
  stereo: true
  num_stems: 1
  num_bands: 11
  sample_rate: 44100  # for the mel filters
training:
  instruments:
  - No Reverb
  - Reverb
  target_instrument: No Reverb
inference:
  batch_size: 1
  dim_t: 301
  num_overlap: 1
  chunk_size: 8192
"""


SCNET = """
audio:
  chunk_size: 44100 # a second
  num_channels: 2
  sample_rate: 44100
  min_mean_abs: 0.000
model:
  sources:
    - drums
    - other
  audio_channels: 2
  dims:
    - 4
    - 8
  nfft: 256
  hop_size: 64
  win_size: 256
  normalized: True
  band_SR:
    - 0.2
    - 0.8
training:
  instruments:
    - Drums
    - Other
  target_instrument: null
inference:
  batch_size: 8
  dim_t: 256
  num_overlap: 4
  normalize: true
"""


def write(folder: Path, text: str, *changes: tuple[str, str]) -> Path:
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "published.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, *changes: tuple[str, str]) -> Checkpoint:
    return read_config(write(folder, text, *changes))


def noise(samples: int) -> torch.Tensor:
    return torch.randn(1, 2, samples, generator=torch.Generator().manual_seed(0))


# This project's keys


def test_a_python_tuple_loads_and_no_other_python_tag_does(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    text = "architecture: bs_roformer\nstems: [vocals]\naudio: {sample_rate: 44100, chunk_size: 8}\nmodel:\n"
    path.write_text(text + "  freqs_per_bands: !!python/tuple\n    - 2\n    - [3, 4]\n")
    assert read_config(path).hyper_parameters == {"freqs_per_bands": (2, [3, 4])}
    ran = tmp_path / "ran"
    for tag in (
        f"!!python/object/apply:os.mkdir ['{ran}']",
        "!!python/object:os.PathLike {}",
        "!!python/name:os.system",
    ):
        path.write_text(text + f"  dim: {tag}\n")
        with pytest.raises(CheckpointError, match=rf"model\.yaml line 5 .*{tag.split()[0].removeprefix('!!')}"):
            read_config(path)
    assert not ran.exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"audio": DOCUMENT["audio"] | {"chunk_sise": 8}}, "unknown key 'audio.chunk_sise'"),
        ({"stems": "vocals"}, "stems must be a list, not 'vocals'"),
        ({"stems": ["vocals", "vocals"]}, "stems must name each stem once"),
        ({"audio": {"sample_rate": 44100}}, "chunk_size is missing: add it as a positive integer"),
        ({"audio": {"chunk_size": 8, "sample_rate": "high"}}, "sample_rate must be a positive integer, not 'high'"),
        ({"architecture": 5}, "architecture must be a string, not 5"),
        ({"stems": ["vocals", "../drums"]}, r"the stem '\.\./drums' cannot be a file's name"),
        ({"audio": {"chunk_size": -8, "sample_rate": 44100}}, "chunk_size must be a positive integer, not -8"),
        ({"files": ["x.ckpt"]}, "each of files must be a section"),
        ({"files": [{"name": "x", "md5": "0"}]}, "unknown key 'md5'"),
        ({"files": [{"name": "x", "is_recorded": True}]}, "unknown key 'is_recorded'"),
        ({"files": [{"name": "../x"}]}, "leads out of the weights folder"),
        ({"files": [{"name": "x", "sha256": "12"}]}, "sha256 must be 64 hexadecimal digits"),
        ({"files": [{"name": "x", "url": "file:///etc/passwd"}]}, "url must begin with https"),
        ({"files": [{"name": "x", "stem": "drums"}, {"name": "y"}]}, "the files must name one stem each"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(
    tmp_path: Path, changes: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "CONFIGS", tmp_path)
    with pytest.raises(CheckpointError, match=rf"small\.yaml: .*{message}"):
        read_config(write_yaml(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"", b"- a list", b"a: [1", b"\xff\xfe\x00", b"a: \x07"])
def test_a_file_without_keys_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.yaml"):
        read_config(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stems": [["vocals"]]}, r"a stem must be a string, not \['vocals'\]"),
        ({"stems": [{"vocals": 1}]}, "a stem must be a string, not {'vocals': 1}"),
        ({"stems": ["x" * 300]}, "cannot be a file's name"),
        ({"stems": ["voc\nals"]}, "cannot be a file's name"),
        ({"stems": ["C:vocals"]}, "cannot be a file's name"),
        ({"audio": {"sample_rate": True, "chunk_size": 8}}, "sample_rate must be a positive integer, not True"),
        ({"audio": {"sample_rate": 10**9, "chunk_size": 8}}, "sample_rate must be at most 384,000, not 1000000000"),
        ({"audio": {"chunk_size": 10**12}}, "chunk_size must be at most 16,777,216, not 1000000000000"),
        ({"audio": {"chunk_size": float("inf")}}, "chunk_size must be a positive integer, not inf"),
        ({"audio": {"chunk_size": float("nan")}}, "chunk_size must be a positive integer, not nan"),
        ({"audio": {"dim_t": 10**6, "hop_length": 10**6}}, "chunk_size must be at most 16,777,216, not 999999000000"),
        ({"audio": {1: 2, "chunk_size": 8}}, "the keys of audio must be strings, not 1"),
        ({"model": {1: 2}}, "the keys of model must be strings, not 1"),
        ({"architecture": ["x" * 1000]}, r"architecture must be a string, not \['x{77}…"),
        ({"files": [{"name": "x" * 300}]}, "a weights file cannot be named 'xxx"),
        ({"files": [{"name": "a/" * 200 + "x" * 201}]}, "a weights file cannot be named"),
        ({"files": [{"name": "..\\x"}]}, "a weights file cannot be named"),
        ({"files": [{"name": "C:/x"}]}, "a weights file cannot be named"),
        ({"files": [{"name": "a//x"}]}, "a weights file cannot be named"),
        ({"files": [{"name": "."}]}, "a weights file cannot be named"),
        ({"files": [{"name": "checksums.lock"}]}, "a weights file cannot be named"),
        ({"files": [{"name": "demo.yaml"}]}, "a weights file cannot be named"),
        ({"files": [{"name": "x", "bytes": 10**15}]}, "bytes must be at most"),
        ({"files": [{"name": "x", "url": "http://[::1"}]}, r"url must be a file's address, not 'http://\[::1'"),
        ({"files": [{"name": "x", "url": "http://"}]}, "url must be a file's address"),
        ({"files": [{"name": "x", "url": "http://a:99999/x"}]}, "url must be a file's address"),
        ({"files": [{"name": "x", "url": "http://a:b/x"}]}, "url must be a file's address"),
        ({"files": [{"name": "x", "url": "http://a/x y"}]}, "url must be a file's address"),
        ({"files": [{"name": "x", "url": "http://a/é"}]}, "url must be a file's address"),
        ({"files": [{"name": "x", "url": "http://a/" + "x" * 3000}]}, "url must be a file's address"),
        ({"files": [{"name": "x", "url": "ftp://a/x"}]}, "url must begin with https"),
    ],
)
def test_a_hostile_value_is_one_short_error(
    changes: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "CONFIGS", tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(write_yaml(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 250


def test_a_nul_in_a_file_name_is_an_error(tmp_path: Path) -> None:
    text = write_yaml(tmp_path).read_text().replace("small.ckpt", '"a\\0b"')
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="a string contains the control character"):
        read_config(tmp_path / "x.yaml")


# The community's keys


@pytest.mark.parametrize(
    "text, stems, chunk_samples",
    [
        (MSST_ROFORMER, ("vocals",), 4096),
        (MSST_DEMUCS, ("drums", "bass"), 44100),
        (UVR_MDX23C, ("kick", "snare", "hh"), 8190),
        (UVR_ROFORMER, ("no reverb",), 8192),
        (SCNET, ("drums", "other"), 44100),
    ],
)
def test_stems_chunk_and_sample_rate_are_those_of_the_training(
    tmp_path: Path, text: str, stems: tuple[str, ...], chunk_samples: int
) -> None:
    found = read(tmp_path, text)
    assert (found.stems, found.chunk_samples, found.sample_rate) == (stems, chunk_samples, 44100)
    assert found.files == () and found.ignored == ()
    assert found.standardised == (text == SCNET)
    assert (found.facts.licence, found.facts.quality) == ("not stated", "not stated")


@pytest.mark.parametrize("architecture", ["", "architecture: bs_roformer\n"])
def test_an_msst_roformer_loads(tmp_path: Path, architecture: str) -> None:
    own = small_model(num_stems=1)
    path = write(tmp_path, architecture + MSST_ROFORMER)
    model = load_model(path, checkpoint=write_weights(own.state_dict(), tmp_path / "x.ckpt"))
    assert_same_model(model, own, noise(256))
    assert model.normalisation == "peak"


@torch.no_grad()
def test_an_msst_demucs_names_its_class_and_has_arguments_under_training(tmp_path: Path) -> None:
    path = write(tmp_path, MSST_DEMUCS)
    found = read_config(path)
    assert found.architecture == "htdemucs"
    assert found.hyper_parameters["dconv_init"] == 1e-3
    model = load_model(path, checkpoint=write_weights(random_weights(path), tmp_path / "x.ckpt"))
    assert model(noise(44100)).shape == (1, 2, 2, 44100)


def test_the_yaml_can_ask_for_standardised_tracks(tmp_path: Path) -> None:
    path = write(tmp_path, MSST_ROFORMER, ("normalize: false", "normalize: true"))
    weights = write_weights(small_model(num_stems=1).state_dict(), tmp_path / "x.ckpt")
    assert load_model(path, checkpoint=weights).normalisation == "standard"


def test_without_a_chunk_size_the_chunk_follows_from_the_stft_frames(tmp_path: Path) -> None:
    no_size = ("  chunk_size: 8190\n", "")
    assert read(tmp_path, UVR_MDX23C, no_size).chunk_samples == 100 * 130
    assert read(tmp_path, UVR_MDX23C, no_size, ("  dim_t: 101\n", "")).chunk_samples == 63 * 130
    with pytest.raises(CheckpointError, match="chunk_size is missing: add it as a positive integer"):
        read(tmp_path, UVR_MDX23C, no_size, ("  hop_length: 130\n", ""))
    with pytest.raises(CheckpointError, match="dim_t must be a positive integer, not 0"):
        read(tmp_path, UVR_MDX23C, no_size, ("  dim_t: 101\n", "  dim_t: 1\n"))


def test_the_default_sample_rate_is_44100(tmp_path: Path) -> None:
    assert read(tmp_path, SCNET, ("  sample_rate: 44100\n", "")).sample_rate == 44100
    assert read(tmp_path, SCNET, ("  sample_rate: 44100\n", "  sample_rate: 48000\n")).sample_rate == 48000
    assert read(tmp_path, MSST_DEMUCS, ("  samplerate: 44100\n", "  samplerate: 48000\n")).sample_rate == 48000


@pytest.mark.parametrize(
    "changes, stems",
    [
        ([("num_stems: 1", "num_stems: 2")], ("vocals", "other")),  # one output per stem, although there is a target
        (
            [("target_instrument: Vocals", "target_instrument: null"), ("num_stems: 1", "num_stems: 2")],
            ("vocals", "other"),
        ),
        ([("target_instrument: Vocals", "target_instrument: other")], ("other",)),
        ([("  num_stems: 1\n", "")], ("vocals",)),
    ],
)
def test_a_target_is_the_only_stem_of_a_model_with_one_output(
    tmp_path: Path, changes: list[tuple[str, str]], stems: tuple[str, ...]
) -> None:
    assert read(tmp_path, MSST_ROFORMER, *changes).stems == stems


def test_sources_are_the_stems_if_training_names_none(tmp_path: Path) -> None:
    found = read(tmp_path, SCNET, ("  instruments:\n    - Drums\n    - Other\n", ""))
    assert found.stems == ("drums", "other")
    with pytest.raises(CheckpointError, match="stems is missing: add it as a list"):
        read(
            tmp_path, UVR_ROFORMER, ("  instruments:\n  - No Reverb\n  - Reverb\n  target_instrument: No Reverb\n", "")
        )


def test_our_keys_take_precedence_over_training(tmp_path: Path) -> None:
    found = read(tmp_path, "stems: [Singing]\narchitecture: own\n" + MSST_ROFORMER)
    assert (found.stems, found.architecture) == (("singing",), "own")
    named = read(tmp_path, MSST_ROFORMER, ("training:\n", "training:\n  model_type: bs_roformer\n"))
    assert named.architecture == "bs_roformer"


def test_a_models_name_and_type_are_not_hyper_parameters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, MSST_ROFORMER, ("  dim: 16\n", "  name: my_roformer\n  type: bs_roformer\n  dim: 16\n"))
    own = small_model(num_stems=1)
    model = load_model(path, checkpoint=write_weights(own.state_dict(), tmp_path / "x.ckpt"))
    assert_same_model(model, own, noise(256))
    assert random_weights(path).keys() == own.state_dict().keys() and not caplog.messages


@pytest.mark.slow
@needs_shared
def test_published_checkpoints_have_the_published_chunk_and_number_of_parameters(tmp_path: Path) -> None:
    facts = json.loads((SHARED / "community" / "wanted.json").read_text(encoding="utf-8"))["models"]
    published = [each for each in facts if each["loadable"] and each["validation"] and each["audio"]]
    assert len(published) > 60
    for each in published:
        document = {key: each[key] for key in ("audio", "model", "training", "inference", "hdemucs") if each.get(key)}
        if not (each["training"] or {}).get("instruments") or "<stem>" in each["stems"]:  # the stems are not published
            document["stems"] = [stem.strip("<>") for stem in each["stems"]]
        path = tmp_path / f"{each['name']}.yaml"
        path.write_text(json.dumps(document), encoding="utf-8")
        found = model_facts(path)
        assert (found["architecture"], found["chunk_samples"]) == (
            each["architecture"],
            each["validation"]["product_chunk"],
        )
        assert found["parameters"] == pytest.approx(each["validation"]["parameters"], rel=1e-3)


def test_unknown_keys_are_named_once_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "is_roformer: true\nema:\n  r: 8\n" + MSST_ROFORMER.replace("  num_channels: 2\n", "  surround: 2\n")
    path = write(tmp_path, text)
    weights = write_weights(small_model(num_stems=1).state_dict(), tmp_path / "x.ckpt")
    with caplog.at_level(logging.WARNING):
        load_model(path, checkpoint=weights)
        load_model(path, checkpoint=weights)
    (said,) = caplog.messages
    assert said == f"{path}: ignoring unknown keys: audio.surround, ema, is_roformer"


@pytest.mark.parametrize("value", ["true", "3", "fast"])
def test_an_unknown_hyper_parameter_is_an_error(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, MSST_ROFORMER, ("  skip_connection: False\n", f"  hyper_streams: {value}\n"))
    weights = write_weights(small_model(num_stems=1).state_dict(), tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"published\.yaml: bs_roformer has no hyper-parameter hyper_streams"):
        load_model(path, checkpoint=weights)


@pytest.mark.parametrize("value", ["", "null", "0", "0.0", "false", "[]"])
def test_an_unknown_hyper_parameter_may_be_off(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, MSST_ROFORMER, ("  skip_connection: False\n", f"  hyper_streams: {value}\n"))
    load_model(path, checkpoint=write_weights(small_model(num_stems=1).state_dict(), tmp_path / "x.ckpt"))


@pytest.mark.parametrize(
    "text, change, message",
    [
        (MSST_DEMUCS, ("  samplerate: 44100\n", ""), "samplerate is missing: add it as a positive integer"),
        (MSST_DEMUCS, ("\nhtdemucs:", "\ndemucs:"), "htdemucs is missing: add it as a section"),
        (MSST_ROFORMER, ("training:\n", "training: 5\nold:\n"), "training must be a section, not 5"),
        (UVR_MDX23C, ("  - Kick\n", "  - Snare\n"), "stems must name each stem once"),
        (MSST_ROFORMER, ("['Vocals', 'other']", "Vocals"), "instruments must be a list, not 'Vocals'"),
        (
            MSST_ROFORMER,
            ("target_instrument: Vocals", "target_instrument: {a: 1}"),
            "a stem must be a string, not {",
        ),
    ],
)
def test_a_wrong_key_of_a_published_yaml_is_named(
    tmp_path: Path, text: str, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"published\.yaml: {message}"):
        read(tmp_path, text, change)


def test_an_empty_section_equals_a_missing_one(tmp_path: Path) -> None:
    text = "stems: [vocals]\n" + UVR_ROFORMER[: UVR_ROFORMER.index("training:")] + "training:\ninference:\n"
    found: Any = read(tmp_path, text)
    assert (found.stems, found.chunk_samples) == (("vocals",), 4096)


ODD: list[Any] = [None, True, 0, 4, 1.5, "4", [4], [["a"]], {"a": 1}, {1: 2}]


READ = {"audio", "chunk_size", "sample_rate", "hop_length", "dim_t", "model", "sources", "num_stems", "training"}


READ |= {"instruments", "target_instrument", "segment", "samplerate", "channels", "htdemucs", "inference", "normalize"}


@pytest.mark.parametrize("text", [MSST_DEMUCS, UVR_ROFORMER, SCNET])
def test_a_value_of_another_type_is_accepted_or_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    published = read_yaml(path)
    sections = {name: section for name, section in published.items() if isinstance(section, dict)}
    places = [(name,) for name in published] + [(name, key) for name in sections for key in sections[name]]
    refused = []
    for place in (place for place in places if READ.issuperset(place)):
        for odd in ODD:
            document = copy.deepcopy(published)
            (document if len(place) == 1 else document[place[0]])[place[-1]] = odd
            path.write_text(json.dumps(document), encoding="utf-8")
            try:
                read_config(path)
            except CheckpointError as e:
                refused.append(str(e))
    assert len(refused) > 30
    assert all(said.startswith(f"{path}: ") and "\n" not in said for said in refused)


# The residual, mirrors, and the published names of stems


def test_stems_keep_their_published_names_beside_ours(tmp_path: Path) -> None:
    found = read(tmp_path, "stems: [lead_vocals]\nresidual: Backing_Track\n" + MSST_ROFORMER)
    assert (found.stems, found.published_stems) == (("lead_vocals",), ("Vocals",))
    assert found.residual == "backing_track"
    kit = read(tmp_path, "stems: [kick, snare, hihat]\n" + UVR_MDX23C)
    assert kit.published_stems == ("Kick", "Snare", "Hh") and kit.residual is None
    other = read(tmp_path, "stems: [vocals]\n" + UVR_ROFORMER[: UVR_ROFORMER.index("training:")])
    assert other.published_stems == ()


@pytest.mark.parametrize("residual", ["vocals", "VOCALS", "a/b", "''", "[a]"])
def test_a_residual_is_a_new_name(tmp_path: Path, residual: str) -> None:
    with pytest.raises(CheckpointError, match=r"published\.yaml: (the residual|residual must be a string)"):
        read(tmp_path, f"residual: {residual}\n" + MSST_ROFORMER)


def test_a_file_has_mirrors(tmp_path: Path) -> None:
    entry = {"name": "x.ckpt", "url": "https://a.org/x", "mirrors": ["https://b.org/x", "http://c.org/x"]}
    (file,) = read_config(write_yaml(tmp_path, files=[entry])).files
    assert file.mirrors == ("https://b.org/x", "http://c.org/x")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mirrors": "https://b.org/x"}, "mirrors must be a list"),
        ({"mirrors": ["ftp://b.org/x"]}, "url must begin with https:// or http://, not 'ftp:"),
        ({"mirrors": [3]}, "url must begin with https:// or http://, not 3"),
        ({"mirrors": ["https://b.org/x"], "url": None}, "the file 'x.ckpt' has mirrors and no url"),
    ],
)
def test_a_wrong_mirror_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_yaml(tmp_path, files=[{"name": "x.ckpt", "url": "https://a.org/x"} | changes])
    with pytest.raises(CheckpointError, match=message):
        read_config(path)


def test_a_models_warning_is_given_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_yaml(tmp_path, warning="its origin is not known")
    weights = write_weights(small_model().state_dict(), tmp_path / "x.ckpt")
    with caplog.at_level(logging.WARNING):
        load_model(path, checkpoint=weights)
        load_model(path, checkpoint=weights)
    assert caplog.messages == ["small: its origin is not known"]
    assert model_facts("bs_roformer_sw")["warning"].startswith("several independent sources say")
