"""The demucs package's networks compute with our spectrograms and attention what they do on their own."""

from fractions import Fraction

import demucs.hdemucs
import demucs.htdemucs
import pytest
import torch
from torch import nn

from helpers.small_demucs import CHUNK_SAMPLES, SOURCES, network, relative_error, song
from separation.errors import CheckpointError
from separation.models import demucs_networks
from separation.models.base import Blueprint
from separation.models.demucs_networks import MultiheadAttention

PACKAGE = {"htdemucs": demucs.htdemucs.HTDemucs, "hdemucs": demucs.hdemucs.HDemucs}

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
@pytest.mark.parametrize("kind", PACKAGE)
def test_a_network_equals_the_packages_own(kind: str) -> None:
    ours = network(0, kind)
    args, kwargs = ours._init_args_kwargs
    theirs = PACKAGE[kind](*args, **kwargs).eval()
    theirs.load_state_dict(ours.state_dict())
    chunks = song(CHUNK_SAMPLES)[None]
    assert torch.equal(ours(chunks), theirs(chunks))


@torch.no_grad()
@pytest.mark.parametrize("kind", PACKAGE)
def test_the_branches_add_up_to_the_networks_estimates(kind: str) -> None:
    net, chunks = network(0, kind), song(CHUNK_SAMPLES)[None]
    expected = net(chunks)
    spectra, waveforms = net.branches(torch.view_as_real(net._spec(chunks)), chunks)
    from_spectra = net._ispec(torch.view_as_complex(spectra.contiguous()), CHUNK_SAMPLES)
    assert relative_error(waveforms + from_spectra, expected) <= 1e-5
    assert torch.equal(net(chunks), expected)  # the network itself still computes its own spectrograms


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "itemwise", "einsum"])
def test_attention_by_a_backend_equals_pytorchs(backend: str) -> None:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    ours = MultiheadAttention(plain, backend)
    x, other = torch.randn(2, 7, 32), torch.randn(2, 11, 32)
    for key in (x, other):
        got, weights = ours(x, key, key, attn_mask=None, need_weights=False)
        expected = plain(x, key, key, need_weights=False)[0]
        assert weights is None and (got - expected).abs().max() <= 1e-6


def test_attention_refuses_options_that_it_would_ignore() -> None:
    ours = MultiheadAttention(nn.MultiheadAttention(8, 2, batch_first=True), "sdpa")
    x = torch.randn(1, 3, 8)
    for options in ({"need_weights": True}, {"attn_mask": torch.zeros(3, 3)}, {"is_causal": True}):
        with pytest.raises(AssertionError):
            ours(x, x, x, **options)


def test_a_config_has_the_arguments_and_defaults_of_its_network() -> None:
    config = demucs_networks.config_of(demucs_networks.HTDemucs)(sources=SOURCES)
    assert (config.sources, config.channels, config.segment) == (SOURCES, 48, 10)
    assert isinstance(config.multi_freqs, tuple | type(None))


def test_a_file_describes_its_network() -> None:
    arguments = {"sources": list(SOURCES), "segment": Fraction(1, 2), "channels": 8, "unknown": 1}
    blueprint = Blueprint("demucs.hdemucs.HDemucs", (), arguments)
    built = demucs_networks.network_of(blueprint)
    assert isinstance(built, demucs_networks.HDemucs) and built.channels == 8
    description = demucs_networks.description_of(blueprint)
    assert description["architecture"] == "hdemucs"
    assert description["audio"] == {"sample_rate": 44100, "chunk_size": 22050}
    assert description["model"]["sources"] == list(SOURCES)


def test_a_file_that_describes_another_class_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^it describes the class os\.system: use a file of one of demucs\."):
        demucs_networks.network_of(Blueprint("os.system", (), {}))


def test_only_plain_demucs_needs_a_longer_chunk() -> None:
    plain, hybrid = network(0, "demucs"), network(0, "hdemucs")
    assert demucs_networks.valid_length([hybrid], 1000) == 1000
    assert demucs_networks.valid_length([hybrid, plain], 1000) == plain.valid_length(1000) > 1000
