"""Slots, loads and versions, with adapters that are short texts."""

import asyncio
import os

import jax.numpy as jnp
import pytest

import mora_jax
from examples.serving.adapters import FILE, Adapters

PLAN = mora_jax.plan({"a": {"kernel": jnp.zeros((4, 4))}}, mora_jax.MoRAConfig(rank=1))


class Texts(Adapters):
    """Each adapter is the text in its file; `put` has what is in the slots."""

    def __init__(self, directory, slots):
        super().__init__(directory, PLAN, {}, slots, self.change)
        self.put, self.told, self.wanted = {}, [], []
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    def _read(self, path):
        text = (self.directory / path / FILE).read_text()
        self.told.append(f"read {text}")
        return text

    async def _take_slot(self, held):
        self.wanted.append(held.name)
        await super()._take_slot(held)

    async def change(self, slot, text):
        self.told.append(f"put {text}")
        await self.goes_on.wait()
        await asyncio.sleep(0.001)
        self.put[slot] = text
        self.told.append(f"done {text}")


@pytest.fixture
def directory(tmp_path):
    for name in "abcde":
        write(tmp_path / name, name)
    return tmp_path


def write(path, text):
    path.mkdir()
    (path / FILE).write_text(text)


async def until(true):
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.001)


async def at_rest(adapters):
    """All has happened that can: one thread reads, and each round lets tasks go on."""
    for _ in range(10):
        await asyncio.get_running_loop().run_in_executor(adapters._reader, int)


async def cancelled(tasks):
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def test_loads_that_nobody_waits_for_are_given_up(directory):
    """One waits in memory, and the last who waits still gets what was asked for."""

    async def run():
        adapters = Texts(directory, slots=1)
        held, tasks = await adapters.acquire("a"), []
        for name in "bcdbe":  # one after another: threads look at the files
            tasks.append(asyncio.create_task(adapters.acquire(name)))
            asked = adapters._requests + 1
            await until(lambda asked=asked: adapters._requests == asked)
        assert len(adapters._loading) == 4
        await cancelled(tasks[:-2])
        await until(lambda: len(adapters._loading) == 2)
        await until(lambda: adapters.wanted == ["a", "b"])
        await at_rest(adapters)
        assert adapters.told == ["read a", "put a", "done a", "read b"]
        adapters.release(held)
        for task in tasks[-2:]:
            adapters.release(await task)
        assert sorted(adapters.told[3:]) == sorted(
            f"{does} {name}" for does in ("read", "put", "done") for name in "be"
        )
        adapters.close()

    asyncio.run(run())


def test_a_slot_that_is_being_changed_is_not_given_away(directory):
    async def run():
        adapters = Texts(directory, slots=1)
        adapters.goes_on.clear()
        task = asyncio.create_task(adapters.acquire("a"))
        await until(lambda: "put a" in adapters.told)
        await cancelled([task])
        task = asyncio.create_task(adapters.acquire("b"))
        await until(lambda: len(adapters._loading) == 2)
        await until(lambda: adapters.wanted == ["a", "b"])
        await at_rest(adapters)
        assert adapters.told == ["read a", "put a", "read b"]
        adapters.goes_on.set()
        held = await task
        assert (held.slot, adapters.put) == (0, {0: "b"})
        adapters.close()

    asyncio.run(run())


def test_damaged_files_evict_nothing(directory):
    async def run():
        adapters = Texts(directory, slots=1)
        adapters.release(await adapters.acquire("a"))
        (directory / "b" / FILE).write_bytes(b"\xff")
        with pytest.raises(UnicodeDecodeError):
            await adapters.acquire("b")
        adapters.release(await adapters.acquire("a"))
        assert adapters.loads == 1
        adapters.close()

    asyncio.run(run())


def test_who_waits_for_a_load_uses_it_before_it_is_evicted(directory):
    """With one slot, and no request causes more than one load."""

    async def run():
        adapters = Texts(directory, slots=1)

        async def ask(name):
            held = await adapters.acquire(name)
            await asyncio.sleep(0.001)
            assert adapters.put[held.slot] == name
            adapters.release(held)

        await asyncio.gather(*(ask(name) for name in 8 * "abcd"))
        assert adapters.loads <= 32
        assert [held.users for held in adapters._slots if held] == [0]
        adapters.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("linked", "back"), [(True, True), (True, False), (False, False)]
)
def test_a_version_that_was_there_for_a_moment(directory, linked, back):
    """It replaces another one while that is read, and goes before the end or later."""
    if linked:
        os.symlink("a", directory / "law")
    else:
        os.rename(directory / "a", directory / "law")

    def replace(by, old):
        if linked:
            os.symlink(by, directory / "link")
            os.replace(directory / "link", directory / "law")
        else:
            os.rename(directory / "law", directory / old)
            os.rename(directory / by, directory / "law")

    async def run():
        adapters = Texts(directory, slots=2)
        read, texts = adapters._read, []

        def quickly(path):
            if texts:
                return read(path)
            replace("b", "a")
            texts.append(read(path))
            if back:
                replace("a", "b")
            return texts[0]

        adapters._read = quickly
        first = await adapters.acquire("law")
        assert adapters.put[first.slot] == ("a" if back else "b")
        if not back:
            replace("a", "b")
        second = await adapters.acquire("law")
        assert adapters.put[second.slot] == "a"
        adapters.close()

    asyncio.run(run())
