"""A plan: the adapters of a model by the paths of their kernels."""

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from mora_jax._common.suggestions import alike, nearest_paths, shown
from mora_jax._plan.settings import AdapterSettings
from mora_jax._plan.spec import AdapterSpec, Part, TrainedArray, check_same


def _cells(part: Part) -> dict[str, str]:
    """The cells of a part of the plan that say what it is."""
    if isinstance(part, TrainedArray):
        shape = " x ".join(map(str, part.shape)) or "1"
        return {"in -> out": shape, "operator": "trained"}
    q, asked = part.operator.square_rank, part.asked_square_rank
    return {
        "in -> out": f"{part.in_features} -> {part.out_features}",
        "operator": part.operator.name,
        "r": f"{part.lora_rank:.1f}",
        "q": f"{q} of {asked}" if asked else f"{q}",
        "alpha": f"{part.alpha:g}",
        "scale": f"{part.scale:.3g}",
        "dropout": f"{part.dropout:g}",
        "init": part.init,
    }


def _lines(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The rows under the names of their columns, with "-" for what a row lacks."""
    cells = [columns, *([row.get(name, "-") for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if name in ("path", "operator") else cell.rjust(width)
            for name, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _share(size: int, base_parameters: int) -> str:
    return f"{size / base_parameters:.2%}" if base_parameters else "-"


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Arrays of one kind, by the pattern of their paths, that get no adapter, and why.

    They are `multiplied` if they multiply inputs, as far as is known.
    """

    pattern: str
    count: int
    why: str
    multiplied: bool

    def __str__(self) -> str:
        return f"{shown(self.pattern, self.count)}: {self.why}"


@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, AdapterSpec]):
    """The adapters of a model, by the paths of their kernels; static and hashable.

    A mapping of paths to `AdapterSpec`s, in the order of the paths. `print(plan)` shows
    it as a table. The arrays of its operators are its leaves as a pytree, and constants
    of a program that uses it. If those are too large, as a `Subspace` may be, give the
    plan to a function under jit as an argument.

    Attributes:
      specs: The adapters, one `AdapterSpec` for each adapted kernel.
      base_parameters: The number of parameters of the model without adapters.
      traced: True if a trace has shown that each kernel reaches the model's output only
        through the product of its layer; embeddings need it. Equality ignores this,
        `left_out` and `unproven`.
      left_out: The other arrays of two or more axes, and why they are left out.
      unproven: (path, reason) for each adapted kernel that no trace has proven.
      trained: The arrays that `MoRAConfig(train=...)` names; the adapters hold copies.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((64, 64))}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(rank=2))
      >>> plan.trainable_parameters, plan.total_parameters
      (256, 4352)
      >>> "fc/kernel" in plan, list(plan), plan["fc/kernel"].lora_rank
      (True, ['fc/kernel'], 2.0)
      >>> plan.digest() == mora_jax.plan(params).digest()
      False
    """

    specs: tuple[AdapterSpec, ...]
    base_parameters: int
    traced: bool = dataclasses.field(default=False, compare=False)
    left_out: tuple[LeftOut, ...] = dataclasses.field(default=(), compare=False)
    unproven: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False)
    trained: tuple[TrainedArray, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, path: object) -> bool:
        # Else Mapping would ask `__getitem__`, whose error looks for similar paths.
        return path in self._by_path

    def __getitem__(self, path: str) -> AdapterSpec:
        if path not in self._by_path:
            raise KeyError(f"no adapter at {path!r}{nearest_paths(str(path), self)}")
        return self._by_path[path]

    @functools.cached_property
    def _by_path(self) -> Mapping[str, AdapterSpec]:
        return {spec.name: spec for spec in self.specs}

    def __str__(self) -> str:
        lines = [summary(self)]
        if self.left_out:
            lines += ["left out:", *(f"  {kind}" for kind in self.left_out)]
        if self.unproven:
            lines.append(
                "not proven (mora_jax.diagnostics.check compares numbers instead):"
            )
        for pattern, kind in alike(self.unproven, lambda pair: pair):
            lines.append(f"  {shown(pattern, len(kind))}: {kind[0][1]}")
        return "\n".join(lines)

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the settings that decide the meaning of the M's.

        Plans of equal digests make the same deltas of the same M's: compare it before
        use where M's are stored without their plan. It covers `AdapterSpec.meaning` by
        path, and the paths and shapes of the arrays that train themselves.
        """
        meanings = {spec.name: spec.meaning for spec in self.specs}
        meanings |= {a.name: {"trained": list(a.shape)} for a in self.trained}
        # The same text for the same meanings, in any order and any version of Python.
        text = json.dumps(meanings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def trainable_parameters(self) -> int:
        """The number of parameters of all M's and all trained arrays."""
        return sum(part.parameters for part in (*self.specs, *self.trained))

    @property
    def total_parameters(self) -> int:
        """The number of parameters of the base and the adapters."""
        return self.base_parameters + self.trainable_parameters


def _flatten(plan: Plan) -> tuple[list[tuple[Any, Any]], Plan]:
    # The kind of a pytree is a plan without operators. So plans that differ in their
    # arrays alone are not equal, and share a program.
    pairs = [(jax.tree_util.DictKey(s.name), s.operator) for s in plan.specs]
    return pairs, _unflatten(plan, [None] * len(plan.specs))


def _unflatten(plan: Plan, operators: Iterable[Any]) -> Plan:
    # Copies, since `__init__` checks, and the leaves of a tree_map may be anything.
    changed, specs = copy.copy(plan), tuple(map(copy.copy, plan.specs))
    for spec, operator in zip(specs, operators, strict=True):
        vars(spec)["operator"] = operator
    vars(changed).pop("_by_path", None)  # is cached, with the old specs
    vars(changed)["specs"] = specs
    return changed


jax.tree_util.register_pytree_with_keys(Plan, _flatten, _unflatten)


def check_plan(plan: Any, name: str = "plan") -> Plan:
    """Return `plan`, if it is a plan; `name` stands for it in the error message."""
    if not isinstance(plan, Plan):
        raise TypeError(
            f"{name} must be a Plan, got {type(plan).__name__}: make one with "
            "mora_jax.plan, mora_jax.linen.plan or mora_jax.nnx.plan"
        )
    return plan


def refuse_other_plan(made_for: Plan, used_with: Plan) -> None:
    """Raise unless M's that were made for the first plan are right for the second."""
    plans, kinds = (made_for, used_with), []
    for plan in plans:
        trained = {a.name: f"an array {a.shape} to train" for a in plan.trained}
        kinds.append(dict.fromkeys(plan, "an adapter") | trained)
    for path in sorted(kinds[0].keys() | kinds[1].keys()):
        there, here = (kind.get(path, "nothing") for kind in kinds)
        if there != here:
            raise ValueError(
                f"the adapters were made for a plan with {there} at {path!r}, where "
                f"this plan has {here}"
            )
    for path, spec in made_for.items():
        check_same(spec, used_with[path])


def summary(plan: Plan, *, collapse: bool = True) -> str:
    """The plan as a table: in, out, operator, r, q, parameters, share of the base.

    The column r shows the rank of the LoRA with as many parameters. If that is less
    than four fifths of the budget, q is shown as "64 of 90", with the q that the budget
    would buy: it is too large for the layer, or does not suit its widths. There are
    columns for alpha, scale, dropout and init if a layer departs from their defaults.
    Arrays that train themselves have "trained" for an operator, and their shape.

    Args:
      plan: The plan.
      collapse: True for one row of layers that differ only in numbers of their paths.

    Raises:
      TypeError: `plan` is not a Plan.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {f"l{k}": {"kernel": jnp.ones((64, 64)) + k} for k in range(3)}
      >>> print(mora_jax.summary(mora_jax.plan(params)))
      path           in -> out  operator    r   q  scale  parameters  of base
      l*/kernel (3)   64 -> 64  rotation  8.0  32      2       3,072   25.00%
      3 adapters: 3,072 trainable parameters, 25.00% of 12,288
    """

    def kind(part: Part) -> tuple[object, ...]:
        operator = getattr(part, "operator", None)
        cells = _cells(part).values()
        return part.name, collapse or part.name, part.shape, operator, *cells

    rows, base = [], check_plan(plan).base_parameters
    for pattern, parts in alike((*plan.specs, *plan.trained), kind):
        size = sum(part.parameters for part in parts)
        row = {"path": shown(pattern, len(parts)), **_cells(parts[0])}
        rows.append(row | {"parameters": f"{size:,}", "of base": _share(size, base)})
    # A column is there if a layer departs from the default.
    departures = [
        name
        for name in ("alpha", "scale", "dropout", "init")
        if any(getattr(s, name) != getattr(AdapterSettings, name) for s in plan.specs)
    ]
    columns = "path", "in -> out", "operator", "r", "q", *departures
    size = plan.trainable_parameters
    counts = [_counted(len(plan), "adapter")]
    counts += [_counted(len(plan.trained), "trained array")] * bool(plan.trained)
    return "\n".join(
        [
            *_lines([*columns, "parameters", "of base"], rows),
            f"{' and '.join(counts)}: {size:,} trainable parameters, "
            f"{_share(size, base)} of {base:,}",
        ]
    )
