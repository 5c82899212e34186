"""recipes.py measures what it says."""

import math

import pytest
import torch
import yaml
from torch import Tensor

import recipes
from helpers.small_model import identity
from separation import ModelPool
from separation.engine.options import EngineOptions
from separation.engine.recipes import resolve
from separation.models.base import SeparationModel


class Shares(SeparationModel):
    """Estimates each stem as a fixed share of the mixture."""

    channels = 2

    def forward(self, chunks: Tensor) -> Tensor:
        return torch.stack([chunks * share for share in (0.5, 0.45, 0.25, 0.25)], dim=1)


def test_each_source_is_scored_by_the_true_stem_over_the_songs() -> None:
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    pool._models = {"htdemucs": Shares(identity(recipes.STEMS, name="htdemucs", chunk_samples=352_800))}
    mixture = torch.randn(2, 1000) * 0.1
    parts = {"vocals": 0.5 / 0.99, "drums": 0.5, "bass": 0.5, "guitar": 0.1, "piano": 0.1, "other": 0.3}
    song = ("song", mixture, {stem: mixture * part for stem, part in parts.items()})
    other = 20 * math.log10(0.5 / 0.7)  # the residual is -0.2 of the mixture
    expected = {("htdemucs", "vocals"): 40, ("htdemucs", "drums"): 20, ("residual", "other"): other}
    sources = {"htdemucs": ("vocals", "drums"), "residual": ("other",)}
    assert recipes.measure(sources, [song, song], pool) == pytest.approx(expected, abs=1e-3)


def test_every_source_that_is_measured_is_one() -> None:
    for source, stems in recipes.SOURCES.items():
        for stem in stems:
            resolve("bench", "all_4", dict.fromkeys(recipes.STEMS, "htdemucs") | {stem: yaml.safe_load(source)})
