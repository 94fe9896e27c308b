"""Adapters that a model holds: variables, dropout, and the tree of all of them.

Linen twins have the same tree. `qwix`, which changes no class, knows nothing else here.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from mora_jax._common.axes import to_model
from mora_jax._common.checks import as_jax_array, check_seed
from mora_jax._common.messages import warn
from mora_jax._common.types import Path
from mora_jax._flax.layer_rules import folded_kernels
from mora_jax._flax.proofs import Proofs
from mora_jax._layer.adapter import Adapter
from mora_jax._mesh.places import explicit_sharding, with_auto_axes
from mora_jax._plan.spec import (
    SUFFIX,
    AdapterSpec,
    TrainedArray,
    check_alike,
    same_record,
)
from mora_jax._tree.base_digest import check_base
from mora_jax._tree.paths import Found, Tree, adapters_in, named_leaves, nest
from mora_jax._tree.plan import Plan
from mora_jax.operators._pytree import by_layer
from mora_jax.sharding import adapter_sharding

Model = TypeVar("Model", bound=nnx.Module)
DROPOUT, PROOFS = "dropout_mora", "proofs_mora"
"""Attributes: of a layer with dropout its switch, of a model its checked calls."""


class MoRAParam(nnx.LoRAParam[Any]):
    """The trained array of one kernel; its metadata `spec` says what it means.

    Code that filters adapters by the type `nnx.LoRAParam` finds it. Where Flax copies a
    whole variable (`nnx.update`, `nnx.merge`, `copy_from`), it copies the spec with the
    numbers. Assigning a variable or an adapter of another spec raises an error.
    """

    spec: AdapterSpec

    @classmethod
    def from_metadata(cls, value: Any, attributes: dict[str, Any]) -> Any:
        # A traced program serves models of other bases too, as in `Adapter`.
        spec = attributes.get("spec")
        if isinstance(value, Tracer) and isinstance(spec, AdapterSpec):
            attributes = {**attributes, "spec": spec.with_base(None)}
        return super().from_metadata(value, attributes)

    def update_from_state(self, variable_state: Any) -> None:
        # Flax copies metadata that differs by `==`, which ignores where M comes from.
        own = self.spec
        super().update_from_state(variable_state)
        new = getattr(variable_state, "spec", own)  # a bare variable brings numbers
        if isinstance(new, AdapterSpec) and new.base_digest is None:
            # The result of a traced program does not know its base.
            new = new.with_base(getattr(own, "base_digest", None))
        if not same_record(new, getattr(self, "spec", None)):
            self.set_metadata(spec=new)

    def set_value(self, value: Any, **kwargs: Any) -> None:
        super().set_value(self._numbers_of(value), **kwargs)

    def set_raw_value(self, value: Any, **kwargs: Any) -> None:
        # What `nnx.update(model, adapters)` does.
        super().set_raw_value(self._numbers_of(value), **kwargs)

    def _numbers_of(self, value: Any) -> Any:
        if isinstance(value, MoRAParam | Adapter):
            path = ("kernel",)
            check_alike({path: value.spec}, {path: self.spec}, "the variable")
        return value.in_model() if isinstance(value, Adapter) else value


class Given(nnx.Variable[Any]):
    """Array that a stack's layers have each their own of, as they have of M."""


class TrainedParam(MoRAParam):
    """Array of the base that trains itself, with the metadata of its variable there."""

    # All that trains, saves or counts adapters by their type does so with it too.
    spec: TrainedArray  # type: ignore[assignment]

    def plain(self) -> nnx.Variable[Any]:
        """A variable as the base has it, with the trained numbers rounded."""
        metadata = dict(self.get_metadata())
        spec, base_type = metadata.pop("spec"), metadata.pop("base_type")
        return base_type.from_metadata(self[...].astype(spec.base_dtype), metadata)


def named_modules(model: nnx.Module) -> Iterator[tuple[Path, nnx.Module]]:
    """The modules inside a model by path, each of them once."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {model!r:.80}")
    for path, module in nnx.iter_modules(model):
        yield tuple(map(str, path)), module


def attributes(model: nnx.Module, kinds: Any) -> Iterator[tuple[nnx.Module, Path, Any]]:
    """(module, path, value) of each attribute of `kinds` in the modules of a model."""
    # As lists, since the caller may remove an attribute that it is given.
    for path, module in list(named_modules(model)):
        for name, value in list(vars(module).items()):
            if isinstance(value, kinds):
                yield module, (*path, name), value


def plain_class(module: nnx.Module) -> type:
    """The class that `module` had before it was adapted."""
    return getattr(module, "plain_class", type(module))


def set_class(module: nnx.Module, cls: type) -> None:
    """Change the class of a module, which Flax does not let an assignment do."""
    object.__setattr__(module, "__class__", cls)


def detached(model: Model) -> Model:
    """A copy without adapters, in which the numbers of trained arrays stay."""
    model = nnx.clone(model)
    kinds = MoRAParam | Given | nnx.Dropout | Proofs
    for module, (*_, name), value in attributes(model, kinds):
        if isinstance(value, TrainedParam):
            setattr(module, name, value.plain())
        elif isinstance(value, MoRAParam | Given) or name in (DROPOUT, PROOFS):
            delattr(module, name)
    for _, module in named_modules(model):
        set_class(module, plain_class(module))
    return model


def held(module: nnx.Module, kernel: str) -> Adapter | None:
    """A kernel's adapter; None without one."""
    own: Any = vars(module)
    if (m := own.get(kernel + SUFFIX)) is None:
        return None
    names = itertools.takewhile(own.__contains__, _given(kernel))
    return Adapter.of_model(m[...], m.spec, [own[name][...] for name in names])


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
    setattr(module, kernel + SUFFIX, MoRAParam(Adapter(m, spec).in_model(), spec=spec))
    hold_given(module, kernel, spec)
    hold_dropout(module, spec, seed)


def _given(kernel: str) -> Iterator[str]:
    return (f"{kernel}_{number}{SUFFIX}" for number in itertools.count())


def hold_given(module: nnx.Module, kernel: str, spec: Any) -> None:
    """Put what a stack's layers have each their own of beside M, and nothing else."""
    arrays, names = by_layer(spec.operator)[0], _given(kernel)
    for array, name in zip(arrays, names, strict=False):  # names go on
        setattr(module, name, Given(to_model(jnp.asarray(array), spec.axes)))
    for name in itertools.takewhile(vars(module).__contains__, names):
        delattr(module, name)


def hold_dropout(module: nnx.Module, spec: Any, seed: int) -> bool:
    """Put the switch of an adapter's dropout into its module; True if it is new."""
    if not getattr(spec, "dropout", 0) or hasattr(module, DROPOUT):
        return False
    dropout: Any = nnx.Dropout(spec.dropout)
    dropout.seed = check_seed(seed)
    setattr(module, DROPOUT, dropout)
    return True


def refuse_dropout(module: nnx.Module, name: str, spec: Any) -> None:
    """Raise if the kernel `name` has dropout, and methods of its module read it."""
    if getattr(spec, "dropout", 0) and folded_kernels(type(module)):
        rule = "dropout must be 0 for a kernel that methods read (products.Folded)"
        raise ValueError(f"{name}: {rule}, got {spec.dropout}; say so in overrides")


def dropout_key(
    module: nnx.Module, kernel: str, adapter: Adapter
) -> PRNGKeyArray | None:
    """The key of a call's dropout; None where nothing is dropped."""
    # It depends on the seed, on M, which each step changes, and on the kernel, which
    # differs between layers. All of them are inputs of the layer, so that lifted
    # transformations, rematerialization and resumed runs draw the same masks.
    dropout: Any = getattr(module, DROPOUT, None)
    if dropout is None or dropout.deterministic or not adapter.spec.dropout:
        return None
    arrays = adapter.m, jax.tree.leaves(getattr(module, kernel))[0]  # maybe quantized

    def make_key(m: jax.Array, kernel: jax.Array) -> PRNGKeyArray:
        first = kernel[(0,) * (kernel.ndim - 1)][:16]  # to read all would take long
        key = jax.random.fold_in(jax.random.key(np.uint32(dropout.seed)), _hash(m))
        return jax.random.fold_in(key, _hash(first))

    for sharding in filter(None, map(explicit_sharding, arrays)):
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
        return with_auto_axes(make_key, replicated, *arrays)
    return make_key(*arrays)


def _hash(x: jax.Array) -> jax.Array:
    """32 bits that change with any number in `x`, and with its position."""
    # The sum of the numbers' bits, each multiplied by another odd number, modulo 2^32.
    # There an odd number has an inverse, so no factor loses any bits.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).ravel()
    position = jax.lax.iota(jnp.uint32, bits.size)
    odd = (position * jnp.uint32(2) + jnp.uint32(1)) * jnp.uint32(0x9E3779B1)
    return jnp.sum(bits * odd, dtype=jnp.uint32)


def held_adapters(model: nnx.Module) -> Found:
    """The adapters in a model, in the order of their paths."""
    ms = {path: m for _, path, m in attributes(model, MoRAParam)}
    if not any(isinstance(m.spec, AdapterSpec) for m in ms.values()):
        raise ValueError("model has no adapters; see mora_jax.nnx.wrap")
    return adapters_in(nest(dict(sorted(ms.items()))))


def traceable(model: nnx.Module, method: str) -> tuple[Callable[..., Any], Any]:
    """A method as a function of (state, args, kwargs), and the model's state."""
    graph, state = nnx.split(model)

    def call(state: Any, args: Any, kwargs: Any) -> Any:
        return getattr(nnx.merge(graph, state), method)(*args, **kwargs)

    return call, state


def parameters(model: nnx.Module) -> Tree:
    """The parameters of the base as nested dicts."""
    return nnx.to_pure_dict(nnx.state(model, nnx.All(nnx.Param, nnx.Not(MoRAParam))))


def plan_of(model: nnx.Module) -> Plan:
    """The plan that an adapted model follows.

    Raises:
      ValueError: `model` lacks adapters.
    """
    found = held_adapters(model)
    size = sum(leaf.size for leaf in jax.tree.leaves(parameters(model)))
    size += sum(spec.parameters for spec in found.trained.specs.values())
    return Plan(found.specs, size, traced=True)  # `wrap` refused the rest


def adapters(model: nnx.Module) -> Tree:
    """The adapters of a model, also of arrays that train themselves; see `wrap`.

    Returns:
      Nested dicts, as `mora_jax.init` makes them and as `linen.wrap` takes them.

    Raises:
      ValueError: `model` lacks adapters.
    """
    return held_adapters(model).tree()


def set_adapters(
    model: nnx.Module, adapters: Any, *, any_base: bool = False, seed: int = 0
) -> None:
    """Put adapters into an adapted model: of a file, a Linen twin or another model.

    The model computes what they say, also with another operator or rank than before.

    Args:
      model: An adapted model, as in the example of `wrap`. It is changed in place.
      adapters: Nested dicts, as `mora_jax.init` and `nnx.adapters` make them; or
        `nnx.state(another_model, MoRAParam)`. An uncommitted M goes where the old is.
      any_base: True to take adapters that were trained on other kernels as well.
      seed: As in `wrap`, where the new adapters have dropout and the old had none. The
        model then drops until `model.eval()`, and a `MoRAWarning` says so.

    Raises:
      TypeError: The adapters are not adapters of arrays.
      ValueError: The model lacks adapters; or the new ones are of other kernels, have
        dropout where methods read a kernel, or (unless `any_base`) are of another base.
    """
    found = adapters_in(adapters)
    check_alike(found.specs, plan_of(model).parts, "the plan", meaning=False)
    if not any_base:
        check_base(found.specs, named_leaves(parameters(model)))
    # All of them are checked before the first is set.
    places, new = list(attributes(model, MoRAParam)), found.placed
    fitting = [_fitting(*place, new[place[1]]) for place in places]
    begins_to_drop = False
    for (module, path, variable), adapter in zip(places, fitting, strict=True):
        if same_record(adapter.spec, variable.spec):
            variable[...] = adapter.m  # which keeps the variable of a trace
            continue
        # Not by `[...]`, which sets arrays alone.
        variable.copy_from(variable.replace(adapter.m, spec=adapter.spec))
        hold_given(module, path[-1].removesuffix(SUFFIX), adapter.spec)
        begins_to_drop |= hold_dropout(module, adapter.spec, seed)
    if begins_to_drop:
        told = "the new adapters have dropout, which the old ones lacked"
        warn(f"{told}: the model drops until model.eval()")


def _fitting(module: nnx.Module, path: Path, old: MoRAParam, new: Adapter) -> Adapter:
    """The new adapter as the place of the old one in a model takes it."""
    name, spec, own = "/".join(path), new.spec, old.spec
    m = as_jax_array(name, new.m)
    if isinstance(own, TrainedArray):  # the model knows its dtypes
        m, spec = m.astype(own.dtype), own
    else:  # of one layer where the model has the variable for one
        spec = spec.with_stack(own.stack_shape)
    m, sharding = Adapter(m, spec).in_model(), named_sharding(old)
    if sharding is not None and not isinstance(m, Tracer) and not m.committed:
        m = jax.device_put(m, sharding)
    if hasattr(module, "plain_class"):  # qwix drops in another way
        refuse_dropout(module, name.removesuffix(SUFFIX), spec)
    return Adapter(m, spec)
