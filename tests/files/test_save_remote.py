"""Under a URL is saved what is saved under a path, and no URL becomes a folder."""

import os
import sys
import tracemalloc
from pathlib import Path

import cloud
import numpy as np
import pytest
from adapter_files import (
    CONFIG,
    DATA,
    NAMES,
    PLAN,
    TEMPORARY,
    TENSORS,
    UP_PROJ,
    assert_old_or_new,
    assert_same,
    base,
    digests,
    kernels,
    made,
    sharded,
    single,
)
from cloud import content
from etils import epath
from safetensors.numpy import save as as_bytes

import mora_jax
from mora_jax import MoRAConfig, io, load, save
from mora_jax.io import AdapterFileError
from mora_jax.io._read import format_of, read_adapter

PLAN_OF_ONE = single(io.reference_operator(1, 24, 40, 2), path=UP_PROJ)
ADAPTED = made(PLAN_OF_ONE), PLAN_OF_ONE
"""What both of PEFT's formats can hold."""


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
    save(tmp_path / "a", adapters, PLAN, {"task": "x"})
    for url in ("mem://bucket/a", epath.Path("mem://bucket/b")):
        save(url, adapters, PLAN, {"task": "x"})
        local = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
        assert content(url) == local
        back, plan = load(url)
        assert_same(back, adapters)
        assert plan == PLAN
        assert io.read_metadata(url) == {"task": "x"}
        assert format_of(url) == "mora"
        assert_same(read_adapter(url)[0], adapters)


def test_a_killed_save_leaves_the_old_adapter_or_the_new_one():
    old, new = made(PLAN, 0), made(PLAN, 1)
    with cloud.states() as first:
        save("mem://bucket/a", old, PLAN)
    for state in first:
        cloud.restore(state)
        try:
            assert_same(load("mem://bucket/a")[0], old)
        except AdapterFileError as error:
            assert f"no {CONFIG}" in str(error)
    with cloud.states() as second:
        save("mem://bucket/a", new, PLAN)
    assert len(second) > 3
    found = []
    for state in second:
        cloud.restore(state)
        found.append(load("mem://bucket/a")[0])
        save("mem://bucket/a", old, PLAN)
        assert_same(load("mem://bucket/a")[0], old)
        assert sorted(content("mem://bucket/a")) == [CONFIG, TENSORS]
    assert_old_or_new(found, old, new)


def test_a_failed_save_leaves_the_old_adapter():
    save("mem://bucket/a", made(PLAN, 0), PLAN)
    cloud.failures.add(CONFIG)
    with pytest.raises(OSError, match="network") as error:
        save("mem://bucket/a", made(PLAN, 1), PLAN)
    assert TEMPORARY not in str(error.value)


def test_peft_directories_have_their_config_last(tmp_path):
    for write in (io.save_peft_mora, io.save_peft_lora):
        write(tmp_path / write.__name__, *ADAPTED)
        with cloud.states() as seen:
            write("mem://bucket/a", *ADAPTED)
        for state in seen[:-1]:
            assert not any(name.endswith(CONFIG) for name in state)
        local = (tmp_path / write.__name__).iterdir()
        assert content("mem://bucket/a") == {p.name: p.read_bytes() for p in local}
        with pytest.raises(FileExistsError, match="new or empty"):
            write("mem://bucket/a", *ADAPTED)
        write("mem://bucket/a", *ADAPTED, force=True)
        cloud.restore({})
        cloud.failures.add(CONFIG)
        with pytest.raises(OSError, match="network"):
            write("mem://bucket/a", *ADAPTED)
        assert not cloud.OBJECTS
        cloud.failures.clear()


def test_the_references_adapters_are_read_from_a_store():
    adapters, plan = io.load_peft_mora(DATA / "type1", base(), NAMES)
    cloud.upload(DATA / "type1", "mem://bucket/ref")
    back, same = io.load_peft_mora("mem://bucket/ref", base(), NAMES)
    assert_same(back, adapters)
    assert same == plan


def test_merges_from_store_to_store(tmp_path):
    local = sharded(tmp_path / "base")
    adapters, plan = kernels(local)
    io.merge_checkpoint(local, adapters, plan, tmp_path / "out")
    cloud.upload(local, "mem://bucket/base")
    with cloud.states() as seen:
        io.merge_checkpoint("mem://bucket/base", adapters, plan, "mem://bucket/out")
    expected = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert content("mem://bucket/out") == expected
    for state in seen[:-1]:
        names = {name.rpartition("/")[2] for name in state if "/out/" in name}
        assert "config.json" not in names
        if "model.safetensors.index.json" in names:
            assert len(names) == len(expected) - 1
    args = "mem://bucket/base", adapters, plan, "mem://bucket/out"
    with pytest.raises(FileExistsError, match="force=True"):
        io.merge_checkpoint(*args)
    with cloud.states() as seen:
        io.merge_checkpoint(*args, force=True)
    removed = [k for k, state in enumerate(seen) if len(state) < len(seen[0])]
    assert not any(name.endswith("/out/config.json") for name in seen[removed[1]])
    assert content("mem://bucket/out") == expected
    for out in ("mem://bucket/base", "mem://bucket", "mem://bucket/base/"):
        with pytest.raises(ValueError, match="must not be the base"):
            io.merge_checkpoint(*args[:3], out, force=True)


def test_a_failed_merge_removes_what_it_wrote(tmp_path):
    local = sharded(tmp_path / "base")
    adapters, plan = kernels(local)
    for name in ("model-00002-of-00002.safetensors", "config.json"):
        cloud.failures.clear()
        cloud.failures.add(name)
        with pytest.raises(OSError, match="network"):
            io.merge_checkpoint(local, adapters, plan, "mem://bucket/out")
        assert not cloud.OBJECTS


def test_damage_in_a_store_is_seen(tmp_path):
    local = sharded(tmp_path / "base")
    adapters, plan = kernels(local)
    cloud.upload(local, "mem://bucket/base")
    (name,) = [name for name in cloud.OBJECTS if name.endswith("00002.safetensors")][1:]
    whole = cloud.OBJECTS[name]
    for broken in (whole[:-8], b"", whole[:8], b"\xff" * 16 + whole[16:]):
        cloud.put(name, broken)
        with pytest.raises(AdapterFileError, match="safetensors"):
            io.Checkpoint("mem://bucket/base")
    cloud.put(name, None)
    with pytest.raises(AdapterFileError, match="there is no model-00002"):
        io.Checkpoint("mem://bucket/base")
    with pytest.raises(AdapterFileError, match="there is no nothing"):
        io.Checkpoint("mem://bucket/nothing")
    save("mem://bucket/a", made(PLAN), PLAN)
    for name in (CONFIG, TENSORS):
        data = content("mem://bucket/a")[name]
        key = (epath.Path("mem://bucket/a") / name).key
        for broken in (data[:-2], data[:50] + b"?" + data[51:]):
            cloud.put(key, broken)
            with pytest.raises(AdapterFileError):
                load("mem://bucket/a")
        cloud.put(key, None)
        with pytest.raises(AdapterFileError, match=f"there is no {name}"):
            load("mem://bucket/a")
        cloud.put(key, data)


def test_merging_in_a_store_needs_memory_for_one_kernel(monkeypatch):
    """20 MB of kernels, 1 MB each; the store's own buffer is one file."""
    kernel = np.zeros((512, 512), np.float32)
    params = {f"layer_{k}": {"kernel": kernel + k} for k in range(20)}
    plan = mora_jax.plan(params, MoRAConfig(rank=1))
    for k in range(20):
        data = as_bytes({f"layer_{k}.kernel": kernel + k})
        path = epath.Path("mem://bucket/base") / f"{k}.safetensors"
        cloud.put(path.key, data)
    adapters = made(plan)
    monkeypatch.setattr(cloud, "put", lambda name, data: None)  # writes are forgotten
    tracemalloc.start()
    try:
        io.merge_checkpoint("mem://bucket/base", adapters, plan, "mem://bucket/out")
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()


# Google's own scheme, through epath's backend for it.


def google(monkeypatch):
    """Have fsspec keep gs:// in memory."""
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    class Google(MemoryFileSystem):
        protocol = ("gcs", "gs")
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            path = str(path).removeprefix("gs://").removeprefix("gcs://")
            return MemoryFileSystem._strip_protocol(path)

    monkeypatch.setenv("EPATH_USE_TF", "false")
    fsspec.register_implementation("gcs", Google, clobber=True)


def test_gs_goes_to_its_backend(monkeypatch, tmp_path):
    google(monkeypatch)
    adapters = made(PLAN)
    for _ in range(2):
        save("gs://bucket/deep/a", adapters, PLAN)
        assert_same(load("gs://bucket/deep/a")[0], adapters)
    names = sorted(path.name for path in epath.Path("gs://bucket/deep/a").iterdir())
    assert names == [CONFIG, TENSORS]
    local = sharded(tmp_path / "base")
    adapters, plan = kernels(local)
    io.merge_checkpoint(local, adapters, plan, "gs://bucket/merged")
    io.merge_checkpoint("gs://bucket/merged", adapters, plan, tmp_path / "out")
    io.merge_checkpoint(local, adapters, plan, "gs://bucket/merged", force=True)
    assert digests(tmp_path / "out").keys() == {
        path.name for path in epath.Path("gs://bucket/merged").iterdir()
    }
    with pytest.raises(AdapterFileError, match=rf"no {CONFIG} in gs://bucket/none"):
        load("gs://bucket/none")


# Paths that are no paths.


@pytest.mark.parametrize("scheme, package", [("s3", "s3fs"), ("az", "adlfs")])
def test_a_missing_package_is_named(monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("EPATH_USE_TF", "false")
    for call in (load, io.read_metadata, io.Checkpoint, format_of):
        with pytest.raises(ImportError, match=f"pip install {package}") as error:
            call(f"{scheme}://bucket/x")
        assert "\n" not in str(error.value)
    with pytest.raises(ImportError, match=f"directory.*{scheme}://bucket/x.*{package}"):
        save(f"{scheme}://bucket/x", made(PLAN), PLAN)


CALLS = {
    "save": (lambda path: save(path, made(PLAN), PLAN), "directory"),
    "load": (load, "directory"),
    "read_metadata": (io.read_metadata, "directory"),
    "format_of": (format_of, "directory"),
    "read_adapter": (read_adapter, "directory"),
    "load_peft_mora": (lambda path: io.load_peft_mora(path, base()), "directory"),
    "save_peft_mora": (lambda p: io.save_peft_mora(p, made(PLAN), PLAN), "directory"),
    "save_peft_lora": (lambda p: io.save_peft_lora(p, made(PLAN), PLAN), "directory"),
    "Checkpoint": (io.Checkpoint, "path"),
    "base": (lambda p: io.merge_checkpoint(p, made(PLAN), PLAN, "out"), "base"),
    "out": (lambda p: io.merge_checkpoint(".", made(PLAN), PLAN, p), "out"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_path_is_refused_by_the_name_of_the_argument(name, unchecked):
    call, argument = CALLS[name]
    for value in (
        "http://host/x",
        "https://host/x",
        "hf://owner/x",
        "ftp://host/x",
        "file://host/x",
        "file://~/x",
        "gs:/bucket/x",
        Path("gs://bucket/x"),
        "~nobody-of-this-name/x",
        "",
    ):
        with pytest.raises(ValueError, match=f"{argument} "):
            call(value)
    for value in (3, None, b"x", ["x"]):
        with pytest.raises((TypeError, ValueError), match=f"{argument} must be a path"):
            call(value)


def test_local_urls_and_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    adapters = made(PLAN)
    for place in ("~/a", Path("~/b"), f"file://{tmp_path}/c%20d", tmp_path.as_uri()):
        save(place, adapters, PLAN)
        assert_same(load(place)[0], adapters)
    assert {"a", "b", "c d", CONFIG} <= set(os.listdir(tmp_path))
    assert_same(load(epath.Path(tmp_path / "a"))[0], adapters)
    io.save_peft_mora("~/reference", *ADAPTED)
    io.load_peft_mora("~/reference", ADAPTED[1])
    io.save_peft_lora(f"file://{tmp_path}/lora", *ADAPTED)
    assert format_of("~/lora") == "peft-lora"


def test_a_file_in_place_of_a_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for target in (file, file / "below"):
        with pytest.raises(NotADirectoryError, match=str(file)):
            save(target, made(PLAN), PLAN)
    with pytest.raises(AdapterFileError, match="not a directory"):
        load(file)
    for write in (io.save_peft_mora, io.save_peft_lora):
        with pytest.raises(FileExistsError, match="file"):
            write(file, made(PLAN), PLAN)
    with pytest.raises(AdapterFileError, match="not a directory"):
        io.Checkpoint(file / "model.safetensors")


def test_errors_name_the_users_path(tmp_path):
    """Not an unfinished file beside it, of which users know nothing."""
    for call in (
        lambda: save("/proc/adapter", made(PLAN), PLAN),
        lambda: save("/sys", made(PLAN), PLAN),
        lambda: io.save_peft_mora("/proc/adapter", *ADAPTED),
        lambda: io.merge_checkpoint(
            sharded(tmp_path / "base"), *kernels(tmp_path / "base"), "/proc/out"
        ),
    ):
        with pytest.raises(OSError) as error:
            call()
        assert "/proc/" in str(error.value) or "/sys" in str(error.value)
        assert TEMPORARY not in str(error.value)


def test_without_etils_local_files_work(tmp_path, monkeypatch):
    for name in ["etils", *sys.modules]:
        if name.partition(".")[0] == "etils":
            monkeypatch.setitem(sys.modules, name, None)
    save(tmp_path / "a", made(PLAN), PLAN)
    assert_same(load(tmp_path / "a")[0], made(PLAN))
    with pytest.raises(ImportError, match=r"pip install mora-jax\[io\]"):
        load("gs://bucket/x")
