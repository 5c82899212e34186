"""State dicts are found in the layouts of all trainers, and a warning names a choice between several."""

import argparse
import logging
import sys
import types
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from helpers.small_model import small_model, write_weights, write_yaml
from separation.checkpoints.load import load_model
from separation.checkpoints.state_dict import open_weights
from separation.checkpoints.unwrap import state_dict_in
from separation.errors import CheckpointError
from separation.models.base import SeparationModel

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    return small_model().state_dict()


def other(state: State) -> State:
    """Weights that must not be used."""
    return {key: value + 1 for key, value in state.items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def loaded(folder: Path, saved: Any) -> SeparationModel:
    torch.save(saved, folder / "x.ckpt")
    return load_model(write_yaml(folder), checkpoint=folder / "x.ckpt")


def assert_loads(folder: Path, saved: Any, state: State) -> None:
    got = loaded(folder, saved).state_dict()
    assert got.keys() == state.keys() and all(torch.equal(got[key], value) for key, value in state.items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "ema_model.", "net.", "module.", "model.", "ema.", "network."])
@pytest.mark.parametrize("above", ["", "model.", "module._orig_mod."])
def test_wrappers_prefixes_are_dropped(tmp_path: Path, state: State, prefix: str, above: str) -> None:
    assert_loads(tmp_path, prefixed(state, above + prefix), state)


@pytest.mark.parametrize("within", ["_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."])
def test_prefixes_of_single_compiled_or_wrapped_layers_are_dropped(tmp_path: Path, state: State, within: str) -> None:
    wrapped = {key.replace("layers.0.1.", f"layers.0.1.{within}"): value for key, value in state.items()}
    assert wrapped.keys() != state.keys()
    assert_loads(tmp_path, wrapped, state)


def test_other_modules_beside_a_wrapped_network_are_left_out(
    tmp_path: Path, state: State, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"loss.window": torch.ones(4), "metric.total": torch.zeros(1)}
    with caplog.at_level(logging.WARNING):
        assert_loads(tmp_path, prefixed(state, "model.") | extra, state)
    assert caplog.messages == [f"{tmp_path / 'x.ckpt'}: using the weights model.*, not those of loss, metric"]


def test_a_file_of_pytorchs_averaged_model_loads(tmp_path: Path, state: State) -> None:
    averaged = AveragedModel(small_model())
    averaged.update_parameters(small_model())
    saved = averaged.state_dict()
    assert "n_averaged" in saved
    assert_loads(tmp_path, {"model_state_dict": saved, "epoch": 3}, state)


@pytest.mark.parametrize("plain", ["model.", "online_model.", "net."])
def test_the_moving_average_in_one_state_dict_is_used(
    tmp_path: Path, state: State, plain: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved = prefixed(other(state), plain) | prefixed(state, "ema_model.") | {"step": torch.ones(1)}
    with caplog.at_level(logging.WARNING):
        assert_loads(tmp_path, saved, state)
    (said,) = caplog.messages
    left_out = ", ".join(sorted([plain.rstrip("."), "step"]))
    assert said == f"{tmp_path / 'x.ckpt'}: using the weights ema_model.*, not those of {left_out}"


@pytest.mark.parametrize("name", ["ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "ema"])
@pytest.mark.parametrize("plain", ["state_dict", "model"])
def test_the_state_dict_of_the_moving_average_is_used(
    tmp_path: Path, state: State, name: str, plain: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved = {plain: other(state), name: {"decay": 0.999, "module": prefixed(state, "module.")}, "epoch": 7}
    with caplog.at_level(logging.WARNING):
        assert_loads(tmp_path, saved, state)
    assert caplog.messages == [f"{tmp_path / 'x.ckpt'}: using the moving average {name!r}, not {plain!r}"]


def test_an_average_without_names_is_not_used(tmp_path: Path, state: State) -> None:
    saved = {"state_dict": state, "ema": {"decay": 0.999, "shadow_params": list(state.values())}}
    assert_loads(tmp_path, saved, state)


# Objects beside the weights


def made_elsewhere(monkeypatch: pytest.MonkeyPatch, module: str, name: str, base: type = object) -> type:
    """A class in a module that exists while the file is written but not when it is read."""
    found = type(name, (base,), {"__module__": module})
    parts = module.split(".")
    for depth in range(len(parts)):
        path = ".".join(parts[: depth + 1])
        monkeypatch.setitem(sys.modules, path, sys.modules.get(path) or types.ModuleType(path))
    setattr(sys.modules[module], name, found)
    return found


def lightning_file(state: State, path: Path) -> Path:
    """A checkpoint as PyTorch Lightning writes it, with hyper-parameters in OmegaConf's classes."""
    with pytest.MonkeyPatch.context() as patch:
        attributes = made_elsewhere(patch, "pytorch_lightning.utilities.parsing", "AttributeDict", dict)
        callback = made_elsewhere(patch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
        config = made_elsewhere(patch, "omegaconf.dictconfig", "DictConfig")()
        config._content = {"lr": 1e-4}
        optimizer = torch.optim.AdamW(small_model().parameters(), lr=1e-4)
        saved = {
            "epoch": 12,
            "global_step": 10_000,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": OrderedDict(prefixed(state, "model.")),
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 13}}}},
            "callbacks": {callback: {"best_model_score": torch.tensor(9.5), "dirpath": path.parent}},
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [{"best": np.float64(9.5), "_last_lr": [1e-4]}],
            "hparams_name": "kwargs",
            "hyper_parameters": attributes(model=config, args=argparse.Namespace(seed=1), optimizer=torch.optim.AdamW),
            "metrics": defaultdict(list, sdr=[9.1, 9.5]),
        }
        torch.save(saved, path)
    return path


def test_a_file_of_lightning_loads_without_its_packages(tmp_path: Path, state: State) -> None:
    path = lightning_file(state, tmp_path / "x.ckpt")
    assert not {"pytorch_lightning", "omegaconf"} & set(sys.modules)
    got = load_model(write_yaml(tmp_path), checkpoint=path).state_dict()
    assert all(torch.equal(got[key], value) for key, value in state.items())
    assert not {"pytorch_lightning", "omegaconf"} & set(sys.modules)


@pytest.mark.parametrize("module", ["trainer.configs", "shutil", "os_helpers"])
def test_an_object_of_another_package_is_refused_by_name(
    tmp_path: Path, state: State, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        config = made_elsewhere(patch, module, "ConfigOfMine")()
        torch.save({"state_dict": state, "hyper_parameters": config}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=rf"loading it would run code \({module}\.ConfigOfMine\)"):
        open_weights(tmp_path / "x.ckpt")


def test_a_file_without_weights_is_not_a_checkpoint(tmp_path: Path) -> None:
    for saved in ({"epoch": 3, "model": {"lr": 0.1}}, [1, 2], {}, {"state_dict": {}}):
        torch.save(saved, tmp_path / "x.ckpt")
        with pytest.raises(CheckpointError, match="has no state dict"):
            open_weights(tmp_path / "x.ckpt")


def test_nested_dictionaries_are_searched_once() -> None:
    bomb: dict[str, Any] = {}
    for _ in range(40):
        bomb = {f"k{number}": bomb for number in range(40)}
    round_and_round: dict[str, Any] = {"lr": 0.1}
    round_and_round["model"] = round_and_round
    weights = {"a": partial(torch.zeros, 2)}
    assert state_dict_in({"ema": bomb, "state": round_and_round, "state_dict": weights}) == (weights, [])
    assert state_dict_in(round_and_round) == ({}, [])
    round_and_round["net"] = weights
    assert state_dict_in(round_and_round) == ({}, [])  # ambiguous: every level has a state dict


def test_plain_and_compiled_layers_are_both_kept(tmp_path: Path, state: State) -> None:
    torch.save({"layers.a": torch.zeros(2), "layers._orig_mod.a": torch.ones(2)}, tmp_path / "x.ckpt")
    assert set(open_weights(tmp_path / "x.ckpt").tensors) == {"layers.a", "layers._orig_mod.a"}


def test_numbers_among_the_weights_are_left_out(tmp_path: Path, state: State) -> None:
    assert_loads(tmp_path, state | {"epoch": 3, "sdr": 9.5, "best": None}, state)


def test_prefixes_are_dropped_in_a_safetensors_file_too(tmp_path: Path, state: State) -> None:
    path = write_weights(prefixed(state, "net.model."), tmp_path / "x.safetensors")
    got = load_model(write_yaml(tmp_path), checkpoint=path).state_dict()
    assert all(torch.equal(got[key], value) for key, value in state.items())
