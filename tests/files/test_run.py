"""The record of a run beside checkpoints of others: what differs is said, and named."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import mora_jax
from mora_jax import MoRAConfig, io
from mora_jax import nnx as mora
from mora_jax.io import AdapterFileError

SEEDED = {"rank": 2, "operator": "orthogonal"}


class Net(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.a = nnx.Linear(16, 24, rngs=rngs)
        self.norm = nnx.LayerNorm(24, rngs=rngs)
        self.b = nnx.Linear(24, 16, rngs=rngs)

    def __call__(self, x):
        return self.b(self.norm(self.a(x)))


def wrapped(base_seed=0, **settings):
    return mora.wrap(Net(base_seed), MoRAConfig(**SEEDED | settings))


@pytest.fixture
def run(tmp_path):
    """A directory with a checkpoint of a run."""
    io.check_run(tmp_path, wrapped())
    (tmp_path / "10").mkdir()
    return tmp_path


def test_the_same_run_goes_on(run):
    before = (run / "mora_jax_run.json").read_bytes()
    io.check_run(run, wrapped())
    io.check_run(str(run), wrapped(dropout=0.1))  # which is no part of a delta
    assert {path.name for path in run.iterdir()} == {"10", "mora_jax_run.json"}
    io.check_run(run, wrapped())
    assert (run / "mora_jax_run.json").read_bytes() == before


@pytest.mark.parametrize(
    ("other", "told", "remedy"),
    [
        ({"alpha": 2.0}, ("alpha=1.0", "alpha=2.0"), "MoRAConfig(alpha=1.0)"),
        ({"seed": 3}, ("seed=0", "seed=3"), "MoRAConfig(seed=0)"),
        ({"rank": 4}, ("rank=2", "rank=4"), "MoRAConfig(rank=2)"),
        ({"scale": "paper"}, ("scale=", "scale=1.0"), "scale='fine-tuning'"),
        (
            {"operator": "sharing"},
            ("operator='orthogonal'", "operator='sharing'"),
            "operator='orthogonal'",
        ),
        ({"alpha": 2.0, "seed": 3}, ("alpha=2.0", "seed=3"), "seed=0, alpha=1.0"),
        (
            {"overrides": {"a/kernel": {"alpha": 3.0}}},
            ("alpha=1.0", "alpha=3.0", "a/kernel"),
            "MoRAConfig(alpha=1.0), in overrides",
        ),
        ({"exclude": "b/kernel"}, ("b/kernel",), "targets"),
        ({"train": "norm/scale"}, ("norm/scale",), "train"),
    ],
)
def test_what_differs_is_named_with_both_values(run, other, told, remedy):
    before = (run / "mora_jax_run.json").read_bytes()
    with pytest.raises(AdapterFileError) as caught:
        io.check_run(run, wrapped(**other))
    message = str(caught.value)
    assert all(part in message for part in (*told, remedy, str(run)))
    assert (run / "mora_jax_run.json").read_bytes() == before


def test_what_comes_from_elsewhere_is_not_named(run):
    """Another rank has another q, and so another scale: the user gave the rank."""
    with pytest.raises(AdapterFileError) as caught:
        io.check_run(run, wrapped(rank=4))
    message = str(caught.value)
    assert not any(name in message for name in ("square_rank", "scale", "operator"))


def test_another_base_is_named(run):
    model = wrapped()
    io.check_run(run, model)
    model.b.kernel[...] = model.b.kernel[...].at[0, 0].add(1.0)
    with pytest.raises(AdapterFileError, match="another base.*'b/kernel'.*SHA-256"):
        io.check_run(run, model)
    with pytest.raises(AdapterFileError, match="another base: 2 kernels"):
        io.check_run(run, wrapped(base_seed=1))


def test_a_base_in_16_bits_is_the_same_base(run):
    model = wrapped()
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16),
        nnx.state(model, nnx.All(nnx.Param, nnx.Not(mora.MoRAParam))),
    )
    nnx.update(model, half)
    io.check_run(run, model)


def test_input_damping_is_compared(tmp_path):
    """Arrays that JSON does not hold, by their digests."""

    def damped(seed):
        model, x = wrapped(), jax.random.normal(jax.random.key(seed), (32, 16))
        inputs = {"a": x, "b": jnp.tile(x, 2)[:, :24]}

        def call(adapters):
            return [adapters[k]["kernel_mora"](inputs[k]).sum() for k in inputs]

        new = mora_jax.input_damping(call, mora.adapters(model), directions=2)
        mora.set_adapters(model, new)
        return model

    model = damped(0)
    io.check_run(tmp_path, model)
    (tmp_path / "1").mkdir()
    io.check_run(tmp_path, model)
    with pytest.raises(AdapterFileError, match="operator.digests=.*input damping"):
        io.check_run(tmp_path, damped(1))
    with pytest.raises(AdapterFileError, match="operator='damped' there"):
        io.check_run(tmp_path, wrapped())


def test_a_model_without_adapters_is_refused(run):
    with pytest.raises(ValueError, match="model has no adapters"):
        io.check_run(run, Net())


def test_checkpoints_without_a_record_warn(run):
    (run / "mora_jax_run.json").unlink()
    with pytest.warns(mora_jax.MoRAWarning, match="cannot be compared"):
        io.check_run(run, wrapped(alpha=2.0))
    with pytest.raises(AdapterFileError, match="alpha=2.0 there"):
        io.check_run(run, wrapped())


def test_a_run_that_left_no_checkpoint_begins_again(tmp_path):
    """Also where it was killed while Orbax wrote the first one."""
    io.check_run(tmp_path, wrapped())
    (tmp_path / "0.orbax-checkpoint-tmp-12").mkdir()
    io.check_run(tmp_path, wrapped(alpha=2.0))
    (tmp_path / "0").mkdir()
    with pytest.raises(AdapterFileError, match="alpha=2.0 there and alpha=1.0 here"):
        io.check_run(tmp_path, wrapped())


def test_a_damaged_record_is_refused(run):
    file = run / "mora_jax_run.json"
    content = json.loads(file.read_text())
    content["layers"][0]["settings"]["alpha"] = 2.0
    file.write_text(json.dumps(content))
    with pytest.raises(AdapterFileError, match="damaged"):
        io.check_run(run, wrapped(alpha=2.0))
