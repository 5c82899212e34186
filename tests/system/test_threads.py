"""A job in a thread sees the context variables of the code that submitted it."""

from contextvars import ContextVar

from separation.system.threads import Threads

current: ContextVar[str] = ContextVar("current", default="none")


def test_each_job_has_the_context_of_its_submitter() -> None:
    with Threads(max_workers=1) as threads:
        token = current.set("first")
        first = threads.submit(current.get)
        current.set("second")
        second = threads.submit(current.get)
        current.reset(token)
        third = threads.submit(current.get)
    assert [first.result(), second.result(), third.result()] == ["first", "second", "none"]


def test_arguments_are_passed_on_and_errors_come_back() -> None:
    with Threads(max_workers=2) as threads:
        assert threads.submit(int, "ff", base=16).result() == 255
        assert isinstance(threads.submit(int, "x").exception(), ValueError)
