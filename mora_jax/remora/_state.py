"""The state of a renewed run, and the adapters that belong to its base."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from mora_jax._common import trees
from mora_jax._common.types import Path
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree import paths
from mora_jax._tree.base_digest import kernel_digests, shared_place
from mora_jax._tree.plan import Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A run whose adapters are renewed: a pytree of arrays, for jit and checkpoints.

    The M's lie between the directions of the last renewal, and belong to the params of
    that renewal. To average runs or steps, average the `adapters` of states between two
    renewals, or merged params; an average of whole states is refused.

    Attributes:
      params: The base, with all deltas up to the last renewal.
      ms: The adapters, whose specs hold the shapes of directions alone. They mean
        nothing without `plan`.
      plan: The specs of the adapters of kernels, with the directions.
      opt_state: The optimizer's state.
      step: The number of calls of `step`, ().
      renewals: The number of renewals that were made, ().
      pending: True if a renewal was due and could not be made, (). The next step tries
        again.
      mark: A hash of the directions, ().
    """

    params: Any
    ms: Any
    plan: Plan
    opt_state: Any
    step: Array
    renewals: Array
    pending: Array
    mark: Array

    @property
    def adapters(self) -> Any:
        """The adapters, to be called, merged or saved.

        Outside of jit they know the base that they belong to, as adapters of a file do:
        `mora_jax.merge` and `save` refuse the params of another renewal.

        Raises:
          TypeError, ValueError: The state is an average of states.
        """
        check_state(self)
        specs = with_base_digests(self.plan.specs, self.params)
        return with_specs(self.ms, specs)


def with_specs(ms: Any, specs: Mapping[Path, AdapterSpec]) -> Any:
    """The adapters of a state's M's, with the directions of these specs."""
    found = paths.adapters_in(ms).kernels
    new = {path: adapter.replace(spec=specs[path]) for path, adapter in found.items()}
    return paths.replace_adapters(ms, new)


def check_state(state: State) -> None:
    """Raise if a state is not one that `init`, `step` or `renew` has returned."""
    # Numbers are compared outside of jit alone. An average has floating-point counts,
    # unless it was cast back, and jit knows that as well.
    if not hasattr(state.mark, "dtype"):
        return  # of shardings, say
    advice = (
        "average the adapters of states between two renewals, or their merged params"
    )
    if not jnp.issubdtype(state.mark.dtype, jnp.integer):
        raise TypeError(
            "state must be as init or step returned it, got one whose mark is "
            f"{state.mark.dtype}, as in an average of states: {advice}"
        )
    leaves = jax.tree.leaves((state.mark, state.plan))
    if not all(map(_readable, leaves)):
        return
    # Also where a compiled function closes over the state.
    with jax.ensure_compile_time_eval():
        mark = int(mark_of(state.plan))
    if mark != int(state.mark):
        raise ValueError(
            "state must be as init or step returned it, got directions that are not "
            f"those of its last renewal (mark {mark}, and {int(state.mark)} in the "
            f"state), as in an average of states: {advice}"
        )


@jax.jit
def mark_of(plan: Plan) -> Array:
    """A number of 16 bits that other directions are unlikely to have."""
    total = jnp.uint32(0)
    for spec in plan.specs.values():
        for basis in jax.tree.leaves(spec):
            bits = jax.lax.bitcast_convert_type(basis.astype(jnp.bfloat16), jnp.uint16)
            bits = bits.astype(jnp.uint32)
            for axis in range(basis.ndim):
                place = jax.lax.broadcasted_iota(jnp.uint32, basis.shape, axis)
                bits = (bits ^ place) * jnp.uint32(0x9E3779B1)
                bits = bits ^ (bits >> 15)
            total = (total * jnp.uint32(31)) + jnp.sum(bits, dtype=jnp.uint32)
    return (total >> 16).astype(jnp.int32)


def with_base_digests(
    specs: Mapping[Path, AdapterSpec], params: Any
) -> dict[Path, AdapterSpec]:
    """Specs that know their kernels in `params`, where these can be read."""
    leaves = trees.located_leaves(params)
    known = dict(specs)
    for path, spec in specs.items():
        kernel = trees.unboxed(leaves.get(path))
        if _is_kernel(kernel, spec):
            with jax.ensure_compile_time_eval():
                digest = kernel_digests(spec, kernel)
            known[path] = dataclasses.replace(spec, base_digest=digest)
    return known


def _is_kernel(kernel: Any, spec: AdapterSpec) -> bool:
    """True for a floating-point array of the kernel's shape that can be read."""
    if not _readable(kernel) or kernel.shape != spec.kernel_shape:
        return False
    return jnp.issubdtype(kernel.dtype, jnp.floating)


def _readable(array: Any) -> bool:
    """True for an array whose numbers this process knows."""
    if isinstance(array, Tracer) or not isinstance(array, np.ndarray | jax.Array):
        return False
    if isinstance(array, jax.Array) and array.is_deleted():
        return False
    return not shared_place(array)
