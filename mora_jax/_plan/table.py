"""A plan as text: a table of its adapters, and remarks on what they leave open."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mora_jax._common.alike import alike, shown
from mora_jax._plan.spec import AdapterSpec
from mora_jax._plan.trained_arrays import TrainedArray

if TYPE_CHECKING:
    from mora_jax._plan.plan import Plan

UNUSUAL = {"alpha": 1, "scale": 1, "dropout": 0}
"""Settings that have a column only where a layer departs from these values."""

LEFT_ALIGNED = ("path", "operator")


def table(plan: "Plan", collapse: bool) -> str:
    """Return the text of `mora_jax.summary`."""
    specs = alike(
        plan.specs,
        lambda spec: (
            *(spec.name, collapse or spec.name, spec.shape, spec.kernel_shape),
            *(spec.operator, spec.asked_square_rank),
            *(getattr(spec, setting) for setting in UNUSUAL),
        ),
    )
    trained = alike(
        plan.trained, lambda array: (array.name, collapse or array.name, array.shape)
    )
    rows = [_adapter_row(kind) for kind in specs] + [_trained_row(k) for k in trained]
    for row, kind in zip(rows, [*specs, *trained], strict=True):
        size = sum(item.parameters for item in kind)
        row["path"] = shown([item.name for item in kind])
        row["parameters"] = f"{size:,}"
        row["of base"] = _share(size, plan.base_parameters)
    unusual = [
        setting
        for setting, usual in UNUSUAL.items()
        if any(getattr(spec, setting) != usual for spec in plan.specs)
    ]
    size, base = plan.trainable_parameters, plan.base_parameters
    counts = [_counted(len(plan), "adapter")]
    counts += [_counted(len(plan.trained), "trained array")] * bool(plan.trained)
    columns = ["path", "in -> out", "operator", "r", "q", *unusual]
    return "\n".join(
        [
            *_lines([*columns, "parameters", "of base"], rows),
            f"{' and '.join(counts)}: {size:,} trainable parameters, "
            f"{_share(size, base)} of {base:,}",
        ]
    )


def _adapter_row(specs: Sequence[AdapterSpec]) -> dict[str, str]:
    spec = specs[0]
    asked = spec.asked_square_rank
    return {
        "in -> out": f"{spec.in_features} -> {spec.out_features}",
        "operator": spec.operator.name,
        "r": f"{spec.lora_rank:.1f}",
        "q": f"{spec.operator.square_rank}" + (f" of {asked}" if asked else ""),
        "alpha": f"{spec.alpha:g}",
        "scale": f"{spec.scale:.3g}",
        "dropout": f"{spec.dropout:g}",
    }


def _trained_row(arrays: Sequence[TrainedArray]) -> dict[str, str]:
    shape = " x ".join(map(str, arrays[0].shape))
    return {"in -> out": shape or "1", "operator": "trained"}


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
