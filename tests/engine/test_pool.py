"""pool: models are loaded once, and only what is needed of them."""

import pytest
from torch import Tensor

from helpers.small_separators import QUICK, Recorder
from separation import InputError, ModelPool, Separator
from separation.engine import pool as pool_module
from separation.engine.options import EngineOptions


@pytest.mark.parametrize(
    "stem, expected",
    [
        ("vocals", ("bs_roformer_viperx_1297", ("vocals",))),
        ("drums", ("htdemucs_ft", ("drums",))),
        ("other", ("htdemucs_ft", ("other",))),
    ],
)
def test_two_stems_load_and_run_only_the_models_of_that_stem(
    stem: str, expected: tuple[str, tuple[str, ...]], clip: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Recorder] = []

    def load(name: str, *, stems: tuple[str, ...], **_: object) -> Recorder:
        loaded.append(Recorder(name, stems, 100_000))
        return loaded[-1]

    monkeypatch.setattr(pool_module, "load_model", load)
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    Separator("standard", two_stems=stem, pool=pool, options=QUICK).separate(clip[:, :1000])
    assert [(model.name, model.stems) for model in loaded] == [expected]
    assert list(pool.load_seconds) == [expected[0]]
    assert 0 <= pool.load_seconds[expected[0]] < 10


def test_models_that_are_not_needed_any_more_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "load_model", lambda name, *, stems, **_: Recorder(name, stems, 1000))
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    kept, dropped = pool.get("kept", ("vocals",)), pool.get("dropped", ("vocals",))
    pool.keep_only({"kept", "another"})
    assert pool.get("kept", ("vocals",)).gain is kept.gain
    assert pool.get("dropped", ("vocals",)).gain is not dropped.gain


def test_models_use_the_chosen_attention_backend() -> None:
    for name in ("einsum", "itemwise"):
        separator = Separator("demo", "all_4", options=EngineOptions(device="cpu", precision="fp32", attention=name))
        assert separator.models["demo"].attention == name
    with pytest.raises(InputError, match="unknown attention backend 'abacus'"):
        Separator("demo", "all_4", options=EngineOptions(device="cpu", attention="abacus"))


def test_a_model_that_two_separators_use_is_loaded_once(pool: ModelPool) -> None:
    first, second = Separator("demo", "vocals_instrumental", pool=pool), Separator("demo", "all_6", pool=pool)
    assert next(first.models["demo"].parameters()) is next(second.models["demo"].parameters())
    assert list(pool.load_seconds) == ["demo"]


def test_loading_more_specialists_keeps_those_that_were_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, ...]] = []

    def load(name: str, *, stems: tuple[str, ...], **_: object) -> Recorder:
        loaded.append(stems)
        return Recorder(name, stems, 1000)

    monkeypatch.setattr(pool_module, "load_model", load)
    pool = ModelPool(EngineOptions(device="cpu", precision="fp32"))
    pool.get("bag", ("drums", "bass"))
    assert pool.get("bag", ("bass",)) is pool.get("bag", ("drums",))
    assert pool.get("bag", ("vocals", "bass")).stems == ("drums", "bass", "vocals")
    assert loaded == [("drums", "bass"), ("drums", "bass", "vocals")]
