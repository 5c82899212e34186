"""Loading weights of small models in every form, and converting them."""

import gc
import hashlib
import logging
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.common import quick_models
from helpers.small_model import (
    HYPER_PARAMETERS,
    assert_near,
    assert_same_model,
    chunks,
    identity,
    small_model,
    write_weights,
    write_yaml,
)
from separation.checkpoints import state_dict
from separation.checkpoints.build import build, random_weights
from separation.checkpoints.catalogue import is_here, read_config
from separation.checkpoints.convert import convert
from separation.checkpoints.load import load_model
from separation.checkpoints.state_dict import open_weights, read_weights
from separation.device import PRECISIONS
from separation.errors import CheckpointError, InputError, OutputError, RecipeError
from separation.models import ARCHITECTURES
from separation.models.base import SeparationModel

SMALL_HTDEMUCS = {
    "sources": ["drums", "bass"],
    "channels": 8,
    "bottom_channels": 0,
    "t_layers": 1,
    "t_heads": 2,
    "nfft": 2048,
    "segment": "1/4",
    "samplerate": 44100,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def state() -> dict[str, Tensor]:
    return small_model().state_dict()


# Building


def test_a_community_yaml_needs_none_of_our_keys(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "x.ckpt")
    relatives = {"linear_transformer_depth": 0, "skip_connection": False, "flash_attn": True, "num_subbands": 1}
    path = write_yaml(
        tmp_path,
        drop=("architecture", "stems", "files"),
        model=HYPER_PARAMETERS | relatives,
        training={"instruments": ["vocals", "drums"], "target_instrument": None, "lr": 1e-5},
        inference={"num_overlap": 4},
    )
    assert load_model(path, checkpoint=tmp_path / "x.ckpt").stems == ("vocals", "drums")


@pytest.mark.parametrize("name", quick_models())
def test_every_shipped_yaml_reads_and_builds(name: str) -> None:
    description = read_config(name)
    assert description.files and description.licence != "not stated" and description.quality != "not stated"
    for file in description.files:
        assert file.sha256 or file.url is None
    specialists = tuple(file.stem for file in description.files if file.stem)
    model = build(description, specialists)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    sources = description.hyper_parameters.get("sources")
    assert sources is None or tuple(sources) == description.stems


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("bs_roformer_viperx_1297", 159_758_092),
        ("bs_roformer_viperx_1296", 159_758_092),
        ("bs_roformer_sw", 174_656_564),
        ("mel_band_roformer_kim", 228_202_852),
        ("htdemucs", 41_984_456),
        ("htdemucs_6s", 27_414_996),
        ("hdemucs_mmi", 83_637_832),
    ],
)
def test_the_published_models_have_their_number_of_parameters(name: str, parameters: int) -> None:
    model = build(read_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# Loading


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".pt", ".th", ".safetensors"])
def test_every_format_gives_the_same_model(tmp_path: Path, state: dict[str, Tensor], suffix: str) -> None:
    path = write_weights(state, tmp_path / f"x{suffix}")
    model = load_model(write_yaml(tmp_path), checkpoint=path)
    assert_same_model(model, small_model(), chunks())
    assert (model.name, model.stems, model.sample_rate) == ("small", ("vocals", "drums"), 44100)
    assert (model.chunk_samples, model.channels, model.training) == (4096, 2, False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "nesting", [("state_dict",), ("state",), ("model",), ("model_state_dict",), ("state", "model")]
)
def test_nested_state_dicts_load(tmp_path: Path, state: dict[str, Tensor], nesting: tuple[str, ...]) -> None:
    saved: dict[str, Any] = state
    for key in nesting:
        saved = {"epoch": 3, key: saved, "optimizer": {"lr": 0.1}}
    torch.save(saved, tmp_path / "x.ckpt")
    model = load_model(write_yaml(tmp_path), checkpoint=tmp_path / "x.ckpt")
    assert_same_model(model, small_model(), chunks())


@pytest.mark.parametrize("prefix", ["module.", "model.", "model.module."])
def test_a_prefix_that_all_keys_have_is_dropped(tmp_path: Path, state: dict[str, Tensor], prefix: str) -> None:
    path = write_weights({prefix + key: value for key, value in state.items()}, tmp_path / "x.ckpt")
    loaded = load_model(write_yaml(tmp_path), checkpoint=path).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_named_file_is_found_in_the_weights_folder(tmp_path: Path, weights: Path, state: dict[str, Tensor]) -> None:
    weights.mkdir()
    torch.save(state, weights / "small.ckpt")
    assert_same_model(load_model(write_yaml(tmp_path), stems=["drums"]), small_model(), chunks())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_weights_in_half_precision_are_widened(
    tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype, suffix: str
) -> None:
    half = {key: value.to(dtype) for key, value in state.items()}
    model = load_model(write_yaml(tmp_path), checkpoint=write_weights(half, tmp_path / f"x{suffix}"))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in half.items())
    assert {value.dtype for value in loaded.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16", torch.bfloat16])
def test_a_half_precision_casts_the_linear_layers(
    tmp_path: Path, state: dict[str, Tensor], precision: torch.dtype | str
) -> None:
    path = write_weights(state, tmp_path / "x.ckpt")
    model = load_model(write_yaml(tmp_path), checkpoint=path, precision=precision)
    types = {type(m).__name__: {p.dtype for p in m.parameters(recurse=False)} for m in model.modules()}
    assert types["Linear"] == {torch.bfloat16} and types["RMSNorm"] == {torch.float32}


def test_device_and_precision_may_be_auto_and_must_be_known(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = write_weights(state, tmp_path / "x.ckpt")
    config = write_yaml(tmp_path)
    model = load_model(config, checkpoint=path, device="auto", precision="auto")
    assert model(chunks().to(next(model.parameters()).device)).shape == (1, 2, 2, 256)
    with pytest.raises(InputError, match="fp8"):
        load_model(config, checkpoint=path, precision="fp8")
    with pytest.raises(InputError, match="abacus"):
        load_model(config, checkpoint=path, device="abacus")


@pytest.mark.parametrize(
    "largest, computed", [(60_000.0, torch.float16), (70_000.0, torch.bfloat16), (torch.nan, torch.bfloat16)]
)
def test_weights_beyond_float16_are_computed_in_bfloat16(
    largest: float, computed: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = small_model().state_dict()
    key = next(key for key, value in state.items() if "to_out" in key and value.ndim == 2)
    state[key][0, 0] = largest
    with caplog.at_level(logging.INFO):
        model = load_model(write_yaml(tmp_path), checkpoint=write_weights(state, tmp_path / "x.ckpt"), precision="fp16")
    assert model.precision == computed
    assert model.is_half == (computed == torch.float16)
    said = [record.getMessage() for record in caplog.records if "exceed" in record.getMessage()]
    sentence = "small: computes in bfloat16, because its weights exceed the range of float16"
    assert said == [sentence] * (computed == torch.bfloat16)


@pytest.mark.parametrize("suffix", [".ckpt", ".th", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_half_a_checkpoint_is_one_clear_sentence(
    tmp_path: Path, state: dict[str, Tensor], suffix: str, kept: float
) -> None:
    path = write_weights(state, tmp_path / f"x{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(
        CheckpointError, match=r"is damaged, incomplete or not a (PyTorch|safetensors) checkpoint"
    ) as caught:
        load_model(write_yaml(tmp_path), checkpoint=path)
    assert "\n" not in str(caught.value)


def test_a_web_page_under_the_name_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for suffix in (".ckpt", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        path.write_text("<!DOCTYPE html><html>Not found</html>" * 20)
        with pytest.raises(CheckpointError, match="is damaged, incomplete or not a"):
            load_model(write_yaml(tmp_path), checkpoint=path)


def test_a_checkpoint_of_another_architecture_or_size_is_told_by_its_keys(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    config = write_yaml(tmp_path)
    path = write_weights({"encoder.0.weight": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.ckpt\) is of another architecture or size \(.*missing .*1 of"):
        load_model(config, checkpoint=path)
    key = "final_norm.gamma"
    path = write_weights(state | {key: torch.zeros(24)}, tmp_path / "wide.ckpt")
    with pytest.raises(CheckpointError, match=rf"of another shape \({key}: \[24\] instead of \[16\]\)"):
        load_model(config, checkpoint=path)
    del state[key]
    with pytest.raises(CheckpointError, match=rf"1 of its keys are missing \({key}\)"):
        load_model(config, checkpoint=write_weights(state, tmp_path / "less.ckpt"))


@pytest.mark.parametrize("saved", [[1, 2], {"epoch": 3}, {}, {"state_dict": {"a": torch.zeros(1), "b": "text"}}])
def test_a_pickle_that_holds_no_state_dict_is_an_error(tmp_path: Path, saved: Any) -> None:
    torch.save(saved, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="has no state dict"):
        load_model(write_yaml(tmp_path), checkpoint=tmp_path / "x.ckpt")


class Malicious:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, state: dict[str, Tensor], form: str) -> None:
    ran, path = tmp_path / "ran", tmp_path / "x.ckpt"
    saved = {"state_dict": state, "extra": Malicious(ran)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(Malicious(ran), protocol=2))
    else:
        torch.save(saved, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"loading it would run code \(\w+\.mkdir\)"):
        load_model(write_yaml(tmp_path), checkpoint=path)
    assert not ran.exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"colour": 1}, "bs_roformer has no hyper-parameter colour"),
        ({"num_subbands": 4}, "bs_roformer has no hyper-parameter num_subbands"),
        ({"freqs_per_bands": [3, 4]}, "adds up to 7 bins"),
        ({"dim": "wide"}, "the model section is not valid"),
        ({"depth": 1.5}, "the model section is not valid"),
        ({"num_stems": 3}, "names 2 stems and num_stems is 3"),
    ],
)
def test_wrong_hyper_parameters_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"small\.yaml.*{message}"):
        load_model(write_yaml(tmp_path, model=HYPER_PARAMETERS | changes))


def test_an_unknown_architecture_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"small\.yaml: unknown architecture 'perceptron': use one of bs_roformer"
    ):
        load_model(write_yaml(tmp_path, architecture="perceptron"))


def test_a_checkpoint_path_that_is_not_there_and_a_yaml_without_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*nothing\.ckpt"):
        load_model(write_yaml(tmp_path), checkpoint=tmp_path / "nothing.ckpt")
    with pytest.raises(CheckpointError, match=r"names no weights files and no weights are beside it \(.*\): give"):
        load_model(write_yaml(tmp_path, drop=("files",)))


def test_a_stem_that_the_model_does_not_give_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="small gives vocals, drums, not 'kazoo'"):
        load_model(write_yaml(tmp_path), stems=["vocals", "kazoo"])
    with pytest.raises(RecipeError, match="not no stem at all"):
        load_model(write_yaml(tmp_path), stems=[])


# Checkpoints made of specialists


def write_specialists(tmp_path: Path, weights: Path) -> tuple[Path, dict[str, SeparationModel]]:
    """A checkpoint of two small HTDemucs specialists; also each one's whole network, loaded without our loader."""
    architecture: Any = ARCHITECTURES["htdemucs"]
    config = architecture.Config(**SMALL_HTDEMUCS)
    networks = {}
    weights.mkdir()
    for seed, stem in enumerate(("drums", "bass")):
        torch.manual_seed(seed)
        networks[stem] = architecture(config, identity(config.sources, chunk_samples=11025)).eval()
        save_file(networks[stem].networks["0"].state_dict(), weights / f"{stem}.safetensors")
    files = [{"name": f"{stem}.safetensors", "stem": stem} for stem in networks]
    path = write_yaml(
        tmp_path,
        architecture="htdemucs",
        stems=list(networks),
        files=files,
        model=SMALL_HTDEMUCS,
        audio={"sample_rate": 44100, "chunk_size": 11025},
    )
    return path, networks


@torch.no_grad()
def test_only_the_specialists_that_are_asked_for_are_loaded_in_that_order(tmp_path: Path, weights: Path) -> None:
    path, networks = write_specialists(tmp_path, weights)
    mixture = chunks(11025)
    drums, bass = networks["drums"](mixture)[:, 0], networks["bass"](mixture)[:, 1]
    both = load_model(path, stems=["bass", "drums"])
    assert both.stems == ("bass", "drums")
    assert_near(both(mixture), torch.stack([bass, drums], dim=1))
    (weights / "drums.safetensors").unlink()
    one = load_model(path, stems=["bass"])
    assert one.stems == ("bass",)
    assert_near(one(mixture), bass.unsqueeze(1))
    with pytest.raises(CheckpointError, match=r"drums\.safetensors is missing"):
        load_model(path)


def test_one_file_stands_for_one_specialist_and_not_for_several(tmp_path: Path, weights: Path) -> None:
    path, _ = write_specialists(tmp_path, weights)
    assert load_model(path, checkpoint=weights / "bass.safetensors", stems=["bass"]).stems == ("bass",)
    with pytest.raises(CheckpointError, match="needs 2 files and checkpoint= is only one"):
        load_model(path, checkpoint=weights / "bass.safetensors")


@torch.no_grad()
def test_a_single_network_of_the_same_architecture_loads(tmp_path: Path, weights: Path) -> None:
    path, networks = write_specialists(tmp_path, weights)
    document = yaml.safe_load(path.read_text()) | {"files": [{"name": "drums.safetensors"}]}
    path.write_text(yaml.safe_dump(document))
    mixture = chunks(11025)
    assert_near(load_model(path)(mixture), networks["drums"](mixture))


# What is read, and in which type


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_are_rounded_to_the_type_that_each_layer_computes_in(
    tmp_path: Path, state: dict[str, Tensor], suffix: str, precision: str
) -> None:
    path = write_weights(state, tmp_path / f"x{suffix}")
    reference = small_model()
    if precision != "fp32":
        reference.to_precision(PRECISIONS[precision])
    loaded = load_model(write_yaml(tmp_path), checkpoint=path, precision=precision).state_dict()
    for key, value in reference.state_dict().items():
        assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value), key


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_loaded_model_has_read_its_file_and_needs_it_no_more(
    tmp_path: Path, state: dict[str, Tensor], suffix: str
) -> None:
    path = write_weights(state, tmp_path / f"x{suffix}")
    model = load_model(write_yaml(tmp_path), checkpoint=path)
    with path.open("r+b") as stream:  # in place: memory mapped from the file would change too
        stream.write(bytes(path.stat().st_size))
    assert_same_model(model, small_model(), chunks())


def test_every_type_and_shape_that_safetensors_holds_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = {str(dtype): torch.arange(7).to(dtype).view(7, 1) for dtype in state_dict.DTYPES.values()} | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(written, tmp_path / "x.safetensors")
    read = read_weights(open_weights(tmp_path / "x.safetensors"), {})
    assert read.keys() == written.keys()
    assert all(read[key].dtype == value.dtype and torch.equal(read[key], value) for key, value in written.items())


def test_a_type_that_no_model_has_is_named(tmp_path: Path) -> None:
    save_file({"gain": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors: gain is of type F8_E4M3: convert it to one of F64, F32"
    ):
        load_model(write_yaml(tmp_path), checkpoint=tmp_path / "x.safetensors")


def test_building_draws_no_random_numbers_and_later_layers_are_initialised() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build(read_config("demo"))
    assert torch.equal(torch.rand(1), expected)
    assert 0 < torch.nn.Linear(100, 100).weight.abs().max() < 0.1001


def test_loading_leaves_the_garbage_collector_as_it_was(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = write_weights(state, tmp_path / "x.ckpt")
    config = write_yaml(tmp_path)
    load_model(config, checkpoint=path)
    assert gc.isenabled()
    with pytest.raises(CheckpointError):
        load_model(config, checkpoint=tmp_path / "nothing.ckpt")
    assert gc.isenabled()
    gc.disable()
    try:
        load_model(config, checkpoint=path)
        assert not gc.isenabled()
    finally:
        gc.enable()


# Converting


def convert_to(folder: Path, saved: dict[str, Any], name: str = "x.ckpt") -> tuple[Path, str]:
    """Save a checkpoint and convert it; its converted file and the sha256 of the checkpoint itself."""
    folder.mkdir(exist_ok=True)
    torch.save(saved, folder / name)
    target = (folder / name).with_suffix(".safetensors")
    convert(folder / name, target)
    return target, hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_a_converted_checkpoint_is_the_same_model_and_names_its_source(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    angles = [key for key in state if key.endswith("rotary_embed.freqs")]
    saved = {f"module.{key}": state[angles[0]] if key in angles else value for key, value in state.items()}
    assert len({value.data_ptr() for value in saved.values()}) < len(saved)  # shared, which safetensors refuses
    target, sha256 = convert_to(tmp_path / "out", {"epoch": 3, "state_dict": saved})
    assert target.stat().st_mode == (target.parent / "x.ckpt").stat().st_mode
    with safe_open(target, framework="pt") as opened:
        assert opened.metadata() == {"source_sha256": sha256, "source_name": "x.ckpt"}
        assert set(opened.keys()) == set(state)
    assert_same_model(load_model(write_yaml(tmp_path), checkpoint=target), small_model(), chunks())
    assert sorted(path.name for path in target.parent.iterdir()) == ["x.ckpt", "x.safetensors"]


def test_converting_keeps_the_types(tmp_path: Path, state: dict[str, Tensor]) -> None:
    target, _ = convert_to(tmp_path, {key: value.half() for key, value in state.items()})
    assert {value.dtype for value in load_file(target).values()} == {torch.float16}


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path: Path, state: dict[str, Tensor]) -> None:
    target, ran = tmp_path / "out" / "x.safetensors", tmp_path / "ran"
    torch.save({"state_dict": state, "extra": Malicious(ran)}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match="would run code"):
        convert(tmp_path / "code.ckpt", target)
    torch.save({"epoch": 3}, tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="has no state dict"):
        convert(tmp_path / "none.ckpt", target)
    with pytest.raises(CheckpointError, match="there is no file"):
        convert(tmp_path / "nothing.ckpt", target)
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"must end in \.safetensors"):
        convert(tmp_path / "x.ckpt", tmp_path / "x.bin")
    assert not ran.exists() and not target.parent.exists()


def test_a_converted_file_that_cannot_be_written_is_one_sentence(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "x.ckpt")
    (tmp_path / "taken.safetensors" / "inside").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"taken\.safetensors' is a folder"):
        convert(tmp_path / "x.ckpt", tmp_path / "taken.safetensors")
    with pytest.raises(OutputError, match=r"cannot write to '.*x\.ckpt'"):
        convert(tmp_path / "x.ckpt", tmp_path / "x.ckpt" / "x.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken.safetensors", "x.ckpt"]


def test_a_full_disk_while_converting_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    torch.save(state, tmp_path / "x.ckpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes; to write more fails as on a full disk
    try:
        with pytest.raises(OutputError, match=r"cannot write to '.*x\.safetensors' \(.*too large") as caught:
            convert(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_converted_file_stands_for_its_checkpoint_without_a_checksum_and_without_the_checkpoint(
    tmp_path: Path, weights: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sha256 = convert_to(weights, state, "small.ckpt")
    (weights / "small.ckpt").unlink()
    monkeypatch.setattr(hashlib, "file_digest", None)  # calling it would be an error
    config = write_yaml(tmp_path, files=[{"name": "small.ckpt", "sha256": sha256, "url": "http://127.0.0.1:1/x"}])
    assert_same_model(load_model(config), small_model(), chunks())
    assert is_here(str(config))


def test_a_converted_file_of_another_checkpoint_is_not_taken_and_a_damaged_one_is_named(
    tmp_path: Path, weights: Path, state: dict[str, Tensor]
) -> None:
    target, sha256 = convert_to(weights, state, "small.ckpt")
    (weights / "small.ckpt").unlink()
    config = write_yaml(tmp_path, files=[{"name": "small.ckpt", "sha256": "0" * 64}])
    with pytest.raises(CheckpointError, match=r"small\.ckpt is missing"):
        load_model(config)
    assert not is_here(str(config))
    target.write_bytes(target.read_bytes()[:-100])
    config = write_yaml(tmp_path, files=[{"name": "small.ckpt", "sha256": sha256}])
    with pytest.raises(CheckpointError, match=r"small\.safetensors .* is damaged, incomplete .*: delete it"):
        load_model(config)


def test_random_weights_are_a_checkpoint_that_its_seed_decides(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, model=HYPER_PARAMETERS | {"depth": 2})  # whose layers share their rotary frequencies
    before = torch.get_rng_state()
    first, again, other = (random_weights(path, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert any(not torch.equal(value, other[key]) for key, value in first.items())
    save_file(first, tmp_path / "random.safetensors")
    model = load_model(path, checkpoint=tmp_path / "random.safetensors")
    assert all(torch.equal(value, first[key]) for key, value in model.state_dict().items())
    assert "channel_downsampler.weight" in random_weights("htdemucs")  # as in a file, without the class's own prefix
