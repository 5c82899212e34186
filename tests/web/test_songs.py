"""Several songs at a time: places, cancelling, folders of stems, and room for delivery."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

import pytest
import torch

from separation.errors import AudioError, InputError
from separation.web import songs
from separation.web.errors import CancelledError
from separation.web.songs import DeliveryRoom, SongThreads, StemFolders, n_slots, n_songs, total_bytes

Check = Callable[[], None]


def test_the_number_of_songs_is_that_of_the_servers_slots_or_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COG_MAX_CONCURRENCY", raising=False)
    monkeypatch.delenv("SEPARATION_CONCURRENCY", raising=False)
    assert (n_slots(), n_songs()) == (1, 1)
    monkeypatch.setenv("COG_MAX_CONCURRENCY", "8")
    assert (n_slots(), n_songs()) == (8, 8)
    monkeypatch.setenv("SEPARATION_CONCURRENCY", "2")
    assert (n_slots(), n_songs()) == (8, 2)


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_another_number_of_songs_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPARATION_CONCURRENCY", value)
    with pytest.raises(
        InputError, match=r"^SEPARATION_CONCURRENCY is .*: set it to a .*number above 0, or leave it out$"
    ):
        n_songs()


def test_as_many_songs_run_at_once_as_there_are_places_and_the_others_follow_in_order() -> None:
    started: list[int] = []
    both, go_on = threading.Barrier(2), threading.Event()

    def job(number: int) -> int:
        started.append(number)
        if number < 2:
            both.wait(60)
        assert go_on.wait(60)
        return number

    async def main() -> list[int]:
        threads = SongThreads(2)
        runs = [asyncio.create_task(threads.run(lambda check, n=n: job(n))) for n in range(5)]
        while len(started) < 2:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        assert sorted(started) == [0, 1]
        go_on.set()
        return list(await asyncio.gather(*runs))

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]
    assert started[2:] in ([2, 3, 4], [3, 2, 4], [2, 4, 3])  # two start at the same time


def test_a_song_keeps_the_context_and_the_number_of_pytorchs_threads() -> None:
    name: ContextVar[str] = ContextVar("name", default="")

    async def main() -> tuple[str, int]:
        name.set("mine")
        return await SongThreads(1).run(lambda check: (name.get(), torch.get_num_threads()))

    assert asyncio.run(main()) == ("mine", torch.get_num_threads())


def test_an_error_reaches_its_own_caller_only() -> None:
    def fail(check: Check) -> str:
        raise AudioError("broken")

    async def main() -> list[object]:
        threads = SongThreads(2)
        return list(
            await asyncio.gather(
                threads.run(lambda check: "one"),
                threads.run(fail),
                threads.run(lambda check: "two"),
                return_exceptions=True,
            )
        )

    one, error, two = asyncio.run(main())
    assert (one, two) == ("one", "two") and isinstance(error, AudioError)


def test_a_cancelled_song_ends_at_its_next_check_and_keeps_its_place_until_then() -> None:
    begun, may_check, ended = threading.Event(), threading.Event(), list[str]()

    def job(check: Check) -> None:
        begun.set()
        may_check.wait(60)
        try:
            check()
        except CancelledError:
            ended.append("cancelled")
            raise

    async def main() -> None:
        threads = SongThreads(1)
        first = asyncio.create_task(threads.run(job))
        while not begun.is_set():
            await asyncio.sleep(0.005)
        first.cancel()
        second = asyncio.create_task(threads.run(lambda check: ended.append("second")))
        await asyncio.sleep(0.05)
        assert ended == [] and not first.done()
        may_check.set()
        await second
        assert first.cancelled()

    asyncio.run(main())
    assert ended == ["cancelled", "second"]


def test_a_song_that_is_cancelled_while_it_waits_never_starts() -> None:
    begun, go_on, ran = threading.Event(), threading.Event(), list[str]()

    def first(check: Check) -> None:
        begun.set()
        go_on.wait(60)

    async def main() -> None:
        threads = SongThreads(1)
        running = asyncio.create_task(threads.run(first))
        while not begun.is_set():
            await asyncio.sleep(0.005)
        waiting = asyncio.create_task(threads.run(lambda check: ran.append("waiting")))
        await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        await running

    asyncio.run(main())
    assert ran == []


@pytest.mark.parametrize("slots", [1, 3])
def test_the_stems_of_the_other_slots_are_kept(slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folders, ended = StemFolders(slots), list[Path]()
    for _ in range(6):
        folder = folders.new()
        assert not folder.exists() and folder.parent == tmp_path and folder.name.startswith("stems-")
        assert sorted(tmp_path.iterdir()) == sorted(ended[len(ended) - min(slots - 1, len(ended)) :])
        folder.mkdir()
        (folder / "vocals.wav").write_bytes(b"12345")
        assert total_bytes(folder) == 5
        folders.end(folder)
        ended.append(folder)
        assert sorted(tmp_path.iterdir()) == sorted(ended[-slots:])


def test_stems_wait_until_there_is_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(songs, "SENDING_SECONDS", 0.3)
    times: dict[str, float] = {}

    async def take(room: DeliveryRoom, name: str, n_bytes: int) -> None:
        await room.take(n_bytes)
        times[name] = time.monotonic()

    async def main() -> None:
        room, start = DeliveryRoom(100), time.monotonic()
        await take(room, "larger than the room, but alone", 1000)
        later = [take(room, "first", 60), take(room, "second", 60), take(room, "small, but last", 30)]
        await asyncio.gather(*later)
        assert times["larger than the room, but alone"] < start + 0.3 <= times["first"]
        assert times["first"] + 0.3 <= times["second"] <= times["small, but last"]

    asyncio.run(main())


def test_who_is_cancelled_while_waiting_for_room_leaves_it_to_the_next() -> None:
    async def main() -> None:
        room = DeliveryRoom(100)
        await room.take(90)
        waiting = asyncio.create_task(room.take(90))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.wait_for(room.take(10), 5)

    asyncio.run(main())


def test_the_room_of_this_machine_is_a_part_of_its_memory() -> None:
    assert DeliveryRoom.of_this_machine()._limit_bytes > 1e6


def test_threads_of_songs_set_their_number_of_threads_even_if_another_thread_has_set_it_last() -> None:
    n_threads = torch.get_num_threads()
    threads = SongThreads(1)
    with ThreadPoolExecutor(1) as other:
        other.submit(torch.set_num_threads, 1).result()
    try:
        assert asyncio.run(threads.run(lambda check: torch.get_num_threads())) == n_threads
    finally:
        torch.set_num_threads(n_threads)
