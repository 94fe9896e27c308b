"""A restart: the deltas are merged, and new M's start between other maps."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.core import Tracer

from mora_jax._common import trees
from mora_jax._common.messages import warn
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree import paths
from mora_jax._tree.optim import restarted_state, transformation
from mora_jax.operators import Damped, Operator, Sharing, sharing
from mora_jax.remora._due import accumulation
from mora_jax.remora._merging import merged_deltas, respecified


class Restarted(NamedTuple):
    """Arrays with which training goes on after a restart.

    Attributes:
      params: The base with the deltas merged in.
      adapters: New adapters, between other maps, whose deltas are zero. Arrays that are
        trained themselves go on as they are, in the adapters alone.
      opt_state: The optimizer's state: moments of M's start again, with the steps that
        count them. Schedules and the state of other leaves go on.
    """

    params: Any
    adapters: Any
    opt_state: Any


def restart(
    params: Any,
    adapters: Any,
    opt_state: Any,
    tx: optax.GradientTransformation | optax.MultiSteps,
    *,
    any_base: bool = False,
) -> Restarted:
    """Merge the adapters, and start new ones between other maps.

    The model computes the same as before. In kernels of 16 bits the deltas are rounded
    with a dither that differs from restart to restart, so that small ones add up. All
    other leaves are the same arrays. A wrapped model takes the new adapters as they
    are. Call it between two training steps; it works under jit as well, but each set of
    operators is a program of its own.

    `sharing` goes through the groupings of the reference's types 1, 2, 3 and 4, in a
    circle. An operator with a seed takes the next: other signs, features or directions.

    Args:
      params: The base's params.
      adapters: The adapters, as `init` makes them.
      opt_state: The state of `tx` for the adapters, or for the combined tree; or an
        `nnx.Optimizer`'s, if `adapters` are `nnx.state(model, MoRAParam)`.
      tx: The optimizer.
      any_base: True to merge into any weights, as for `merge`.

    Raises:
      TypeError, ValueError: As `merge`; an operator lacks other maps, so that the rank
        would not grow; `tx` is not a transformation, or `opt_state` not its state here.

    Warns:
      MoRAWarning: `optax.MultiSteps` holds an unfinished sum of gradients, which is
        lost.
    """
    tx = transformation(tx)
    _warn_of_unfinished_sums(opt_state)
    found = paths.checked_adapters(adapters)
    merged, new = merged_deltas(params, adapters, any_base=any_base), {}
    for path, adapter in found.kernels.items():
        op = _next_operator("/".join(path), adapter.operator)
        spec = respecified(adapter.spec, op)
        new[path] = Adapter(_started(path, spec, adapter.m), spec)
    adapters = paths.replace_adapters(adapters, new)
    return Restarted(merged, adapters, restarted_state(opt_state, tx, merged, adapters))


def _warn_of_unfinished_sums(opt_state: Any) -> None:
    """Warn if a restart drops gradients that `optax.MultiSteps` has summed."""
    # Counts of an nnx.Optimizer are in variables.
    plain = jax.tree.map(trees.unboxed, opt_state, is_leaf=trees.is_end)
    _, is_complete = accumulation(plain, jnp.zeros((), jnp.int32))
    if not isinstance(is_complete, Tracer) and not is_complete:
        warn(
            "the optimizer has summed gradients that it has not applied yet, and the "
            "restart drops them: restart where its mini_step is 0"
        )


def _started(path: Path, spec: AdapterSpec, old: Array) -> Array:
    """An M whose delta is zero, in the dtype and the place of the old M."""
    # Path and operator determine what is random, so that resumed runs are the same.
    init = "zeros" if spec.init == "gaussian" else spec.init
    new = dataclasses.replace(spec, init=init, param_dtype=old.dtype)
    m = new.start(path, spec.start_key(path))
    if isinstance(old, Tracer) or not old.committed:
        return m
    return jax.device_put(m, old.sharding)


def _next_operator(name: str, op: Operator) -> Operator:
    """Other maps of the same size for the kernel `name`."""
    if isinstance(op, Damped):
        return op.around(_next_operator(name, op.inner))
    if hasattr(op, "seed"):
        return dataclasses.replace(op, seed=op.seed + 1)  # type: ignore[call-arg]
    if isinstance(op, Sharing):
        types = list(sharing.REFERENCE_GROUPS.values())
        at = types.index((op.compress_groups, op.decompress_groups))
        ins, outs = types[(at + 1) % len(types)]
        return dataclasses.replace(op, compress_groups=ins, decompress_groups=outs)
    same = f"{op.name} has the same maps after each restart"
    why = "so that the rank of what is learned would not grow"
    remedy = "plan with 'block_diagonal', 'signed_decoupling' or 'sharing'"
    raise ValueError(f"{name}: {same}, {why}; {remedy}, or take directions(...)")
