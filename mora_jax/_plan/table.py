"""A plan as text: a table of its adapters, and remarks on what they leave open."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mora_jax._common.alike import alike, shown
from mora_jax._plan.spec import AdapterSpec
from mora_jax._plan.trained_arrays import TrainedArray

if TYPE_CHECKING:
    from mora_jax._plan.plan import Plan

LEFT_ALIGNED = ("path", "operator")
COLUMNS = ("in -> out", "operator", "r", "q", "alpha", "scale", "dropout")
USUAL = {"alpha": 1, "scale": 1, "dropout": 0}
"""Values that need no column, if no layer departs from them."""


def table(plan: "Plan", collapse: bool) -> str:
    """Return the text of `mora_jax.summary`."""

    def kind(part: AdapterSpec | TrainedArray) -> tuple[object, ...]:
        operator = getattr(part, "operator", None)
        cells = _cells(part).values()
        return part.name, collapse or part.name, part.shape, operator, *cells

    rows, base = [], plan.base_parameters
    for parts in alike((*plan.specs, *plan.trained), kind):
        size = sum(part.parameters for part in parts)
        row = {"path": shown([part.name for part in parts]), **_cells(parts[0])}
        rows.append(row | {"parameters": f"{size:,}", "of base": _share(size, base)})
    columns = [
        name
        for name in COLUMNS
        if name not in USUAL or any(getattr(s, name) != USUAL[name] for s in plan.specs)
    ]
    size = plan.trainable_parameters
    counts = [_counted(len(plan), "adapter")]
    counts += [_counted(len(plan.trained), "trained array")] * bool(plan.trained)
    return "\n".join(
        [
            *_lines(["path", *columns, "parameters", "of base"], rows),
            f"{' and '.join(counts)}: {size:,} trainable parameters, "
            f"{_share(size, base)} of {base:,}",
        ]
    )


def _cells(part: AdapterSpec | TrainedArray) -> dict[str, str]:
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
    }


def _lines(columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The rows under the names of their columns, with "-" for what a row lacks."""
    cells = [columns, *([row.get(name, "-") for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if name in LEFT_ALIGNED else cell.rjust(width)
            for name, cell, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _share(size: int, base_parameters: int) -> str:
    return f"{size / base_parameters:.2%}" if base_parameters else "-"


def remarks(plan: "Plan") -> list[str]:
    """Return lines on the arrays left out and the adapters that are not proven."""
    lines = [f"  {kind}" for kind in plan.left_out]
    if lines:
        lines.insert(0, "left out:")
    if plan.unproven:
        lines.append(
            "not proven (mora_jax.diagnostics.check compares numbers instead):"
        )
    for kind in alike(plan.unproven, lambda pair: pair):
        lines.append(f"  {shown([path for path, _ in kind])}: {kind[0][1]}")
    return lines
