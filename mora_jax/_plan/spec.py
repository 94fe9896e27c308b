"""Meanings of trained arrays: adapters of kernels, and arrays that train themselves."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from mora_jax._common.axes import features, order_in_model, sizes, without
from mora_jax._common.checks import check_dtype, check_floating, check_param_dtype
from mora_jax._common.messages import warn
from mora_jax._common.types import Path, Shape
from mora_jax._mesh.places import KernelLayout
from mora_jax._plan import settings
from mora_jax._plan.settings import SETTINGS, AdapterSettings, KernelConfig, MoRAConfig
from mora_jax.operators import _registry
from mora_jax.operators._base import Operator
from mora_jax.operators._pytree import by_layer, register_pytree

SUFFIX = "_mora"
"""The end of the name of an M, after the name of its kernel."""


@dataclasses.dataclass(frozen=True)
class AdapterSpec(AdapterSettings):
    """The meaning of an M: everything of a kernel's adapter but M; hashable.

    It lacks the kernel's path, so that equal layers have equal specs and programs.

    Attributes:
      operator: The maps C and D.
      kernel_shape: The kernel's shape, including its stack axes.
      axes: The meaning of the kernel's axes, a letter each: "i", "o" or "s".
      alpha, scale, dropout, init, param_dtype, execution: As in `MoRAConfig`.
      layout: Places of features on a mesh, by `sharding.on_mesh`; None on one device.
      base_digest: Digests of the kernel that the adapter was trained on, one for each
        index of its stack axes; None if no file holds them. A program that JAX traces
        does not carry them.
      rank: The budget that q was chosen by; None if q itself was given.

    `==` ignores `init`, `param_dtype`, `layout`, `base_digest` and `rank`, which do not
    change the delta.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((64, 64))}}
      >>> spec = mora_jax.plan(params, mora_jax.MoRAConfig(rank=2))["fc/kernel"]
      >>> spec.operator.name, spec.shape, spec.parameters
      ('block_diagonal', (16, 4, 4), 256)
    """

    # What decides the delta, or what a program computes, is compared: two adapters that
    # differ in it must not share a program. The rest says where an adapter comes from
    # or where it is, and is carried along without being compared. So all adapters of
    # one delta mix in `jax.tree.map`, in optimizers' states and in checkpoints.
    #
    # A compiled function returns the specs that it was traced with. For `rank`, `init`
    # and `param_dtype` that changes no number. A `layout` belongs to a mesh, and arrays
    # on another mesh make JAX trace the function again. Another `base_digest` would be
    # wrong, so traced programs do not know it: see `with_base`.
    operator: Operator
    kernel_shape: Shape
    axes: str = "io"
    layout: KernelLayout | None = settings.carried(None)
    base_digest: tuple[str, ...] | None = settings.carried(None)
    rank: int | None = settings.carried(None)

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator):
            raise TypeError(f"operator must be an Operator, got {self.operator!r}")
        expected = features(self.kernel_shape, self.axes)
        if (widths := (self.in_features, self.out_features)) != expected:
            kernel = f"a kernel of shape {self.kernel_shape} with axes {self.axes!r}"
            rule = f"operator must have the features {expected} of {kernel}"
            raise ValueError(f"{rule}, got {widths}")
        for array in by_layer(self.operator)[0]:
            if (stack := tuple(array.shape[:-2])) != self.stack_shape:
                raise ValueError(
                    f"arrays of {self.operator.name} must be of one kernel or of the "
                    f"stack {self.stack_shape}, got {stack}; in a model they are taken "
                    "apart by linen.wrap and nnx.wrap"
                )
        super().__post_init__()

    @classmethod
    def from_config(
        cls,
        config: KernelConfig | None,
        kernel_shape: Shape,
        axes: str = "io",
        *,
        kernel_dtype: DTypeLike | None = None,
        name: str = "kernel",
    ) -> "AdapterSpec":
        """The adapter that `config` asks for on a kernel.

        Args:
          config: The settings; None for the default ones.
          kernel_shape: The kernel's shape.
          axes: The meaning of the kernel's axes, a letter each.
          kernel_dtype: The kernel's dtype, for a `config.param_dtype` of None.
          name: The kernel's path, for a warning.

        Raises:
          ValueError: The axes do not fit the shape, or the kernel is too small.
        """
        # A plan has chosen the settings of the kernel already; users give a MoRAConfig.
        if not isinstance(config, KernelConfig):
            config = settings.check_config(config)
        if isinstance(config, MoRAConfig) and config.train:
            rule = f"train must be empty for one layer, got {config.train}"
            raise ValueError(f"{rule}: it is for the plan of a whole model")
        operator = _operator(config, *features(kernel_shape, axes))
        own = {name: getattr(config, name) for name in SETTINGS}
        own["scale"] = 1.0 if config.scale == "paper" else operator.fine_tuning_scale
        if config.param_dtype is None:
            what = f"{name}: param_dtype"
            own["param_dtype"] = check_param_dtype(what, kernel_dtype)
        budget = config.budget if config.square_rank is None else None
        spec = cls(operator, kernel_shape, axes, rank=budget, **own)
        q, asked = operator.square_rank, spec.asked_square_rank or 0
        # Only min(in, out) cuts q to less than half. The default rank asks for nothing.
        if asked > 2 * q and config.rank is not None:
            alike = re.sub(r"\d+", "*", name)  # layers of a kind have one warning
            told = f"{alike}: rank={budget} asks for q = {asked}, and {q} is the widest"
            warn(f"{told} that fits; say square_rank={q} in overrides if it is meant")
        return spec

    @property
    def factor(self) -> float:
        """The factor of the delta: alpha times scale."""
        return self.alpha * self.scale

    @property
    def in_features(self) -> int:
        """The product of the kernel's input axes."""
        return self.operator.in_features

    @property
    def out_features(self) -> int:
        """The product of the kernel's output axes."""
        return self.operator.out_features

    @property
    def stack_shape(self) -> Shape:
        """The sizes of the kernel's stack axes."""
        return sizes(self.kernel_shape, self.axes, "s")

    @property
    def shape(self) -> Shape:
        """The shape of M: (*stack, q, q)."""
        return (*self.stack_shape, *self.operator.m_shape)

    @property
    def stacked_in_front(self) -> bool:
        """True if no stack axis of the kernel is behind its features."""
        return "s" not in self.axes.lstrip("s")

    @property
    def shape_in_model(self) -> Shape:
        """The shape of M in a model, with stack axes where the kernel has them."""
        shape = self.shape
        return tuple([shape[k] for k in order_in_model(self.axes, len(shape))])

    @property
    def parameters(self) -> int:
        """The number of parameters of M."""
        return math.prod(self.shape)

    @property
    def lora_rank(self) -> float:
        """The rank of a LoRA with as many parameters: q^2 / (in + out)."""
        return math.prod(self.operator.m_shape) / (self.in_features + self.out_features)

    @property
    def asked_square_rank(self) -> int | None:
        """The q that the budget would buy, if less than four fifths of it are used."""
        if self.rank is None or 5 * self.lora_rank >= 4 * self.rank:
            return None
        asked = self.operator.widest(self.rank, self.in_features, self.out_features, 1)
        return asked if asked > self.operator.square_rank else None

    def start_key(self, path: Path) -> PRNGKeyArray:
        """The key that path and operator determine for what is random at the start."""
        # The same on every platform, whatever JAX's default kind of key is.
        seed = crc32(repr((path, self.operator)).encode())
        return jax.random.key(seed, impl="threefry2x32")

    def start(self, path: Path, key: PRNGKeyArray | None = None) -> jax.Array:
        """The M of the kernel at `path` at its start, of the shape `shape`."""
        if key is None and not self.operator.linear:
            key = self.start_key(path)
        return self.operator.start(self.stack_shape, self.init, key, self.param_dtype)

    def with_base(self, digest: tuple[str, ...] | None) -> "AdapterSpec":
        """The same adapter, of a base with this digest; None if it is not known."""
        if self.base_digest == digest:
            return self
        return dataclasses.replace(self, base_digest=digest)

    @property
    def meaning(self) -> dict[str, Any]:
        """The settings that decide an M's delta, as JSON values."""
        own = operator_settings(self.operator).items()
        return {
            **{f"operator.{name}": value for name, value in own},
            "kernel_shape": list(self.kernel_shape),
            "axes": self.axes,
            "square_rank": self.operator.square_rank,
            **{name: getattr(self, name) for name in SETTINGS if SETTINGS[name]},
        }

    def with_stack(self, stack: Shape) -> "AdapterSpec":
        """The same adapter for a stack of such kernels, or for one of this stack."""
        # Flax's lifted transformations add stack axes to any arrays, or take them off.
        own = self.stack_shape
        more = len(stack) - len(own)
        for taken in self.stacks(-more):
            if sizes(*self._without(taken), "s") == stack:
                return self.one_of(taken)
        if more <= 0 or stack[more:] != own:
            raise ValueError(f"the stack of M must be {own} or within it, got {stack}")
        shape, axes = (*stack[:more], *self.kernel_shape), "s" * more + self.axes
        changes: Any = {"kernel_shape": shape, "axes": axes, "base_digest": None}
        if layout := self.layout:
            split = ((),) * more + layout.mesh_axes
            changes["layout"] = dataclasses.replace(layout, mesh_axes=split)
        return dataclasses.replace(self, **changes)

    def stacks(self, count: int) -> Iterator[tuple[int, ...]]:
        """The choices of `count` stack axes of the kernel, the first ones first."""
        places = [k for k, letter in enumerate(self.axes) if letter == "s"]
        return itertools.combinations(places, count) if count >= 0 else iter(())

    def one_of(self, taken: Sequence[int], **operator: Operator) -> "AdapterSpec":
        """The same adapter for one kernel of the stack along the axes `taken`."""
        # Its operator is to be given, as `operator`, if each has its own.
        if not taken and not operator:
            return self
        (shape, axes), layout = self._without(taken), self.layout
        if layout:
            split = without(layout.mesh_axes, taken)
            layout = dataclasses.replace(layout, mesh_axes=split)
        # Digests are of the whole stack.
        own: Any = {"kernel_shape": shape, "axes": axes, "base_digest": None}
        return dataclasses.replace(self, **own, layout=layout, **operator)

    def _without(self, taken: Sequence[int]) -> tuple[Shape, str]:
        return without(self.kernel_shape, taken), "".join(without(self.axes, taken))


register_pytree(AdapterSpec, ["operator"])


def same_record(one: Any, other: Any) -> bool:
    """True if two specs agree in all of their fields, also in those that == ignores."""
    if type(one) is not type(other):
        return False
    names = [field.name for field in dataclasses.fields(one)]
    return all(getattr(one, name) == getattr(other, name) for name in names)


def many_if(shape: Shape, one: Shape) -> str:
    """Remedy, in a message, where `shape` is of many arrays, each of a shape `one`."""
    # As `serving.stack` and `serving.select` make them.
    many = "; many adapters are for jax.vmap, which calls a model with each of them"
    return many if shape and tuple(shape[1:]) == tuple(one) else ""


def _operator(config: KernelConfig, ins: int, outs: int) -> Operator:
    """The operator that `config` asks for, between `ins` and `outs` features."""
    q, name = config.square_rank, config.operator
    if q is None:
        # "auto" goes by the budget, and not by the q that is left of it.
        name = _registry.resolve_auto(name, config.budget)
        q = _registry.square_rank(config.budget, ins, outs, name, config.multiple_of)
    else:
        _registry.refuse_auto(name, q)
        kind, _ = _registry.parse_spec(name)
        if q > min(ins, outs) and _registry.OPERATORS[kind].square:
            raise ValueError(
                "square_rank must be at most min(in_features, out_features) = "
                f"{min(ins, outs)}, got {q}"
            )
    return _registry.make_operator(name, ins, outs, q, seed=config.seed)


def operator_settings(operator: Operator) -> dict[str, Any]:
    """An operator's name and settings without sizes, and digests of given arrays."""
    # Arrays that the settings determine are not compared.
    fields = {field.name for field in dataclasses.fields(operator) if field.compare}
    fields -= {size.name for size in dataclasses.fields(Operator)}
    # Nothing is known of the numbers of arguments of a function under jit.
    traced = any(isinstance(getattr(operator, k), Tracer) for k in operator.arrays)
    fields |= {"digests"} if operator.given and not traced else set()
    values = {name: getattr(operator, name) for name in sorted(fields)}
    for name, value in values.items():
        if isinstance(value, Operator):
            values[name] = operator_settings(value)
    return {"name": operator.name, **values}


def check_same(name: str, made_for: AdapterSpec, used_with: AdapterSpec) -> None:
    """Raise unless both specs give the M of the kernel `name` the same delta."""
    made = _flat(made_for.meaning)
    used = _flat(used_with.meaning)
    # If an operator lacks a setting of the other one, their names differ already.
    keys = [key for key in made if key in used and made[key] != used[key]]
    told = [f"{k} {made[k]!r}, not {used[k]!r}" for k in keys if "digests" not in k]
    if told:
        raise ValueError(f"{name}{SUFFIX} was made for {' and '.join(told)}")
    if keys:
        raise ValueError(
            f"{name}{SUFFIX} was made for other directions ({made_for.operator.label}):"
            " both must have the same ones, as adapters of one call of"
            " mora_jax.input_damping or mora_jax.directions have"
        )


def _flat(meaning: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A meaning whose nested settings have names such as "operator.inner.name"."""
    flat: dict[str, Any] = {}
    for key, value in meaning.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@dataclasses.dataclass(frozen=True)
class TrainedArray:
    """The meaning of a copy of an array of the base: a norm's scale, a bias, a head.

    The adapters hold the copy under the array's own path, and training changes it. The
    model computes with it, rounded to the base's dtype; so `merge` puts it into a base.

    Attributes:
      shape: The array's shape.
      dtype, base_dtype: The dtypes of the copy and of the base's array. `==` ignores
        the first.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(train="fc/bias"))
      >>> plan.trained["fc/bias"].shape
      (8,)
    """

    shape: Shape
    dtype: DTypeLike = settings.setting(jnp.float32, check_dtype, compare=False)
    base_dtype: DTypeLike = settings.setting(jnp.float32, check_dtype)

    def __post_init__(self) -> None:
        settings.check_settings(self)

    @classmethod
    def of(cls, name: str, leaf: Any, param_dtype: DTypeLike | None) -> "TrainedArray":
        """The base's array or shape `leaf`; the copy has `param_dtype`, or is wider."""
        check_floating(leaf, name, "take it out of train")
        if jnp.dtype(leaf.dtype).itemsize < 2:
            raise TypeError(
                f"{name} must have at least 16 bits, got {leaf.dtype}; "
                "take it out of train"
            )
        # A step of training is smaller than what 16 bits can tell beside the array.
        dtype = jnp.promote_types(leaf.dtype, param_dtype or leaf.dtype)
        return cls(tuple(leaf.shape), dtype, leaf.dtype)

    @property
    def parameters(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)


register_pytree(TrainedArray, [])

Spec = AdapterSpec | TrainedArray
"""The meaning of a trained array."""
Specs = Mapping[Path, Spec]


def check_alike(specs: Specs, like: Specs, whose: str, *, meaning: bool = True) -> None:
    """Raise unless adapters are for the arrays of others, deltas and base included.

    Without `meaning` other deltas of the same arrays will do.
    """
    for path in {**specs, **like}:
        name, own, other = "/".join(path), specs.get(path), like.get(path)
        if (array := _array_of(own)) != (planned := _array_of(other)):
            shapes = [getattr(spec, "kernel_shape", ()) for spec in (own, other)]
            hint = many_if(*shapes)
            if isinstance(own, TrainedArray) or isinstance(other, TrainedArray):
                hint = "; use the plan that made the adapters, with its train="
            raise ValueError(
                f"adapters have {array} at {name!r}, {whose} {planned}{hint}"
            )
        if meaning and isinstance(own, AdapterSpec) and isinstance(other, AdapterSpec):
            check_same(name, own, other)
            if len({own.base_digest, other.base_digest} - {None}) > 1:  # which few know
                rule = "adapters must be of one base"
                raise ValueError(f"{rule}, got different weights of {name!r}")


def _array_of(spec: Spec | None) -> str:
    """The array of the base that a spec is for, in a message."""
    if isinstance(spec, AdapterSpec):
        return f"a kernel {spec.kernel_shape} with axes {spec.axes!r}"
    return "nothing" if spec is None else f"an array {spec.shape} to train"
