"""MDX23C with a Hartley transform gives what Music-Source-Separation-Training gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.recorded import assert_as_recorded
from helpers.small_model import assert_near, identity
from helpers.small_unets import AUDIO, MODEL, STEMS, small_mdx23c
from separation import CheckpointError, Separator, load_model
from separation.models.mdx23c_stht import MDX23CSTHT, MDX23CSTHTConfig

# By models/mdx23c_tfc_tdf_v3_with_STHT.py of ZFTurbo/Music-Source-Separation-Training at ccc011a
TWO_STEMS = """
    5.095843 5.031746 -0.03353288 -0.001687316 -0.03403023 -0.019535 0.03001342 -0.03561573 0.03681571 0.01679037
    0.05567472 -0.01592106 0.06223598 0.01123387 0.03940282 -0.03886161 0.04180744 0.003203579 -0.05371562 0.0606364
    0.1165197 -0.07384893 0.03068274 0.03228019 -0.04187126 0.01914707
"""
FOUR_STEMS = """
    3.480386 3.637571 5.491777 3.949382 0.01384647 -0.01491272 -0.01554342 -0.05078267 0.01989417 -0.01376918
    -0.09928127 0.1278681 -0.03347071 0.05705338 -0.01687691 -0.07025319 0.02880562 0.0005278011 0.004009706
    0.006165172 0.01378257 0.01927405 -0.001973938 -0.1493442 0.007543964 -0.0369742 -0.02887875 0.01679893
"""


def small(stems: int = 2, **changes: Any) -> MDX23CSTHT:
    torch.manual_seed(0)
    fields = {**AUDIO, "audio_channels": 2, **MODEL, **changes}
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    del fields["sample_rate"]
    config = MDX23CSTHTConfig(num_stems=stems, **fields)
    return MDX23CSTHT(config, identity(STEMS[:stems], chunk_samples=config.chunk_size)).eval()


@pytest.mark.parametrize(
    "stems, changes, figures", [(2, {}, TWO_STEMS), (4, {"num_subbands": 2, "norm": "GroupNorm4"}, FOUR_STEMS)]
)
def test_output_equals_the_public_reference(stems: int, changes: dict[str, Any], figures: str) -> None:
    assert_as_recorded(small(stems, **changes), AUDIO["chunk_size"], figures)


def test_the_fast_layers_equal_the_plain_ones() -> None:
    model = small(4)
    chunk = torch.randn(2, 2, AUDIO["chunk_size"]) * 0.1
    with torch.inference_mode():
        plain = model(chunk)
        model.fuse_for_cpu()
        assert (model(chunk) - plain).abs().max() <= 2e-5 * plain.abs().max()
        assert_near(model.only(STEMS[2:3])(chunk), model(chunk)[:, 2:3])


def test_the_transform_is_the_definition_and_its_inverse() -> None:
    model = small()
    chunk = torch.randn(1, 2, AUDIO["chunk_size"])
    spectrum = model._stft.spectrogram(chunk)
    values = model._taken(spectrum)
    assert values.shape == (1, 2, 256, 32, 1)
    frame = torch.nn.functional.pad(chunk, (128, 128), mode="reflect")[0, 0, 64 * 5 : 64 * 5 + 256]
    transform = torch.fft.fft(frame * torch.hamming_window(256))
    assert torch.allclose(values[0, 0, :, 5, 0], transform.real - transform.imag, atol=1e-4)
    assert torch.allclose(model._given(values.transpose(2, 3)).transpose(-1, -2), spectrum, atol=1e-4)


def test_weights_with_a_yaml_that_names_no_architecture_are_recognised_by_their_shape(tmp_path: Path) -> None:
    """As Music-Source-Separation-Training publishes it."""
    document = {"audio": AUDIO, "model": MODEL, "training": {"instruments": list(STEMS[:2]), "target_instrument": None}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    for model in (small(), small_mdx23c(2)):
        torch.save(model.state_dict(), tmp_path / "x.ckpt")
        loaded = load_model(tmp_path / "x.ckpt")
        assert type(loaded) is type(model)
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def test_a_yaml_that_names_it_loads_it_and_separates_a_song(tmp_path: Path) -> None:
    document = {
        "architecture": "experimental_mdx23c_stht",
        "audio": AUDIO,
        "model": MODEL,
        "training": {"instruments": list(STEMS[:2]), "target_instrument": None},
    }
    torch.save(small().state_dict(), tmp_path / "x.ckpt")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    model = load_model(tmp_path / "x.ckpt")
    assert isinstance(model, MDX23CSTHT)
    stems = Separator.from_model(model).separate(torch.randn(2, 5000) * 0.1)
    assert list(stems) == list(STEMS[:2])
    document["audio"] = AUDIO | {"dim_f": 64}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match="dim_f 64 must be half of n_fft 256"):
        load_model(tmp_path / "x.ckpt")
