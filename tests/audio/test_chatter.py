import contextlib
import os
import threading

import pytest

from separation.audio.chatter import Chatter


def test_lines_of_the_library_are_kept_and_others_reach_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    chatter = Chatter()
    with chatter.caught():
        os.write(2, b"before\n[src/libmpg123/layer3.c:1] error: bad\nNote: odd\nWarning: harmless\nafter\n")
    assert chatter.lines == ["[src/libmpg123/layer3.c:1] error: bad", "Note: odd"]
    assert chatter.n_lines == 2
    assert capfd.readouterr().err == "before\nafter\n"


def test_only_the_first_lines_are_kept_but_all_are_counted() -> None:
    chatter = Chatter()
    for _ in range(3):
        with chatter.caught():
            os.write(2, b"libmpg123: bad\n" * 5)
    assert chatter.lines == ["libmpg123: bad"] * 10
    assert chatter.n_lines == 15


def test_while_several_threads_catch_other_lines_arrive_and_stderr_is_restored(
    capfd: pytest.CaptureFixture[str],
) -> None:
    done, n_lines = threading.Event(), 0

    def catch_some() -> None:
        for _ in range(100):
            with Chatter().caught():
                os.write(2, b"libmpg123: bad\n")

    def print_lines() -> None:
        nonlocal n_lines
        while not done.wait(0.002):
            os.write(2, f"line {n_lines}\n".encode())
            n_lines += 1

    before = os.fstat(2)
    printing = threading.Thread(target=print_lines)
    printing.start()
    threads = [threading.Thread(target=catch_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    printing.join()
    with Chatter().caught():  # passes on a write that ended after the last redirection
        pass
    after = os.fstat(2)
    assert (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino)
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines, key=lambda line: int(line.split()[1])) == [f"line {i}" for i in range(n_lines)]


def test_without_a_stderr_nothing_is_caught_and_nothing_fails() -> None:
    kept = os.dup(2)
    os.close(2)
    try:
        chatter = Chatter()
        with chatter.caught(), contextlib.suppress(OSError):
            os.write(2, b"lost")
        assert chatter.n_lines == 0
    finally:
        os.dup2(kept, 2)
        os.close(kept)
