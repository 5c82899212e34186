"""compute_thread: all work on a device runs on one thread."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers.simulated_gpu import simulated_gpu
from separation.engine.compute_thread import compute_thread

CPU = torch.device("cpu")


def test_all_jobs_of_a_device_run_on_one_thread_whoever_submits_them() -> None:
    thread = compute_thread(CPU)
    with ThreadPoolExecutor(2) as pool:
        idents = list(pool.map(lambda _: thread.run(threading.get_ident), range(4)))
    assert {*idents, compute_thread(CPU).run(threading.get_ident)} == {idents[0]}
    assert idents[0] != threading.get_ident()


def test_jobs_run_in_the_order_in_which_they_were_submitted() -> None:
    done: list[int] = []
    futures = [compute_thread(CPU).submit(done.append, number) for number in range(100)]
    for future in futures:
        future.result()
    assert done == list(range(100))


def test_an_error_in_a_job_reaches_the_caller_and_the_thread_goes_on() -> None:
    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        compute_thread(CPU).run(fail)
    assert compute_thread(CPU).run(int) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is there")
def test_a_gpu_without_a_number_is_the_current_gpu() -> None:
    with simulated_gpu():
        assert compute_thread(torch.device("cuda")) is compute_thread(torch.device("cuda", 0))
