"""State dicts are read from every format, as torch reads them, and no code in a file runs."""

import functools
import pickle
import sys
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demucs.hdemucs import HDemucs
from demucs.states import get_state
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.demucs_files import CLASSES, SOURCES, assert_separates_as, config, network, package, save
from helpers.small_model import (
    RunsCode,
    assert_same_model,
    chunks,
    small_model,
    write_weights,
    write_yaml,
)
from separation.checkpoints import state_dict
from separation.checkpoints.convert import convert
from separation.checkpoints.load import load_model
from separation.checkpoints.state_dict import open_weights, read_weights
from separation.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".pt", ".th", ".safetensors"])
def test_every_format_gives_the_same_model(tmp_path: Path, state: dict[str, Tensor], suffix: str) -> None:
    path = write_weights(state, tmp_path / f"x{suffix}")
    model = load_model(write_yaml(tmp_path), checkpoint=path)
    assert_same_model(model, small_model(), chunks())
    assert (model.name, model.stems, model.sample_rate) == ("small", ("vocals", "drums"), 44100)
    assert (model.chunk_samples, model.channels, model.training) == (4096, 2, False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_every_type_and_shape_in_a_safetensors_file_is_read_unchanged(tmp_path: Path) -> None:
    written = {str(dtype): torch.arange(7).to(dtype).view(7, 1) for dtype in state_dict.DTYPES.values()} | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(written, tmp_path / "x.safetensors")
    read = read_weights(open_weights(tmp_path / "x.safetensors"), {})
    assert read.keys() == written.keys()
    assert all(read[key].dtype == value.dtype and torch.equal(read[key], value) for key, value in written.items())


def test_an_unsupported_type_is_named(tmp_path: Path) -> None:
    save_file({"gain": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"x\.safetensors: gain is of type F8_E4M3: convert it to one of F64, F32"
    ):
        load_model(write_yaml(tmp_path), checkpoint=tmp_path / "x.safetensors")


# Damaged files


@pytest.mark.parametrize("suffix", [".ckpt", ".th", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_one_error(
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


def test_a_web_page_named_like_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for suffix in (".ckpt", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        path.write_text("<!DOCTYPE html><html>Not found</html>" * 20)
        with pytest.raises(CheckpointError, match="is damaged, incomplete or not a"):
            load_model(write_yaml(tmp_path), checkpoint=path)


@pytest.mark.parametrize("saved", [[1, 2], {"epoch": 3}, {}, {"state_dict": {"a": torch.zeros(1), "b": "text"}}])
def test_a_pickle_without_a_state_dict_is_an_error(tmp_path: Path, saved: Any) -> None:
    torch.save(saved, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="has no state dict"):
        load_model(write_yaml(tmp_path), checkpoint=tmp_path / "x.ckpt")


# Code in pickles


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, state: dict[str, Tensor], form: str) -> None:
    ran, path = tmp_path / "ran", tmp_path / "x.ckpt"
    saved = {"state_dict": state, "extra": RunsCode(ran)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(RunsCode(ran), protocol=2))
    else:
        torch.save(saved, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"loading it would run code \(\w+\.mkdir\)"):
        load_model(write_yaml(tmp_path), checkpoint=path)
    assert not ran.exists()


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
def test_a_file_cannot_call_the_classes_that_it_may_name(
    name: str, zipped: bool, tmp_path: Path, built: list[str]
) -> None:
    network_class = CLASSES[name][0]
    saved = {"state": {"a": torch.zeros(1)}, "extra": Call(network_class, SOURCES, 2, 8)}
    torch.save(saved, tmp_path / "x.th", _use_new_zipfile_serialization=zipped)
    # The older format stores a module's class with its source, which the reader does not support.
    refusal = rf"loading it would run code \(demucs\.{name}\.\w+\)" if zipped else "is damaged, incomplete"
    with pytest.raises(CheckpointError, match=refusal):
        load_model(config(tmp_path, name), checkpoint=tmp_path / "x.th")
    torch.load(tmp_path / "x.th", weights_only=False)
    assert built == [network_class.__name__, network_class.__name__]  # once for the YAML and once by torch.load


def opcodes(*parts: bytes) -> bytes:
    """A pickle of protocol 2 that leaves a dict with what the opcodes push as its only value."""
    return b"\x80\x02}X\x05\x00\x00\x00state" + b"".join(parts) + b"s."


@pytest.mark.parametrize(
    "what",
    [
        b"cdemucs.hdemucs\nHDemucs\n)\x81",  # NEWOBJ
        b"cdemucs.hdemucs\nHDemucs\n)\x81}b",  # NEWOBJ and BUILD
        b"cdemucs.hdemucs\nHDemucs\n}b",  # BUILD on the class itself
        b"cfractions\nFraction\n)\x81",
    ],
)
def test_no_opcode_creates_an_object_of_a_class_that_a_file_may_name(
    what: bytes, tmp_path: Path, built: list[str]
) -> None:
    torch.save({"state": {"a": torch.zeros(1)}}, tmp_path / "whole.th")
    with zipfile.ZipFile(tmp_path / "whole.th") as whole, zipfile.ZipFile(tmp_path / "x.th", "w") as crafted:
        for name in whole.namelist():
            is_pickle = name.endswith("data.pkl")
            crafted.writestr(name.replace("whole", "x"), opcodes(what) if is_pickle else whole.read(name))
    with pytest.raises(CheckpointError, match=r"is refused|is damaged, incomplete"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "x.th")
    assert built == ["HDemucs"]  # for the YAML


@pytest.mark.parametrize("text", ["1e999999999", "9" * 30, "1/0", "nan", "-1"])
def test_a_slow_or_invalid_fraction_is_refused(text: str, tmp_path: Path) -> None:
    torch.save({"state": {"a": torch.zeros(1)}, "extra": Call(Fraction, text)}, tmp_path / "x.th")
    with pytest.raises(CheckpointError, match=r"loading it would run code \(fractions\.Fraction\)"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "x.th")


@pytest.mark.parametrize("function", [eval, getattr, np.load, nn.Linear, HDemucs.load_state_dict, pickle.loads])
def test_every_other_global_is_refused(function: Any, tmp_path: Path) -> None:
    saved = package(network("hdemucs")) | {"extra": Call(function, "print()")}
    torch.save(saved, tmp_path / "x.th")
    with pytest.raises(CheckpointError, match="loading it would run code"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "x.th")


def test_torch_load_refuses_the_classes(tmp_path: Path) -> None:
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


def test_quantised_weights_are_unpacked_as_demucs_does(tmp_path: Path) -> None:
    from demucs.states import load_model as load_by_demucs

    path = quantised(network("hdemucs", cac=False), tmp_path)
    net = load_by_demucs(path).eval()
    assert_separates_as(load_model(config(tmp_path, "hdemucs"), checkpoint=path), net)
    convert(path, tmp_path / "q.safetensors")
    assert_separates_as(load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "q.safetensors"), net)


def test_incomplete_quantised_weights_are_refused(tmp_path: Path) -> None:
    path = quantised(network("hdemucs"), tmp_path, others=[])
    with pytest.raises(CheckpointError, match=r"q\.th: some of its weights are missing"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=path)


def test_without_diffq_quantised_weights_are_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffq", None)
    net = network("hdemucs")
    state = {"quantized": [], "float16": [], "others": [], "meta": {}, "__quantized": True}
    torch.save(package(net) | {"state": state, "weights": torch.zeros(10**6)}, tmp_path / "q.th")
    with pytest.raises(CheckpointError, match=r"q\.th: its weights are quantised: `pip install diffq`"):
        load_model(config(tmp_path, "hdemucs"), checkpoint=tmp_path / "q.th")
