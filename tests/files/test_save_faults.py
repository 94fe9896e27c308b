"""Whatever happens while files are written or read, no directory lies."""

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from test_save import CONFIG, PLAN, TENSORS, assert_same, made, rewrite

import mora_jax
from mora_jax import load, save
from mora_jax.io import AdapterFileError
from mora_jax.io import _native as native

FILES = ("_files.py", "_native.py")


def states(directory, action, scratch):
    """Copies of `directory` as it was before each line of ours that `action` ran."""
    copies, last = [], None

    def content():
        if not directory.exists():
            return None
        return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}

    def trace(frame, event, arg):
        nonlocal last
        if not frame.f_code.co_filename.endswith(FILES):
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
    first = states(directory, lambda: save(directory, old, PLAN), scratch(tmp_path, 1))
    assert len(first) > 3
    for copy in first:
        try:
            adapters, plan = load(copy)
        except AdapterFileError as error:
            assert f"no {CONFIG}" in str(error)
        else:
            assert_same(adapters, old)
    second = states(directory, lambda: save(directory, new, PLAN), scratch(tmp_path, 2))
    found = []
    for copy in second:
        adapters, plan = load(copy)
        assert plan == PLAN
        is_new = bool(
            (adapters["enc"]["kernel_mora"] == new["enc"]["kernel_mora"]).all()
        )
        assert_same(adapters, new if is_new else old)
        found.append(is_new)
        save(copy, old, PLAN)  # what the killed process left is no hindrance
        assert_same(load(copy)[0], old)
        assert sorted(os.listdir(copy)) == [CONFIG, TENSORS]
    assert found == sorted(found) and set(found) == {False, True}


# Loading while others save.


def contents(tmp_path, count):
    """Adapters that differ in their numbers alone, and their files' bytes."""
    adapters = [made(PLAN, seed) for seed in range(count)]
    for number, one in enumerate(adapters):
        save(tmp_path / str(number), one, PLAN)
    names = CONFIG, TENSORS
    return adapters, [
        [(tmp_path / str(number) / name).read_bytes() for name in names]
        for number in range(count)
    ]


def test_load_tries_again_while_the_config_is_replaced(tmp_path, monkeypatch):
    """Each of the first six times that the config is read another save follows."""
    adapters, files = contents(tmp_path, 2)
    directory, read, left = tmp_path / "a", Path.read_bytes, [*range(6)]
    native._replace(directory, *files[0])

    def read_bytes(path):
        data = read(path)
        if path == directory / CONFIG and left:
            native._replace(directory, *files[left.pop() % 2])
        return data

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert_same(load(directory)[0], adapters[0])
    assert not left


def test_load_finds_tensors_that_move_while_it_looks(tmp_path, monkeypatch):
    """From their waiting place, right after they were seen there."""
    adapters, files = contents(tmp_path, 2)
    directory, stat = tmp_path / "a", Path.stat
    native._replace(directory, *files[0])
    waiting = directory / native._waiting(hashlib.sha256(files[1][1]).hexdigest())
    waiting.write_bytes(files[1][1])
    (directory / CONFIG).write_bytes(files[1][0])

    def look(path, **kwargs):
        found = stat(path, **kwargs)
        if path == waiting:
            os.replace(waiting, directory / TENSORS)
        return found

    monkeypatch.setattr(Path, "stat", look)
    assert_same(load(directory)[0], adapters[1])


def test_damage_is_no_reason_to_try_for_ever(tmp_path, monkeypatch):
    """Nobody saves, so the config stays what it is."""
    _, files = contents(tmp_path, 2)
    (tmp_path / "0" / TENSORS).write_bytes(files[1][1])
    read, reads = Path.read_bytes, []

    def read_bytes(path):
        reads.append(path.name)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(AdapterFileError, match="damaged"):
        load(tmp_path / "0")
    assert reads.count(CONFIG) <= 3


def test_load_beside_three_writers(tmp_path):
    """What is loaded is always one of the adapters, whole."""
    adapters, files = contents(tmp_path, 3)
    directory = tmp_path / "a"
    native._replace(directory, *files[0])
    done = threading.Event()

    def write(number):
        for turn in range(60):
            native._replace(directory, *files[(number + turn) % 3])

    def check():
        count = 0
        while not done.is_set():
            config, tensors = native._files(directory)
            assert [config, tensors] in files
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
    found = load(directory)[0]
    assert any(
        (found["enc"]["kernel_mora"] == one["enc"]["kernel_mora"]).all()
        for one in adapters
    )


def scratch(tmp_path, number):
    path = tmp_path / f"scratch-{number}"
    path.mkdir()
    return path


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
    run = subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path / "a"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("200 ")


def test_disk_full(tmp_path):
    """The kernel refuses to write on: the old adapter stays, and no litter."""
    save(tmp_path, made(PLAN), PLAN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError):
            save(tmp_path, made(PLAN, 1), PLAN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(load(tmp_path)[0], made(PLAN))
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]


def test_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for target in ("/proc/adapter", tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError):
            save(target, made(PLAN), PLAN)


# Directories from strangers.

PLAIN = mora_jax.plan(
    {"a": {"kernel": jnp.ones((8, 8))}, "b": {"kernel": jnp.ones((8, 12))}},
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
    layers = json.loads((directory / CONFIG).read_text())["layers"]
    flat = {spec.name: spec for spec in plan.specs}
    assert len(flat) == len(layers) == len(tensors)
    for entry in layers:
        spec = flat["/".join(entry["path"])]
        node = adapters
        for key in spec.path[:-1]:
            node = node[key]
        np.testing.assert_array_equal(
            node[spec.path[-1] + "_mora"], tensors[f"{spec.name}_mora"]
        )
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
        start = time.perf_counter()
        try:
            adapters, plan = load(directory)
        except AdapterFileError:
            slowest = max(slowest, time.perf_counter() - start)
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


def test_no_pickle():
    """None of our modules can even name it."""
    for path in Path(mora_jax.__file__).parent.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text and "allow_pickle" not in text, path
