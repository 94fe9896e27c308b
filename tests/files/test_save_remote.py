"""Under a URL is saved what is saved under a path, and no URL becomes a folder."""

import functools
import os
import sys
import tracemalloc
from pathlib import Path

import cloud
import fsspec
import jax
import numpy as np
import pytest
from adapter_files import PLAN, UP_PROJ, assert_same, contents, made, single
from base_files import base, kernels, sharded, write_reference
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import save as as_bytes

import mora_jax
from mora_jax import MoRAConfig, io, load, save
from mora_jax.cli._app import read_adapter
from mora_jax.io import AdapterFileError
from mora_jax.io._files import CONFIG, TENSORS
from mora_jax.io.peft._read import reference_operator

PLAN_OF_ONE = single(reference_operator(1, 24, 40, 2), path=UP_PROJ)
ADAPTED = made(PLAN_OF_ONE)
"""What PEFT's formats can hold."""
URL = "mem://bucket/a"


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """An empty store, and an empty working directory, which must stay so."""
    cloud.restore({})
    cloud.failures.clear()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    assert not os.listdir(here)


def test_a_url_holds_what_a_path_does(tmp_path):
    adapters = made(PLAN)
    save(tmp_path / "a", adapters, {"task": "x"})
    for url in (URL, epath.Path("mem://bucket/b")):
        save(url, adapters, {"task": "x"})
        assert contents(url) == contents(tmp_path / "a")
        assert_same(load(url), adapters)
        assert io.read_metadata(url) == {"task": "x"}
        read, *told = read_adapter(url)
        assert_same(read, adapters)
        assert told == ["mora", {"task": "x"}]
    ((m,), module) = jax.tree.leaves(ADAPTED), ".".join(UP_PROJ[:-1])
    write_reference(tmp_path / "reference", 1, {module: (np.asarray(m), 2)})
    cloud.upload(tmp_path / "reference", "mem://bucket/reference")
    back = io.load_peft("mem://bucket/reference", PLAN_OF_ONE)
    assert_same(back, ADAPTED)


def test_peft_directories_have_their_config_last(tmp_path):
    write = functools.partial(io.export, adapters=ADAPTED, program="peft")
    write(tmp_path / "a")
    with cloud.states() as seen:
        write(URL)
    for state in seen[:-1]:
        assert not any(name.endswith(CONFIG) for name in state)
    assert contents(URL) == contents(tmp_path / "a")
    with pytest.raises(FileExistsError, match="new or empty"):
        write(URL)
    write(URL, force=True)
    with pytest.raises(FileExistsError, match="adapter of another format"):
        save(URL, ADAPTED)
    assert contents(URL) == contents(tmp_path / "a")
    cloud.restore({})
    cloud.failures.add(CONFIG)
    with pytest.raises(OSError, match="network"):
        write(URL)
    assert not cloud.OBJECTS


def test_merges_from_store_to_store(tmp_path):
    local, out = sharded(tmp_path / "base"), "mem://bucket/out"
    adapters = kernels(local)
    io.merge_checkpoint(local, adapters, tmp_path / "out")
    cloud.upload(local, "mem://bucket/base")
    args = "mem://bucket/base", adapters
    with cloud.states() as seen:
        io.merge_checkpoint(*args, out)
    expected = contents(tmp_path / "out")
    assert contents(out) == expected
    for state in seen[:-1]:
        names = {name.rpartition("/")[2] for name in state if "/out/" in name}
        assert "config.json" not in names
        if "model.safetensors.index.json" in names:
            assert len(names) == len(expected) - 1
    with pytest.raises(FileExistsError, match="force=True"):
        io.merge_checkpoint(*args, out)
    with cloud.states() as seen:
        io.merge_checkpoint(*args, out, force=True)
    removed = [k for k, state in enumerate(seen) if len(state) < len(seen[0])]
    assert not any(name.endswith("/out/config.json") for name in seen[removed[1]])
    assert contents(out) == expected
    cloud.put((epath.Path(out) / "notes.txt").key, b"mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        io.merge_checkpoint(*args, out, force=True)
    assert contents(out) == expected | {"notes.txt": b"mine"}
    for out in ("mem://bucket/base", "mem://bucket", "mem://bucket/base/"):
        with pytest.raises(ValueError, match="must not be the base"):
            io.merge_checkpoint(*args, out, force=True)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json"])
def test_a_failed_merge_removes_what_it_wrote(tmp_path, name):
    local = sharded(tmp_path / "base")
    cloud.failures.add(name)
    with pytest.raises(OSError, match="network"):
        io.merge_checkpoint(local, kernels(local), "mem://bucket/out")
    assert not cloud.OBJECTS


def test_damage_in_a_store_is_seen(tmp_path):
    cloud.upload(sharded(tmp_path / "base"), "mem://bucket/base")
    save(URL, made(PLAN))
    for read, url, name in (
        (io.Checkpoint, "mem://bucket/base", "model-00002-of-00002.safetensors"),
        (load, URL, TENSORS),
    ):
        key, data = (epath.Path(url) / name).key, contents(url)[name]
        read(url)
        for broken in (data[:-8], b"", data[:8], b"\xff" * 16 + data[16:]):
            cloud.put(key, broken)
            with pytest.raises(AdapterFileError, match="safetensors|json"):
                read(url)
        cloud.put(key, None)
        with pytest.raises(AdapterFileError, match=f"there is no {name}"):
            read(url)
        cloud.put(key, data)
    with pytest.raises(AdapterFileError, match="there is no nothing"):
        io.Checkpoint("mem://bucket/nothing")


def test_merging_in_a_store_needs_memory_for_one_kernel(monkeypatch):
    """20 MB of kernels, 1 MB each; the store's own buffer is one file."""
    params = {f"layer_{k}": {"kernel": np.ones((512, 512), "f4")} for k in range(20)}
    plan = mora_jax.plan(params, MoRAConfig(rank=1))
    for name, layer in params.items():
        path = epath.Path("mem://bucket/base") / f"{name}.safetensors"
        cloud.put(path.key, as_bytes({f"{name}.kernel": layer["kernel"]}))
    adapters = made(plan)
    monkeypatch.setattr(cloud, "put", lambda name, data: None)  # writes are forgotten
    tracemalloc.start()
    try:
        io.merge_checkpoint("mem://bucket/base", adapters, "mem://bucket/out")
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()


# Google's own scheme, through epath's backend for it.


class Google(MemoryFileSystem):
    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).rpartition("://")[2])


def test_gs_goes_to_its_backend(monkeypatch, tmp_path):
    monkeypatch.setenv("EPATH_USE_TF", "false")
    fsspec.register_implementation("gcs", Google, clobber=True)
    adapters, merged = made(PLAN), "gs://bucket/merged"
    for _ in range(2):
        save("gs://bucket/deep/a", adapters)
        assert_same(load("gs://bucket/deep/a"), adapters)
    assert [*contents("gs://bucket/deep/a")] == [TENSORS]
    local = sharded(tmp_path / "base")
    adapters = kernels(local)
    io.merge_checkpoint(local, adapters, merged)
    io.merge_checkpoint(merged, adapters, tmp_path / "out")
    io.merge_checkpoint(local, adapters, merged, force=True)
    assert contents(tmp_path / "out").keys() == contents(merged).keys()
    with pytest.raises(AdapterFileError, match=rf"no {TENSORS} in gs://bucket/none"):
        load("gs://bucket/none")


# Paths that are no paths.


@pytest.mark.parametrize("scheme, package", [("s3", "s3fs"), ("az", "adlfs")])
def test_a_missing_package_is_named(monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("EPATH_USE_TF", "false")
    for call in (load, io.read_metadata, io.Checkpoint, read_adapter):
        with pytest.raises(ImportError, match=package) as error:
            call(f"{scheme}://bucket/x")
        assert "\n" not in str(error.value)
    with pytest.raises(ImportError, match=package):
        save(f"{scheme}://bucket/x", made(PLAN))


CALLS = {
    "save": (lambda path: save(path, made(PLAN)), "directory"),
    "load": (load, "directory"),
    "read_metadata": (io.read_metadata, "directory"),
    "read_adapter": (read_adapter, "adapter"),
    "load_peft": (lambda path: io.load_peft(path, base()), "directory"),
    "export": (lambda p: io.export(p, made(PLAN), "peft"), "directory"),
    "Checkpoint": (io.Checkpoint, "path"),
    "base": (lambda p: io.merge_checkpoint(p, made(PLAN), "out"), "base"),
    "out": (lambda p: io.merge_checkpoint(".", made(PLAN), p), "out"),
}
NO_PLACES = """http://host/x https://host/x hf://owner/x ftp://host/x file://host/x
    file://~/x gs:/bucket/x""".split()


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_path_is_refused_by_the_name_of_the_argument(name, unchecked):
    call, argument = CALLS[name]
    for value in (*NO_PLACES, Path("gs://bucket/x"), ""):
        with pytest.raises(ValueError, match=f"{argument} "):
            call(value)
    with pytest.raises(RuntimeError, match="home directory"):
        call("~nobody-of-this-name/x")
    for value in (3, None, b"x", ["x"]):
        with pytest.raises((TypeError, ValueError), match=f"{argument} must be a path"):
            call(value)


def test_local_urls_and_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    adapters = made(PLAN)
    for place in ("~/a", Path("~/b"), f"file://{tmp_path}/c%20d", tmp_path.as_uri()):
        save(place, adapters)
        assert_same(load(place), adapters)
    assert {"a", "b", "c d", TENSORS} <= set(os.listdir(tmp_path))
    assert_same(load(epath.Path(tmp_path / "a")), adapters)
    io.export(f"file://{tmp_path}/lora", ADAPTED, "peft")
    assert read_adapter("~/lora")[1:] == ("peft-lora", {})


def test_errors_name_the_users_path(tmp_path):
    local, file = sharded(tmp_path / "base"), tmp_path / "file"
    adapted = made(PLAN)
    merge = functools.partial(io.merge_checkpoint, local, kernels(local))
    file.write_text("")
    cloud.failures.add(TENSORS)
    for error, told, call in (
        (OSError, "the network is gone", lambda: save(URL, adapted)),
        (OSError, "/proc/", lambda: save("/proc/adapter", adapted)),
        (OSError, "/sys", lambda: save("/sys", adapted)),
        (OSError, "/proc/", lambda: io.export("/proc/a", ADAPTED, "peft")),
        (OSError, "/proc/", lambda: merge("/proc/x")),
        (NotADirectoryError, str(file), lambda: save(file, adapted)),
        (NotADirectoryError, str(file), lambda: save(file / "below", adapted)),
        (NotADirectoryError, "file", lambda: io.export(file, ADAPTED, "peft")),
        (AdapterFileError, "not a directory", lambda: io.Checkpoint(file / "x")),
        (AdapterFileError, f"no directory {tmp_path}/x,", lambda: load(tmp_path / "x")),
        (AdapterFileError, f"no directory {Path.cwd()}/no, ", lambda: load("no")),
    ):
        with pytest.raises(error, match=told):
            call()


def test_without_etils_local_files_work(tmp_path, monkeypatch):
    for name in ["etils", *sys.modules]:
        if name.partition(".")[0] == "etils":
            monkeypatch.setitem(sys.modules, name, None)
    save(tmp_path / "a", made(PLAN))
    assert_same(load(tmp_path / "a"), made(PLAN))
