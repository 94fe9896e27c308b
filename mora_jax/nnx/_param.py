"""Variables and the dropout of an adapted module."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from mora_jax._common.checks import check_seed
from mora_jax._flax.layer_rules import folded_kernels
from mora_jax._layer.adapter import Adapter
from mora_jax._layer.per_row import Selected
from mora_jax._mesh.placement import explicit_sharding, with_auto_axes
from mora_jax._plan.places import adapter_sharding
from mora_jax._plan.spec import SUFFIX, AdapterSpec, Spec, TrainedArray, check_same
from mora_jax._tree.paths import unboxed

DROPOUT = "dropout_mora"


class MoRAParam(nnx.LoRAParam[Any]):
    """The trained array of one kernel; its metadata `spec` says what it means.

    Code that filters adapters by the type `nnx.LoRAParam` finds it. Where Flax copies a
    whole variable (`nnx.update`, `nnx.merge`, `copy_from`), it copies the spec with the
    numbers. Assigning a variable or an adapter of another spec raises an error.
    """

    spec: AdapterSpec

    def set_value(self, value: Any, **kwargs: Any) -> None:
        super().set_value(self._numbers_of(value), **kwargs)

    def set_raw_value(self, value: Any, **kwargs: Any) -> None:
        # What `nnx.update(model, adapters)` does.
        super().set_raw_value(self._numbers_of(value), **kwargs)

    def _numbers_of(self, value: Any) -> Any:
        if isinstance(value, MoRAParam | Adapter):
            self._check(value.spec)
        return value.m if isinstance(value, Adapter) else value

    def _check(self, spec: AdapterSpec) -> None:
        check_same("kernel", spec, self.spec)


class TrainedParam(MoRAParam):
    """Array of the base that trains itself, with the metadata of its variable there."""

    # A subclass of `MoRAParam`, so that all that trains, saves or counts adapters by
    # that type does so with it too.
    spec: TrainedArray  # type: ignore[assignment]

    @classmethod
    def in_place_of(
        cls, variable: nnx.Variable[Any], spec: TrainedArray, copy: Any
    ) -> "TrainedParam":
        """The trained copy of what `variable` holds."""
        own = {"spec": spec, "base_type": type(variable)}
        return cls.from_metadata(copy, {**variable.get_metadata(), **own})  # type: ignore[return-value]

    def plain(self) -> nnx.Variable[Any]:
        """A variable as the base has it, with the trained numbers rounded."""
        metadata = dict(self.get_metadata())
        spec, base_type = metadata.pop("spec"), metadata.pop("base_type")
        return base_type.from_metadata(self[...].astype(spec.base_dtype), metadata)

    def _check(self, spec: Any) -> None:
        if spec != self.spec:
            raise ValueError(f"the trained array must be {self.spec}, got {spec}")


def held(module: nnx.Module, kernel: str) -> Adapter | None:
    """A kernel's adapter, or the slots of many; None without an adapter."""
    m: Any = getattr(module, kernel + SUFFIX, None)
    if m is None:
        return None
    value = unboxed(m)
    return Adapter(value if isinstance(value, Selected) else m[...], m.spec)


def named_sharding(variable: nnx.Variable[Any]) -> NamedSharding | None:
    """The sharding of a variable over a mesh; None in a trace and on one device."""
    value, *others = jax.tree.leaves(variable)
    if others or not isinstance(value, jax.Array) or isinstance(value, Tracer):
        return None
    return value.sharding if isinstance(value.sharding, NamedSharding) else None


def hold_adapter(module: nnx.Module, kernel: str, adapter: Adapter, seed: int) -> None:
    """Put M beside its kernel, on the same mesh, and the switch of its dropout."""
    m, spec = adapter.m, adapter.spec
    if sharding := named_sharding(getattr(module, kernel)):
        m = jax.device_put(m, adapter_sharding(spec, sharding))
    setattr(module, kernel + SUFFIX, MoRAParam(m, spec=spec))
    if spec.dropout > 0:
        hold_dropout(module, spec, seed)


def hold_dropout(module: nnx.Module, spec: AdapterSpec, seed: int) -> None:
    """Put the switch of an adapter's dropout into its module."""
    check_seed(seed)
    dropout: Any = nnx.Dropout(spec.dropout)
    dropout.seed = seed
    setattr(module, DROPOUT, dropout)


def refuse_dropout(module: nnx.Module, name: str, spec: Spec) -> None:
    """Raise if the kernel `name` has dropout, and methods of its module read it."""
    if not isinstance(spec, AdapterSpec) or spec.dropout == 0:
        return
    if folded_kernels(type(module)):
        raise ValueError(
            f"{name}: dropout must be 0 for a kernel that methods read "
            f"(products.Folded), got {spec.dropout}; say so in overrides"
        )


def dropout_key(
    module: nnx.Module, kernel: str, adapter: Adapter
) -> PRNGKeyArray | None:
    """The key of a call's dropout; None where nothing is dropped."""
    # It depends on the seed, on M, which each step of an optimizer changes, and on the
    # kernel, which differs between layers. All of these are inputs of the layer. So
    # lifted transformations, rematerialization and resumed runs draw the same masks,
    # and the model's state holds nothing except its parameters.
    dropout: Any = getattr(module, DROPOUT, None)
    if dropout is None or dropout.deterministic or not adapter.spec.dropout:
        return None
    own = jax.tree.leaves(getattr(module, kernel))[0]  # it may be quantized
    m = jax.tree.leaves(adapter.m)[0]  # or one for each row

    def make_key(m: jax.Array, kernel: jax.Array) -> PRNGKeyArray:
        first = kernel[(0,) * (kernel.ndim - 1)][:16]  # to read all would take long
        key = jax.random.fold_in(jax.random.key(np.uint32(dropout.seed)), _hash(m))
        return jax.random.fold_in(key, _hash(first))

    for sharding in filter(None, map(explicit_sharding, (m, own))):
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
        return with_auto_axes(make_key, replicated, m, own)
    return make_key(m, own)


def _hash(x: jax.Array) -> jax.Array:
    """32 bits that change with any number in `x`, and with its position."""
    # The sum of the numbers' bits, each multiplied by another odd number, modulo 2^32.
    # There an odd number has an inverse, so no factor loses any bits.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).ravel()
    position = jax.lax.iota(jnp.uint32, bits.size)
    odd = (position * jnp.uint32(2) + jnp.uint32(1)) * jnp.uint32(0x9E3779B1)
    return jnp.sum(bits * odd, dtype=jnp.uint32)
