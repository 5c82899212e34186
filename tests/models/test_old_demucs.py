"""Demucs 1 and 2: networks whose estimates are shorter than their chunks, and their files."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from helpers.recorded import drawn_chunks, drawn_weights, figures_of
from helpers.small_demucs import SOURCES, relative_error, song
from separation import CheckpointError, Separator, load_model
from separation.checkpoints.convert import convert
from separation.models.htdemucs import DemucsV2
from separation.models.old_demucs import OldDemucs

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"sources": list(SOURCES), "channels": 4}
# Norms and samples of estimates for 10,000 samples, by demucs/model.py and apply_model of facebookresearch/demucs at
# 64ed2cb (version 2) and 110f8fe (version 1). The last network has other sizes.
RECORDED: dict[str, tuple[dict[str, Any], str]] = {
    "2": (
        {},
        """
        18.45343 14.37343 19.64941 14.88805 -0.04711237 -0.05828542 -0.04603703 0.1796569 0.1763525 0.1715168 0.1220073
        0.1263331 0.1314075 0.05742435 0.01116941 0.05367854 0.1337513 0.1240027 0.1230277 -0.1625809 -0.148596
        -0.1562964 0.144298 0.1389864 0.1448686 0.02072851 0.02031815 0.02273775
        """,
    ),
    "1": (
        {"resample": False, "is_scaled": False},
        """
        18.81733 16.05267 20.48214 15.82223 -0.03667651 -0.09711367 -0.03285787 0.2255567 0.1245733 0.2106315 0.1297475
        0.1256932 0.1630726 0.1130999 0.1132148 0.08234014 0.1917697 0.05893864 0.189252 -0.1348858 -0.1306984
        -0.2033857 0.1577072 0.1393857 0.1604026 -0.03164492 0.07280799 -0.004804237
        """,
    ),
    "2, other sizes": (
        {
            "channels": 6,
            "depth": 4,
            "context": 1,
            "growth": 1.5,
            "lstm_layers": 1,
            "normalize": True,
            "resample": False,
        },
        """
        1.698028 1.908709 1.724314 1.700289 -0.005062207 0.01860366 0.02246432 -0.002704886 0.01602099 0.007250741
        -0.005188161 -0.007884786 -0.02539825 -0.006983472 0.004333339 0.009941293 0.0002659222 -0.0001522336
        0.005563444 0.0006492746 -0.002150845 0.01929419 0.006222405 0.02897535 -0.0003406421 -0.003594223 0.002817022
        0.0003980483
        """,
    ),
}


def network(**changes: Any) -> OldDemucs:
    net = OldDemucs(**SMALL | changes).eval()
    net.load_state_dict(drawn_weights(net.state_dict()))
    return net


def estimate(net: OldDemucs, mixture: torch.Tensor) -> torch.Tensor:
    """The estimate for a mixture `[2, T]`, which is extended by silence, `[S, 2, T]`."""
    length = mixture.shape[-1]
    missing = net.valid_length(length) - length
    padded = nn.functional.pad(mixture, (missing // 2, missing - missing // 2))
    with torch.inference_mode():
        found: torch.Tensor = net(padded[None])[0][..., missing // 2 : missing // 2 + length]
    return found


@pytest.mark.parametrize("version", RECORDED)
def test_an_estimate_equals_the_public_reference(version: str) -> None:
    changes, figures = RECORDED[version]
    found = figures_of(estimate(network(**changes), drawn_chunks((2, 10_000)))[None])
    expected = torch.tensor([float(number) for number in figures.split()])
    for part in (slice(0, 4), slice(4, None)):
        assert (torch.tensor(found)[part] - expected[part]).abs().max() <= 1e-5 * expected[part].abs().max()


def test_the_least_length_gives_as_many_samples() -> None:
    net = network()
    for length in (1, 999, 5000, 5001):
        needed = net.valid_length(length)
        assert net.valid_length(needed - 1) >= needed - 1 >= length - 1
        inside = torch.randn(1, 2, needed) * 0.1
        with torch.inference_mode():
            zeros = (net(inside)[0] == 0).all(dim=(0, 1)).nonzero().flatten()
        kept = torch.arange((needed - length) // 2, (needed - length) // 2 + length)
        assert not set(zeros.tolist()) & set(kept.tolist())


def save_version_1(net: OldDemucs, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save a network as version 1 does: its class, its arguments and its weights in a tuple."""
    published = type("Demucs", (), {"__module__": "demucs.model"})
    module = ModuleType("demucs.model")
    monkeypatch.setattr(module, "Demucs", published, raising=False)
    monkeypatch.setitem(sys.modules, "demucs.model", module)
    arguments = {"sources": 4, "audio_channels": 2, "channels": 4, "depth": 6, "samplerate": 44100, "upsample": False}
    torch.save((published, (), arguments, net.state_dict()), path)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("converted", [False, True])
def test_a_published_file_needs_no_yaml(
    tmp_path: Path, version: int, converted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(**({"resample": False, "is_scaled": False} if version == 1 else {}))
    path = tmp_path / "demucs.th"
    if version == 1:
        save_version_1(net, path, monkeypatch)
    else:
        torch.save(net.state_dict(), path)
    if converted:
        convert(path, path.with_suffix(".safetensors"))
        path = path.with_suffix(".safetensors")
    model = load_model(path)
    assert isinstance(model, DemucsV2) and model.stems == SOURCES
    assert model.chunk_samples == (10 if version == 1 else 40) * 44100
    mixture = song(9000)
    mixture -= mixture.mean()
    found = Separator.from_model(model).separate(mixture)
    scale = mixture.mean(0).std()
    expected = estimate(net, mixture / scale) * scale
    assert relative_error(torch.stack(list(found.values())), expected) <= 1e-5


def test_weights_for_another_number_of_stems_need_a_yaml(tmp_path: Path) -> None:
    torch.save(network(sources=["a", "b"]).state_dict(), tmp_path / "x.th")
    with pytest.raises(CheckpointError, match="needs the YAML file"):
        load_model(tmp_path / "x.th")


def test_upsampling_is_refused() -> None:
    with pytest.raises(ValueError, match="upsample"):
        OldDemucs(sources=SOURCES, upsample=True)
