r"""ReMoRA: merge the adapters into the base, start them again, and train on.

The rank of one delta is bounded by its operator. A *restart* adds the delta to the base
and starts M with a delta of zero between other maps C and D, so that the sum of all
deltas may have a higher rank: so the paper pretrains with adapters alone. The plan says
where in the cycle a run is, so that a run which is resumed from a saved plan, base and
adapters restarts as it would have.

Example::

  >>> import jax.numpy as jnp, mora_jax, optax
  >>> from mora_jax import remora
  >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
  >>> config = mora_jax.MoRAConfig(rank=1, operator="permutation", seed=3)
  >>> plan = mora_jax.plan(params, config)
  >>> rate = remora.restart_schedule(1.0, 1000, every=100, warmup=10)
  >>> [round(float(rate(step)), 3) for step in (0, 9, 99, 100, 1000)]
  [0.1, 1.0, 0.978, 0.098, 0.01]
  >>> adapters, tx = mora_jax.init(plan), optax.adam(rate)
  >>> after = remora.restart(params, adapters, plan, tx.init(adapters), tx)
  >>> after.plan["fc/kernel"].operator.seed
  4
"""

import dataclasses
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.core import Tracer
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path

from mora_jax._common.checks import check_number, positive_integer
from mora_jax._plan.plan import Plan, check_plan
from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.adapters import start_key
from mora_jax._tree.combined import combine
from mora_jax._tree.merge import array_items, merged_kernel, with_kernels
from mora_jax._tree.optim import check_transformation
from mora_jax._tree.paths import (
    adapter_path,
    is_boxed,
    key_name,
    replace_leaves,
    unboxed,
)
from mora_jax.io.peft._reference import REFERENCE_GROUPS
from mora_jax.operators import Sharing

__all__ = ["Restarted", "next_plan", "restart", "restart_schedule"]


class Restarted(NamedTuple):
    """Arrays and plan with which training goes on after a restart.

    Attributes:
      params: The base with the deltas merged in.
      adapters: New adapters, whose deltas are zero. Arrays that the plan trains go on
        as they are, in the adapters alone.
      plan: Their plan, which has other operators.
      opt_state: The optimizer's state.
    """

    params: Any
    adapters: Any
    plan: Plan
    opt_state: Any


def restart(
    params: Any,
    adapters: Any,
    plan: Plan,
    opt_state: Any,
    tx: optax.GradientTransformation,
    *,
    any_base: bool = False,
    keep_moments: bool = False,
    donate: bool = False,
) -> Restarted:
    """Merge the adapters, and start new ones between other maps.

    The model computes the same as before. In kernels of 16 bits the deltas are rounded
    with a dither that differs from restart to restart, so that small ones add up. All
    other leaves are the same arrays. Call it between two training steps; it works under
    jit as well, but each plan is a program of its own.

    Args:
      params: The base's params.
      adapters: The adapters, as `init` makes them.
      plan: Their plan.
      opt_state: The state of `tx` for the adapters, or for the combined tree; or an
        `nnx.Optimizer`'s, if `adapters` are `nnx.state(model, MoRAParam)`.
      tx: The optimizer.
      any_base: True to merge into any weights, as for `merge`.
      keep_moments: True to keep the state of the M's. By default it is reset, with the
        steps that it counts; schedules and the state of other leaves go on.
      donate: True to overwrite the old kernels. Memory then does not hold them twice,
        and `params` cannot be used any more.

    Raises:
      TypeError, ValueError: As `merge` or `next_plan`; or `tx` is not a transformation,
        or `opt_state` is not its state for these adapters.
    """
    check_transformation(tx)
    following = next_plan(plan)
    items = array_items(adapters, plan)
    kernels = with_kernels(params, items, any_base=any_base)
    ms = {adapter_path(old): _started(following[old.name], m) for old, m in items}
    adapters = replace_leaves(_with_next_specs(adapters), ms)
    opt_state = _with_next_specs(opt_state)
    if not keep_moments:
        opt_state = _with_new_moments(opt_state, tx, params, adapters, following)
    add, sums = _add_and_donate if donate else _add, {}
    for spec, m, path, kernel in kernels:
        # Without its path a spec is the same for equal layers, which share a program.
        sums[path] = add(dataclasses.replace(spec, path=()), m, kernel)
    return Restarted(replace_leaves(params, sums), adapters, following, opt_state)


def next_plan(plan: Plan) -> Plan:
    """The plan after a restart: the same kernels and widths, between other maps.

    `sharing` goes through the groupings of the reference's types 1, 2, 3 and 4, in a
    circle. An operator with a seed takes the next: other signs, features or directions.

    Raises:
      TypeError: `plan` is not a Plan.
      ValueError: An operator lacks other maps, and the rank would not grow.
    """
    specs = tuple(map(_next_spec, check_plan(plan).specs))
    return dataclasses.replace(plan, specs=specs)


def restart_schedule(
    peak: float, steps: int, every: int, *, warmup: int = 50, floor: float = 0.1
) -> optax.Schedule:
    r"""A cosine over all of training, with a warm-up after each restart.

    .. math:: \eta_t = \eta\, \Bigl(f + (1 - f)\, \frac{1 + \cos(\pi t / T)}{2}\Bigr)\,
        \min\Bigl(1, \frac{(t \bmod N) + 1}{w}\Bigr)

    Args:
      peak: The largest learning rate.
      steps: T, the number of steps of the whole training; the floor stays after it.
      every: N, the number of steps from one restart to the next.
      warmup: w, the number of steps until the rate is at the cosine again.
      floor: f, what is left of the largest rate at the end.

    Raises:
      TypeError, ValueError: A number of steps is not a positive integer, `warmup` is
        more than `every`, or `floor` is not between 0 and 1.
    """
    for name, value in (("steps", steps), ("every", every), ("warmup", warmup)):
        positive_integer(name, value)
    if warmup > every:
        raise ValueError(f"warmup must be at most every={every}, got {warmup}")
    peak, floor = check_number("peak", peak), check_number("floor", floor)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must be from 0 to 1, got {floor}")

    cosine = optax.cosine_decay_schedule(peak, steps, alpha=floor)

    def schedule(count: Any) -> Any:
        return cosine(count) * jnp.minimum((count % every + 1) / warmup, 1.0)

    return schedule


def _started(spec: AdapterSpec, old: jax.Array) -> jax.Array:
    """An M whose delta is zero, in the dtype and the place of the old M."""
    # The plan determines what is random, so that a resumed run goes on as it would.
    m = spec.operator.start(spec.stack_shape, "zeros", start_key(spec), old.dtype)
    if isinstance(old, Tracer) or not old.committed:
        return m
    return jax.device_put(m, old.sharding)


def _next_spec(spec: AdapterSpec) -> AdapterSpec:
    op = spec.operator
    if hasattr(op, "seed"):
        op = dataclasses.replace(op, seed=op.seed + 1)  # type: ignore[call-arg]
    elif isinstance(op, Sharing):
        types = list(REFERENCE_GROUPS.values())
        at = types.index((op.compress_groups, op.decompress_groups))
        names = "compress_groups", "decompress_groups"
        groups = dict(zip(names, types[(at + 1) % len(types)], strict=True))
        op = dataclasses.replace(op, **groups)
    else:
        raise ValueError(
            f"{spec.name}: {op.name} has the same maps after each restart, so that the "
            "rank of what is learned would not grow; plan with 'permutation', "
            "'signed_decoupling' or 'sharing'"
        )
    # The digest is of the kernel before this restart.
    return dataclasses.replace(spec, operator=op, base_digest=None)


def _with_next_specs(tree: Any) -> Any:
    """A state of NNX, or of an optimizer for one, whose M's say what they are for."""

    def follow(leaf: Any) -> Any:
        spec = getattr(leaf, "spec", None) if isinstance(leaf, nnx.Variable) else None
        if not isinstance(spec, AdapterSpec):
            return leaf
        return leaf.replace(unboxed(leaf), spec=_next_spec(spec))

    return jax.tree.map(follow, tree, is_leaf=is_boxed)


def _dithered(spec: AdapterSpec, m: jax.Array, kernel: jax.Array) -> jax.Array:
    """The kernel plus the delta, rounded with the dither of the operator."""
    # The dither is a hash of a number's place. Shifted, it is another one.
    shift = crc32(repr(spec.operator).encode()) % 2**31
    return merged_kernel(spec, m, kernel, rounding="dither", start=(shift, shift))


_add = jax.jit(_dithered, static_argnums=0)
_add_and_donate = jax.jit(_dithered, static_argnums=0, donate_argnums=2)


def _with_new_moments(
    opt_state: Any,
    tx: optax.GradientTransformation,
    params: Any,
    adapters: Any,
    plan: Plan,
) -> Any:
    """Optimizer state with the moments of the adapters reset and the rest unchanged."""
    bare = _bare(opt_state)
    for trained in (adapters, combine(params, adapters, plan)):
        try:  # without memory for the moments of all params
            shapes = jax.eval_shape(tx.init, trained)
        except (TypeError, ValueError):  # tx has labels or a mask for the other tree
            continue
        if jax.tree.structure(_bare(shapes)) == jax.tree.structure(bare):
            new = _renewed(bare, _bare(tx.init(trained)))
            return jax.tree.unflatten(jax.tree.structure(opt_state), new)
    raise ValueError(
        "opt_state must be a state of tx for the adapters, or for the combined tree of "
        f"params and adapters, got one of {jax.tree.structure(bare).num_leaves} arrays "
        "for other ones; an nnx.Optimizer's is for nnx.state(model, MoRAParam)"
    )


def _bare(opt_state: Any) -> Any:
    """The state with arrays instead of boxes."""
    # An nnx.Optimizer keeps them in variables of another type than the adapters'.
    return jax.tree.map(unboxed, opt_state, is_leaf=is_boxed)


def _renewed(old: Any, new: Any) -> list[Any]:
    """The leaves of `new` that start again, and the other leaves of `old`."""
    leaves, renewed = tree_leaves_with_path(old), []
    owners = [_owner(keys) for keys, _ in leaves]
    rows = zip(leaves, owners, jax.tree.leaves(new), strict=True)
    for (keys, before), (state, starts), after in rows:
        if starts is None:
            # The count of a named tuple such as Adam's starts again with its trees, if
            # these hold M's alone. Adam would otherwise correct the bias of new moments
            # as if they were old, and its first steps would be large.
            starts = (state, True) in owners and (state, False) not in owners
        # The steps of `optax.MultiSteps` are the steps of a schedule.
        starts &= key_name(keys[-1]) != "gradient_step"
        renewed.append(after if starts else before)
    return renewed


def _owner(keys: Any) -> tuple[str, bool | None]:
    """The named tuple that holds a leaf, and True if the leaf belongs to an M."""
    # An optimizer's state is a tree of named tuples, whose fields are trees like the
    # trained one, or single arrays. Those belong to no leaf, which None stands for.
    fields = [k for k, key in enumerate(keys) if isinstance(key, GetAttrKey)]
    last = fields[-1] if fields else -1
    names = [key_name(key) for key in keys[last + 1 :]]
    of_m = any(name.endswith(SUFFIX) for name in names) if names else None
    return keystr(keys[: max(last, 0)]), of_m
