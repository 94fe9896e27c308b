"""Ways in which an array decides about another one, each by a primitive of JAX.

A way is a function of an array `a` of numbers and of activations `x`, to an array like
`x`. It depends on `a` by the primitive in its name, though `a` may only choose: by the
predicate of a `cond`, the bound of a loop or the keys of a `sort`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback, pallas
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import PartitionSpec

Way = Callable[[jax.Array, jax.Array], jax.Array]


def flag(a):
    """True if the sum of an array is positive."""
    return jnp.sum(a) > 0


def count(a):
    """1 or 2, by the sum of an array."""
    return 1 + flag(a).astype(jnp.int32)


def number(a, dtype=float):
    """The first number of an array; by 0.5 off, so that 0 is none of them."""
    return (a.ravel()[0] + 0.5).astype(dtype)


def few(a):
    """Some numbers of an array, as many as activations have features."""
    return a.ravel()[:8]


def by_cond(a, x):
    return lax.cond(flag(a), lambda x: x, jnp.sin, x)


def by_switch(a, x):
    return lax.switch(count(a), [lambda x: x, jnp.sin, jnp.cos], x)


def by_while(a, x):
    def goes_on(state):
        return state[0] < count(a)

    return lax.while_loop(goes_on, lambda s: (s[0] + 1, jnp.sin(s[1])), (0, x))[1]


def by_carried_limit(a, x):
    def goes_on(state):
        return state[0] < state[1]

    def body(state):
        k, limit, x = state
        return k + 1, limit, jnp.sin(x)

    return lax.while_loop(goes_on, body, (0, count(a), x))[2]


def by_late_limit(a, x):
    """The limit is a number in the first round, and is made of `a` in it."""

    def body(state):
        k, limit, x = state
        return k + 1, count(a), jnp.sin(x)

    return lax.while_loop(lambda s: s[0] < s[1], body, (0, 1, x))[2]


def by_fori_bound(a, x):
    return lax.fori_loop(0, count(a), lambda _, x: jnp.sin(x), x)


def by_fori_start(a, x):
    return lax.fori_loop(count(a), 3, lambda _, x: jnp.sin(x), x)


def by_cond_in_scan(a, x):
    return lax.scan(lambda c, row: (c, by_cond(a, row)), 0, x)[1]


def by_carry_of_scan(a, x):
    """A flag that is set in one round decides in the next."""

    def step(state, _):
        is_set, x = state
        return (flag(a), lax.cond(is_set, jnp.sin, lambda x: x, x)), None

    return lax.scan(step, (jnp.array(False), x), None, length=2)[0][1]


def by_cond_in_while(a, x):
    def body(state):
        return state[0] + 1, by_cond(a, state[1])

    return lax.while_loop(lambda s: s[0] < 2, body, (0, x))[1]


def by_while_in_cond(a, x):
    return lax.cond(x.sum() > 0, partial(by_while, a), lambda x: x, x)


def by_cond_of_each(a, x):
    """Under vmap a predicate of each row becomes `select_n`."""
    each = jax.vmap(lambda k: lax.cond(flag(a) & (k > 0), jnp.sin, jnp.cos, k))
    return each(x.ravel()).reshape(x.shape)


CONTROL: dict[str, Way] = {
    "cond": by_cond,
    "cond, switch": by_switch,
    "while": by_while,
    "while, carried": by_carried_limit,
    "while, late": by_late_limit,
    "while, bound": by_fori_bound,
    "while, start": by_fori_start,
    "scan": by_cond_in_scan,
    "scan, carried": by_carry_of_scan,
    "while, cond": by_cond_in_while,
    "cond, while": by_while_in_cond,
    "cond, vmap": lambda a, x: jax.vmap(lambda row: by_cond(a, row))(x),
    "select_n, vmap": by_cond_of_each,
    "cond, jit": lambda a, x: jax.jit(by_cond)(a, x),
    "cond, remat": lambda a, x: jax.checkpoint(by_cond)(a, x),
    "cond, grad": lambda a, x: jax.grad(lambda x: by_cond(a, x).sum())(x),
}
"""Ways by the array that chooses which program runs, or how often.

The name is that of the primitive, and after a comma what is particular.
"""


def by_sort(a, x):
    return lax.sort((few(a) * jnp.ones_like(x), x), num_keys=1)[1]


def by_dynamic_update_slice(a, x):
    at = count(a)
    return lax.dynamic_update_slice_in_dim(x, x[..., :2], at, -1)


def by_reduce(a, x):
    return x * lax.reduce(few(a), -jnp.inf, lambda p, q: lax.max(p, q) * 1, (0,))


def by_select_and_scatter(a, x):
    def pooled(b):
        init = -jnp.inf
        return lax.reduce_window(b, init, lax.max, (2,), (2,), "VALID").sum()

    return x + jax.grad(pooled)(few(a))


def by_ragged_dot(a, x):
    rows = x.reshape(-1, x.shape[-1])
    sizes = jnp.stack([count(a), len(rows) - count(a)])
    groups = jnp.stack([jnp.eye(8), 2 * jnp.eye(8)]).astype(x.dtype)
    return lax.ragged_dot(rows, groups, sizes).reshape(x.shape)


def bits(a):
    """The bits of numbers as integers."""
    return lax.bitcast_convert_type(a.astype(jnp.float32), jnp.int32)


def by_key(a, x, use=jax.random.normal):
    # By a count, which rounding does not change: any other seed gives other numbers.
    return x + use(jax.random.key(count(a)), x.shape)


def by_solve(a, x):
    solution = lax.custom_linear_solve(
        lambda y: y * (2 + flag(a)), few(x), lambda _, b: b / 2, symmetric=True
    )
    return x + solution


def by_pallas(a, x):
    def kernel(a_ref, x_ref, y_ref):
        y_ref[...] = x_ref[...] + a_ref[0, 0]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    a = a.reshape(-1, 8)
    return pallas.pallas_call(kernel, out_shape=shape, interpret=True)(a, x)


def by_shard_map(a, x, devices=1):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), "d")
    spread = PartitionSpec("d")

    def program(a, rows):
        return by_cond(a, rows)

    specs = {"in_specs": (PartitionSpec(), spread), "out_specs": spread}
    return jax.shard_map(program, mesh=mesh, **specs, check_vma=False)(a, x)


def by_partitioning(a, x):
    function = custom_partitioning(lambda a, x: x * flag(a))
    function.def_partition(
        infer_sharding_from_operands=lambda *_: None,
        partition=lambda *_: None,
        sharding_rule="..., ... -> ...",
    )
    return function(few(a), x)


def by_custom_vmap(a, x):
    function = jax.custom_batching.custom_vmap(lambda a, x: x * flag(a))
    function.def_vmap(lambda size, mapped, a, x: (x, True))
    return function(a, x)


def by_custom_jvp(a, x):
    function = jax.custom_jvp(by_cond)
    function.defjvps(None, lambda dx, y, a, x: dx)
    return function(a, x)


def by_custom_vjp(a, x):
    function = jax.custom_vjp(by_cond)
    function.defvjp(lambda a, x: (by_cond(a, x), None), lambda _, g: (None, g))
    return function(a, x)


def by_linear_call(a, x):
    def times(a, x):
        return x * flag(a)

    return jax.custom_derivatives.linear_call(times, times, a, x)


def on_host(call):
    def way(a, x):
        return x * call(np.sum, jax.ShapeDtypeStruct((), a.dtype), a)

    return way


def by_exported(a, x):
    exported = jax.export.export(jax.jit(by_cond))(a, x)
    return exported.call(a, x)


CHOICES: dict[str, Way] = {
    "gather": lambda a, x: x[..., jnp.argsort(few(a))],
    "dynamic_slice": lambda a, x: x + lax.dynamic_slice_in_dim(x, count(a), 1, -1),
    "dynamic_update_slice": by_dynamic_update_slice,
    "scatter": lambda a, x: x.at[..., count(a)].set(3.0),
    "scatter-add": lambda a, x: x.at[..., count(a)].add(3.0),
    "sort": by_sort,
    "top_k": lambda a, x: x[..., lax.top_k(few(a), 8)[1]],
    "approx_top_k": lambda a, x: x[..., lax.approx_max_k(few(a), 2)[1]].sum() + x,
    "argmax": lambda a, x: x * jnp.argmax(few(a)),
    "argmin": lambda a, x: x * jnp.argmin(few(a)),
    "select_n": lambda a, x: jnp.where(few(a) > 0, x, 2 * x),
    "clamp": lambda a, x: lax.clamp(-abs(number(a, x.dtype)), x, number(a, x.dtype)),
    "gt": lambda a, x: x * (few(a) > 0),
    "eq": lambda a, x: x * (few(a) == 0),
    "is_finite": lambda a, x: x * jnp.isfinite(few(a)),
    "sign": lambda a, x: x * jnp.sign(few(a)),
    "floor": lambda a, x: x * jnp.floor(few(a)),
    "convert_element_type": lambda a, x: x * few(a).astype(jnp.int32),
    "bitcast_convert_type": lambda a, x: x * (bits(few(a)) % 3),
    "reduce_precision": lambda a, x: x * lax.reduce_precision(few(a), 5, 2),
    "stop_gradient": lambda a, x: x * lax.stop_gradient(few(a)),
    "cumsum": lambda a, x: x * jnp.cumsum(few(a)),
    "reduce": by_reduce,
    "select_and_scatter_add": by_select_and_scatter,
    "ragged_dot_general": by_ragged_dot,
    "triangular_solve": lambda a, x: (
        x + lax.linalg.triangular_solve(jnp.diag(1 + few(a) ** 2), few(x))
    ),
    "fft": lambda a, x: x + jnp.fft.fft(few(a)).real,
    "random_seed": by_key,
    "random_bits": partial(by_key, use=lambda k, s: jax.random.bits(k, s) % 2),
    "random_fold_in": lambda a, x: (
        x + jax.random.normal(jax.random.fold_in(jax.random.key(0), count(a)), x.shape)
    ),
    "random_split": partial(
        by_key, use=lambda k, s: jax.random.normal(jax.random.split(k)[0], s)
    ),
    "optimization_barrier": lambda a, x: x + lax.optimization_barrier(few(a)),
    "name": lambda a, x: x + checkpoint_name(few(a), "few"),
    "remat2": lambda a, x: jax.checkpoint(lambda a, x: x * few(a))(a, x),
    "custom_jvp_call": by_custom_jvp,
    "custom_vjp_call": by_custom_vjp,
    "composite": lambda a, x: lax.composite(by_cond, "my.choice")(a, x),
    "shard_map": by_shard_map,
}
"""Ways by other primitives, which a trace knows."""

HIDDEN: dict[str, Way] = {
    "pure_callback": on_host(jax.pure_callback),
    "io_callback": on_host(io_callback),
    "pallas_call": by_pallas,
    "shard_map, two devices": partial(by_shard_map, devices=2),
    "custom_partitioning": by_partitioning,
    "custom_vmap_call": by_custom_vmap,
    "custom_linear_solve": by_solve,
    "linear_call": by_linear_call,
    "call_exported": by_exported,
}
"""Ways by primitives whose inside a trace does not see."""


def written(a, x):
    ref = jax.new_ref(jnp.zeros(8, a.dtype))
    ref[...] = few(a)
    return x * ref[...]


def added(a, x):
    ref = jax.new_ref(jnp.zeros(8, a.dtype))
    jax.ref.addupdate(ref, ..., few(a))
    return x * jax.ref.freeze(ref)


def written_in_a_branch(a, x):
    ref = jax.new_ref(jnp.zeros((), x.dtype))

    def write():
        ref[...] = x.sum()

    lax.cond(flag(a), write, lambda: None)
    return x * ref[...]


def written_in_a_loop(a, x):
    ref = jax.new_ref(jnp.zeros((), x.dtype))

    def body(k):
        ref[...] += x.sum()
        return k + 1

    lax.while_loop(lambda k: k < count(a), body, 0)
    return x * ref[...]


def kept_on_host(a, x):
    kept = []
    io_callback(lambda a: kept.append(a.sum()), None, a, ordered=True)
    shape = jax.ShapeDtypeStruct((), a.dtype)
    return x * io_callback(lambda: kept.pop(), shape, ordered=True)


def counted_on_host(a, x):
    """The host counts the rounds of a loop, and gets no array."""
    rounds = []

    def body(k):
        io_callback(lambda: rounds.append(1), None, ordered=True)
        return k + 1

    lax.while_loop(lambda k: k < count(a), body, 0)
    shape = jax.ShapeDtypeStruct((), np.float32)
    length = io_callback(lambda: np.float32(len(rounds)), shape, ordered=True)
    return x * length.astype(x.dtype)


MEMORY: dict[str, Way] = {
    "swap": written,
    "addupdate": added,
    "swap, in a branch": written_in_a_branch,
    "swap, in a loop": written_in_a_loop,
    "io_callback, kept": kept_on_host,
    "io_callback, counted": counted_on_host,
}
"""Ways by what is written and read again, on which no operand tells."""


def printed(a, x):
    jax.debug.print("{}", a.sum())
    jax.debug.callback(lambda a: None, a)
    return x


def printed_in_a_branch(a, x):
    lax.cond(flag(a), lambda: jax.debug.print("positive"), lambda: None)
    return x


HARMLESS: dict[str, Way] = {
    "debug_callback": printed,
    "debug_callback, in a branch": printed_in_a_branch,
    "cond, on activations": lambda a, x: by_cond(x, x),
    "while, on activations": lambda a, x: by_while(x, x),
    "unused": lambda a, x: (by_cond(a, x), x)[1],
    "of its shape": lambda a, x: x * a.size,
}
"""Functions that read the array, but whose output does not depend on it."""

WAYS = CONTROL | CHOICES | HIDDEN | MEMORY
