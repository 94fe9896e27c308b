"""Whatever happens while files are written or read, no directory lies."""

import json
import os
import pickle
import random
import resource
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax.traverse_util
import numpy as np
import pytest
import safetensors.numpy
from adapter_files import (
    CONFIG,
    PLAN,
    TEMPORARY,
    TENSORS,
    assert_old_or_new,
    assert_same,
    config_of,
    digests,
    files_of_at_most,
    is_new,
    kernels,
    made,
    rewrite,
    sharded,
)
from processes import python

import mora_jax
from mora_jax import io, load, save
from mora_jax.io import AdapterFileError

OURS = os.path.dirname(io.__file__)


def states(directory, action):
    """Copies of `directory` as it was before each line of ours that `action` ran."""
    copies, last = [], None
    scratch = directory.parent / f"states-{len(list(directory.parent.iterdir()))}"

    def content():
        if not directory.exists():
            return None
        return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}

    def trace(frame, event, arg):
        nonlocal last
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        now = content()
        if now is not None and now != last:
            copy = scratch / str(len(copies))
            shutil.copytree(directory, copy)
            copies.append(copy)
            last = now
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return copies


def test_killed_at_any_line(tmp_path):
    """The first save: nothing or all. The second: the old adapter or the new one."""
    directory, old, new = tmp_path / "a", made(PLAN, 0), made(PLAN, 1)
    first = states(directory, lambda: save(directory, old, PLAN))
    assert len(first) > 3
    for copy in first:
        try:
            adapters, plan = load(copy)
        except AdapterFileError as error:
            assert f"no {CONFIG}" in str(error)
        else:
            assert_same(adapters, old)
    found = []
    for copy in states(directory, lambda: save(directory, new, PLAN)):
        adapters, plan = load(copy)
        assert plan == PLAN
        found.append(adapters)
        save(copy, old, PLAN)  # what the killed process left is no hindrance
        assert_same(load(copy)[0], old)
        assert sorted(os.listdir(copy)) == [CONFIG, TENSORS]
    assert_old_or_new(found, old, new)


def test_a_merge_killed_at_any_line_leaves_a_whole_output_or_none(tmp_path):
    base, out = sharded(tmp_path / "base"), tmp_path / "out"
    adapters, plan = kernels(base)
    first = states(out, lambda: io.merge_checkpoint(base, adapters, plan, out))
    old = digests(out)
    assert first and all(digests(copy) == old for copy in first)
    args = base, made(plan, 1), plan, out
    second = states(out, lambda: io.merge_checkpoint(*args, force=True))
    are_new = [digests(copy) != old for copy in second]
    assert are_new == sorted(are_new) and set(are_new) == {False, True}
    for copy, fresh in zip(second, are_new, strict=True):
        assert not fresh or digests(copy) == digests(out)


# Loading while others save.


def test_load_tries_again_while_the_config_is_replaced(tmp_path, monkeypatch):
    """Each of the first six times that the config is read another save follows."""
    adapters = [made(PLAN, seed) for seed in range(2)]
    read, left = Path.read_bytes, [*range(6)]
    save(tmp_path, adapters[0], PLAN)

    def read_bytes(path):
        data = read(path)
        if path == tmp_path / CONFIG and left:
            save(tmp_path, adapters[left.pop() % 2], PLAN)
        return data

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert_same(load(tmp_path)[0], adapters[0])
    assert not left


def test_load_finds_tensors_that_move_while_it_looks(tmp_path, monkeypatch):
    """From their waiting place, right after they were seen there."""
    directory, new = tmp_path / "a", made(PLAN, 1)
    save(directory, made(PLAN, 0), PLAN)
    for copy in states(directory, lambda: save(directory, new, PLAN)):
        waiting = [path for path in copy.iterdir() if path.name.startswith(TEMPORARY)]
        if waiting and is_new(load(copy)[0], new):
            break
    else:
        raise AssertionError("no state of a save has its config and waiting tensors")
    (waiting,), stat = waiting, Path.stat

    def look(path, **kwargs):
        found = stat(path, **kwargs)
        if path == waiting and os.path.exists(waiting):
            os.replace(waiting, copy / TENSORS)
        return found

    monkeypatch.setattr(Path, "stat", look)
    assert_same(load(copy)[0], new)
    assert sorted(os.listdir(copy)) == [CONFIG, TENSORS]


def test_damage_is_no_reason_to_try_for_ever(tmp_path, monkeypatch):
    """Nobody saves, so the config stays what it is."""
    for seed in range(2):
        save(tmp_path / str(seed), made(PLAN, seed), PLAN)
    shutil.copy(tmp_path / "1" / TENSORS, tmp_path / "0" / TENSORS)
    read, reads = Path.read_bytes, []

    def read_bytes(path):
        reads.append(path.name)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(AdapterFileError, match="damaged"):
        load(tmp_path / "0")
    assert reads.count(CONFIG) <= 3


@pytest.mark.parametrize("turns", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_load_beside_three_writers(tmp_path, turns):
    """What is loaded is always one of the adapters, whole."""
    adapters = [made(PLAN, seed) for seed in range(3)]
    save(tmp_path, adapters[0], PLAN)
    done = threading.Event()

    def write(number):
        for turn in range(turns):
            save(tmp_path, adapters[(number + turn) % 3], PLAN)

    def check():
        count = 0
        while not done.is_set():
            found = load(tmp_path)[0]
            assert_same(found, next(one for one in adapters if is_new(found, one)))
            count += 1
        return count

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(check) for _ in range(2)]
        writers = [pool.submit(write, number) for number in range(3)]
        try:
            for writer in writers:
                writer.result()
        finally:
            done.set()
        assert all(reader.result() > 0 for reader in readers)


KILLER = """
import os, random, signal, sys, time
from pathlib import Path

import jax.numpy as jnp
import mora_jax
from mora_jax.io import _files as files
from mora_jax.io import _native as native

directory = Path(sys.argv[1])
plan = mora_jax.plan({"fc": {"kernel": jnp.ones((64, 64))}})
adapters = [
    {"fc": {"kernel_mora": jnp.full(plan.specs[0].shape, m)}} for m in (1.0, 2.0)
]
contents = []
for one in adapters:
    mora_jax.save(directory, one, plan)
    names = files.CONFIG, files.TENSORS
    contents.append([(directory / name).read_bytes() for name in names])


def slow(function):
    def run(*args, **kwargs):
        time.sleep(0.001)
        return function(*args, **kwargs)

    return run


chance, killed, seen = random.Random(0), 0, {1.0: 0, 2.0: 0}
while killed < 200:
    child = os.fork()
    if child == 0:
        for name in ("fsync", "replace", "open", "close"):
            setattr(files.os, name, slow(getattr(files.os, name)))
        for number in range(killed, killed + 100):  # JAX itself is not for forks
            native._replace(directory, *contents[number % 2])
        os._exit(0)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    back, same = mora_jax.load(directory)
    m = back["fc"]["kernel_mora"]
    assert same == plan and (m == m[0, 0]).all(), m
    seen[float(m[0, 0])] += 1
print(killed, sorted(seen.values()))
assert min(seen.values()) > 20, seen
"""


@pytest.mark.slow
def test_killed_200_times(tmp_path):
    """By SIGKILL, in a process that does nothing but save, on a slow file system."""
    out = python("-c", KILLER, tmp_path / "a", JAX_PLATFORMS="cpu")
    assert out.startswith("200 ")


def test_disk_full(tmp_path):
    """The kernel refuses to write on: the old adapter stays, and no litter."""
    save(tmp_path, made(PLAN), PLAN)
    with files_of_at_most(100):
        save(tmp_path, made(PLAN, 1), PLAN)
    assert_same(load(tmp_path)[0], made(PLAN))
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]


# Directories from strangers.

PLAIN = mora_jax.plan(
    {"a": {"kernel": np.ones((8, 8))}, "b": {"kernel": np.ones((8, 12))}},
    mora_jax.MoRAConfig(
        rank=2, overrides={"a/kernel": {"operator": "hadamard", "seed": 1}}
    ),
)


def flip(chance, data):
    place = chance.randrange(len(data))
    return (
        data[:place]
        + bytes([data[place] ^ 1 << chance.randrange(8)])
        + data[place + 1 :]
    )


def cut(chance, data):
    return data[: chance.randrange(len(data))]


def swap(chance, data):
    """Two pieces of text change places, as two shapes or names would."""
    words = [b"a/kernel_mora", b"b/kernel_mora", b"[4,4]", b"[6,6]", b"F32", b"F16"]
    one, other = chance.sample(words, 2)
    return data.replace(one, b"?").replace(other, one).replace(b"?", other)


def header(chance, data):
    size = chance.choice([0, 2**63, 2**32, 10**8, chance.randrange(2**16)])
    return size.to_bytes(8, "little") + data[8:]


def rename(chance, data):
    new = chance.choice(
        [b"../kernel_mor", b"/etc/passwd..", b"b/kernel_mora", b"\0" * 13]
    )
    return data.replace(b"a/kernel_mora", new)


def nan(chance, data):
    place = len(data) - 4 * chance.randrange(1, 16)
    return data[: place - 4] + np.float32("nan").tobytes() + data[place:]


def numbers(chance, data):
    """Absurd values in JSON."""
    value = chance.choice([10**9, -1, 0, 1e308, None, True, "x", [], {}, 2**70, 0.5])
    config = json.loads(data)
    target = chance.choice([config, *config["layers"]])
    key = chance.choice(sorted(target))
    if isinstance(target[key], list) and target[key] and chance.random() < 0.5:
        target[key][chance.randrange(len(target[key]))] = value
    else:
        target[key] = value
    return json.dumps(config).encode()


OF_TENSORS = (flip, cut, swap, header, rename, nan)
OF_CONFIG = (flip, cut, numbers, numbers, numbers)


def says(directory, adapters, plan):
    """Whether both are what the files say, read by others."""
    tensors = safetensors.numpy.load_file(directory / TENSORS)
    layers = config_of(directory)["layers"]
    assert len(plan) == len(layers) == len(tensors)
    found = flax.traverse_util.flatten_dict(adapters, sep="/")
    for entry in layers:
        spec = plan["/".join(entry["path"])]
        name = f"{spec.name}_mora"
        np.testing.assert_array_equal(found[name], tensors[name])
        assert list(spec.kernel_shape) == entry["kernel_shape"]
        assert spec.operator.square_rank == entry["square_rank"]
        assert spec.operator.name == entry["operator"]["name"]
        assert (spec.alpha, spec.dropout) == (entry["alpha"], entry["dropout"])
    return True


def mutate_and_load(directory, count):
    """How many mutants were loaded; all others were refused in time."""
    save(directory, made(PLAIN), PLAIN)
    tensors, config = ((directory / name).read_bytes() for name in (TENSORS, CONFIG))
    chance, loaded, slowest = random.Random(0), 0, 0.0
    for _ in range(count):
        (directory / TENSORS).write_bytes(tensors)
        (directory / CONFIG).write_bytes(config)
        signed = chance.random() < 0.7  # by someone who knows the format
        if chance.random() < 0.5:
            new = chance.choice(OF_TENSORS)(chance, tensors)
            if signed:
                rewrite(directory, lambda config: None, new)
            else:
                (directory / TENSORS).write_bytes(new)
        else:
            new = chance.choice(OF_CONFIG)(chance, config)
            (directory / CONFIG).write_bytes(new)
            if signed:
                try:
                    rewrite(directory, lambda config: None)
                except (ValueError, AttributeError):
                    pass  # it is no JSON object any more
        start = time.process_time()
        try:
            adapters, plan = load(directory)
        except AdapterFileError:
            slowest = max(slowest, time.process_time() - start)
        else:
            loaded += says(directory, adapters, plan)
    assert slowest < 1
    return loaded


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutants(tmp_path, count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = mutate_and_load(tmp_path, count)
    assert 0 < loaded < count / 2
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000  # kilobytes


class Evil:
    """Its pickle makes a file when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_is_never_opened(tmp_path):
    """Neither beside the files nor in their place, signed as ours or not."""
    mark, directory = tmp_path / "opened", tmp_path / "a"
    evil = pickle.dumps(Evil(mark))
    pickle.loads(evil)
    mark.rmdir()  # so it works
    np.save(tmp_path / "objects.npy", np.array([Evil(mark)], object))
    save(directory, made(PLAN), PLAN)
    for name in ("adapter_model.bin", "pytorch_model.bin", "adapter_model.pkl"):
        (directory / name).write_bytes(evil)
    assert_same(load(directory)[0], made(PLAN))
    readers = load, io.Checkpoint, lambda path: io.load_peft_mora(path, PLAN)
    for data in (evil, (tmp_path / "objects.npy").read_bytes()):
        rewrite(directory, lambda config: None, data)
        for read in readers:
            with pytest.raises(AdapterFileError):
                read(directory)
    (directory / CONFIG).write_bytes(evil)
    for read in (*readers, io.read_metadata):
        with pytest.raises(AdapterFileError):
            read(directory)
    assert not mark.exists()
