"""Whatever happens while files are written or read, no directory lies."""

import contextlib
import functools
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

import cloud
import jax
import numpy as np
import pytest
import safetensors.numpy
from adapter_files import (
    PLAN,
    assert_same,
    config_of,
    contents,
    made,
    rewrite,
    single,
    slow,
    specs_of,
    with_metadata,
)
from base_files import files_of_at_most, kernels, sharded

from mora_jax import Plan, io, load, make_operator, save
from mora_jax._plan.settings import AdapterSettings
from mora_jax.io import AdapterFileError
from mora_jax.io._files import CONFIG, TEMPORARY, TENSORS

OURS = os.path.dirname(io.__file__)


def states(directory, action):
    """Copies of `directory` as it was before each line of ours that `action` ran."""
    copies, last = [], None
    scratch = directory.parent / f"states-{len(list(directory.parent.iterdir()))}"

    def trace(frame, event, arg):
        nonlocal last
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if directory.exists() and (now := contents(directory)) != last:
            copies.append(shutil.copytree(directory, scratch / str(len(copies))))
            last = now
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
    return copies


def states_of_store(url, action):
    """The same of an object store, which holds them one after the other."""
    with cloud.states() as seen:
        action()
    for state in seen:
        cloud.restore(state)
        yield url


def is_new(found, new):
    """Whether adapters of `PLAN` are these."""
    return np.array_equal(found["enc"]["kernel_mora"].m, new["enc"]["kernel_mora"].m)


@pytest.mark.parametrize("states_of", [states, states_of_store])
def test_killed_at_any_line(tmp_path, states_of):
    """The first save: nothing or all. The second: the old adapter or the new one."""
    cloud.restore({})
    place = tmp_path / "a" if states_of is states else "mem://bucket/a"
    old, new = made(PLAN, 0), made(PLAN, 1)
    count = 0
    for copy in states_of(place, lambda: save(place, old)):
        count += 1
        try:
            assert_same(load(copy), old)
        except AdapterFileError as error:
            assert f"no {TENSORS}" in str(error)
    assert count > 3
    found = []
    for copy in states_of(place, lambda: save(place, new)):
        found.append(load(copy))
        save(copy, old)  # what the killed process left is no hindrance
        assert_same(load(copy), old)
        others = [name for name in contents(copy) if name != TENSORS]
        assert all(name.startswith(TEMPORARY) for name in others)
    are_new = [is_new(adapters, new) for adapters in found]
    for adapters, fresh in zip(found, are_new, strict=True):
        assert_same(adapters, new if fresh else old)
    assert are_new == sorted(are_new) and set(are_new) == {False, True}


def test_a_merge_killed_at_any_line_leaves_a_whole_output_or_none(tmp_path):
    base, out = sharded(tmp_path / "base"), tmp_path / "out"
    adapters = kernels(base)
    first = states(out, lambda: io.merge_checkpoint(base, adapters, out))
    old = contents(out)
    assert first and all(contents(copy) == old for copy in first)
    args = base, jax.tree.map(lambda m: m + 1, adapters), out
    second = states(out, lambda: io.merge_checkpoint(*args, force=True))
    are_new = [contents(copy) != old for copy in second]
    assert are_new == sorted(are_new) and set(are_new) == {False, True}
    for copy, fresh in zip(second, are_new, strict=True):
        assert not fresh or contents(copy) == contents(out)


# Loading while others save.


def test_load_while_the_file_is_replaced(tmp_path, monkeypatch):
    """A local file that is open stays whole, whatever has its name by then."""
    old, new = made(PLAN, 0), made(PLAN, 1)
    save(tmp_path, old)
    opened, left = Path.open, [new]

    def open_(path, *args, **kwargs):
        file = opened(path, *args, **kwargs)
        if path == tmp_path / TENSORS and left:
            save(tmp_path, left.pop())
        return file

    monkeypatch.setattr(Path, "open", open_)
    assert_same(load(tmp_path), old)
    assert_same(load(tmp_path), new)
    assert not left


def test_parts_of_two_files_are_no_adapter(monkeypatch):
    """A store may read a file in pieces, between which another save lies."""
    cloud.restore({})
    url = "mem://bucket/a"
    save(url, made(PLAN, 0))
    read, left = cloud.MemoryPath.read_bytes, [made(PLAN, 1)]

    def read_bytes(path):
        data = read(path)
        if left:
            save(url, left.pop())
            half = len(data) // 2
            return data[:half] + read(path)[half:]
        return data

    monkeypatch.setattr(cloud.MemoryPath, "read_bytes", read_bytes)
    with pytest.raises(AdapterFileError, match="damaged"):
        load(url)
    assert_same(load(url), made(PLAN, 1))


def test_a_file_under_way_is_not_removed(tmp_path, monkeypatch):
    """By others that save: the last one's adapter stays."""
    replace, turns = Path.replace, [made(PLAN, seed) for seed in (1, 2, 3)]
    save(tmp_path, made(PLAN))

    def replace_(path, target):
        if turns:
            save(tmp_path, turns.pop())
        assert path.exists()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_)
    save(tmp_path, made(PLAN, 4))
    assert not turns and os.listdir(tmp_path) == [TENSORS]
    assert_same(load(tmp_path), made(PLAN, 4))


@pytest.mark.slow
def test_load_beside_three_writers(tmp_path):
    """What is loaded is always one of the adapters, whole."""
    adapters = [made(PLAN, seed) for seed in range(3)]
    save(tmp_path, adapters[0])
    done = threading.Event()

    def write(number):
        for turn in range(30):
            save(tmp_path, adapters[(number + turn) % 3])

    def check():
        count = 0
        while not done.is_set():
            found = load(tmp_path)
            assert_same(found, next(one for one in adapters if is_new(found, one)))
            count += 1
        return count

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(check) for _ in range(2)]
        try:
            list(pool.map(write, range(3)))
        finally:
            done.set()
        assert all(reader.result() > 0 for reader in readers)


def test_disk_full(tmp_path):
    save(tmp_path, made(PLAN))
    with files_of_at_most(100):
        save(tmp_path, made(PLAN, 1))
    assert_same(load(tmp_path), made(PLAN))
    assert os.listdir(tmp_path) == [TENSORS]


# Directories from strangers.

ONE = single(make_operator("hadamard", 8, 8, 4, seed=1))
TWO = single(make_operator("rotation", 8, 12, 6), path=("b", "kernel"))
PLAIN = Plan({**ONE.parts, **TWO.parts}, base_parameters=160)


def flip(chance, data):
    data = bytearray(data)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def cut(chance, data):
    return data[: chance.randrange(len(data))]


def swap(chance, data):
    """Two pieces of text change places, which are shapes, types or names."""
    words = [b"a/kernel_mora", b"b/kernel_mora", b"[4,4]", b"[6,6]", b"F32", b"F16"]
    words += [b"../kernel_mor", b"/etc/passwd..", b"\0" * 13]
    one, other = chance.sample(words, 2)
    return data.replace(one, b"?").replace(other, one).replace(b"?", other)


def header(chance, data):
    size = chance.choice([0, 2**63, 2**32, 10**8, chance.randrange(2**16)])
    return size.to_bytes(8, "little") + data[8:]


def numbers(chance, data):
    """Absurd values in JSON."""
    value = chance.choice([10**9, -1, 0, 1e308, None, True, "x", [], {}, 2**70, 0.5])
    config = json.loads(data)
    layers = config["layers"]
    target = chance.choice([config, *layers, *(layer["settings"] for layer in layers)])
    key = chance.choice(sorted(target))
    if isinstance(target[key], list) and target[key] and chance.random() < 0.5:
        target[key][chance.randrange(len(target[key]))] = value
    else:
        target[key] = value
    return json.dumps(config).encode()


def assert_says(directory, adapters):
    """They are what the file says, read by others."""
    tensors = safetensors.numpy.load_file(directory / TENSORS)
    layers = config_of(directory)["layers"]
    specs = specs_of(adapters)
    assert len(specs) == len(layers) == len(tensors)
    for entry in layers:
        spec = specs[name := "/".join(entry["path"])]
        m = adapters[entry["path"][0]]["kernel_mora"].m
        np.testing.assert_array_equal(m, tensors[f"{name}_mora"])
        assert list(spec.kernel_shape) == entry["kernel_shape"]
        assert spec.operator.square_rank == entry["square_rank"]
        assert spec.operator.name == entry["operator"]["name"]
        said = AdapterSettings().to_json() | entry["settings"]  # or the default
        assert spec.to_json() == said


def mutate(directory, chance, original):
    """Change the file or its config, often as someone who knows the format."""
    (directory / TENSORS).write_bytes(original)
    if chance.random() < 0.5:
        change = chance.choice((flip, cut, numbers, numbers, numbers))
        text = json.dumps(config_of(directory)).encode()
        text = change(chance, text).decode("latin-1")
        data = with_metadata(original, {"mora_jax": text})
        (directory / TENSORS).write_bytes(data)
        signing = functools.partial(rewrite, directory)
    else:
        change = chance.choice((flip, cut, swap, swap, header))
        data = change(chance, original)
        signing = functools.partial(rewrite, directory, tensors=data)
    if chance.random() < 0.7:
        with contextlib.suppress(ValueError, AttributeError):  # no JSON object any more
            signing()
            return
    (directory / TENSORS).write_bytes(data)


@pytest.mark.parametrize("count", [300, slow(5000)])
def test_mutants(tmp_path, count):
    """Those that are loaded are as the files say, the others are refused in time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save(tmp_path, made(PLAIN))
    original = (tmp_path / TENSORS).read_bytes()
    chance, loaded = random.Random(0), 0
    for _ in range(count):
        mutate(tmp_path, chance, original)
        start = time.process_time()
        try:
            found = load(tmp_path)
        except AdapterFileError:
            assert time.process_time() - start < 1
        else:
            assert_says(tmp_path, found)
            loaded += 1
    assert 0 < loaded < count / 2
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000  # kilobytes


class Evil:
    """Its pickle makes a directory when it is opened."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


def test_a_pickle_is_never_opened(tmp_path, monkeypatch):
    """Neither beside the files nor in their place, signed as ours or not."""
    monkeypatch.chdir(tmp_path)
    directory, objects = tmp_path / "a", tmp_path / "objects.npy"
    evil = pickle.dumps(Evil())
    pickle.loads(evil)
    os.rmdir("opened")  # so it works
    np.save(objects, np.array([Evil()], object))
    save(directory, made(PLAN))
    for name in ("adapter_model.bin", "pytorch_model.bin", "adapter_model.pkl"):
        (directory / name).write_bytes(evil)
    assert_same(load(directory), made(PLAN))
    readers = load, io.Checkpoint, lambda path: io.load_peft(path, PLAN)
    for data in (evil, objects.read_bytes()):
        save(directory, made(PLAN))
        rewrite(directory, tensors=data)
        for read in (*readers, io.read_metadata):
            with pytest.raises(AdapterFileError):
                read(directory)
    (directory / CONFIG).write_bytes(evil)
    for read in readers:
        with pytest.raises(AdapterFileError):
            read(directory)
    assert not os.path.exists("opened")
