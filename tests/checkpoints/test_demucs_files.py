"""Files of weights as the demucs package writes them: what they say of their networks holds, and nothing runs."""

import functools
import json
import pickle
import re
import sys
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from demucs.apply import BagOfModels
from demucs.hdemucs import HDemucs
from demucs.states import get_state, save_with_checksum
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from helpers.demucs_files import ARGUMENTS, CLASSES, SOURCES, assert_separates_as, config, network, package, save
from helpers.small_model import write_yaml
from separation.checkpoints.build import random_weights
from separation.checkpoints.catalogue import available, read_config
from separation.checkpoints.convert import convert
from separation.checkpoints.load import load_model
from separation.errors import CheckpointError
from separation.models import ARCHITECTURES

pytestmark = pytest.mark.usefixtures("one_thread")


# What is read


@pytest.mark.parametrize("name", CLASSES)
def test_a_file_that_demucs_wrote_separates_as_demucs_does(name: str, tmp_path: Path) -> None:
    net = network(name)
    model = load_model(config(tmp_path, name), checkpoint=save(net, tmp_path))
    loaded = model.networks["0"].state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in net.state_dict().items())
    assert_separates_as(model, net)


def test_a_package_of_serialize_model_is_read(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf", reason="needs omegaconf")
    from demucs.states import serialize_model

    net = network("hdemucs")
    training_args = omegaconf.OmegaConf.create({"dset": {"sources": SOURCES}, "epochs": 360, "weights": [1.0, 1.0]})
    save_with_checksum(serialize_model(net, training_args), tmp_path / "x.th")
    (path,) = tmp_path.glob("x-*.th")
    assert_separates_as(load_model(config(tmp_path, "hdemucs"), checkpoint=path), net)


@pytest.mark.parametrize("name", CLASSES)
def test_a_file_as_on_hugging_face_separates_as_demucs_does_and_as_demucs_reads_it(name: str, tmp_path: Path) -> None:
    from demucs.hf import load_safetensors_model

    net = network(name)
    convert(save(net, tmp_path), tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata()["klass"] == f"demucs.{name}.{type(net).__name__}"
    by_package = load_safetensors_model(tmp_path / "x.safetensors").eval()
    assert by_package._init_args_kwargs[1]["segment"] == ARGUMENTS["segment"]
    assert_separates_as(load_model(config(tmp_path, name), checkpoint=tmp_path / "x.safetensors"), by_package)


def test_the_arguments_in_a_file_hold_and_not_those_of_the_yaml(tmp_path: Path) -> None:
    net = network("hdemucs", cac=False, hybrid_old=True, norm_starts=5, freq_emb=0.1)
    assert_separates_as(load_model(config(tmp_path, "hdemucs"), checkpoint=save(net, tmp_path)), net)
    convert(next(tmp_path.glob("*.th")), tmp_path / "x.safetensors")
    assert_separates_as(load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "x.safetensors"), net)


def test_a_state_dict_alone_takes_its_arguments_from_the_yaml(tmp_path: Path) -> None:
    net = network("hdemucs", cac=False, hybrid_old=True)
    torch.save({"state": net.state_dict()}, tmp_path / "x.th")
    path = config(tmp_path, "hdemucs", cac=False, hybrid_old=True)
    assert_separates_as(load_model(path, checkpoint=tmp_path / "x.th"), net)


def test_several_files_without_a_stem_are_averaged_each_with_its_own_arguments(tmp_path: Path, weights: Path) -> None:
    nets = [network("hdemucs"), network("hdemucs", seed=1, cac=False, hybrid_old=True)]
    for number, net in enumerate(nets):
        save(net, weights, f"x{number}").rename(weights / f"x{number}.th")
    path = config(tmp_path, "hdemucs", files=2)
    assert_separates_as(load_model(path), BagOfModels(nets))
    assert load_model(path, stems=["bass"]).stems == ("drums", "bass")
    with pytest.raises(CheckpointError, match="needs 2 files and checkpoint= is only one"):
        load_model(path, checkpoint=weights / "x0.th")


def test_only_architectures_that_average_take_several_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"small\.yaml.*members"):
        load_model(write_yaml(tmp_path, files=[{"name": "a"}, {"name": "b"}]))


def test_each_class_is_known_by_its_keys_and_no_other_is() -> None:
    keys = {name: list(network(name).state_dict()) for name in CLASSES}
    keys["demo"] = list(random_weights("demo"))
    for name in CLASSES:
        patterns = ARCHITECTURES[name].KEY_PATTERNS
        found = {of for of in keys if all(any(re.fullmatch(p, key) for key in keys[of]) for p in patterns)}
        assert found == {name}


# What does not fit


def test_a_file_of_another_class_or_of_other_stems_is_named(tmp_path: Path) -> None:
    path = save(network("hdemucs"), tmp_path)
    with pytest.raises(CheckpointError, match=r"\.th: it describes a HDemucs for drums, bass, .* a HTDemucs for drums"):
        load_model(config(tmp_path, "htdemucs"), checkpoint=path)
    document = yaml.safe_load(config(tmp_path, "hdemucs").read_text())
    document |= {"stems": ["bass", "drums"], "model": document["model"] | {"sources": ["bass", "drums"]}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(CheckpointError, match=r"HDemucs for drums, bass, .* a HDemucs for bass, drums"):
        load_model(tmp_path / "other.yaml", checkpoint=path)


def saved_with(tmp_path: Path, form: str, **kwargs: Any) -> Path:
    """A file that says of its network what it likes."""
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
def test_arguments_that_would_take_all_memory_or_time_are_refused(
    form: str, kwargs: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = saved_with(tmp_path, form, **kwargs)
    with pytest.raises(CheckpointError, match=rf"x\.{form} describes a network that .*{message}") as caught:
        load_model(config(tmp_path, "hdemucs"), checkpoint=path)
    assert "\n" not in str(caught.value)


def test_a_class_that_demucs_does_not_have_is_named(tmp_path: Path) -> None:
    metadata = {"klass": "os.system", "args": '["true"]', "kwargs": "{}"}
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"describes a os\.system: use a file of one of demucs\.demucs\.Demucs"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "x.safetensors")


# Hostile pickles


class Call:
    """A pickle of it calls something with arguments of its own when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of demucs that were instantiated while the test ran."""
    made: list[str] = []
    for network_class, _ in CLASSES.values():
        monkeypatch.setattr(network_class, "__init__", _noting(network_class, made))
    return made


def _noting(network_class: type[nn.Module], made: list[str]) -> Any:
    plain = network_class.__init__

    @functools.wraps(plain)
    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(network_class.__name__)
        plain(self, *args, **kwargs)

    return noting


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_class_that_a_file_may_name_cannot_be_called_by_it(
    name: str, zipped: bool, tmp_path: Path, built: list[str]
) -> None:
    network_class = CLASSES[name][0]
    saved = {"state": {"a": torch.zeros(1)}, "extra": Call(network_class, SOURCES, 2, 8)}
    torch.save(saved, tmp_path / "x.th", _use_new_zipfile_serialization=zipped)
    # In the older format PyTorch does not get as far: classes of modules lie there beside their source text.
    refusal = rf"loading it would run code \(demucs\.{name}\.\w+\)" if zipped else "is damaged, incomplete"
    with pytest.raises(CheckpointError, match=refusal):
        load_model(config(tmp_path, name), checkpoint=tmp_path / "x.th")
    torch.load(tmp_path / "x.th", weights_only=False)
    assert built == [network_class.__name__, network_class.__name__]  # the YAML's and, by PyTorch, the pickle's


def opcodes(*parts: bytes) -> bytes:
    """A pickle of protocol 2 that leaves a dict with what the opcodes push as its only value."""
    return b"\x80\x02}X\x05\x00\x00\x00state" + b"".join(parts) + b"s."


@pytest.mark.parametrize(
    "what",
    [
        b"cdemucs.hdemucs\nHDemucs\n)\x81",  # NEWOBJ
        b"cdemucs.hdemucs\nHDemucs\n)\x81}b",  # and BUILD
        b"cdemucs.hdemucs\nHDemucs\n}b",  # BUILD on the class itself
        b"cfractions\nFraction\n)\x81",
    ],
)
def test_no_opcode_makes_an_object_of_a_class_that_a_file_may_name(
    what: bytes, tmp_path: Path, built: list[str]
) -> None:
    torch.save({"state": {"a": torch.zeros(1)}}, tmp_path / "whole.th")
    with zipfile.ZipFile(tmp_path / "whole.th") as whole, zipfile.ZipFile(tmp_path / "x.th", "w") as crafted:
        for name in whole.namelist():
            is_pickle = name.endswith("data.pkl")
            crafted.writestr(name.replace("whole", "x"), opcodes(what) if is_pickle else whole.read(name))
    with pytest.raises(CheckpointError, match=r"is refused|is damaged, incomplete"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "x.th")
    assert built == ["HDemucs"]  # the YAML's


@pytest.mark.parametrize("text", ["1e999999999", "9" * 30, "1/0", "nan", "-1"])
def test_a_fraction_that_takes_long_or_is_none_is_refused(text: str, tmp_path: Path) -> None:
    torch.save({"state": {"a": torch.zeros(1)}, "extra": Call(Fraction, text)}, tmp_path / "x.th")
    with pytest.raises(CheckpointError, match=r"loading it would run code \(fractions\.Fraction\)"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "x.th")


@pytest.mark.parametrize("function", [eval, getattr, np.load, nn.Linear, HDemucs.load_state_dict, pickle.loads])
def test_every_other_global_is_refused(function: Any, tmp_path: Path) -> None:
    saved = package(network("hdemucs")) | {"extra": Call(function, "print()")}
    torch.save(saved, tmp_path / "x.th")
    with pytest.raises(CheckpointError, match="loading it would run code"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "x.th")


def test_other_loads_of_the_same_process_are_as_strict_as_before(tmp_path: Path) -> None:
    path = save(network("hdemucs"), tmp_path)
    load_model(config(tmp_path, "hdemucs"), checkpoint=path)
    with pytest.raises(pickle.UnpicklingError, match=r"demucs\.hdemucs\.HDemucs"):
        torch.load(path, weights_only=True)


# Quantised weights


def quantised(net: Any, folder: Path, **changes: Any) -> Path:
    diffq = pytest.importorskip("diffq", reason="needs diffq")
    quantizer = diffq.DiffQuantizer(net, min_size=0.01, group_size=8)
    saved = package(net) | {"state": get_state(net, quantizer) | changes}
    quantizer.restore_quantized_state(saved["state"] if not changes else get_state(net, quantizer))
    quantizer.detach()
    torch.save(saved, folder / "q.th")
    return folder / "q.th"


def test_quantised_weights_are_those_that_demucs_unpacks(tmp_path: Path) -> None:
    from demucs.states import load_model as load_by_demucs

    path = quantised(network("hdemucs", cac=False), tmp_path)
    net = load_by_demucs(path).eval()
    assert_separates_as(load_model(config(tmp_path, "hdemucs"), checkpoint=path), net)
    convert(path, tmp_path / "q.safetensors")
    assert_separates_as(load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "q.safetensors"), net)


def test_quantised_weights_of_which_some_are_missing_are_refused(tmp_path: Path) -> None:
    path = quantised(network("hdemucs"), tmp_path, others=[])
    with pytest.raises(CheckpointError, match=r"q\.th: some of its weights are missing"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=path)


def test_without_diffq_quantised_weights_are_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffq", None)
    net = network("hdemucs")
    state = {"quantized": [], "float16": [], "others": [], "meta": {}, "__quantized": True}
    torch.save(package(net) | {"state": state, "weights": torch.zeros(10**6)}, tmp_path / "q.th")
    with pytest.raises(CheckpointError, match=r"q\.th: its weights are quantised: `pip install diffq`"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "q.th")


# The published ones


@pytest.mark.parametrize("name", [name for name in available() if read_config(name).architecture == "hdemucs"])
def test_a_published_files_name_holds_the_start_of_its_checksum(name: str) -> None:
    for file in read_config(name).files:
        assert file.sha256 and file.sha256.startswith(Path(file.name).stem.rpartition("-")[2])
