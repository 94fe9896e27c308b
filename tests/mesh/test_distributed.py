"""A run on a mesh survives what befalls long runs: SIGTERM, SIGKILL, another mesh."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import assert_same, flatten, unflatten
from flax.linen import spmd
from jax.sharding import PartitionSpec as P
from meshes import assert_shardings, placed, shardings
from processes import ROOT, environment
from safetensors.numpy import save_file

import mora_jax
from examples import train_sharded
from models import llama
from mora_jax import MoRAConfig

PLAIN = {"model.norm": "norm/scale", "lm_head": "lm_head/kernel"}
STEPS, EVERY, SECONDS = 12, 3, 240
# With dropout and an update every other batch, all parts of a state matter. In float32,
# and with an M that many places share, so that meshes differ by less than a batch
# matters: at this rate Adam makes much of a number whose gradient is nearly zero.
SETTINGS = "--dtype float32 --batch 8 --tokens 16 --rank 2 --learning-rate 1e-2"
SETTINGS += f" --dropout 0.1 --accumulate 2 --save-every {EVERY} --operator rotation"


@contextlib.contextmanager
def running(path, options="--host-devices 2", log="log", steps=STEPS, **variables):
    """The example as a process, which is killed if it has not ended by then."""
    options = f"-m examples.train_sharded {SETTINGS} {options} --steps {steps}"
    command = [sys.executable, *options.split(), "--checkpoint", path / "run"]
    env = environment(
        JAX_COMPILATION_CACHE_DIR=jax.config.jax_compilation_cache_dir,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        **variables,
    )
    with (path / log).open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def running_pair(path, steps=STEPS):
    """Two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--host-devices 2 --model 2 --coordinator 127.0.0.1:{port} --processes 2"
    # With JAX 0.12.1, processes on CPUs wait for each other forever in a program with
    # collectives that one of them has read from the cache.
    alone = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    with (
        running(path, f"{options} --process 0", "log", steps, **alone) as first,
        running(path, f"{options} --process 1", "other", steps, **alone) as second,
    ):
        yield first, second


def printed(path, log="log"):
    return (path / log).read_text()


def assert_ends_well(process, path):
    assert process.wait(SECONDS) == 0, printed(path)


def wait_until(condition, process, path):
    """Poll `condition`, of a process that must be running until it holds."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < end, printed(path)
        time.sleep(0.005)


def saved(path):
    """The positions of all checkpoints that are whole."""
    names = [state.name for state in (path / "run/states").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def assert_resumes(path, whole, exactly=True):
    """The rest of the run is what it would have been."""
    start = saved(path)[-1]
    assert 0 < start < STEPS and not (path / "run/adapter").exists()
    with running(path) as process:
        assert_ends_well(process, path)
    assert f"{start}/{STEPS}" in printed(path) and f" {start - 1}/" not in printed(path)
    assert saved(path)[-1] == STEPS
    got, expected = (mora_jax.load(run / "run/adapter") for run in (path, whole))
    # A batch moves an M by up to 1e-2.
    chex.assert_trees_all_close(got, expected, rtol=0, atol=0 if exactly else 1e-4)
    assert all(np.abs(m).max() > 0.01 for m in jax.tree.leaves(expected))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from begin to end, on two devices."""
    path = tmp_path_factory.mktemp("whole")
    with running(path) as process:
        assert_ends_well(process, path)
    return path


@pytest.mark.slow
def test_loss_falls(whole):
    losses = [float(loss) for loss in re.findall(r"loss=([0-9.]+)", printed(whole))]
    assert losses[-1] < losses[0] - 0.3 and "skipped=0" in printed(whole)
    assert saved(whole) == list(range(EVERY, STEPS + 1, EVERY))[-train_sharded.KEPT :]
    metadata = mora_jax.io.read_metadata(whole / "run/adapter")
    assert metadata["rank"] == 2 and metadata["accumulate"] == 2


@pytest.mark.slow
def test_sigterm_saves_and_the_rest_is_the_same_bit_for_bit(tmp_path, whole):
    with running(tmp_path, "--host-devices 2 --save-every 100") as process:
        begun = re.compile(r" [3-9]/12")
        wait_until(lambda: begun.search(printed(tmp_path)), process, tmp_path)
        process.send_signal(signal.SIGTERM)
        assert_ends_well(process, tmp_path)
    [last] = saved(tmp_path)
    assert f"SIGTERM: saved after batch {last}," in printed(tmp_path)
    assert_resumes(tmp_path, whole)


@pytest.mark.slow
def test_killed_while_saving(tmp_path, whole):
    """A kill leaves half a checkpoint, which the next run does not take for one."""
    states = tmp_path / "run/states"
    with running(tmp_path) as process:
        wait_until(
            lambda: saved(tmp_path) and any(states.glob("6*")), process, tmp_path
        )
        process.kill()
    assert_resumes(tmp_path, whole)


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_another_mesh_goes_on(tmp_path, whole):
    with running_pair(tmp_path) as (first, second):
        wait_until(lambda: saved(tmp_path), first, tmp_path)
        second.kill()
        second.wait()
        # The other waits for it, or fails; but it cannot end well.
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert first.wait(2) != 0
    assert_resumes(tmp_path, whole, exactly=False)


@pytest.mark.slow
def test_two_processes_write_one_adapter(tmp_path, whole):
    with running_pair(tmp_path) as pair:
        for process in pair:
            assert_ends_well(process, tmp_path)
    got, expected = (mora_jax.load(run / "run/adapter") for run in (tmp_path, whole))
    chex.assert_trees_all_close(got, expected, rtol=0, atol=1e-4)
    assert "the adapters are in" in printed(tmp_path)
    assert "the adapters are in" not in printed(tmp_path, "other")


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both(tmp_path):
    with running_pair(tmp_path, steps=10_000) as (first, second):
        wait_until(lambda: saved(tmp_path), first, tmp_path)
        second.send_signal(signal.SIGTERM)
        for process in (first, second):
            assert_ends_well(process, tmp_path)
    message = f"SIGTERM: saved after batch {saved(tmp_path)[-1]},"
    assert message in printed(tmp_path) and message not in printed(tmp_path, "other")


def test_a_base_from_a_file(tmp_path):
    model, mesh = llama.Llama(llama.SHAPES["tiny"]), llama.make_mesh(2, 2, 2)
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens)
    names = nn.get_partition_spec(boxed)
    places = spmd.logical_to_mesh_sharding(names, mesh, llama.RULES)
    expected, tensors = {}, {}
    for number, (path, leaf) in enumerate(flatten(nn.unbox(boxed["params"])).items()):
        array = np.full(leaf.shape, number, leaf.dtype)
        expected[path] = array
        for module, kernel in {**llama.NAMES, **PLAIN}.items():
            if kernel.removesuffix("[{n}]") != path:
                continue
            for n, layer in enumerate(array if "{n}" in kernel else [array]):
                weight = layer.T if path.endswith("kernel") else layer
                tensors[f"{module.format(n=n)}.weight"] = weight.copy()
    save_file(tensors, tmp_path / "model.safetensors")
    args = train_sharded.arguments(["--base", str(tmp_path)])
    variables = train_sharded.init_base(model, tokens, places, args)
    assert_same(variables, {"params": unflatten(expected)})
    assert_shardings(variables, places)


def test_batches_are_the_same_on_any_mesh_and_from_any_position():
    def batches(*sizes, position=0):
        return train_sharded.Batches(8, 20, llama.make_mesh(*sizes), 3, position)

    first = batches(1, 1, 1)
    taken = [np.asarray(next(first)) for _ in range(4)]
    assert len({batch.tobytes() for batch in taken}) == 4
    assert len({row.tobytes() for row in taken[0]}) == 8
    for sizes in ((1, 8, 1), (2, 2, 2), (1, 1, 8)):
        again = batches(*sizes, position=2)
        np.testing.assert_array_equal(next(again), taken[2])
        np.testing.assert_array_equal(batch := next(again), taken[3])
        assert again.position == 4 and batch.sharding.mesh.devices.shape == sizes
        rows = 8 // (sizes[0] * sizes[1])
        assert {shard.data.shape for shard in batch.addressable_shards} == {(rows, 20)}


def test_newest_whole_checkpoint_goes_into_another_mesh(tmp_path):
    """Of adapters for stacked kernels, which the first mesh splits."""
    kernel = jax.ShapeDtypeStruct((4, 16, 16), jnp.float32)
    config = MoRAConfig(rank=2, overrides={".*": {"axes": "sio"}})
    plan = mora_jax.plan({"fc": {"kernel": kernel}}, config)
    tx = train_sharded.make_optimizer(train_sharded.arguments([]))
    first = train_sharded.first_state(plan, tx, 0)
    first = jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), first)

    def places(mesh, *axes):
        kernels = shardings({"fc": {"kernel": P(*axes)}}, mesh)
        adapters = mora_jax.sharding.adapter_shardings(plan, kernels)
        return train_sharded.place_state(first, tx, adapters, shardings(P(), mesh))

    def checkpoints(*options):
        options = ["--checkpoint", str(tmp_path / "run"), *options]
        return train_sharded.Checkpoints(train_sharded.arguments(options))

    before = jax.device_put(first, places(llama.make_mesh(1, 4, 2), "fsdp"))
    moments = jax.tree.leaves(before["optimizer"])
    split = [m.sharding.spec for m in moments if m.ndim == 4]
    assert split == [P("fsdp", *[None] * 3)] * 3  # two, and the sum
    run = checkpoints()  # one alone: each removes unfinished ones in the background
    assert run.newest(first) is None
    for position in (3, 6):
        run.save(position, before)
    # As a process leaves it that is killed while it saves.
    (tmp_path / "run/states/9.orbax-checkpoint-tmp-1").mkdir()

    places_after = places(llama.make_mesh(1, 1, 2), None, "model")
    after = placed(first, places_after)
    got = checkpoints("--steps", "999", "--model", "2").newest(after)

    assert_same(got, before)
    assert jax.tree.map(lambda leaf: leaf.sharding, got) == places_after
    with pytest.raises(SystemExit, match="rank must be 8 as in .*states, got 4"):
        checkpoints("--rank", "4").newest(after)


def test_bad_options():
    for options, message in (
        (["--data", "3"], "data x fsdp x model must be 8, .* got 3 x 2 x 1"),
        (["--batch", "12"], "--batch must be a multiple of data x fsdp = 8, got 12"),
    ):
        with pytest.raises(SystemExit, match=message):
            train_sharded.make_mesh(train_sharded.arguments(options))
