"""Several processes of two devices each save, load and merge as one process does.

The functions of `CASES` and of `DEATHS` run on all of them; `hosts.run` starts these.
"""

import contextlib
import dataclasses
import errno
import fcntl
import math
import os
import pickle
import signal
import time

import hosts
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_files import assert_same, made, slow, without_digests
from flax import nnx
from helpers import ROUNDED
from jax._src import compiler
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mora_jax
from benchmarks.mesh.traffic import collectives
from mora_jax import MoRAConfig, sharding
from mora_jax._tree import base_digest
from mora_jax.io import AdapterFileError, _files

pytestmark = pytest.mark.slow

SHAPES = {
    "fc": ((256, 192), "io", P("f", "t")),
    "rows": ((256, 192), "io", P(("f", "t"))),
    "columns": ((192, 256), "oi", P(None, ("t", "f"))),
    "heads": ((16, 32, 64), "ioi", P("f", None, "t")),
    "stack": ((4, 256, 64), "sio", P("f", None, "t")),
    "layers": ((4, 64, 256), "soi", P(None, "f", "t")),
    "whole": ((64, 32), "io", P()),
}
"""Kernels: shape, axes, and how the mesh splits them; "f" is split over processes."""

AXES = {f"{name}/.*": {"axes": axes} for name, (_, axes, _) in SHAPES.items()}
LIKE = {n: {"kernel": jax.ShapeDtypeStruct(s, "f4")} for n, (s, *_) in SHAPES.items()}
CONFIG = MoRAConfig(rank=2, operator="block_diagonal", overrides=AXES)
PLAN = mora_jax.plan(LIKE, CONFIG)
METADATA = {"step": 3}


def kernels(dtype="float32"):
    """The base, in NumPy, as one process has it; a part of it is -0.0."""
    numbers = np.random.default_rng(1)
    arrays = {n: numbers.normal(size=shape) for n, (shape, *_) in SHAPES.items()}
    for array in arrays.values():
        array.ravel()[::3] = -0.0
    return {n: {"kernel": array.astype(dtype)} for n, array in arrays.items()}


def on_hosts(arrays, kind="Auto", across="f"):
    """The same, split over all devices, with processes along the mesh axis `across`."""
    devices = np.array(jax.devices()).reshape(-1, hosts.DEVICES)
    devices = devices if across == "f" else devices.T
    mesh = Mesh(devices, ("f", "t"), axis_types=(getattr(AxisType, kind),) * 2)
    return {
        name: {"kernel": placed(layer["kernel"], NamedSharding(mesh, SHAPES[name][2]))}
        for name, layer in arrays.items()
    }


def placed(array, place):
    return jax.make_array_from_callback(array.shape, place, array.__getitem__)


def shared_adapters(params, seed=0):
    """Adapters beside params: M's of stacks, and of blocks, are split."""
    plan = sharding.on_mesh(PLAN, params, batch_axes=())
    where = sharding.adapter_shardings(plan, params)
    tree = made(plan, seed)
    return jax.tree.map(lambda m, place: placed(np.asarray(m), place), tree, where)


def in_numpy(adapters):
    return jax.tree.map(np.asarray, adapters)


def is_whole(shared, array):
    """True if all parts that this process has are an array's, bit for bit."""
    parts = ((part.data, array[part.index]) for part in shared.addressable_shards)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in parts)


def raised(call, *args, **kwargs):
    """The error of a call."""
    try:
        call(*args, **kwargs)
    except Exception as error:
        return error
    raise AssertionError("it must raise")


def assert_error_of_all(error, number, kind, message):
    """It is process `number`'s own, and one of all others, who say where it was."""
    text = f"{type(error).__name__}: {error}"
    if jax.process_index() == number:
        assert isinstance(error, kind) and message in str(error), text
    else:
        start = f"failed on process {number}, so on all: "
        assert type(error) is RuntimeError and start in str(error), text
        assert message in str(error), text


@contextlib.contextmanager
def largest_sent():
    """The numbers in the largest array that devices send, of each program compiled."""
    sizes, compile_one = [], compiler.compile_or_get_cached

    def compile_and_read(*args, **kwargs):
        program = compile_one(*args, **kwargs)
        (module,) = program.hlo_modules()
        arrays = collectives(module.to_string())
        sizes.append(max((math.prod(shape) for _, shape in arrays), default=0))
        return program

    compiler.compile_or_get_cached = compile_and_read
    yield sizes
    compiler.compile_or_get_cached = compile_one


def tensors(folder):
    return (folder / _files.TENSORS).read_bytes()


# --- Cases: each runs on all processes ---


def a_digest_is_the_same_on_every_mesh(folder):
    """And devices send rows of a kernel, and no kernel."""
    for dtype, kind, across in (
        ("float32", "Auto", "f"),
        ("bfloat16", "Auto", "t"),
        ("float32", "Explicit", "t"),
    ):
        arrays = kernels(dtype)
        shared = on_hosts(arrays, kind, across)
        for name, layer in arrays.items():
            spec, place = PLAN[f"{name}/kernel"], SHAPES[name][2]
            rows = 8 * layer["kernel"].size // spec.in_features
            with largest_sent() as sizes:
                got = base_digest.kernel_digests(spec, shared[name]["kernel"])
            assert max(sizes, default=0) <= rows, name
            assert any(sizes) == (place != P()), name
            assert got == base_digest.kernel_digests(spec, layer["kernel"]), name


def split_ms_are_saved_and_loaded(folder):
    """Only M's are gathered; each process gets its parts of them."""
    params, gathered = on_hosts(kernels()), []
    adapters, gather = shared_adapters(params), multihost_utils.process_allgather
    split = [m for m in jax.tree.leaves(adapters) if not m.is_fully_replicated]
    assert len(split) > 2
    stack = adapters["stack"]["kernel_mora"]
    error = raised(lambda: stack == stack.replace(m=stack.m))
    assert isinstance(error, TypeError) and "parts" in str(error), error

    def counted(array, tiled):
        gathered.append(array.shape)
        return gather(array, tiled=tiled)

    multihost_utils.process_allgather = counted
    # The others need not see the directory.
    place = folder / "a" if jax.process_index() == 0 else "/dev/null/a"
    with largest_sent() as sizes:
        mora_jax.save(place, adapters, METADATA, params=params)
    multihost_utils.process_allgather = gather
    ms = [m.shape for m in jax.tree.leaves(adapters)]
    assert gathered[-len(ms) :] == ms  # after the rows of kernels
    largest = max(*map(math.prod, gathered), *sizes)
    kernels_split = [k for k in jax.tree.leaves(params) if not k.is_fully_replicated]
    assert largest < min(map(len_of_part, kernels_split))
    expected = in_numpy(made(PLAN))
    assert_same(without_digests(mora_jax.load(folder / "a")), expected)
    assert [file.name for file in (folder / "a").iterdir()] == [_files.TENSORS]
    for base in (params, jax.tree.map(shape_of, params)):
        got = mora_jax.load(folder / "a", base)
        where = sharding.adapter_shardings(got, params)
        assert jax.tree.map(lambda m: m.sharding, got) == where
        assert all(map(is_whole, jax.tree.leaves(got), jax.tree.leaves(expected)))
        shape = got["stack"]["kernel_mora"].m.addressable_shards[0].data.shape
        assert shape[0] == 4 // jax.process_count()


def len_of_part(array):
    """The numbers that a device has of an array."""
    return array.addressable_shards[0].data.size


def shape_of(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def an_error_of_one_is_one_of_all(folder):
    """And leaves the old file whole, and the next save works."""
    me, local, params = jax.process_index(), kernels(), on_hosts(kernels())
    adapters, wrong, write = shared_adapters(params), kernels(), _files._write
    mora_jax.save(folder, adapters, METADATA, params=params)
    old, last = tensors(folder), jax.process_count() - 1

    def check(number, kind, message, adapters, params, metadata=None):
        error = raised(mora_jax.save, folder, adapters, metadata, params=params)
        if number is None:  # each process has found it
            assert isinstance(error, kind) and message in str(error), error
        else:
            assert_error_of_all(error, number, kind, message)
        assert tensors(folder) == old

    def changed(tree, change):
        """The tree, with a change on the last process."""
        if me == last:
            change(tree := {name: dict(layer) for name, layer in tree.items()})
        return tree

    plain = in_numpy(made(PLAN, 1))
    nan = jax.tree.map(np.copy, plain)
    nan["fc"]["kernel_mora"].m.flat[0] = np.nan
    one = changed(plain, lambda tree: tree.update(fc=nan["fc"]))
    check(last, ValueError, "fc/kernel_mora holds NaN", one, params)
    where = [m.sharding for m in jax.tree.leaves(adapters)]
    shared_nan = list(map(placed, jax.tree.leaves(nan), where))
    one = jax.tree.unflatten(jax.tree.structure(adapters), shared_nan)
    check(None, ValueError, "fc/kernel_mora holds NaN", one, params)

    one = changed(params, lambda tree: tree.update(fc={"kernel": np.ones((4, 4), "f")}))
    check(last, ValueError, "fc/kernel in params must have shape", adapters, one)
    other = "other arguments than here"
    one = changed(params, lambda tree: tree.update(fc=local["fc"]))  # it is not split
    check(None, RuntimeError, other, adapters, one)
    one = changed(adapters, lambda tree: tree.pop("fc"))
    check(None, RuntimeError, other, one, params)
    one = changed(plain, lambda tree: tree.update(fc=in_numpy(made(PLAN, 2))["fc"]))
    check(None, RuntimeError, other, one, params)  # each has an M of its own
    wrong["fc"]["kernel"] = wrong["fc"]["kernel"] + 1
    one = changed(local, lambda tree: tree.update(wrong))
    check(None, RuntimeError, other, plain, one)
    check(last, TypeError, "params must hold arrays", plain, changed(local, no_array))
    mine = {"step": 1 if me == last else 2}
    check(None, RuntimeError, f"{other}: metadata", plain, params, mine)
    one = changed(plain, lambda tree: tree.update(fc=with_alpha(tree["fc"], 2.0)))
    check(None, RuntimeError, f"{other}: the meaning of the M's", one, params)

    def full(path, chunks):
        write(path, [b"half"])
        raise OSError(errno.ENOSPC, "No space left on device")

    _files._write = full
    check(0, OSError, "No space left", adapters, params)
    _files._write = write
    assert [file.name for file in folder.iterdir()] == [_files.TENSORS]
    hosts.barrier("listed")
    if me == 0:
        (folder / _files.CONFIG).write_text("{}")
    check(0, FileExistsError, "another format", adapters, params)
    if me == 0:
        (folder / _files.CONFIG).unlink()
    keys = "ab" if me == last else "ba"  # their order says nothing
    mora_jax.save(folder, plain, dict.fromkeys(keys, 1), params=params)
    assert_same(without_digests(mora_jax.load(folder)), plain)


def with_alpha(layer, alpha):
    """The adapter of a kernel with another alpha."""
    adapter = layer["kernel_mora"]
    spec = dataclasses.replace(adapter.spec, alpha=alpha)
    return {"kernel_mora": adapter.replace(spec=spec)}


def no_array(tree):
    tree["fc"] = {"kernel": "text"}


def a_process_that_is_late_is_not_waited_for(folder):
    """Both fail, and then both can save."""
    adapters, limit = made(PLAN), _files.LIMIT
    _files.LIMIT = 1
    late = jax.process_index() == jax.process_count() - 1
    time.sleep(2 * late)
    start = time.monotonic()
    error = raised(mora_jax.save, folder, adapters)
    assert time.monotonic() - start < 5
    assert isinstance(error, RuntimeError), error
    assert "save must be called on all processes within 1 s" in str(error)
    assert not any(folder.iterdir())
    _files.LIMIT = limit
    mora_jax.save(folder, adapters)
    assert_same(mora_jax.load(folder), in_numpy(adapters))


def another_base_is_refused_alike(folder):
    """By all processes, when loading and when merging, if one has other weights too."""
    local = kernels()
    params, last = on_hosts(local), jax.process_count() - 1
    mora_jax.save(folder, shared_adapters(params), params=params)
    adapters = mora_jax.load(folder, params)
    wrong = kernels()
    wrong["stack"]["kernel"][3, 0] += 1
    text = "'stack/kernel' holds other weights than the base"
    other = on_hosts(wrong)
    for error in (
        raised(mora_jax.load, folder, other),
        raised(mora_jax.merge, other, adapters),
    ):
        assert isinstance(error, ValueError) and text in str(error), error
    loaded = mora_jax.load(folder, other, any_base=True)
    assert jax.tree.structure(loaded) == jax.tree.structure(adapters)
    if jax.process_index() == last:
        local["whole"]["kernel"] += 1
    error = raised(mora_jax.load, folder, on_hosts(local))
    assert_error_of_all(error, last, AdapterFileError, "'whole/kernel' holds other")


def a_file_that_one_lacks_is_an_error_of_all(folder):
    params, last = on_hosts(kernels()), jax.process_count() - 1
    mora_jax.save(folder / "a", shared_adapters(params), params=params)
    mora_jax.save(folder / "b", shared_adapters(params, seed=1), params=params)

    def name(if_last):
        return folder / (if_last if jax.process_index() == last else "a")

    error = raised(mora_jax.load, name("none"), params)
    assert_error_of_all(error, last, AdapterFileError, "there is no directory")
    error = raised(mora_jax.load, name("b"), params)
    assert isinstance(error, RuntimeError) and "other arguments" in str(error), error
    assert mora_jax.load(name("b"))  # without params each is alone


def a_merge_keeps_shardings_and_moves_no_kernel(folder):
    """Bit for bit what one process has, of 16-bit kernels too, eagerly and compiled."""
    many = jax.process_count() > 2
    names = SHAPES if many else ("fc", "heads", "stack")
    ms = {name: made(PLAN)[name] for name in names}
    for dtype in ("float32", "bfloat16"):
        local = {name: kernels(dtype)[name] for name in names}
        expected, params = jax.jit(mora_jax.merge)(local, ms), on_hosts(local)
        adapters = {name: shared_adapters(on_hosts(kernels()))[name] for name in names}
        with largest_sent() as sizes:
            merged = [jax.jit(mora_jax.merge)(params, adapters)]
            if many or dtype == "bfloat16":
                merged.append(mora_jax.merge(params, adapters))
        assert sizes and max(sizes) <= max(m.size for m in jax.tree.leaves(ms))
        for name in names:
            kernel, place = expected[name]["kernel"], params[name]["kernel"].sharding
            for got in (tree[name]["kernel"] for tree in merged):
                assert got.sharding.is_equivalent_to(place, got.ndim), name
                assert got.dtype == dtype and is_whole(got, kernel), name


def directions_are_those_of_one_process(folder):
    """Also where a compiled step renews them, with each where its features are."""
    names = "fc", "stack"

    def loss(adapters, params, weights):
        folded = mora_jax.fold(params, adapters)
        pairs = [(folded[n]["kernel"], weights[n]["kernel"]) for n in names]
        return sum(
            jnp.sum(weight * kernel * jnp.sin(kernel)) for kernel, weight in pairs
        )

    def trained(params, weights, batch_axes=None):
        plan = mora_jax.Plan({(n, "kernel"): PLAN[f"{n}/kernel"] for n in names})
        if batch_axes is not None:
            plan = sharding.on_mesh(plan, params, batch_axes=batch_axes)
        adapters = mora_jax.directions(loss, mora_jax.init(plan), [(params, weights)])
        init, step, _ = mora_jax.remora.renewing(loss, optax.sgd(1e-3), 2)
        state, step, value = init(params, adapters), jax.jit(step), None
        for _ in range(3):
            state, value = step(state, weights)
        return adapters, state, value

    base = {name: kernels()[name] for name in names}
    weights = jax.tree.map(lambda kernel: np.cos(7 * kernel), base)
    expected, run, value = trained(base, weights)
    shared = (on_hosts(tree) for tree in (kernels(), jax.tree.map(np.cos, kernels())))
    params, other = ({name: tree[name] for name in names} for tree in shared)
    other = {
        n: {"kernel": placed(weights[n]["kernel"], other[n]["kernel"].sharding)}
        for n in names
    }
    got, again, other_value = trained(params, other, ())
    np.testing.assert_allclose(float(other_value), float(value), rtol=1e-4)
    for name in names:
        one, two = (tree[name]["kernel_mora"].operator for tree in (expected, got))
        bases = (np.asarray(op.in_basis, np.float64) for op in (one, two))
        along = np.abs(np.sum(np.multiply(*bases), -2))
        np.testing.assert_allclose(along, 1, atol=ROUNDED)
        basis = again.plan[f"{name}/kernel"].operator.in_basis
        there = NamedSharding(basis.sharding.mesh, P("f"))  # features, and layers
        assert basis.sharding.is_equivalent_to(there, basis.ndim), name


def a_run_is_compared_on_all_processes(folder):
    """With the run whose checkpoints are there, and with the others' model."""
    me, last = jax.process_index(), jax.process_count() - 1

    def model(alpha=2.0, bias=0.0):
        base = nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0))
        kernel = np.asarray(base.kernel[...]) + np.float32(bias)
        everywhere = NamedSharding(Mesh(jax.devices(), ("d",)), P("d"))
        base.kernel[...] = placed(kernel, everywhere)
        return mora_jax.nnx.wrap(base, MoRAConfig(rank=2, alpha=alpha))

    def error_of(mine):
        return raised(mora_jax.io.check_run, folder, mine)

    mora_jax.io.check_run(folder, model())
    if me == 0:
        (folder / "1").mkdir()  # as a trainer does with its first checkpoint
    hosts.barrier("a checkpoint")
    mora_jax.io.check_run(folder, model())
    for other, words in (
        (model(alpha=3.0), "alpha"),
        (model(bias=1.0), "another base"),
    ):
        assert_error_of_all(error_of(other), 0, AdapterFileError, words)
    error = error_of(model(alpha=3.0 if me == last else 2.0))
    assert isinstance(error, RuntimeError), error
    assert "other arguments than here: the adapters" in str(error), error
    error = error_of(model(bias=float(me == last)))  # a part of the kernel differs
    assert_error_of_all(error, 0, AdapterFileError, "another base")
    mora_jax.io.check_run(folder, model())


def saves_once_more(folder, number, module, name):
    """Adapters are saved; while they are saved again, a process calls `name` and dies.

    The others have an error soon, and the old file.
    """
    params = on_hosts(kernels())
    adapters = shared_adapters(params)
    mora_jax.save(folder, adapters, METADATA, params=params)
    old, _files.LIMIT = tensors(folder), 3
    if jax.process_index() == number:
        setattr(module, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    error = raised(mora_jax.save, folder, adapters, params=params)
    text = "save must be called on all processes within 3 s, got one that ended"
    assert isinstance(error, RuntimeError) and text in str(error), error
    assert tensors(folder) == old


def the_death_of_one_is_an_error_of_all(folder):
    """Before it has checked anything; the last case, since it cannot go on."""
    last = jax.process_count() - 1
    saves_once_more(folder, last, mora_jax.io.native._adapter, "plain")


CASES = [
    a_digest_is_the_same_on_every_mesh,
    split_ms_are_saved_and_loaded,
    an_error_of_one_is_one_of_all,
    a_process_that_is_late_is_not_waited_for,
    another_base_is_refused_alike,
    a_file_that_one_lacks_is_an_error_of_all,
    a_run_is_compared_on_all_processes,
    a_merge_keeps_shardings_and_moves_no_kernel,
    directions_are_those_of_one_process,
    the_death_of_one_is_an_error_of_all,
]


def one_dies_while_rows_travel(folder):
    saves_once_more(folder, 1, base_digest, "kernel_digests")


def the_first_dies_while_it_writes(folder):
    saves_once_more(folder, 0, _files.os, "fsync")


DEATHS = {one_dies_while_rows_travel: 1, the_first_dies_while_it_writes: 0}
"""Cases that need processes of their own, with the one that dies."""


# --- Tests ---


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A function of the number of processes to the group that has run all cases.

    Workers of pytest-xdist share it: one of them runs it, and the others wait.
    """

    def run(count):
        shared = "PYTEST_XDIST_WORKER" in os.environ
        base = tmp_path_factory.getbasetemp()
        base = base.parent if shared else base
        with (base / f"hosts{count}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder, done = base / f"hosts{count}", base / f"hosts{count}.done"
            if not done.exists():
                names = [case.__name__ for case in CASES]
                done.write_bytes(
                    pickle.dumps(tuple(hosts.run(__file__, count, names, folder)))
                )
            return hosts.Group(*pickle.loads(done.read_bytes())), folder

    return run


@pytest.mark.parametrize("count", [2, slow(4)])
@pytest.mark.parametrize("case", [case.__name__ for case in CASES[:-1]])
def test_on_processes(group, count, case):
    found, _ = group(count)
    found.check(case)


@pytest.mark.parametrize("count", [2, slow(4)])
def test_a_file_is_what_one_process_writes(group, count, tmp_path):
    """With the same digests, byte for byte."""
    found, folder = group(count)
    found.check(case := split_ms_are_saved_and_loaded.__name__)
    mora_jax.save(tmp_path, made(PLAN), METADATA, params=kernels())
    assert tensors(tmp_path) == tensors(folder / case / "a")
    mora_jax.load(folder / case / "a", jax.tree.map(jnp.asarray, kernels()))


@pytest.mark.parametrize("count", [2, slow(4)])
def test_the_death_of_one_is_an_error_of_all(group, count):
    found, _ = group(count)
    errors = found.errors[the_death_of_one_is_an_error_of_all.__name__]
    assert errors == dict.fromkeys(range(count - 1), ""), found.logs
    assert found.codes[-1] == -signal.SIGKILL, found.logs


@pytest.mark.parametrize("case", DEATHS)
def test_a_death_at_a_bad_time_is_an_error_of_all(case, tmp_path):
    """JAX ends the others if one dies in a collective, or if it coordinates."""
    dead = DEATHS[case]
    names = [case.__name__]
    found = hosts.run(__file__, 2, names, tmp_path / "group", heartbeat=8)
    assert found.codes[dead] == -signal.SIGKILL and found.codes[1 - dead], found.logs
    assert found.seconds < 100, found.logs
    assert found.errors.get(case.__name__, {}) in ({}, {1 - dead: ""}), found.logs
    got = mora_jax.load(tmp_path / "group" / case.__name__, kernels())
    assert_same(without_digests(got), made(PLAN))
