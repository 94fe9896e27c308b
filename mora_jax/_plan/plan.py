"""A plan: the adapters of a model by the paths of their kernels."""

import dataclasses
import functools
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from mora_jax._plan.left_out import LeftOut
from mora_jax._plan.spec import AdapterSpec, check_same
from mora_jax._plan.trained_arrays import TrainedArray
from mora_jax._tree.paths import nearest_paths


@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, AdapterSpec]):
    """The adapters of a model, by the paths of their kernels; static and hashable.

    A mapping of paths to `AdapterSpec`s, in the order of the paths. `print(plan)` shows
    it as a table.

    It is a pytree whose leaves are the arrays of its operators. They are constants of a
    program that uses the plan. Those of a `Subspace` may be too large for that, and
    then the plan can be an argument of a function under jit.

    Attributes:
      specs: The adapters, one `AdapterSpec` for each adapted kernel.
      base_parameters: How many numbers the params tree holds without adapters.
      traced: Whether a trace has shown that each kernel reaches the model's output
        only through the product of its layer; embeddings need it. Plans that differ
        only in this and in the attributes below are equal.
      left_out: The other arrays of two or more axes, and why they are left out.
      unproven: (path, reason) for each adapted kernel of which the trace proves
        nothing, or which a layer multiplies and no call was traced.
      trained: The arrays of the base that `MoRAConfig(train=...)` names, which train
        themselves. Their copies are part of the adapters; plans compare them.

    Example::

      >>> import jax.numpy as jnp
      >>> import mora_jax
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
        return path in self._by_path

    def __getitem__(self, path: str) -> AdapterSpec:
        if path not in self._by_path:
            raise KeyError(f"no adapter at {path!r}{nearest_paths(str(path), self)}")
        return self._by_path[path]

    @functools.cached_property
    def _by_path(self) -> Mapping[str, AdapterSpec]:
        return {spec.name: spec for spec in self.specs}

    def __str__(self) -> str:
        return "\n".join([summary(self), *_remarks(self)])

    def digest(self) -> str:
        """A SHA-256, in hexadecimal, of what decides the meaning of the M's.

        An M is a square of numbers, which only its plan makes a delta. So keep the
        digest together with M's that are stored without their plan, and compare it
        before they are used: plans of equal digests make the same deltas of the same
        M's. The digest covers, by the kernels' paths, their shapes and axes, the
        operators with all of their settings and seeds, the square ranks, alpha and
        scale. It does not cover what decides how M's are trained or
        computed: dropout, init, execution, param_dtype and layout. Of the arrays that
        train themselves it covers paths and shapes.
        """
        meanings = {spec.name: spec.meaning for spec in self.specs}
        meanings |= {one.name: {"trained": list(one.shape)} for one in self.trained}
        text = json.dumps(meanings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def trainable_parameters(self) -> int:
        """How many numbers all M's and all trained arrays hold together."""
        return sum(one.parameters for one in (*self.specs, *self.trained))

    @property
    def total_parameters(self) -> int:
        """How many numbers the base and the adapters hold together."""
        return self.base_parameters + self.trainable_parameters


def _flatten(plan: Plan) -> tuple[list[tuple[Any, Any]], Plan]:
    key = jax.tree_util.DictKey
    return [(key(spec.name), spec.operator) for spec in plan.specs], plan


def _unflatten(plan: Plan, operators: Iterable[Any]) -> Plan:
    # Not through __init__: the leaves of a tree_map may be anything.
    pairs = zip(plan.specs, operators, strict=True)
    specs = tuple(_changed(spec, operator=operator) for spec, operator in pairs)
    return _changed(plan, specs=specs)


def _changed(instance: Any, **values: Any) -> Any:
    fields = {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}
    made = object.__new__(type(instance))
    for name, value in (fields | values).items():
        object.__setattr__(made, name, value)
    return made


jax.tree_util.register_pytree_with_keys(Plan, _flatten, _unflatten)


def check_plan(plan: Any, name: str = "plan") -> Plan:
    """`plan`, if it is a plan; `name` is what the error message calls it."""
    if not isinstance(plan, Plan):
        raise TypeError(
            f"{name} must be a Plan, got {type(plan).__name__}: make one with "
            "mora_jax.plan, mora_jax.linen.plan or mora_jax.nnx.plan"
        )
    return plan


def refuse_other_plan(made_for: Plan, used_with: Plan) -> None:
    """Raise unless M's that were made for the first plan are right for the second.

    Raises:
      ValueError: They are not. The message names the first layer and what differs.
    """
    for path in sorted(used_with.keys() - made_for.keys()):
        raise ValueError(
            f"the adapters were made for a plan without {path!r}, which this plan has"
        )
    for path in sorted(made_for.keys() - used_with.keys()):
        raise ValueError(
            f"the adapters were made for a plan with {path!r}, which this plan lacks"
        )
    for path, spec in made_for.items():
        check_same(spec, used_with[path])
    shapes = [{one.name: one.shape for one in p.trained} for p in (made_for, used_with)]
    for path in sorted(shapes[0].keys() | shapes[1].keys()):
        made, used = (found.get(path) for found in shapes)
        if made != used:
            texts = ["not at all" if s is None else f"as {s}" for s in (made, used)]
            raise ValueError(
                f"the adapters were made for a plan that trains {path!r} itself "
                f"{texts[0]}, and this plan {texts[1]}"
            )


def summary(plan: Plan, *, collapse: bool = True) -> str:
    """The plan as a table: in, out, operator, r, q, parameters, share of the base.

    Its last line is what PEFT's print_trainable_parameters prints. The column r shows
    how much of the budget a layer uses. If that is less than four fifths, q is shown as
    "64 of 90", with the q that the budget would buy: the layer is too small for that
    one, or it does not suit its widths. The table has columns for alpha, scale and
    dropout if a layer departs from their defaults. Arrays that train themselves have
    "trained" for an operator, and their shape.

    Args:
      plan: The plan.
      collapse: Whether layers that differ only in the numbers of their paths share a
        row.

    Returns:
      The table as text; r is the rank of the LoRA with as many parameters.

    Raises:
      TypeError: `plan` is not a Plan.

    Example::

      >>> import jax.numpy as jnp
      >>> import mora_jax
      >>> params = {f"l{k}": {"kernel": jnp.ones((64, 64)) + k} for k in range(3)}
      >>> print(mora_jax.summary(mora_jax.plan(params)))
      path           in -> out  operator    r   q  scale  parameters  of base
      l*/kernel (3)   64 -> 64  rotation  8.0  32      2       3,072   25.00%
      3 adapters: 3,072 trainable parameters, 25.00% of 12,288
    """
    groups: dict[tuple[Any, ...], list[AdapterSpec]] = defaultdict(list)
    for spec in check_plan(plan).specs:
        key = re.sub(r"\d+", "*", spec.name) if collapse else spec.name
        size = spec.shape, spec.kernel_shape, spec.operator, spec.asked_square_rank
        groups[key, size, spec.alpha, spec.scale, spec.dropout].append(spec)
    columns = ["path", "in -> out", "operator", "r", "q"]
    columns += ["alpha"] * any(spec.alpha != 1 for spec in plan.specs)
    columns += ["scale"] * any(spec.scale != 1 for spec in plan.specs)
    columns += ["dropout"] * any(spec.dropout != 0 for spec in plan.specs)
    columns += ["parameters", "of base"]
    rows = [columns]
    for (name, *_), specs in groups.items():
        cells = _cells(name, specs, plan.base_parameters)
        rows.append([cells[column] for column in columns])
    for cells in _trained_rows(plan, collapse):
        rows.append([cells.get(column, "-") for column in columns])
    left_aligned = {"path", "operator"}
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left_aligned else cell.rjust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    size, also = plan.trainable_parameters, ""
    if plan.trained:
        also = f" and {_counted(len(plan.trained), 'trained array')}"
    lines.append(
        f"{_counted(len(plan), 'adapter')}{also}: {size:,} trainable parameters, "
        f"{_share(size, plan.base_parameters)} of {plan.base_parameters:,}"
    )
    return "\n".join(lines)


def _remarks(plan: Plan) -> list[str]:
    """Lines that say which arrays are left out, and which adapters are not proven."""
    lines = []
    if plan.left_out:
        lines.append("left out:")
        lines += [f"  {kind}" for kind in plan.left_out]
    if plan.unproven:
        lines.append(
            "not proven (mora_jax.diagnostics.check compares numbers instead):"
        )
        alike: dict[tuple[str, str], list[str]] = defaultdict(list)
        for path, why in plan.unproven:
            alike[re.sub(r"\d+", "*", path), why].append(path)
        for (pattern, why), paths in alike.items():
            count = len(paths)
            name = paths[0] if count == 1 else f"{pattern} ({count})"
            lines.append(f"  {name}: {why}")
    return lines


def _cells(name: str, specs: list[AdapterSpec], base_parameters: int) -> dict[str, str]:
    """A row of `summary` for layers that are alike, by the names of its columns."""
    spec, size = specs[0], sum(spec.parameters for spec in specs)
    op, asked = spec.operator, spec.asked_square_rank
    return {
        "path": spec.name if len(specs) == 1 else f"{name} ({len(specs)})",
        "in -> out": f"{spec.in_features} -> {spec.out_features}",
        "operator": spec.operator.name,
        "r": f"{spec.lora_rank:.1f}",
        "q": f"{op.square_rank}" + f" of {asked}" * bool(asked),
        "alpha": f"{spec.alpha:g}",
        "scale": f"{spec.scale:.3g}",
        "dropout": f"{spec.dropout:g}",
        "parameters": f"{size:,}",
        "of base": _share(size, base_parameters),
    }


def _trained_rows(plan: Plan, collapse: bool) -> list[dict[str, str]]:
    """Rows of `summary` for the arrays that train themselves."""
    groups: dict[tuple[Any, ...], list[TrainedArray]] = defaultdict(list)
    for one in plan.trained:
        key = re.sub(r"\d+", "*", one.name) if collapse else one.name
        groups[key, one.shape].append(one)
    rows = []
    for (name, shape), found in groups.items():
        size = sum(one.parameters for one in found)
        row = {
            "path": found[0].name if len(found) == 1 else f"{name} ({len(found)})",
            "in -> out": " x ".join(map(str, shape)) or "1",
            "operator": "trained",
            "parameters": f"{size:,}",
            "of base": _share(size, plan.base_parameters),
        }
        rows.append(row)
    return rows


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _share(size: int, base_parameters: int) -> str:
    return f"{size / base_parameters:.2%}" if base_parameters else "-"
