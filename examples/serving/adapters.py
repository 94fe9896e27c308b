"""Which adapter is in which slot.

An adapter is a directory that `mora_jax.save` wrote, and its name is the directory's.
What is on the disk is the truth: files that changed are loaded again, files that are
damaged are refused, and an adapter whose files are gone is gone. A request keeps the
version with which it began, since a new version gets another slot.
"""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mora_jax
from mora_jax import io

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The names that an adapter may have; none of them leads out of the directory."""
FILES = "adapter_config.json", "adapter_model.safetensors"
SETTLED = 1.0
"""The age in seconds from which on a refused version is not read again."""

Version = tuple[tuple[int, ...], ...]


class UnknownAdapter(Exception):
    """There is no adapter of this name."""


class UnusableAdapter(Exception):
    """The files of an adapter are damaged, or they do not fit this service."""


@dataclass(eq=False)
class Held:
    """An adapter in a slot.

    Attributes:
        name: Its name.
        version: That of the files that it was loaded from.
        slot: The number of its slot.
        users: The number of requests that use it now, and loads that are not finished.
        used: When it was used last, in requests.
    """

    name: str
    version: Version
    slot: int
    users: int = 0
    used: int = 0


class Adapters:
    """The adapters of a directory, those in use and the last ones used in memory.

    All methods belong to one event loop; files are read in a thread.

    Args:
        directory: The directory with a directory for each adapter.
        plan: The plan that every adapter must have.
        params: The base, which every adapter must have been trained on.
        slots: The number of adapters in memory.
        change: (slot, adapters): puts adapters into a slot.
    """

    def __init__(
        self,
        directory: Path,
        plan: mora_jax.Plan,
        params: Any,
        slots: int,
        change: Callable[[int, Any], Awaitable[None]],
    ) -> None:
        self.directory, self.plan, self.params = directory, plan, params
        self._change = change
        self._slots: list[Held | None] = [None] * slots
        self._current: dict[str, Held] = {}
        self._loading: dict[tuple[str, Version], asyncio.Task[Held]] = {}
        self._refused: dict[str, tuple[Version, str]] = {}
        self._freed = asyncio.Event()
        self._reader = ThreadPoolExecutor(1, "adapters")
        self._requests = self.loads = 0
        self._largest = 8 * plan.trainable_parameters + 2**20

    def names(self) -> list[str]:
        """The names of all adapters in the directory."""
        with os.scandir(self.directory) as found:
            return sorted(
                entry.name
                for entry in found
                if NAME.fullmatch(entry.name)
                and os.path.exists(os.path.join(entry.path, FILES[0]))
            )

    async def acquire(self, name: str) -> Held:
        """The adapter as its files are now, for one request; `release` it at the end.

        It waits as long as all slots are in use.

        Raises:
            UnknownAdapter: There is none of this name.
            UnusableAdapter: Its files are damaged, or not for this service.
        """
        while True:
            version = await asyncio.to_thread(self._version, name)
            held = self._current.get(name)
            if held is None or held.version != version:
                held = await self._load(name, version)
            if self._current.get(name) is held:  # not evicted in the meantime
                self._requests += 1
                held.users, held.used = held.users + 1, self._requests
                return held

    def release(self, held: Held) -> None:
        """Say that a request does not use an adapter any more."""
        held.users -= 1
        self._freed.set()

    def close(self) -> None:
        """Load nothing more."""
        for task in self._loading.values():
            task.cancel()
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _version(self, name: str) -> Version:
        """What changes if a file is changed or replaced."""
        if not NAME.fullmatch(name):
            raise UnknownAdapter(name)
        try:
            found = [os.stat(self.directory / name / file) for file in FILES]
        except (FileNotFoundError, NotADirectoryError):
            if (self.directory / name / FILES[0]).exists():
                raise UnusableAdapter(f"there is no {FILES[1]}") from None
            raise UnknownAdapter(name) from None
        return tuple(
            (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found
        )

    async def _load(self, name: str, version: Version) -> Held:
        """Load a version once for all requests that wait for it."""
        refused = self._refused.get(name)
        if refused is not None and refused[0] == version:
            raise UnusableAdapter(refused[1])
        key = name, version
        task = self._loading.get(key)
        if task is None:
            task = asyncio.create_task(self._load_now(name, version))
            self._loading[key] = task
            task.add_done_callback(lambda task: self._loaded(key, task))
        # The other requests still want it when this one is given up.
        return await asyncio.shield(task)

    def _loaded(self, key: tuple[str, Version], task: asyncio.Task[Held]) -> None:
        del self._loading[key]
        if not task.cancelled():
            task.exception()  # asyncio complains of errors that nobody has asked for

    async def _load_now(self, name: str, version: Version) -> Held:
        loop = asyncio.get_running_loop()
        try:
            adapters = await loop.run_in_executor(self._reader, self._read, name)
        except OSError as error:  # the files may have gone in the meantime
            raise UnusableAdapter(error.strerror or "it cannot be read") from error
        except (UnusableAdapter, io.AdapterFileError) as error:
            # Clients need not know where the directory is.
            why = str(error).replace(f"{self.directory}{os.sep}", "")
            changed = max(times[-1] for times in version) / 1e9
            if time.time() > changed + SETTLED:
                self._refuse(name, version, why)
            raise UnusableAdapter(why) from error
        held = await self._take_slot(name, version)
        try:
            await self._change(held.slot, adapters)
        except BaseException:
            self._slots[held.slot] = None
            raise
        self._current[name] = held
        self.loads += 1
        self.release(held)
        return held

    def _read(self, name: str) -> Any:
        path = self.directory / name
        size = os.path.getsize(path / FILES[1])
        if size > self._largest:
            raise UnusableAdapter(
                f"{FILES[1]} must have at most {self._largest:,} bytes, got {size:,}"
            )
        adapters, plan = mora_jax.load(path, self.params)
        if plan.digest() != self.plan.digest():
            raise UnusableAdapter(
                f"its plan must be that of the service ({_told(self.plan)}), got "
                f"{_told(plan)}"
            )
        return adapters

    def _refuse(self, name: str, version: Version, why: str) -> None:
        self._refused.pop(name, None)
        self._refused[name] = version, why
        if len(self._refused) > len(self._slots):
            del self._refused[next(iter(self._refused))]

    async def _take_slot(self, name: str, version: Version) -> Held:
        """The slot that nobody uses and that was used least recently."""
        while not (free := self._free_slots()):
            self._freed.clear()
            await self._freed.wait()
        slot = min(free)[1]
        old = self._slots[slot]
        if old is not None and self._current.get(old.name) is old:
            del self._current[old.name]
        held = Held(name, version, slot, users=1, used=self._requests)
        self._slots[slot] = held
        return held

    def _free_slots(self) -> list[tuple[int, int]]:
        """(when it was used last, the number) of each slot that nobody uses."""
        return [
            (-1 if held is None else held.used, slot)
            for slot, held in enumerate(self._slots)
            if held is None or not held.users
        ]


def _told(plan: mora_jax.Plan) -> str:
    """A plan in a few words."""
    operators = sorted({spec.operator.name for spec in plan.specs})
    return (
        f"{len(plan)} kernels, {plan.trainable_parameters:,} parameters, "
        f"{' and '.join(operators)}, {plan.digest()[:12]}"
    )
