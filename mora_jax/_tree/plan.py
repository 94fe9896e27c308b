"""A plan: the adapters of a model by the paths of their kernels."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mora_jax._common import trees
from mora_jax._common.messages import alike, nearest_paths, shown
from mora_jax._common.types import Path
from mora_jax._layer.adapter import Adapter, check_adapter
from mora_jax._plan.settings import FrozenMapping
from mora_jax._plan.spec import AdapterSpec, Spec, TrainedArray, check_same
from mora_jax._tree import paths


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Arrays of one kind, by a pattern of paths, that get no adapter, and why."""

    pattern: str
    count: int
    why: str
    multiplied: bool  # True if they multiply inputs, as far as is known

    def __str__(self) -> str:
        return f"{shown(self.pattern, self.count)}: {self.why}"


@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, AdapterSpec]):
    """The kernels of a model that get an adapter, and which one; static and hashable.

    A mapping of slash-joined paths to `AdapterSpec`s, in the order of the paths.
    `print(plan)` shows it as a table, and `init(plan)` makes its adapters, which know
    what they are: nothing else needs the plan.

    As a pytree its leaves are the arrays of its operators. A function under jit may
    take a plan and bare arrays, and make adapters of them by `plan.adapters`: then the
    directions of a `Subspace` are not constants of the program.

    Attributes:
      parts: {path: spec} of kernels, and of arrays that train themselves.
      base_parameters: The number of the base's parameters; 0 if nobody has said it.
      traced: True if a trace has shown that each kernel reaches the model's output only
        through its layer's product; embeddings need it. `==` ignores it and the rest.
      left_out: The other arrays of two or more axes, and why they are left out.
      unproven: (path, reason) for each adapted kernel that no trace has proven.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((64, 64))}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(rank=2))
      >>> plan.trainable_parameters, plan.total_parameters
      (256, 4352)
      >>> "fc/kernel" in plan, list(plan), plan["fc/kernel"].lora_rank
      (True, ['fc/kernel'], 2.0)
      >>> plan.adapters({"fc": {"kernel_mora": jnp.ones((16, 4, 4))}})
      {'fc': {'kernel_mora': Adapter(block_diagonal, float32[16, 4, 4])}}
    """

    parts: Mapping[Path, Spec]
    base_parameters: int = 0
    traced: bool = dataclasses.field(default=False, compare=False)
    left_out: tuple[LeftOut, ...] = dataclasses.field(default=(), compare=False)
    unproven: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", FrozenMapping(self.parts))

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, path: object) -> bool:
        # Else Mapping would ask `__getitem__`, whose error looks for similar paths.
        return path in self._by_name

    def __getitem__(self, path: str) -> AdapterSpec:
        if path not in self._by_name:
            raise KeyError(f"no adapter at {path!r}{nearest_paths(str(path), self)}")
        return self._by_name[path]

    @functools.cached_property
    def _by_name(self) -> Mapping[str, AdapterSpec]:
        return {"/".join(path): spec for path, spec in self.specs.items()}

    @functools.cached_property
    def specs(self) -> Mapping[Path, AdapterSpec]:
        """{path: spec} of the kernels."""
        return {p: s for p, s in self.parts.items() if isinstance(s, AdapterSpec)}

    @functools.cached_property
    def trained(self) -> Mapping[str, TrainedArray]:
        """{slash-joined path: meaning} of the arrays that train themselves."""
        parts = self.parts.items()
        return {"/".join(p): s for p, s in parts if isinstance(s, TrainedArray)}

    def __str__(self) -> str:
        lines = [summary(self)]
        if self.left_out:
            lines += ["left out:", *(f"  {kind}" for kind in self.left_out)]
        if self.unproven:
            lines.append("not proven (compare numbers, as docs/trace-check.md does):")
        for pattern, kind in alike(self.unproven, lambda pair: pair):
            lines.append(f"  {shown(pattern, len(kind))}: {kind[0][1]}")
        return "\n".join(lines)

    @property
    def trainable_parameters(self) -> int:
        """The number of parameters of all M's and all trained arrays."""
        return sum(spec.parameters for spec in self.parts.values())

    @property
    def total_parameters(self) -> int:
        """The number of parameters of the base and the adapters."""
        return self.base_parameters + self.trainable_parameters

    @property
    def shapes(self) -> paths.Found:
        """The adapters, with shapes instead of arrays."""
        made = paths.Found()
        for path, spec in self.parts.items():
            dtype = spec.param_dtype if isinstance(spec, AdapterSpec) else spec.dtype
            made[path] = Adapter(jax.ShapeDtypeStruct(spec.shape, dtype), spec)
        return made

    def adapters(self, tree: Any) -> paths.Tree:
        """Adapters of this plan from a tree of plain arrays, as another library has it.

        Args:
          tree: Nested mappings of arrays or shapes, an M at `<kernel>_mora`, and each
            array that trains itself at its own path; or adapters that mean the same.

        Raises:
          TypeError, ValueError: The tree lacks an array, has others, or one does not
            fit; or an adapter in it was made for another delta.
        """
        leaves, made = trees.located_leaves(tree, "tree"), {}
        for path, spec in self.parts.items():
            place = paths.place_of(path, spec)
            name = "/".join(place)
            if place not in leaves:
                raise ValueError(f"tree lacks {name!r}, which the plan has")
            adapter = leaves.pop(place)
            if not isinstance(adapter, Adapter):
                adapter = Adapter(trees.unboxed(adapter), spec)
            elif isinstance(spec, AdapterSpec):
                check_same("/".join(path), check_adapter(name, adapter).spec, spec)
            made[place] = check_adapter(name, adapter.replace(spec=spec))
        for path in leaves:
            raise ValueError(f"tree holds {'/'.join(path)!r}, which the plan lacks")
        return paths.nest(made)


jax.tree_util.register_pytree_with_keys(
    Plan,
    lambda plan: (
        [(jax.tree_util.DictKey("/".join(p)), s) for p, s in plan.parts.items()],
        (tuple(plan.parts), plan.base_parameters, plan.traced),
    ),
    lambda static, specs: Plan(dict(zip(static[0], specs, strict=True)), *static[1:]),
)
trees.WHOLE += (Plan,)
trees.REFUSED[Plan] = "the {}: adapters are init(plan)"


def check_plan(plan: Any, name: str = "plan") -> Plan:
    """Return `plan`, if it is a plan; `name` stands for it in the error message."""
    if not isinstance(plan, Plan):
        hint = "make one with mora_jax.plan, mora_jax.linen.plan or mora_jax.nnx.plan"
        raise TypeError(f"{name} must be a Plan, got {type(plan).__name__}: {hint}")
    return plan


def summary(plan_or_adapters: Any, *, collapse: bool = True) -> str:
    """A table: in, out, operator, r, q, parameters, share of the base.

    The column r shows the rank of the LoRA with as many parameters. If that is less
    than four fifths of the budget, q is shown as "64 of 90", with the q that the budget
    would buy: it is too large for the layer, or does not suit its widths. There are
    columns for alpha, scale, dropout and init if a layer departs from their defaults.
    Arrays that train themselves have "trained" for an operator, and their shape.

    Args:
      plan_or_adapters: A plan, which knows how large the base is, or adapters.
      collapse: True for one row of layers that differ only in numbers of their paths.

    Raises:
      TypeError, ValueError: Neither a plan nor adapters.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {f"l{k}": jnp.ones((64, 64)) + k for k in range(3)}
      >>> config = mora_jax.MoRAConfig(targets="l.*")
      >>> print(mora_jax.summary(mora_jax.plan(params, config)))
      path    in -> out  operator          r            q  scale  parameters  of base
      l* (3)   64 -> 64  block_diagonal  8.0  4 x 16 x 16   2.83       3,072   25.00%
      3 adapters: 3,072 trainable parameters, 25.00% of 12,288; LoRAs of the same rank
      have 3,072
    """
    plan = plan_or_adapters
    if not isinstance(plan, Plan):
        plan = Plan(paths.adapters_in(plan).specs)

    def kind(part: tuple[str, Spec]) -> tuple[object, ...]:
        name, spec = part
        operator, cells = getattr(spec, "operator", None), _cells(spec).values()
        return name, collapse or name, spec.shape, operator, *cells

    rows, base = [], plan.base_parameters
    for pattern, parts in alike((*plan.items(), *plan.trained.items()), kind):
        size, cells = sum(spec.parameters for _, spec in parts), _cells(parts[0][1])
        row = {"path": shown(pattern, len(parts)), **cells, "parameters": f"{size:,}"}
        rows.append(row | ({"of base": f"{size / base:.2%}"} if base else {}))
    lines = [""] * (1 + len(rows))
    for name in dict.fromkeys(name for row in rows for name in row):
        usual = USUAL.get(name)  # the column is there if a layer departs from it
        if any(row.get(name, usual) != usual for row in rows):
            cells = [name, *(row.get(name, "-") for row in rows)]
            put = str.ljust if name in ("path", "operator") else str.rjust
            width, pairs = max(map(len, cells)), zip(lines, cells, strict=True)
            lines = [f"{line}  {put(cell, width)}" for line, cell in pairs]
    table = "\n".join(line[2:].rstrip() for line in lines)
    counts = [(len(plan), "adapter")]
    counts += [(len(plan.trained), "trained array")] * bool(plan.trained)
    numbers = " and ".join(f"{n} {noun}{'s' * (n != 1)}" for n, noun in counts)
    size = plan.trainable_parameters
    of_base = f", {size / base:.2%} of {base:,}" if base else ""
    budgets = [(s.rank or 0) * s.parameters / s.lora_rank for s in plan.values()]
    known = len(plan) > 0 and all(budgets)  # not where a q was given, not a rank
    beside = f"; LoRAs of the same rank have {sum(budgets):,.0f}" if known else ""
    return f"{table}\n{numbers}: {size:,} trainable parameters{of_base}{beside}"


USUAL = {"alpha": "1", "scale": "1", "dropout": "0", "init": "zeros"}
"""The cells of settings that `summary` shows where they are others."""


def _cells(part: Spec) -> dict[str, str]:
    """The cells of a part of a plan that say what it is."""
    if isinstance(part, TrainedArray):
        shape = " x ".join(map(str, part.shape)) or "1"
        return {"in -> out": shape, "operator": "trained"}
    op, asked = part.operator, part.asked_square_rank
    q = " x ".join(map(str, op.m_shape)) if len(op.m_shape) > 2 else op.square_rank
    return {
        "in -> out": f"{part.in_features} -> {part.out_features}",
        "operator": part.operator.label,
        "r": f"{part.lora_rank:.1f}",
        "q": f"{q} of {asked}" if asked else f"{q}",
        "alpha": f"{part.alpha:g}",
        "scale": f"{part.scale:.3g}",
        "dropout": f"{part.dropout:g}",
        "init": part.init,
    }
