"""Which kernels get an adapter, and which."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from mora_jax.config import DEFAULT_TARGETS, MoRAConfig, default_targets
from mora_jax.paths import Path, named_leaves, nearest
from mora_jax.products import Product
from mora_jax.spec import AdapterSpec, check_kernel

ATTENTION_AXES = (
    (r"(.*/)?(query|key|value)/kernel", "ioo"),
    (r"(.*/)?out/kernel", "iio"),
)
"""Kernels of three axes in Flax's own attention modules, known by name."""


@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, AdapterSpec]):
    """The adapters of a model, by the paths of their kernels; static and hashable.

    A mapping of paths to `AdapterSpec`s, in the order of the paths. `print(plan)` shows
    it as a table.

    Attributes:
      specs: one for each adapted kernel.
      base_parameters: how many numbers the params tree holds without adapters.
      traced: whether a trace has shown who reads the kernels; embeddings need it. Two
        plans that differ in this alone are equal.

    Example::

      >>> import jax.numpy as jnp
      >>> from mora_jax import MoRAConfig, plan
      >>> layers = plan({"fc": {"kernel": jnp.ones((64, 64))}}, MoRAConfig(rank=2))
      >>> layers.trainable_parameters, layers.total_parameters
      (256, 4352)
      >>> "fc/kernel" in layers, list(layers), layers["fc/kernel"].lora_rank
      (True, ['fc/kernel'], 2.0)
    """

    specs: tuple[AdapterSpec, ...]
    base_parameters: int
    traced: bool = dataclasses.field(default=False, compare=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, path: object) -> bool:
        return path in self._by_path

    def __getitem__(self, path: str) -> AdapterSpec:
        if path not in self._by_path:
            raise KeyError(f"no adapter at {path!r}{nearest(str(path), self)}")
        return self._by_path[path]

    @functools.cached_property
    def _by_path(self) -> Mapping[str, AdapterSpec]:
        return {spec.name: spec for spec in self.specs}

    def __str__(self) -> str:
        return summary(self)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers all M's hold together."""
        return sum(spec.parameters for spec in self.specs)

    @property
    def total_parameters(self) -> int:
        """Base and adapters together."""
        return self.base_parameters + self.trainable_parameters


def plan(params_or_shapes: Any, config: MoRAConfig | None = None) -> Plan:
    """Choose the kernels to adapt, and an operator and square rank for each.

    This goes by names and shapes alone: a kernel of two axes is (in, out), and Flax's
    attention kernels of three are known by name. `linen.plan` and `nnx.plan` ask the
    model itself.

    Args:
      params_or_shapes: the model's params, any pytree of arrays, or its
        `jax.eval_shape`. Paths are the slash-joined keys.
      config: what to adapt, and how.

    Raises:
      TypeError: a leaf that is no array, or a target that is not floating-point.
      ValueError: a pattern that matches nothing, axes that are not known, a kernel that
        is found twice or shared by two paths, a rank that does not fit.

    Example::

      >>> import jax.numpy as jnp
      >>> from mora_jax import MoRAConfig, plan
      >>> params = {"fc": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}}
      >>> print(plan(params, MoRAConfig(rank=2)))
      path       in -> out  operator   r     q  parameters  of base
      fc/kernel   64 -> 64  rotation   2.0  16         256     6.15%
      1 adapter: 256 trainable parameters, 6.15% of 4,160
    """
    return _plan(params_or_shapes, config or MoRAConfig(), None)


def plan_products(
    params: Any, config: MoRAConfig | None, products: Mapping[str, Product]
) -> Plan:
    """`plan` where it is known what the layers compute.

    Args:
      params: as in `plan`.
      config: what to adapt; its default targets are the dense layers.
      products: {path: the product} of all kernels that can be adapted.
    """
    return _plan(params, config or MoRAConfig(), products)


def _plan(
    params: Any, config: MoRAConfig, products: Mapping[str, Product] | None
) -> Plan:
    leaves = named_leaves(params)
    kernels = {n: leaf for n, (_, leaf) in leaves.items() if len(leaf.shape) >= 2}
    patterns = config.targets
    if products is not None and patterns == DEFAULT_TARGETS:
        dense = {name for name, product in products.items() if product.dense}
        kernels = {name: leaf for name, leaf in kernels.items() if name in dense}
        patterns = (default_targets("[^/]+"),)
    targets = _select("targets", patterns, kernels, leaves)
    excluded = _select("exclude", config.exclude, leaves, leaves)
    targets = sorted(targets - excluded, key=lambda name: leaves[name][0])
    if not targets:
        raise ValueError("exclude leaves no kernel to adapt")
    _select("overrides", config.overrides, targets, targets)
    _refuse_shared(leaves, targets)
    specs = []
    for name in targets:
        path, leaf = leaves[name]
        check_kernel(leaf, name)
        settings, override = config.settings(name)
        try:
            axes = override or _axes(name, leaf, products)
            spec = AdapterSpec.from_config(
                settings, tuple(leaf.shape), axes, path=path, kernel_dtype=leaf.dtype
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        specs.append(spec)
    size = sum(math.prod(leaf.shape) for _, leaf in leaves.values())
    return Plan(tuple(specs), size)


def _select(
    field: str, patterns: Any, candidates: Iterable[str], known: Iterable[str]
) -> set[str]:
    """Names that any pattern matches; a pattern that matches none is an error."""
    selected: set[str] = set()
    for pattern in patterns:
        regex = re.compile(pattern)
        matched = {name for name in candidates if regex.fullmatch(name)}
        if not matched:
            default = pattern in (*DEFAULT_TARGETS, default_targets("[^/]+"))
            shown = "the default" if default else repr(pattern)
            wanted = {
                "targets": " of a kernel that can be adapted (two or more axes, in a "
                "layer of which it is known what it computes)",
                "overrides": " that is adapted",
            }
            raise ValueError(
                f"{field}: {shown} matches no path{wanted.get(field, '')}"
                + nearest(pattern, known)
            )
        selected |= matched
    return selected


def _axes(name: str, leaf: Any, products: Mapping[str, Product] | None) -> str:
    """The axes of a kernel: by what its layer computes, or by its name and shape."""
    ndim = len(leaf.shape)
    if products is not None:
        if name not in products:
            raise ValueError(
                "it is not known how a layer uses it: teach its class with "
                "mora_jax.register_layer, and plan with inputs of a call"
            )
        axes = products[name].axes
        return "s" * (ndim - len(axes)) + axes
    if ndim == 2:
        return "io"
    for pattern, axes in ATTENTION_AXES:
        if ndim == 3 and re.fullmatch(pattern, name):
            return axes
    raise ValueError(
        f"which of its axes {tuple(leaf.shape)} are features is not known; plan with "
        "mora_jax.linen.plan or mora_jax.nnx.plan, or say "
        f"overrides={{{name!r}: {{'axes': ...}}}}"
    )


def _refuse_shared(leaves: Mapping[str, tuple[Path, Any]], targets: Any) -> None:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, (_, leaf) in leaves.items():
        if not isinstance(leaf, jax.ShapeDtypeStruct):  # those are often reused
            owners[id(leaf)].append(name)
    for names in owners.values():
        if len(names) > 1 and any(name in targets for name in names):
            raise ValueError(
                f"the kernel at {names[0]!r} is shared with {names[1]!r}: an adapter "
                "on one would not reach the other; exclude both, or copy the kernel"
            )


def summary(plan: Plan, *, collapse: bool = True) -> str:
    """The plan as a table: in, out, operator, r, q, parameters, share of the base.

    Args:
      plan: the plan.
      collapse: one row for all layers that differ only in the numbers of their paths.

    Returns:
      The table as text; r is the rank of the LoRA with as many parameters.

    Example::

      >>> import jax.numpy as jnp
      >>> from mora_jax import plan, summary
      >>> params = {f"l{k}": {"kernel": jnp.ones((64, 64)) + k} for k in range(3)}
      >>> print(summary(plan(params)))
      path           in -> out  operator    r   q  parameters  of base
      l*/kernel (3)   64 -> 64  rotation  8.0  32       3,072   25.00%
      3 adapters: 3,072 trainable parameters, 25.00% of 12,288
    """
    groups: dict[tuple[Any, ...], list[AdapterSpec]] = defaultdict(list)
    for spec in plan.specs:
        key = re.sub(r"\d+", "*", spec.name) if collapse else spec.name
        groups[key, spec.shape, spec.kernel_shape, spec.operator].append(spec)
    rows = [("path", "in -> out", "operator", "r", "q", "parameters", "of base")]
    for (name, *_), specs in groups.items():
        spec, size = specs[0], sum(spec.parameters for spec in specs)
        rows.append(
            (
                spec.name if len(specs) == 1 else f"{name} ({len(specs)})",
                f"{spec.in_features} -> {spec.out_features}",
                spec.operator.name,
                f"{spec.lora_rank:.1f}",
                str(spec.operator.square_rank),
                f"{size:,}",
                f"{size / plan.base_parameters:.2%}",
            )
        )
    left = {0, 2}
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if k in left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    size = plan.trainable_parameters
    lines.append(
        f"{len(plan)} adapter{'s' * (len(plan) != 1)}: {size:,} trainable parameters, "
        f"{size / plan.base_parameters:.2%} of {plan.base_parameters:,}"
    )
    return "\n".join(lines)
