"""The thread that decodes: requests wait, get a row of the cache, and leave it.

Everything on the device belongs to this thread. Others hand in jobs and adapters, and
events come back through `publish`.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from examples.serving.jobs import End, Event, Full, Job
from models import decoding
from models.smollm2 import EOS, Config

SHORTEST = 32
"""The number of tokens that the shortest prompt is padded to."""


Publish = Callable[[Sequence[tuple[Job, Event]]], None]


@dataclass
class Engine:
    """Rows of one base, each with an adapter of its own, in one compiled step.

    Attributes:
        programs: What is compiled.
        config: The sizes of the model.
        params: The base.
        stacked: The adapters of all slots.
        put: (stacked, slot, adapters) -> stacked, with one slot replaced.
        rows: The number of jobs that are decoded at once.
        size: The largest number of tokens of a prompt and its continuation.
        queue: The largest number of jobs that wait for a row.
        publish: A function that is given the events of each step.
        error: What ended the thread, if it did not end by `stop`.
    """

    programs: decoding.Programs
    config: Config
    params: Any
    stacked: Any
    put: Callable[[Any, int, Any], Any]
    rows: int
    size: int
    queue: int
    publish: Publish = lambda events: None
    error: BaseException | None = None
    _waiting: deque[Job] = field(default_factory=deque)
    _changes: deque[tuple[int, Any, Future[None]]] = field(default_factory=deque)
    _events: list[tuple[Job, Event]] = field(default_factory=list)
    _stopping: bool = False

    def __post_init__(self) -> None:
        self._cache = decoding.new_cache(self.config, self.rows, self.size)
        self._jobs: list[Job | None] = [None] * self.rows
        self._state = decoding.Rows(
            tokens=np.full(self.rows, EOS, np.int32),
            positions=np.full(self.rows, self.size, np.int32),
            adapters=np.full(self.rows, -1, np.int32),
            temperatures=np.zeros(self.rows, np.float32),
            seeds=np.zeros(self.rows, np.uint32),
        )
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def lengths(self) -> list[int]:
        """The lengths that prompts are padded to: powers of two, up to `size`."""
        found = [min(SHORTEST, self.size)]
        while found[-1] < self.size:
            found.append(min(2 * found[-1], self.size))
        return found

    def start(self) -> None:
        """Compile all programs, and start the thread."""
        for length in self.lengths():
            self._fill(0, [EOS] * length, -1, 0.0, 0)
        self._step()
        self._thread.start()

    def stop(self) -> None:
        """Finish all jobs, and end the thread; no other jobs are taken from now on."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, job: Job) -> None:
        """Let a job wait for a row.

        Raises:
            Full: Too many wait already, or the engine is stopping.
        """
        with self._news:
            if self._stopping or self.error is not None:
                raise Full("the service is stopping", stopping=True)
            if sum(self.busy) >= self.rows + self.queue:
                raise Full(f"{self.queue} requests wait already")
            self._waiting.append(job)
            self._news.notify()

    def change(self, slot: int, adapters: Any) -> Future[None]:
        """Put adapters into a slot that no job uses, between two steps.

        Raises:
            Full: The engine is stopping.
        """
        done: Future[None] = Future()
        with self._news:
            if self._stopping or self.error is not None:
                raise Full("the service is stopping", stopping=True)
            self._changes.append((slot, adapters, done))
            self._news.notify()
        return done

    @property
    def busy(self) -> tuple[int, int]:
        """How many jobs have a row, and how many wait for one."""
        return sum(job is not None for job in self._jobs), len(self._waiting)

    def _run(self) -> None:
        try:
            while self._has_work():
                self._change()
                self._sweep()
                self._admit()
                if any(self._jobs):
                    self._decode()
                self._flush()
        except BaseException as error:  # of XLA, for example: no memory
            self._fail(error)

    def _has_work(self) -> bool:
        """Wait for work; False if there will be none."""
        with self._news:
            while not (self._waiting or self._changes or any(self._jobs)):
                if self._stopping:
                    return False
                self._news.wait()
        return True

    def _change(self) -> None:
        while self._changes:
            slot, adapters, done = self._changes.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                self.stacked = self.put(self.stacked, slot, adapters)
            except (TypeError, ValueError) as error:  # they do not fit
                done.set_exception(error)
            else:
                done.set_result(None)

    def _sweep(self) -> None:
        """End the jobs that are late, or that nobody waits for."""
        with self._news:
            over = [(job, why) for job in self._waiting if (why := job.over())]
            for job, _ in over:
                self._waiting.remove(job)
        self._events += over
        for row, job in enumerate(self._jobs):
            if job is not None and (why := job.over()):
                self._leave(row, why)

    def _admit(self) -> None:
        """Give each free row a job that waits, and read its prompt.

        A row whose job ends with its first token stays free until the next round:
        otherwise the other rows would wait until nothing waits for a row.
        """
        for row in range(self.rows):
            if self._jobs[row] is not None or not self._waiting:
                continue
            with self._news:
                job = self._waiting.popleft()
            if why := job.over():  # the prompts before it took long
                self._events.append((job, why))
                continue
            self._jobs[row] = job
            token = self._fill(row, job.prompt, job.slot, job.temperature, job.seed)
            self._state.adapters[row] = job.slot
            self._state.temperatures[row] = job.temperature
            self._state.seeds[row] = job.seed
            self._hear(row, token, len(job.prompt))
            self._flush()

    def _decode(self) -> None:
        """One token for every row."""
        tokens = self._step()
        for row, job in enumerate(self._jobs):
            if job is not None:
                self._hear(row, int(tokens[row]), self._state.positions[row] + 1)

    def _hear(self, row: int, token: int, position: int) -> None:
        """Take the next token of a row, which is at `position` in its text."""
        job = self._jobs[row]
        assert job is not None
        if token == EOS:
            self._leave(row, End.STOP)
            return
        self._events.append((job, token))
        job.said += 1
        self._state.tokens[row], self._state.positions[row] = token, position
        if job.said >= job.max_tokens:
            self._leave(row, End.LENGTH)

    def _leave(self, row: int, why: End) -> None:
        job = self._jobs[row]
        assert job is not None
        self._events.append((job, why))
        self._jobs[row] = None
        self._state.adapters[row] = -1
        self._state.temperatures[row] = 0
        self._state.positions[row] = self.size  # where nothing is written

    def _flush(self) -> None:
        events, self._events = self._events, []
        if events:
            self.publish(events)

    def _fail(self, error: BaseException) -> None:
        with self._news:
            self.error = error
            jobs = [*self._waiting, *(job for job in self._jobs if job is not None)]
            self._waiting.clear()
            changes, self._changes = self._changes, deque()
        for *_, done in changes:
            done.set_exception(error)
        ended = {job for job, event in self._events if isinstance(event, End)}
        self._events += [(job, End.FAILED) for job in jobs if job not in ended]
        self.publish(self._events)

    def _fill(
        self, row: int, prompt: Sequence[int], slot: int, temperature: float, seed: int
    ) -> int:
        length = next(n for n in self.lengths() if n >= len(prompt))
        ids = np.full((1, length), EOS, np.int32)
        ids[0, : len(prompt)] = prompt
        one = decoding.Rows(
            tokens=ids[0, :1],
            positions=np.array([len(prompt) - 1], np.int32),
            adapters=np.array([slot], np.int32),
            temperatures=np.array([temperature], np.float32),
            seeds=np.array([seed], np.uint32),
        )
        token, self._cache = self.programs.fill(
            self.stacked, self.params, self._cache, np.int32(row), ids, one
        )
        return int(token[0])

    def _step(self) -> np.ndarray:
        tokens, self._cache = self.programs.step(
            self.stacked, self.params, self._cache, self._state
        )
        return np.asarray(tokens)
