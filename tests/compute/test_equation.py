"""The equation is easy to find, and near to what users call."""

import json

import pytest
from processes import python

# A process of its own, since the type checks of the tests add frames to every call.
RECORD = """
import json, pathlib, sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

jax.config.update("jax_num_cpu_devices", 4)
original, depths, operator, outermost = jax.lax.dot_general, [], None, None

def recording(x, y, *args, **kwargs):
    if np.shape(y) in ([(24, 8), (8, 40)] if operator == "low_rank" else [(8, 8)]):
        frame, own = sys._getframe(1), 0
        while frame is not None:
            own += frame.f_code.co_filename.startswith(HOME)
            if frame.f_code is outermost:
                break
            frame = frame.f_back
        depths.append(own)
    return original(x, y, *args, **kwargs)

jax.lax.dot_general = recording  # before the library, or it would be intercepted
import flax.linen as nn
from flax import nnx
import mora_jax
from mora_jax import FrozenDense, MoRAConfig, mora_apply, sharding

HOME = str(pathlib.Path(mora_jax.__file__).parent)

# Calls of the library's functions, of a first program: before the others are made.
# Comprehensions are calls up to Python 3.11 only.
COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>"}
model, x = nn.Sequential([nn.Dense(48), nn.Dense(32)]), jnp.ones((4, 32))
variables = model.init(jax.random.key(0), x)
config = mora_jax.MoRAConfig(rank=2, operator="sharing")
apply = mora_jax.linen.wrap(model, config, variables, x)
adapters, calls, count = mora_jax.init(apply.plan), [], 0

def record(frame, event, _):
    global count
    code = frame.f_code
    own = event == "call" and code.co_filename.startswith(HOME)
    count += own and code.co_name not in COMPREHENSIONS

for rows in (4, 4, 5):
    step = jax.jit(jax.value_and_grad(lambda *args: (apply(*args) ** 2).sum()))
    count, args = 0, (adapters, variables, jnp.ones((rows, 32)))
    sys.setprofile(record)
    step.lower(*args)
    sys.setprofile(None)
    calls.append(count)

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
split, x = {"kernel": PartitionSpec("model")}, jnp.ones((4, 24))
kernel = jnp.ones((24, 40))
dense, variables = nn.Dense(40), {"params": {"kernel": kernel, "bias": kernel[0]}}
linear, found = nnx.Linear(24, 40, rngs=nnx.Rngs(0)), {}
only_ms = nnx.DiffState(0, mora_jax.nnx.MoRAParam)

def deepest(jitted, *args):
    depths.clear(), jax.clear_caches()
    jitted.lower(*args)
    return max(depths)

def step(apply):
    return jax.jit(jax.value_and_grad(lambda *args: apply(*args).sum()))

for operator in ("sharing", "rotation", "orthogonal", "low_rank"):
    for way in ("activation", "auto"):
        config = MoRAConfig(operator=operator, square_rank=8, execution=way)
        planned = mora_jax.plan({"kernel": kernel}, config)
        params = {"kernel_mora": jnp.full(planned["kernel"].shape, 0.5)}
        on_mesh = sharding.on_mesh(planned, split, batch_axes="data", mesh=mesh)
        outermost = mora_apply.__code__
        for where, spec in ("", planned["kernel"]), (" on a mesh", on_mesh["kernel"]):
            settings = dict(execution=way, layout=spec.layout)
            frozen = FrozenDense(kernel, None, spec.operator, **settings)
            name = f"mora_apply{where}, {operator}, {way}"
            found[name] = deepest(jax.jit(mora_apply), params, frozen, x)
            if not where:
                found[f"{name}, step"] = deepest(step(mora_apply), params, frozen, x)
        outermost, own = None, f"{operator}, {way}"
        apply = mora_jax.linen.wrap(dense, config, variables, x)
        adapters = mora_jax.init(apply.plan)
        found[f"linen, {own}"] = deepest(step(apply), adapters, variables, x)
        adapted = mora_jax.nnx.wrap(linear, config)
        by_ms = nnx.value_and_grad(lambda m, x: m(x).sum(), argnums=only_ms)
        found[f"nnx, {own}"] = deepest(nnx.jit(by_ms), adapted, x)
print(json.dumps([calls, found]))
"""


@pytest.fixture(scope="module")
def recorded():
    """The calls of three programs, and the frames of many, in one process."""
    return json.loads(python("-c", RECORD))


@pytest.mark.slow
def test_few_frames_lie_between_what_users_call_and_the_product_with_m(recorded):
    """Counted at the product itself, while a training step is traced."""
    _, found = recorded
    assert len(found) == 40
    for name, frames in found.items():
        least = name.startswith("mora_apply,") and not name.endswith("step")
        assert 0 < frames <= (9 if least else 12), found


@pytest.mark.slow
def test_few_calls_make_a_program(recorded):
    """Of a training step of two layers: the first, the same again, and another shape.

    A program of a new shape includes the proof that it reads the kernels as planned.
    """
    (first, again, other), _ = recorded
    assert first <= 1140 and again <= 340 and other <= 1140, (first, again, other)
