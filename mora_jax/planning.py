"""Which kernels get an adapter, and which."""

import dataclasses
import difflib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from flax.core.meta import AxisMetadata

from mora_jax.config import DEFAULT_TARGETS, MoRAConfig, default_targets
from mora_jax.spec import SUFFIX, AdapterSpec, check_kernel

Path = tuple[str, ...]

ATTENTION_AXES = (
    (r"(.*/)?(query|key|value)/kernel", "ioo"),
    (r"(.*/)?out/kernel", "iio"),
)
"""Kernels of three axes in Flax's own attention modules, known by name."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The adapters of a model: static, hashable, printable.

    Iterating gives the `AdapterSpec`s in the order of their paths; `plan[path]` is one
    of them.

    Attributes:
      specs: one for each adapted kernel.
      base_parameters: how many numbers the params tree holds without adapters.

    Example::

      >>> import jax.numpy as jnp
      >>> from mora_jax import MoRAConfig, plan
      >>> layers = plan({"fc": {"kernel": jnp.ones((64, 64))}}, MoRAConfig(rank=2))
      >>> layers.trainable_parameters, layers.total_parameters
      (256, 4352)
      >>> layers["fc/kernel"].lora_rank
      2.0
    """

    specs: tuple[AdapterSpec, ...]
    base_parameters: int

    def __iter__(self) -> Iterator[AdapterSpec]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, path: str) -> AdapterSpec:
        for spec in self.specs:
            if spec.name == path:
                return spec
        raise KeyError(
            f"no adapter at {path!r}{nearest(path, [s.name for s in self.specs])}"
        )

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


def plan(
    params_or_shapes: Any,
    config: MoRAConfig | None = None,
    *,
    axes: Mapping[str, str] | None = None,
) -> Plan:
    """Choose the kernels to adapt, and an operator and square rank for each.

    Args:
      params_or_shapes: the model's params, any pytree of arrays, or its
        `jax.eval_shape`. Paths are the slash-joined keys.
      config: what to adapt, and how.
      axes: {path: axes} of all kernels that can be adapted, as `linen.plan` finds them;
        an override still wins. Without, a kernel of two axes is (in, out), and Flax's
        attention kernels of three are known by name.

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
    config = config or MoRAConfig()
    leaves = named_leaves(params_or_shapes)
    kernels = {n: leaf for n, (_, leaf) in leaves.items() if len(leaf.shape) >= 2}
    patterns = config.targets
    if axes is not None and patterns == DEFAULT_TARGETS:
        kernels = {name: leaf for name, leaf in kernels.items() if name in axes}
        patterns = (default_targets("[^/]+"),)
    targets = _select("targets", patterns, kernels, leaves)
    excluded = _select("exclude", config.exclude, leaves, leaves)
    targets = {n: None for n in kernels if n in targets and n not in excluded}
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
            kernel_axes = override or _axes(name, leaf, axes)
            specs.append(
                AdapterSpec.from_config(
                    settings, tuple(leaf.shape), kernel_axes, path=path
                )
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    size = sum(math.prod(leaf.shape) for _, leaf in leaves.values())
    return Plan(tuple(specs), size)


def named_leaves(params: Any) -> dict[str, tuple[Path, Any]]:
    """{slash-joined path: (path, leaf)} of a tree of arrays or shapes, unboxed."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_boxed)
    leaves: dict[str, tuple[Path, Any]] = {}
    for keys, leaf in flat:
        path = tuple(key_name(key) for key in keys)
        name = "/".join(path)
        leaf = leaf.unbox() if _boxed(leaf) else leaf
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(
                f"params must hold arrays only, got {type(leaf).__name__} at {name!r}"
            )
        if name in leaves:
            raise ValueError(f"params has two leaves of the path {name!r}")
        leaves[name] = path, leaf
    if not leaves:
        raise ValueError("params holds no array")
    return leaves


def key_name(key: Any) -> str:
    """What a pytree key is called in a path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _boxed(leaf: Any) -> bool:
    return isinstance(leaf, AxisMetadata)


def _select(
    field: str, patterns: Any, candidates: Mapping[str, Any], known: Mapping[str, Any]
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
                "layer of a known class)",
                "overrides": " that is adapted",
            }
            raise ValueError(
                f"{field}: {shown} matches no path{wanted.get(field, '')}"
                + nearest(pattern, known)
            )
        selected |= matched
    return selected


def nearest(pattern: str, names: Iterable[str]) -> str:
    """The names most like `pattern`, as the end of a message."""
    words = re.sub(r"\\?[.*+?()|\[\]^$\\]+", " ", pattern).strip(" /")
    depth = words.count("/") + 1
    # Compared from their ends, as deep as the pattern goes: layers of the same kind are
    # one candidate, and a wrong name counts for more than a long way to it.
    ends: dict[str, str] = {}
    for name in names:
        ends.setdefault("/".join(name.split("/")[-depth:]), name)
    close = difflib.get_close_matches(words, ends, n=3, cutoff=0.0)
    shown = ", ".join(repr(ends[end]) for end in close)
    return f"; the nearest are {shown}" if close else ""


def _axes(name: str, leaf: Any, known: Mapping[str, str] | None) -> str:
    """The axes of a kernel: as known, or by its name and shape."""
    ndim = len(leaf.shape)
    if known is not None:
        if name not in known:
            raise ValueError(
                "no layer of a known class uses it in this call; "
                "see mora_jax.register_layer"
            )
        return known[name]
    if ndim == 2:
        return "io"
    for pattern, axes in ATTENTION_AXES:
        if ndim == 3 and re.fullmatch(pattern, name):
            return axes
    raise ValueError(
        f"which of its axes {tuple(leaf.shape)} are features is not known; say it with "
        f"overrides={{{name!r}: {{'axes': ...}}}}, or plan with mora_jax.linen.plan"
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


def adapter_path(spec: AdapterSpec) -> Path:
    """Where M lives, in the adapters and in a combined tree."""
    return (*spec.path[:-1], spec.path[-1] + SUFFIX)


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
    for spec in plan:
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
