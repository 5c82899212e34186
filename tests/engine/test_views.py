"""views: a model's input inverted, swapped and delayed, and its estimates turned back."""

import pytest
import torch
from torch import Tensor

from separation.engine.recipe_lines import PLAIN, View
from separation.engine.song_waveforms import Samples
from separation.engine.views import Viewed, undone

VIEWS = [PLAIN, View(is_inverted=True), View(is_swapped=True), View(delay_samples=7), View(True, True, 700)]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("n_block", [1, 100, 5000])
def test_a_view_is_undone_exactly_whatever_the_blocks(view: View, n_block: int) -> None:
    song = noise(2, 1000)
    viewed = Viewed(Samples.of(song), view)
    assert viewed.n_samples == 1000 + view.delay_samples
    blocks = [viewed.read(at, min(at + n_block, viewed.n_samples)) for at in range(0, viewed.n_samples, n_block)]
    stems = (torch.stack([block, block]) for block in blocks)
    assert torch.equal(torch.cat(list(undone(stems, view)), dim=-1), torch.stack([song, song]))


def test_a_model_sees_the_channels_swapped_the_sign_inverted_and_silence_first() -> None:
    song = noise(2, 10)
    assert torch.equal(Viewed(Samples.of(song), View(is_swapped=True)).read(0, 10), song[[1, 0]])
    assert torch.equal(Viewed(Samples.of(song), View(is_inverted=True)).read(3, 5), -song[:, 3:5])
    delayed = Viewed(Samples.of(song), View(delay_samples=4))
    assert torch.equal(delayed.read(0, 14), torch.cat([torch.zeros(2, 4), song], dim=-1))
    assert torch.equal(delayed.read(1, 3), torch.zeros(2, 2))
    assert delayed.read(0, 0).shape == (2, 0)
