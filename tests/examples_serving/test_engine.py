"""The engine with programs that compute nothing."""

import threading
import time

import numpy as np
import pytest
from services import until

from examples.serving.engine import Engine
from examples.serving.jobs import End, Full, Job
from models import bytelevel
from models.smollm2 import EOS


class Counting:
    """Programs that continue 10 by 11, 12, and so on, up to 20, which is the end."""

    def __init__(self):
        self.gate, self.error, self.steps = threading.Event(), None, 0
        self.fills = []
        self.gate.set()

    def next(self, tokens):
        return np.where(tokens >= 19, EOS, tokens + 1)

    def fill(self, stacked, params, cache, row, ids, one):
        assert one.tokens.shape == one.positions.shape == (1,)
        self.fills.append(self.steps)
        return self.next(ids[0, one.positions]), cache

    def step(self, stacked, params, cache, rows):
        self.steps += 1
        self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return self.next(rows.tokens), cache


class Engines:
    def __init__(self):
        self.all = []

    def make(self, **settings):
        given = {"rows": 2, "size": 64, "queue": 2} | settings
        put = lambda stacked, slot, adapters: stacked | {slot: adapters + 0}  # noqa: E731
        engine = Engine(Counting(), bytelevel.CONFIG, None, {}, put, **given)
        engine.publish = lambda events: [job.on_event(e) for job, e in events]
        engine.start()
        self.all.append(engine)
        return engine


@pytest.fixture
def make():
    engines = Engines()
    yield engines.make
    for engine in engines.all:
        engine.programs.gate.set()
        engine.stop()
        assert not engine._thread.is_alive()


def job(first=10, tokens=100, seconds=10.0):
    said = []
    made = Job([7, first], -1, tokens, 0.0, 0, time.monotonic() + seconds, said.append)
    return made, said


def held(engine, jobs):
    """Submit jobs to an engine that is in the middle of a step with the first two."""
    steps = engine.programs.steps
    engine.programs.gate.clear()
    for made, _ in jobs[:2]:
        engine.submit(made)
    until(lambda: engine.programs.steps > steps)
    for made, _ in jobs[2:]:
        engine.submit(made)


def ended(said):
    until(lambda: said and isinstance(said[-1], End))
    return said


def test_jobs_end_at_the_end_or_when_they_have_enough(make):
    engine = make()
    for first, tokens, wanted in (
        (15, 100, [16, 17, 18, 19, End.STOP]),
        (15, 2, [16, 17, End.LENGTH]),
        (18, 1, [19, End.LENGTH]),
        (19, 5, [End.STOP]),
    ):
        made, said = job(first, tokens)
        engine.submit(made)
        assert ended(said) == wanted
    assert engine.busy == (0, 0)


def test_more_jobs_than_rows_wait_in_turn(make):
    engine = make(queue=20)
    all_said = []
    for first in range(10, 20):
        made, said = job(first)
        engine.submit(made)
        all_said.append(said)
    for first, said in zip(range(10, 20), all_said, strict=True):
        assert ended(said) == [*range(first + 1, 20), End.STOP]


def test_jobs_that_end_with_their_prompt_do_not_hold_up_the_others(make):
    """Between two steps at most one prompt is read for each row."""
    engine = make(queue=20)
    jobs = [job(), *(job(tokens=1) for _ in range(12))]
    held(engine, jobs[:1])
    steps, fills = engine.programs.steps, engine.programs.fills
    fills.clear()
    for made, _ in jobs[1:]:
        engine.submit(made)
    engine.programs.gate.set()
    for made, said in jobs:
        assert ended(said)[-1] is (End.LENGTH if made.max_tokens == 1 else End.STOP)
    assert fills[:8] == [steps + i for i in range(8)]  # while the first had a row


def test_what_is_said_is_published_before_the_next_prompt_is_read(make):
    """And a job that nobody waits for by then is not read."""
    engine = make(rows=3)
    first, last = job(tokens=1), job(tokens=1)
    said = first[0].on_event

    def leave(event):
        said(event)
        last[0].gone = True

    first[0].on_event = leave
    held(engine, [job()])
    for made, _ in (first, last):
        engine.submit(made)
    engine.programs.gate.set()
    assert ended(first[1]) == [11, End.LENGTH]
    assert ended(last[1]) == [End.GONE]


def test_a_full_queue_refuses(make):
    engine = make()
    jobs = [job() for _ in range(4)]
    held(engine, jobs)
    with pytest.raises(Full, match="2 requests wait already") as caught:
        engine.submit(job()[0])
    assert not caught.value.stopping
    engine.programs.gate.set()
    for _, said in jobs:
        assert ended(said)[-1] is End.STOP


def test_jobs_that_are_late_or_given_up_leave_rows_and_queue(make):
    engine = make()
    jobs = [job(seconds=0.05), job(), job(seconds=0.05), job()]
    held(engine, jobs)
    jobs[1][0].gone = jobs[3][0].gone = True
    time.sleep(0.1)
    engine.programs.gate.set()
    ends = [ended(said)[-1] for _, said in jobs]
    assert ends == [End.LATE, End.GONE, End.LATE, End.GONE]
    assert len(jobs[2][1]) == len(jobs[3][1]) == 1


def test_to_stop_is_to_finish(make):
    engine = make()
    jobs = [job() for _ in range(4)]
    held(engine, jobs)
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    until(lambda: engine._stopping)
    with pytest.raises(Full, match="stopping"):
        engine.submit(job()[0])
    engine.programs.gate.set()
    stopper.join()
    assert all(said == [*range(11, 20), End.STOP] for _, said in jobs)
    assert engine.error is None


def test_a_failure_ends_all_jobs(make):
    engine = make()
    jobs = [job() for _ in range(4)]
    held(engine, jobs)
    change = engine.change(0, 1)
    engine.programs.error = MemoryError("no memory")
    engine.programs.gate.set()
    for _, said in jobs:
        assert ended(said).count(End.FAILED) == 1
    with pytest.raises(MemoryError):
        change.result(10)
    assert isinstance(engine.error, MemoryError)
    with pytest.raises(Full, match="stopping"):
        engine.submit(job()[0])


def test_adapters_that_do_not_fit_are_refused(make):
    """And the engine goes on."""
    engine = make()
    with pytest.raises(TypeError):
        engine.change(0, "x").result(10)
    engine.change(1, 5).result(10)
    assert engine.stacked == {1: 5}
    made, said = job()
    engine.submit(made)
    assert ended(said)[-1] is End.STOP


def test_prompts_are_padded_to_powers_of_two(make):
    assert make(size=64).lengths() == [32, 64]
    assert make(size=100).lengths() == [32, 64, 100]
    assert make(size=20).lengths() == [20]
