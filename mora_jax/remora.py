r"""ReMoRA: merge the adapters into the base, start them again, and train on.

The rank of one delta is bounded by its operator. A *restart* adds the delta to the base
and starts M with a delta of zero between other maps C and D, so that the sum of all
deltas may have a higher rank: so the paper pretrains with adapters alone. The adapters
say where in the cycle a run is, so that a run which is resumed from a saved base and
adapters restarts as it would have. Between the directions of a gradient it is *renewed*
by `restart(grads=...)`: the next directions are of a new gradient. What was learned in
the end is one file by `learned`.

Example::

  >>> import jax.numpy as jnp, mora_jax, optax
  >>> from mora_jax import remora
  >>> params = {"fc": {"kernel": jnp.ones((8, 8))}}
  >>> config = mora_jax.MoRAConfig(rank=1, operator="signed_decoupling", seed=3)
  >>> plan = mora_jax.plan(params, config)
  >>> adapters, tx = mora_jax.init(plan), optax.adam(1e-3)
  >>> after = remora.restart(params, adapters, tx.init(adapters), tx)
  >>> after.adapters["fc"]["kernel_mora"].operator.seed
  4
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from mora_jax._common.axes import rows_from_kernel
from mora_jax._common.checks import check_concrete, check_finite, check_number
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter, wide
from mora_jax._plan.spec import AdapterSpec, operator_settings
from mora_jax._tree import gradients, lora_trees, merge, paths
from mora_jax._tree.optim import check_transformation, restarted_state
from mora_jax.operators import Damped, Operator, Sharing, low_rank, sharing

__all__ = ["Restarted", "learned", "restart"]


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
    tx: optax.GradientTransformation,
    *,
    grads: Callable[[Any], Any] | None = None,
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
      grads: A function from the merged params to gradients of the loss there, a tree or
        an iterator as `gradient_bases` takes them. The new maps are the directions of
        these gradients then, which needs concrete arrays, so not under jit.
      any_base: True to merge into any weights, as for `merge`.

    Raises:
      TypeError, ValueError: As `merge`; an operator lacks other maps, so that the rank
        would not grow; `tx` is not a transformation, or `opt_state` is not its state
        for these adapters.
    """
    check_transformation(tx)
    found = paths.checked_adapters(adapters)
    old, arrays = found.kernels, found.in_base(params, any_base=any_base)
    following, sums = {}, {}
    for path, adapter in old.items():
        spec = dataclasses.replace(adapter.spec, base_digest=None)
        # Equal layers share a program, whatever arrays their operators have. The dither
        # is a hash of a number's place; shifted, it is another one.
        shift = crc32(repr(operator_settings(spec.operator)).encode()) % 2**31
        place, kernel = arrays[path]
        sums[place] = _dithered(spec, adapter.m, kernel, shift)
        # On the merged kernel it starts with a delta of zero.
        init = "zeros" if spec.init == "gradient" else spec.init
        op = spec.operator
        if grads is None:
            op = _next_operator("/".join(path), op)
        following[path] = dataclasses.replace(spec, operator=op, init=init)
    merged = paths.replace_leaves(params, sums)
    if grads is not None:
        following = gradients.specs_along(grads(merged), following, "tree of adapters")
    new = {p: Adapter(_started(p, s, old[p].m), s) for p, s in following.items()}
    adapters = paths.replace_adapters(adapters, new)
    return Restarted(merged, adapters, restarted_state(opt_state, tx, merged, adapters))


def learned(
    base: Any, merged: Any, adapters: Any, *, max_error: float | int = 0.01
) -> tuple[paths.Tree, dict[str, float]]:
    """The difference that many restarts made to the base, as one tree of adapters.

    It is a LoRA ("low_rank") for each kernel, of the least rank that keeps it within
    `max_error`, and the arrays that are trained themselves. Save, merge or export it as
    any other.

    Args:
      base: The params before the first restart.
      merged: The params with the last adapters merged in.
      adapters: The adapters of any part of the run, which say what is trained.
      max_error: The largest share of a delta that is cut off, by the Frobenius norm.

    Returns:
      (adapters, {kernel: the share of its delta that is cut off}).

    Raises:
      TypeError, ValueError: The params do not fit the adapters, or `max_error` is not
        between 0 and 1.

    Example::

      >>> import mora_jax
      >>> params = {"kernel": jnp.eye(8)}
      >>> adapters = mora_jax.init(mora_jax.plan(params))
      >>> merged = {"kernel": jnp.eye(8).at[0, 1].add(0.5)}
      >>> learned(params, merged, adapters)
      ({'kernel_mora': Adapter(low_rank, float32[16, 1])}, {'kernel': 0.0})
    """
    max_error = check_number(
        "max_error", max_error, lambda error: 0 <= error <= 1, "be from 0 to 1"
    )
    found, made, lost = paths.adapters_in(adapters), paths.Found(), {}
    old, new = found.kernels.in_base(base, "base"), found.in_base(merged, "merged")
    for path, adapter in found.items():
        name, spec = "/".join(path), adapter.spec
        if not adapter.of_kernel:
            made[path] = Adapter(jnp.array(new[path][1], spec.dtype), spec)
            continue
        before, after = (wide(arrays[path][1]) for arrays in (old, new))
        what = f"the delta of {name!r}"
        check_concrete(delta := after - before, what, spec.kernel_shape)
        check_finite(delta, what)
        delta = np.asarray(rows_from_kernel(delta, spec.axes))
        a, b, lost[name], _ = low_rank.nearest_factors(delta, max_error)
        spec = dataclasses.replace(spec, base_digest=None)
        made[path] = lora_trees.lora_adapter(spec, jnp.asarray(a), jnp.asarray(b))
    return made.tree(), lost


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
    raise ValueError(f"{name}: {same}, {why}; {remedy}, or give restart(grads=...)")


@jax.jit
def _dithered(spec: AdapterSpec, m: Array, kernel: Array, shift: Any) -> Array:
    """The kernel plus the delta, rounded with the dither that starts at `shift`."""
    start = shift, shift
    return merge.merged_kernel(Adapter(m, spec), kernel, rounding="dither", start=start)
