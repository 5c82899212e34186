"""Estimates of the time that is left, on a clock that the tests move."""

from separation.web.pace import LATEST, REST, Paces, SongPace

STEMS = 3  # tracks


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def run(paces: Paces, clock: Clock, *, steps: int = 10, step_seconds: float = 2.0, rest: float = 4.0) -> list[float]:
    """A song of 100 s with one model; returns the errors of the estimates that there are, in seconds."""
    pace, errors = SongPace(paces, "demo", lambda: 100.0, STEMS, clock), list[float]()
    end = clock.now + steps * step_seconds + rest
    for step in range(steps + 1):
        left = pace.in_models(step / steps, "model")
        if left is not None:
            errors.append(left - (end - clock.now))
        clock.now += step_seconds if step < steps else 0
    pace.after_models()
    clock.now += rest
    pace.end()
    return errors


def test_the_first_song_is_estimated_once_some_batches_are_done() -> None:
    errors = run(Paces(), Clock(), rest=REST * 100 * STEMS)
    assert len(errors) == 8  # not at the start, nor after the first two batches
    assert max(map(abs, errors)) < 1e-6


def test_the_next_song_is_estimated_from_the_start() -> None:
    paces, clock = Paces(), Clock()
    assert paces.total("demo", 100, STEMS) is None
    run(paces, clock)
    assert paces.total("demo", 50, STEMS) == 12
    assert paces.total("other", 50, STEMS) is None
    errors = run(paces, clock)
    assert len(errors) == 11
    assert max(map(abs, errors)) < 1e-6


def test_a_song_from_the_cache_does_not_make_the_next_one_look_quick() -> None:
    paces, clock = Paces(), Clock()
    run(paces, clock)
    for _ in range(LATEST - 1):
        run(paces, clock, step_seconds=0.0)
    assert paces.models("demo", 100) == 20
    run(paces, clock, step_seconds=0.0)
    assert paces.models("demo", 100) == 0  # but what is long ago is forgotten


def test_the_time_goes_on_while_a_batch_is_computed_and_is_never_negative() -> None:
    clock = Clock()
    pace = SongPace(Paces(), "demo", lambda: 100.0, STEMS, clock)
    for step in range(5):
        clock.now += 2
        pace.in_models(step / 10, "model")
    rest = REST * 100 * STEMS
    assert pace.in_models(0.4, "model") == 12 + rest
    clock.now += 1
    assert pace.in_models(0.4, "model") == 11 + rest
    clock.now += 100
    assert pace.in_models(0.4, "model") == rest
    assert pace.after_models() == rest == 9
    clock.now += 10
    assert pace.after_models(0.1) == 0
    assert pace.after_models(0.25) == 30  # a quarter took 10 s
    assert pace.after_models(1) == 0


def test_each_model_has_its_own_pace() -> None:
    clock = Clock()
    pace = SongPace(Paces(), "demo", lambda: 100.0, STEMS, clock)
    for step in range(6):
        pace.in_models(step / 20, "quick")
        clock.now += 1
    assert pace.in_models(0.3, "slow") is None
    for step in range(1, 5):
        clock.now += 4
        left = pace.in_models(0.3 + step / 20, "slow")
    assert left == 10 * 4 + REST * 100 * STEMS
