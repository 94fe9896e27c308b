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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mora_jax
from mora_jax import io

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The names that an adapter may have; none of them leads out of the directory."""
FILE = "adapter_model.safetensors"
"""The file that is an adapter, in its directory."""
SETTLED = 1.0
"""The age in seconds from which on a refused version is not read again."""

Version = tuple[Path, tuple[int, ...]]
"""The directory, without links, and device, inode, size and times of the file."""


class Changed(Exception):
    """The files of an adapter have changed while they were read."""


class UnknownAdapter(Exception):
    """There is no adapter of this name."""


class UnusableAdapter(Exception):
    """The files of an adapter are damaged, or they do not fit this service."""


@dataclass(eq=False)
class Held:
    """An adapter in a slot, or on its way there.

    Attributes:
        name: Its name.
        version: That of the files that it is loaded from.
        slot: The number of its slot; -1 as long as it has none.
        users: The number of requests that use it now, or wait for it.
        used: When it was asked for last, in requests.
        load: The task that loads it, which has the slot to itself.
    """

    name: str
    version: Version
    slot: int = -1
    users: int = 0
    used: int = 0
    load: asyncio.Task[None] = field(init=False)


class Adapters:
    """The adapters of a directory, those in use and the last ones used in memory.

    All methods belong to one event loop; files are read in a thread.

    Args:
        directory: The directory with a directory for each adapter.
        plan: The plan that every adapter must follow.
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
        self._loading: set[asyncio.Task[None]] = set()
        self._refused: dict[str, tuple[Version, str]] = {}
        self._freed, self._turn = asyncio.Event(), asyncio.Lock()
        self._reader = ThreadPoolExecutor(1, "adapters")
        self._requests = self.loads = 0
        self._largest = 8 * plan.trainable_parameters + 2**23

    def names(self) -> list[str]:
        """The names of all adapters in the directory."""
        with os.scandir(self.directory) as found:
            return sorted(
                entry.name
                for entry in found
                if NAME.fullmatch(entry.name)
                and os.path.exists(os.path.join(entry.path, FILE))
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
                held = self._begin(name, version)
            self._requests += 1
            held.users, held.used = held.users + 1, self._requests
            try:
                await asyncio.wait([held.load])  # others may wait for it, too
                held.load.result()
                return held
            except Changed:
                self.release(held)
            except BaseException:
                self.release(held)
                raise

    def release(self, held: Held) -> None:
        """Say that a request does not use an adapter any more, or wait for it."""
        held.users -= 1
        # With a slot it may be on its way into the engine: that cannot be undone.
        if not held.users and held.slot < 0:
            self._forget(held)
            held.load.cancel()
        self._freed.set()

    def close(self) -> None:
        """Load nothing more."""
        for load in self._loading:
            load.cancel()
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _version(self, name: str) -> Version:
        """What changes if a file is changed or replaced."""
        if not NAME.fullmatch(name):
            raise UnknownAdapter(name)
        path = Path(os.path.realpath(self.directory / name))
        try:
            s = os.stat(path / FILE)
        except (FileNotFoundError, NotADirectoryError):
            raise UnknownAdapter(name) from None
        except OSError as error:
            raise UnusableAdapter(error.strerror) from error
        return path, (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)

    def _begin(self, name: str, version: Version) -> Held:
        """Begin to load a version, once for all requests that will wait for it."""
        refused = self._refused.get(name)
        if refused is not None and refused[0] == version:
            raise UnusableAdapter(refused[1])
        held = self._current[name] = Held(name, version)
        held.load = asyncio.create_task(self._load(held))
        held.load.add_done_callback(self._loaded)
        self._loading.add(held.load)
        return held

    def _loaded(self, load: asyncio.Task[None]) -> None:
        self._loading.remove(load)
        self._freed.set()
        if not load.cancelled():
            load.exception()  # asyncio complains of errors that nobody has asked for

    def _forget(self, held: Held) -> None:
        """Let no other request use it."""
        if self._current.get(held.name) is held:
            del self._current[held.name]

    async def _load(self, held: Held) -> None:
        """Load an adapter, in turn: no more than one waits in memory for a slot.

        Only what could be read takes one, so that damaged files evict nothing.
        """
        try:
            async with self._turn:
                adapters = await self._read_version(held.name, held.version)
                await self._take_slot(held)
            await self._change(held.slot, adapters)
        except BaseException:
            if held.slot >= 0:
                self._slots[held.slot] = None
            self._forget(held)
            raise
        self.loads += 1

    async def _read_version(self, name: str, version: Version) -> Any:
        """The adapters in the files of a version, if it is that to the end."""
        path, times = version
        loop = asyncio.get_running_loop()
        try:
            adapters = await loop.run_in_executor(self._reader, self._read, path)
        except OSError as error:  # the files may have gone in the meantime
            raise UnusableAdapter(error.strerror or "it cannot be read") from error
        except (UnusableAdapter, io.AdapterFileError) as error:
            # Clients need not know where the directory is.
            why = str(error).replace(str(path), name)
            if time.time() > times[-1] / 1e9 + SETTLED:
                self._refuse(name, version, why)
            raise UnusableAdapter(why) from error
        if await asyncio.to_thread(self._version, name) != version:
            raise Changed
        return adapters

    def _read(self, path: Path) -> Any:
        size = os.path.getsize(path / FILE)
        if size > self._largest:
            raise UnusableAdapter(
                f"{FILE} must have at most {self._largest:,} bytes, got {size:,}"
            )
        adapters = mora_jax.load(path, self.params)
        try:
            return self.plan.adapters(adapters)
        except ValueError as error:
            told = f"it must follow the plan of the service: {error}"
            raise UnusableAdapter(told) from error

    def _refuse(self, name: str, version: Version, why: str) -> None:
        self._refused.pop(name, None)
        self._refused[name] = version, why
        if len(self._refused) > len(self._slots):
            del self._refused[next(iter(self._refused))]

    async def _take_slot(self, held: Held) -> None:
        """Take the slot that nobody uses and that was used least recently."""
        while not (free := self._free_slots()):
            self._freed.clear()
            await self._freed.wait()
        held.slot = min(free)[1]
        old = self._slots[held.slot]
        if old is not None:
            self._forget(old)
        self._slots[held.slot] = held

    def _free_slots(self) -> list[tuple[int, int]]:
        """(when it was used last, the number) of each slot that nobody uses."""
        return [
            (-1 if held is None else held.used, slot)
            for slot, held in enumerate(self._slots)
            if held is None or (held.load.done() and not held.users)
        ]
