"""Threads get their turns in the order in which they ask."""

import threading
import time
from collections.abc import Callable

import pytest

from separation.engine.turns import Turns


def waiting(turns: Turns, n_threads: int, job: Callable[[int], None]) -> list[threading.Thread]:
    """Threads that ask for a turn one after the other, and run the job in it."""

    def run(number: int) -> None:
        with turns.turn():
            job(number)

    threads = []
    for number in range(n_threads):
        threads.append(threading.Thread(target=run, args=(number,)))
        threads[-1].start()
        while len(turns._waiting) <= number:
            time.sleep(0.001)
    return threads


def test_turns_come_one_at_a_time_in_the_order_of_asking() -> None:
    turns, order, inside = Turns(), list[int](), threading.Lock()

    def job(number: int) -> None:
        assert inside.acquire(blocking=False)
        order.append(number)
        inside.release()

    with turns.turn():
        assert not turns.is_wanted
        threads = waiting(turns, 8, job)
        assert turns.is_wanted and order == []
    for thread in threads:
        thread.join(60)
    assert order == list(range(8))
    assert not turns.is_wanted


def test_who_gives_up_waiting_leaves_the_turn_to_the_others() -> None:
    turns, order = Turns(), list[int]()

    class Cancelled(BaseException):
        pass

    def give_up() -> None:
        raise Cancelled

    with turns.turn():
        raised: list[bool] = []

        def cancelled() -> None:
            with pytest.raises(Cancelled), turns.turn(give_up):
                raised.append(False)
            raised.append(True)

        thread = threading.Thread(target=cancelled)
        thread.start()
        thread.join(60)
        assert raised == [True] and not turns.is_wanted
        threads = waiting(turns, 2, order.append)
    for thread in threads:
        thread.join(60)
    assert order == [0, 1]


def test_an_error_in_a_turn_passes_it_on() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.turn():
        _ = 1 / 0
    with turns.turn():
        pass
