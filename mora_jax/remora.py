r"""ReMoRA: merge the adapters into the base, start them again, and train on.

The rank of one delta is bounded by its operator. A *restart* adds the delta to the base
and starts M with a delta of zero between other maps C and D, so that the sum of all
deltas may have a higher rank: so the paper pretrains with adapters alone. The adapters
say where in the cycle a run is, so that a run which is resumed from a saved base and
adapters restarts as it would have. `renewing` does it within a step of training, with
the directions of a new gradient for maps. `learned` makes one file of all deltas.

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
from typing import Any, Literal, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer

from mora_jax._common import axes, checks
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter, wide
from mora_jax._plan.spec import AdapterSpec, operator_settings
from mora_jax._tree import gradients, lora_trees, merge, paths
from mora_jax._tree.optim import check_transformation, restarted_state
from mora_jax._tree.plan import Plan
from mora_jax.operators import Damped, Operator, Sharing, Subspace, low_rank, sharing
from mora_jax.operators.orthogonal import Projection

__all__ = ["Renewing", "Restarted", "State", "learned", "renewing", "restart"]


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
    """
    check_transformation(tx)
    found = paths.checked_adapters(adapters)
    merged, new = _merged(params, adapters, any_base=any_base), {}
    for path, adapter in found.kernels.items():
        op = _next_operator("/".join(path), adapter.operator)
        spec = _restarted(adapter.spec, op)
        new[path] = Adapter(_started(path, spec, adapter.m), spec)
    adapters = paths.replace_adapters(adapters, new)
    return Restarted(merged, adapters, restarted_state(opt_state, tx, merged, adapters))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A run whose adapters are renewed: a pytree of arrays, for jit and checkpoints.

    Attributes:
      params: The base, with all deltas up to the last renewal.
      ms: The adapters, whose meanings have the shapes of directions alone.
      plan: The meanings of the adapters of kernels, with the directions.
      opt_state: The optimizer's state.
      step: The number of steps, ().
    """

    params: Any
    ms: Any
    plan: Plan
    opt_state: Any
    step: Array

    @property
    def adapters(self) -> Any:
        """The adapters, to be called, merged or saved."""
        found = paths.adapters_in(self.ms).kernels
        new = {path: a.replace(spec=self.plan.parts[path]) for path, a in found.items()}
        return paths.replace_adapters(self.ms, new)


class Renewing(NamedTuple):
    """Training with renewals, as functions to be compiled.

    Attributes:
      init: (params, adapters) -> State.
      step: (state, *batch) -> (state, loss).
      renew: (state, *batch) -> state, for a loop that says itself when.
    """

    init: Callable[[Any, Any], State]
    step: Callable[..., tuple[State, Array]]
    renew: Callable[..., State]


def renewing(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    every: int | Callable[[Array], Any],
    *,
    along: Literal["gradient", "random"] = "gradient",
    moments: Literal["restart", "keep"] = "restart",
    merge: Callable[[Any, Any, Array], Any] | None = None,
) -> Renewing:
    """A training step that merges the adapters at times, and goes on between new maps.

    It is one program for all renewals, since directions are data here. A renewal merges
    as `restart` does, and takes two gradients of a LoRA at the merged params. The first
    step is one, and finds the first directions.

    Args:
      loss: A function from adapters, params and the arguments of a batch to the loss.
      tx: The optimizer.
      every: The number of steps from renewal to renewal, or a function from the number
        of steps so far to True where one is due, also at 0 unless there are directions.
      along: "gradient" for the `directions` of the step's batch; "random" for random
        ones, as ReLoRA and the paper's ReMoRA have it.
      moments: "restart" for an optimizer's state as after `restart`; "keep" for the
        moments of the old directions.
      merge: A function from params, adapters and the step to params with the deltas, as
        `qwix.merge_quantized`; None merges into floating-point kernels.

    Returns:
      (init, step, renew). `init` takes adapters with `operator="orthogonal"`, or of
      `directions`. If `step` is compiled with the state donated, the params that `init`
      was given are overwritten.

    Raises:
      TypeError, ValueError: An argument is of another kind.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax, optax
      >>> params, x = {"kernel": jnp.ones((8, 8))}, jnp.eye(8)
      >>> def loss(adapters, params, x):
      ...     return jnp.mean((x @ mora_jax.fold(params, adapters)["kernel"]) ** 2)
      >>> config = mora_jax.MoRAConfig(operator="orthogonal", rank=1)
      >>> adapters = mora_jax.init(mora_jax.plan(params, config))
      >>> init, step, _ = mora_jax.remora.renewing(loss, optax.adam(0.1), every=2)
      >>> state, step = init(params, adapters), jax.jit(step, donate_argnums=0)
      >>> for _ in range(4):
      ...     state, value = step(state, x)
      >>> bool(value < 0.9), state.adapters
      (True, {'kernel_mora': Adapter(subspace, float32[4, 4])})
    """
    check_transformation(tx)
    checks.check_choice("along", along, ("gradient", "random"))
    checks.check_choice("moments", moments, ("restart", "keep"))
    if not callable(every):
        checks.positive_integer("every", every)
    gradients.check_loss(loss)
    if not callable(merge_into := merge or _merged):
        raise TypeError(f"merge must be a function or None, got {merge!r}")

    def init(params: Any, adapters: Any) -> State:
        found, parts, shapes = paths.checked_adapters(adapters), {}, {}
        if not merge:
            found.in_base(params, any_base=False)
        for path, adapter in found.kernels.items():
            op = _replaceable("/".join(path), adapter.operator)
            # Copies, since a step may be given the state to overwrite.
            spec = jax.tree.map(jnp.array, _restarted(adapter.spec, op))
            if along == "gradient":
                scale = gradients.scale_with(op, adapter.spec)
                spec = dataclasses.replace(spec, scale=scale)
            parts[path] = gradients.moved(spec, *gradients.bases_of(spec))
            shape = jax.eval_shape(lambda spec: spec, parts[path])
            shapes[path] = Adapter(adapter.m, shape)
        ms = jax.tree.map(jnp.copy, paths.replace_adapters(adapters, shapes))
        return State(params, ms, Plan(parts), tx.init(ms), jnp.zeros((), jnp.int32))

    def renew(state: State, *batch: Any) -> State:
        adapters, old = state.adapters, paths.adapters_in(state.ms).kernels
        merged = merge_into(state.params, adapters, state.step)
        if along == "random":
            key = jax.random.fold_in(jax.random.key(0), state.step)
            parts = gradients.at_random(state.plan.specs, key)
        else:
            args = adapters, merged, *batch
            parts = gradients.renewed(
                lambda loras: gradients.lora_gradient(loss, loras, *args),
                state.plan.specs,
            )
        zeros = {path: a.replace(m=jnp.zeros_like(a.m)) for path, a in old.items()}
        ms, opt_state = paths.replace_adapters(state.ms, zeros), state.opt_state
        if moments == "restart":
            opt_state = restarted_state(opt_state, tx, merged, ms)
        return State(merged, ms, Plan(parts), opt_state, state.step)

    def step(state: State, *batch: Any) -> tuple[State, Array]:
        at = state.step
        due = every(at) if callable(every) else at % every == 0
        state = jax.lax.cond(due, renew, lambda state, *_: state, state, *batch)

        def of(ms: Any) -> Any:
            adapters = dataclasses.replace(state, ms=ms).adapters
            return loss(adapters, state.params, *batch)

        value, grads = jax.value_and_grad(of)(state.ms)
        if along == "gradient":
            grads = _own_gradients(grads, due)
        updates, opt_state = tx.update(grads, state.opt_state, state.ms)
        ms = optax.apply_updates(state.ms, updates)
        return State(state.params, ms, state.plan, opt_state, at + 1), value

    return Renewing(init, step, renew)


def learned(
    base: Any, merged: Any, adapters: Any, *, max_error: float | int = 0.01
) -> tuple[paths.Tree, dict[str, float]]:
    """The difference that many restarts made to the base, as one tree of adapters.

    It is a LoRA ("low_rank") for each kernel, of the least rank that keeps it within
    `max_error`, and the arrays that are trained themselves: adapters as any others.

    Args:
      base: The params before the first restart.
      merged: The params with the last adapters merged in.
      adapters: The adapters of any part of the run, which say what is trained.
      max_error: The largest share of a delta that is cut off, by the Frobenius norm.

    Returns:
      (adapters, {kernel: the share of its delta that is cut off}).

    Raises:
      TypeError, ValueError: Params do not fit, or `max_error` is not from 0 to 1.

    Example::

      >>> import mora_jax
      >>> params = {"kernel": jnp.eye(8)}
      >>> adapters = mora_jax.init(mora_jax.plan(params))
      >>> merged = {"kernel": jnp.eye(8).at[0, 1].add(0.5)}
      >>> learned(params, merged, adapters)
      ({'kernel_mora': Adapter(low_rank, float32[16, 1])}, {'kernel': 0.0})
    """
    max_error = checks.check_number(
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
        checks.check_concrete(delta := after - before, what, spec.kernel_shape)
        checks.check_finite(delta, what)
        delta = np.asarray(axes.rows_from_kernel(delta, spec.axes))
        a, b, lost[name], _ = low_rank.nearest_factors(delta, max_error)
        spec = dataclasses.replace(spec, base_digest=None)
        made[path] = lora_trees.lora_adapter(spec, jnp.asarray(a), jnp.asarray(b))
    return made.tree(), lost


def _merged(
    params: Any, adapters: Any, shift: Any = None, *, any_base: bool = True
) -> Any:
    """The params with the deltas, rounded with the dither that starts at `shift`."""
    found, sums = paths.adapters_in(adapters), {}
    for path, (place, kernel) in found.in_base(params, any_base=any_base).items():
        if not (adapter := found[path]).of_kernel:
            continue
        # Equal layers share a program, whatever arrays their operators have. The dither
        # is a hash of a number's place; shifted, it is another one.
        settings = repr(operator_settings(adapter.operator))
        own = crc32(settings.encode()) % 2**31 if shift is None else shift
        spec = dataclasses.replace(adapter.spec, base_digest=None)
        sums[place] = _dithered(spec, adapter.m, kernel, own)
    return paths.replace_leaves(params, sums)


def _own_gradients(grads: Any, due: Array) -> Any:
    """Gradients of M's between the directions of their own batch, if it is due."""
    # Adam would make whole steps of the rounding errors where they are zero.
    new = {}
    for path, grad in paths.adapters_in(grads).kernels.items():
        others = np.arange(q := grad.m.shape[-1]) >= q // gradients.ALONE
        where = np.eye(q, dtype=bool) | others & others[:, None]
        new[path] = grad.replace(m=jnp.where(where | ~due, grad.m, 0))
    return paths.replace_adapters(grads, new)


def _restarted(spec: AdapterSpec, op: Operator) -> AdapterSpec:
    # On the merged kernel it starts with a delta of zero.
    init = "zeros" if spec.init == "gradient" else spec.init
    return dataclasses.replace(spec, base_digest=None, operator=op, init=init)


def _replaceable(name: str, op: Operator) -> Operator:
    """The operator with directions that may be replaced, or an error."""
    if isinstance(op, Damped):
        return op.around(_replaceable(name, op.inner))
    if isinstance(op, Subspace):
        return op
    if not isinstance(op, Projection):
        rule = "renewing needs directions, of directions(loss, adapters)"
        got = f"got {op.name!r} at {name!r}"
        raise ValueError(f"{rule} or operator='orthogonal', {got}")
    bases = (op.basis(side, jnp.float32) for side in ("in", "out"))
    return Subspace(op.in_features, op.out_features, op.square_rank, *bases)


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


@jax.jit
def _dithered(spec: AdapterSpec, m: Array, kernel: Array, shift: Any) -> Array:
    """The kernel plus the delta, rounded with the dither that starts at `shift`."""
    start = shift, shift
    return merge.merged_kernel(Adapter(m, spec), kernel, rounding="dither", start=start)
