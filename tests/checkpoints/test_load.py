"""Loading models: from named files, in each precision, and of several networks."""

import gc
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from demucs.apply import BagOfModels
from demucs.hdemucs import HDemucs
from demucs.states import save_with_checksum
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers.common import quick_first
from helpers.demucs_files import ARGUMENTS, CLASSES, SOURCES, assert_separates_as, config, network, save
from helpers.small_model import (
    assert_near,
    assert_same_model,
    chunks,
    identity,
    small_model,
    write_weights,
    write_yaml,
)
from separation.checkpoints.catalogue import read_config
from separation.checkpoints.convert import convert
from separation.checkpoints.load import load_model
from separation.device import PRECISIONS
from separation.errors import CheckpointError, InputError, RecipeError
from separation.models import ARCHITECTURES
from separation.models.base import SeparationModel
from separation.models.kernels.native import library
from separation.models.kernels.registry import cpu_fault

pytestmark = pytest.mark.usefixtures("one_thread")


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
def test_a_common_prefix_is_dropped(tmp_path: Path, state: dict[str, Tensor], prefix: str) -> None:
    path = write_weights({prefix + key: value for key, value in state.items()}, tmp_path / "x.ckpt")
    loaded = load_model(write_yaml(tmp_path), checkpoint=path).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_named_file_is_found_in_the_weights_folder(tmp_path: Path, weights: Path, state: dict[str, Tensor]) -> None:
    weights.mkdir()
    torch.save(state, weights / "small.ckpt")
    assert_same_model(load_model(write_yaml(tmp_path), stems=["drums"]), small_model(), chunks())


def test_a_missing_checkpoint_and_a_yaml_without_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*nothing\.ckpt"):
        load_model(write_yaml(tmp_path), checkpoint=tmp_path / "nothing.ckpt")
    with pytest.raises(CheckpointError, match=r"names no weights files and no weights are beside it \(.*\): give"):
        load_model(write_yaml(tmp_path, drop=("files",)))


def test_an_unknown_stem_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="small does not give 'kazoo': choose from vocals, drums"):
        load_model(write_yaml(tmp_path), stems=["vocals", "kazoo"])
    with pytest.raises(RecipeError, match="small needs at least one stem: choose from vocals, drums"):
        load_model(write_yaml(tmp_path), stems=[])


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_loaded_model_does_not_need_its_file(tmp_path: Path, state: dict[str, Tensor], suffix: str) -> None:
    path = write_weights(state, tmp_path / f"x{suffix}")
    model = load_model(write_yaml(tmp_path), checkpoint=path)
    with path.open("r+b") as stream:  # in place, so that a memory map would change too
        stream.write(bytes(path.stat().st_size))
    assert_same_model(model, small_model(), chunks())


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


def test_the_origin_of_given_weights_is_their_own_sha256(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = write_weights(state, tmp_path / "x.ckpt")
    config = write_yaml(tmp_path, files=[{"name": "small.ckpt", "sha256": "0" * 64}])
    model = load_model(config, checkpoint=path)
    assert model.origin is not None
    assert model.origin.weights["0"]() == hashlib.sha256(path.read_bytes()).hexdigest()


# Devices and precisions


def test_device_and_precision_are_auto_or_a_known_name(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = write_weights(state, tmp_path / "x.ckpt")
    config = write_yaml(tmp_path)
    model = load_model(config, checkpoint=path, device="auto", precision="auto")
    assert model(chunks().to(next(model.parameters()).device)).shape == (1, 2, 2, 256)
    with pytest.raises(InputError, match="fp8"):
        load_model(config, checkpoint=path, precision="fp8")
    with pytest.raises(InputError, match="abacus"):
        load_model(config, checkpoint=path, device="abacus")


def test_a_model_names_the_kind_of_cpu_only_if_it_uses_its_kernels(
    tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = write_weights(state, tmp_path / "x.ckpt"), write_yaml(tmp_path)
    kind = None if cpu_fault() else library().kind.name
    assert load_model(model, checkpoint=path).cpu_kind == kind
    assert load_model(model, checkpoint=path, attention="sdpa").cpu_kind is None
    monkeypatch.setenv("SEPARATION_ATTENTION", "sdpa")
    assert load_model(model, checkpoint=path).cpu_kind is None


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


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_are_rounded_to_the_type_of_their_layer(
    tmp_path: Path, state: dict[str, Tensor], suffix: str, precision: str
) -> None:
    path = write_weights(state, tmp_path / f"x{suffix}")
    reference = small_model()
    if precision != "fp32":
        reference.to_precision(PRECISIONS[precision])
    loaded = load_model(write_yaml(tmp_path), checkpoint=path, precision=precision).state_dict()
    for key, value in reference.state_dict().items():
        assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value), key


@pytest.mark.parametrize(
    "largest, computed", [(60_000.0, torch.float16), (70_000.0, torch.bfloat16), (torch.nan, torch.bfloat16)]
)
def test_a_model_with_weights_beyond_float16_computes_in_bfloat16(
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


# Checkpoints of several networks


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
def test_only_the_requested_specialists_are_loaded_in_that_order(tmp_path: Path, weights: Path) -> None:
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


def test_one_file_replaces_one_specialist_but_not_several(tmp_path: Path, weights: Path) -> None:
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


@pytest.mark.slow
def test_files_without_a_stem_are_averaged_each_with_its_own_arguments(tmp_path: Path, weights: Path) -> None:
    nets = [network("hdemucs"), network("hdemucs", seed=1, cac=False, hybrid_old=True)]
    for number, net in enumerate(nets):
        save(net, weights, f"x{number}").rename(weights / f"x{number}.th")
    path = config(tmp_path, "hdemucs", files=2)
    assert_separates_as(load_model(path), BagOfModels(nets))
    assert load_model(path, stems=["bass"]).stems == ("drums", "bass")
    with pytest.raises(CheckpointError, match="needs 2 files and checkpoint= is only one"):
        load_model(path, checkpoint=weights / "x0.th")


# Files that demucs wrote


@pytest.mark.parametrize("name", quick_first(CLASSES, 1))
def test_a_file_that_demucs_wrote_separates_as_demucs_does(name: str, tmp_path: Path) -> None:
    net = network(name)
    path, checkpoint = config(tmp_path, name), save(net, tmp_path)
    loaded = load_model(path, checkpoint=checkpoint, attention="sdpa").networks["0"].state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in net.state_dict().items())
    assert_separates_as(load_model(path, checkpoint=checkpoint), net)


def test_a_file_of_serialize_model_loads(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf", reason="needs omegaconf")
    from demucs.states import serialize_model

    net = network("hdemucs")
    training_args = omegaconf.OmegaConf.create({"dset": {"sources": SOURCES}, "epochs": 360, "weights": [1.0, 1.0]})
    save_with_checksum(serialize_model(net, training_args), tmp_path / "x.th")
    (path,) = tmp_path.glob("x-*.th")
    assert_separates_as(load_model(config(tmp_path, "hdemucs"), checkpoint=path), net)


@pytest.mark.parametrize("name", quick_first(CLASSES, 1))
def test_a_safetensors_file_of_demucs_separates_as_demucs_does(name: str, tmp_path: Path) -> None:
    from demucs.hf import load_safetensors_model

    net = network(name)
    convert(save(net, tmp_path), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata()["klass"] == f"demucs.{name}.{type(net).__name__}"
    by_package = load_safetensors_model(tmp_path / "x.safetensors").eval()
    assert by_package._init_args_kwargs[1]["segment"] == ARGUMENTS["segment"]
    assert_separates_as(load_model(config(tmp_path, name), checkpoint=tmp_path / "x.safetensors"), by_package)


def test_a_files_own_arguments_take_precedence_over_the_yaml(tmp_path: Path) -> None:
    net = network("hdemucs", cac=False, hybrid_old=True, norm_starts=5, freq_emb=0.1)
    assert_separates_as(load_model(config(tmp_path, "hdemucs"), checkpoint=save(net, tmp_path)), net)
    convert(next(tmp_path.glob("*.th")), tmp_path / "x.safetensors")
    assert_separates_as(load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "x.safetensors"), net)


def test_a_plain_state_dict_has_its_arguments_in_the_yaml(tmp_path: Path) -> None:
    net = network("hdemucs", cac=False, hybrid_old=True)
    torch.save({"state": net.state_dict()}, tmp_path / "x.th")
    path = config(tmp_path, "hdemucs", cac=False, hybrid_old=True)
    assert_separates_as(load_model(path, checkpoint=tmp_path / "x.th"), net)


def test_a_file_of_another_class_or_with_other_stems_is_named(tmp_path: Path) -> None:
    path = save(network("hdemucs"), tmp_path)
    with pytest.raises(CheckpointError, match=r"\.th: it describes a HDemucs for drums, bass, .* a HTDemucs for drums"):
        load_model(config(tmp_path, "htdemucs"), checkpoint=path)
    document = yaml.safe_load(config(tmp_path, "hdemucs").read_text())
    document |= {"stems": ["bass", "drums"], "model": document["model"] | {"sources": ["bass", "drums"]}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(CheckpointError, match=r"HDemucs for drums, bass, .* a HDemucs for bass, drums"):
        load_model(tmp_path / "other.yaml", checkpoint=path)


def saved_with(tmp_path: Path, form: str, **kwargs: Any) -> Path:
    """A file with this description of its network."""
    weights = {"encoder.0.conv.weight": torch.zeros(100_000)}
    if form == "th":
        saved = {"klass": HDemucs, "args": (SOURCES,), "kwargs": kwargs, "state": weights}
        torch.save(saved, tmp_path / "x.th")
    else:
        metadata = {"klass": "demucs.hdemucs.HDemucs", "args": json.dumps([SOURCES]), "kwargs": json.dumps(kwargs)}
        save_file(weights, tmp_path / f"x.{form}", metadata)
    return tmp_path / f"x.{form}"


@pytest.mark.parametrize("form", ["th", "safetensors"])
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"channels": 1 << 40}, ""),
        ({"channels": 4096}, "it has more weights than the file"),
        ({"depth": 10**9}, "depth is 1000000000, more than 256"),
        ({"wiener_iters": 10**9, "end_iters": 10**9}, "wiener_iters is 1000000000, more than 256"),
        ({"multi_freqs": [0.1] * 1000}, "multi_freqs is 1000, more than 256"),
        ({"channels": "many"}, ""),
        ({"sources": ["drums"]}, "multiple values for argument 'sources'"),
    ],
)
def test_arguments_that_would_need_too_much_memory_or_time_are_refused(
    form: str, kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved_with(tmp_path, form, **kwargs)
    with pytest.raises(CheckpointError, match=rf"x\.{form} describes a network that .*{message}") as caught:
        load_model(config(tmp_path, "hdemucs"), checkpoint=path)
    assert "\n" not in str(caught.value)


def test_an_unknown_class_is_named(tmp_path: Path) -> None:
    metadata = {"klass": "os.system", "args": '["true"]', "kwargs": "{}"}
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"describes the class os\.system: use a file of one of demucs"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["hdemucs_mmi", "mdx_extra", "mdx_extra_q"])
def test_a_published_files_name_has_the_start_of_its_checksum(name: str) -> None:
    for file in read_config(name).files:
        assert file.sha256 and file.sha256.startswith(Path(file.name).stem.rpartition("-")[2])
