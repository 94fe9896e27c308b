"""Files that change, break or go while they are in use, and clients that go."""

import contextlib
import os
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import openai
import pytest
from services import NAMES, TOKENS, asked, until

from examples.serving import adapters as registry
from models import bytelevel
from mora_jax import init, save

pytestmark = pytest.mark.slow  # the service takes seconds to start
TENSORS = registry.FILE


@pytest.fixture
def place(service):
    """The directory of an adapter of this test."""
    path = service.directory / "changing"
    yield path
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def held_up(service, seconds):
    """Each step takes longer, as that of a large model."""
    engine, step = service.service.engine, service.service.engine._step

    def slowly():
        time.sleep(seconds)
        return step()

    engine._step = slowly
    try:
        yield
    finally:
        engine._step = step


def test_replaced_files_are_loaded_again(service, oracle, place):
    for seed in (7, 8, 7):
        oracle.save(place, seed)
        assert service.text("changing") == oracle.says(seed)["Hi"]


def test_an_answer_keeps_the_version_with_which_it_began(service, oracle, place):
    oracle.save(place, 7)
    with held_up(service, 0.02), service.ask("changing", stream=True) as stream:
        chunks = [next(stream), next(stream)]
        oracle.save(place, 8)
        assert service.text("changing") == oracle.says(8)["Hi"]
        shutil.rmtree(place)
        with pytest.raises(openai.NotFoundError):
            service.text("changing")
        chunks += list(stream)
    said = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert said == oracle.says(7)["Hi"]


def test_versions_in_use_are_never_evicted(service, oracle, place):
    """With more versions in use than slots the next one waits for a slot."""
    oracle.save(place, 7)
    with held_up(service, 0.02), ThreadPoolExecutor(6) as clients:
        said = list(clients.map(service.text, ["changing", *NAMES[:5]]))
    wanted = [oracle.says(seed)["Hi"] for seed in (7, 0, 1, 2, 3, 4)]
    assert said == wanted


def cut(path):
    """As a copy that has not come to its end."""
    whole = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(whole[: len(whole) // 2])


def flip(path):
    whole = bytearray((path / TENSORS).read_bytes())
    whole[-5] ^= 1
    (path / TENSORS).write_bytes(whole)


FAULTS = {
    "cut": (cut, "is damaged"),
    "a changed byte": (flip, "is damaged"),
    "empty": (lambda path: (path / TENSORS).write_bytes(b""), "is damaged"),
    "too large": (
        lambda path: os.truncate(path / TENSORS, 10**10),
        "must have at most",
    ),
}


@pytest.mark.parametrize("damaged", [False, True])
def test_files_that_change_while_they_are_read(
    service, oracle, place, damaged, monkeypatch
):
    """Who asks after the change is not answered by what was read before it."""
    adapters, entered, goes_on = service.service.adapters, Event(), Event()
    read = adapters._read

    def slowly(name):
        try:
            return read(name)
        finally:
            entered.set()
            assert goes_on.wait(10)

    monkeypatch.setattr(adapters, "_read", slowly)
    oracle.save(place, 7)
    if damaged:
        flip(place)
    with ThreadPoolExecutor(2) as clients:
        before = clients.submit(service.text, "changing")
        assert entered.wait(10)
        oracle.save(place, 8)
        after = clients.submit(service.text, "changing")
        until(lambda: len(adapters._loading) == 2)
        goes_on.set()
        assert after.result() == oracle.says(8)["Hi"]
    if damaged:
        with pytest.raises(openai.InternalServerError, match="is damaged"):
            before.result()
    else:
        assert before.result() in (oracle.says(7)["Hi"], oracle.says(8)["Hi"])


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_refused(service, oracle, place, fault):
    """Also the version before, which is still in memory; others are served."""
    damage, says = FAULTS[fault]
    oracle.save(place, 7)
    assert service.text("changing") == oracle.says(7)["Hi"]
    damage(place)
    for _ in range(2):
        with pytest.raises(openai.InternalServerError, match=says) as caught:
            service.text("changing")
        assert caught.value.status_code == 503
        assert caught.value.code == "adapter_unusable"
        assert str(service.directory) not in str(caught.value)
    assert service.text("law") == oracle.says(0)["Hi"]
    oracle.save(place, 8)
    assert service.text("changing") == oracle.says(8)["Hi"]


def test_links_that_lead_nowhere_are_refused(service, place):
    os.symlink(place.name, place)  # to itself
    try:
        with pytest.raises(openai.InternalServerError, match="levels of symbolic"):
            service.text("changing")
    finally:
        place.unlink()


def test_the_directory_may_be_gone_for_a_while(service, monkeypatch, tmp_path):
    monkeypatch.setattr(service.service.adapters, "directory", tmp_path / "gone")
    with pytest.raises(openai.InternalServerError, match="No such file or directory"):
        service.client.models.list()
    with pytest.raises(openai.NotFoundError, match="'law' does not exist"):
        service.text("law")


def test_refused_files_are_read_once(service, oracle, place, monkeypatch):
    monkeypatch.setattr(registry, "SETTLED", -1)
    read, count = service.service.adapters._read, []
    monkeypatch.setattr(
        service.service.adapters, "_read", lambda name: count.append(1) or read(name)
    )
    oracle.save(place, 7)
    flip(place)
    for _ in range(3):
        with pytest.raises(openai.InternalServerError, match="is damaged"):
            service.text("changing")
    assert len(count) == 1


def test_other_plans_and_bases_are_refused(service, oracle, place):
    save(place, init(oracle.plan_of(2)))
    told = "must follow the plan of the service: .* made for square_rank"
    with pytest.raises(openai.InternalServerError, match=told):
        service.text("changing")
    oracle.save(place, 7, params=bytelevel.load(seed=1)[1])
    with pytest.raises(openai.InternalServerError, match="base"):
        service.text("changing")


@pytest.mark.slow
def test_many_faults_at_once_touch_nobody_else(service, oracle, place):
    """Files are damaged and mended all the time, while others are asked."""
    oracle.save(place, 7)
    stop = Event()

    def spoil():
        for number in range(10**6):
            if stop.is_set():
                return
            FAULTS[list(FAULTS)[number % len(FAULTS)]][0](place)
            time.sleep(0.002)
            oracle.save(place, 7 + number % 2)
            time.sleep(0.01)

    def ask(number):
        name = "changing" if number % 3 == 0 else NAMES[number % 5]
        try:
            return name, service.text(name)
        except openai.InternalServerError as error:
            return name, error.code
        except openai.NotFoundError as error:  # saving where there are no tensors
            return name, error.code

    with ThreadPoolExecutor(9) as clients:
        spoiler = clients.submit(spoil)
        try:
            said = list(clients.map(ask, range(60)))
        finally:
            stop.set()
        spoiler.result()
    told = {"adapter_unusable", "model_not_found"}
    for name, answer in said:
        if name != "changing":
            assert answer == oracle.says(NAMES.index(name))["Hi"]
        else:
            assert answer in told | {oracle.says(7)["Hi"], oracle.says(8)["Hi"]}


@pytest.mark.parametrize("streams", [True, False])
def test_who_hangs_up_frees_the_row(service, streams):
    # Greedy: of random answers one in some hundred would end with its first token.
    body = asked("law", max_tokens=60, stream=streams, temperature=0)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}"
    )
    with held_up(service, 0.05):
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", service.port)) as client:
                client.sendall(f"{head}\r\n\r\n".encode() + body)
                until(lambda: service.service.engine.busy == (1, 0))
                if streams:
                    assert b"200 OK" in client.recv(64)
            service.wait_until_idle(2)  # the answer alone would take three seconds


def test_who_hangs_up_in_the_body_is_forgotten(service):
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
        client.sendall(b"content-length: 100\r\n\r\n{")
    assert service.text("law", max_tokens=1)


def test_too_many_are_told_to_come_again(service):
    """Three rows and a queue of eight."""
    with held_up(service, 0.05), ThreadPoolExecutor(14) as clients:

        def ask(_):
            try:
                return service.ask("law").usage.completion_tokens
            except openai.RateLimitError as error:
                return error.response.headers["retry-after"]

        said = list(clients.map(ask, range(14)))
    assert sorted(set(map(str, said))) == ["1", str(TOKENS)]
    assert said.count(TOKENS) >= 11


def test_what_takes_too_long_ends(service, monkeypatch):
    monkeypatch.setattr(
        service.service, "limits", replace(service.service.limits, seconds=0.3)
    )
    with held_up(service, 0.05):
        with pytest.raises(openai.InternalServerError) as caught:
            service.ask("law", max_tokens=60)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="took too long"):
            with service.ask("law", max_tokens=60, stream=True) as stream:
                assert len(list(stream)) > 2
