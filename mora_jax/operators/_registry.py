"""Operators by name, and the square rank that a budget buys."""

import dataclasses
import math
from collections.abc import Hashable, Mapping
from typing import Any

from mora_jax._common.checks import positive_integer
from mora_jax._common.messages import did_you_mean
from mora_jax.operators._base import Operator

OPERATORS: dict[str, type[Operator]] = {}
"""Every operator class by its name; `mora_jax.operators` puts them here."""

RECOMMENDED = ("auto", "block_diagonal", "rotation", "sharing", "low_rank")
"""The names to choose from; the other operators are there to reproduce papers."""

SHARING_FROM_RANK = 128  # from here on "auto" is sharing, the paper's best at r=256
MADE_BY = {
    "damped": "; mora_jax.input_damping(call, adapters) damps new adapters",
    "subspace": "; mora_jax.directions(loss, plan, batches) makes a plan with it",
}
"""{operator that holds given arrays: the function that makes it, for messages}."""

LANES = 128  # the width of a TPU's registers, in numbers

OperatorSpec = str | Mapping[str, Any]
"""A name, or a mapping with "name" and settings: {"name": "sharing", ...}."""


def parse_spec(spec: OperatorSpec) -> tuple[str, dict[str, Any]]:
    """The name and the settings of `spec`, checked."""
    if isinstance(spec, str) and spec in OPERATORS:  # as for nearly every kernel
        return spec, {}
    if not isinstance(spec, str | Mapping):
        raise TypeError(f"operator must be a name or a mapping, got {spec!r}")
    settings = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = settings.pop("name", None)
    if name == "auto" and not settings:
        return name, settings
    if not isinstance(name, str) or name not in OPERATORS:
        of_papers = [known for known in OPERATORS if known not in RECOMMENDED]
        known = [*RECOMMENDED, *of_papers]
        hint = MADE_BY.get(str(name)) or did_you_mean(str(name), known)
        raise ValueError(
            f"operator must be one of {list(RECOMMENDED)}, or to reproduce papers one "
            f"of {of_papers}, got {name!r}{hint}"
        )
    taken = {"in_features", "out_features", "square_rank", "seed"}
    fields = {f.name for f in dataclasses.fields(OPERATORS[name]) if f.init} - taken
    for setting, value in settings.items():
        if setting not in fields:
            rule = f"operator {name!r} has settings {sorted(fields)}"
            hint = did_you_mean(setting, sorted(fields))
            raise ValueError(f"{rule}, got {setting!r}{hint}")
        if not isinstance(value, Hashable):  # as a config is
            raise ValueError(
                f"{setting!r} of the operator {name!r} must be a text, a number or a "
                f"truth value, got {value!r}"
            )
    return name, settings


def resolve_auto(spec: OperatorSpec, rank: int | float) -> OperatorSpec:
    """`spec`, or what "auto" stands for with a budget of `rank`."""
    if parse_spec(spec)[0] != "auto":
        return spec
    return "sharing" if rank >= SHARING_FROM_RANK else "block_diagonal"


def refuse_auto(spec: OperatorSpec, square_rank: int) -> None:
    """Raise if `spec` is "auto", which goes by a budget, where a width is given."""
    if parse_spec(spec)[0] == "auto":
        raise ValueError(
            f"operator must be named beside square_rank={square_rank}, got 'auto', "
            "which goes by a rank: say operator='sharing' or 'rotation'"
        )


def square_rank(
    rank: int,
    in_features: int,
    out_features: int,
    operator: OperatorSpec = "sharing",
    multiple_of: int | None = None,
) -> int:
    r"""The q of a budget: the widest M that costs no more and suits the layer.

    .. math:: \hat r = \lfloor \sqrt{(in + out)\, r} \rfloor

    trains no more parameters than LoRA of rank `rank` would (paper section 3.2; the
    reference rounds to the nearest instead, which may exceed the budget). q is at most
    min(in, out), and even for rotation. For chips the widest multiple of 128, or else
    of 64, is taken that divides both widths, if more than half of that q. Where nothing
    is divided ("orthogonal", "hadamard", "truncation") any will do: docs/operators.md.

    Args:
      rank: The budget r.
      in_features: The number of the kernel's input features.
      out_features: The number of its output features.
      operator: The operator that q is for; "auto" is the one of this budget.
      multiple_of: A number that q is rounded down to a multiple of, blocks up, unless
        it is larger; 1 takes all of the budget. None is for what suits the layer.

    Raises:
      TypeError, ValueError: A number is not a positive integer; too small a budget.

    Example::

      >>> square_rank(8, 1024, 1024)
      128
    """
    positive_integer("rank", rank)
    positive_integer("in_features", in_features)
    positive_integer("out_features", out_features)
    positive_integer("multiple_of", 1 if multiple_of is None else multiple_of)
    cls = OPERATORS[parse_spec(resolve_auto(operator, rank))[0]]
    q = cls.widest(rank, in_features, out_features, multiple_of)
    if not cls.square:
        return q
    q = min(q, in_features, out_features)
    if multiple_of is None:
        common = 0 if cls.bounded else math.gcd(in_features, out_features)
        if fitting := _fitting(q, common):
            return fitting
        multiple_of = 8 if q >= 64 else 1  # it costs at most a tenth of q
    step = math.lcm(cls.q_multiple_of, multiple_of)
    q -= q % (step if q >= step else cls.q_multiple_of)
    if q == 0:
        kernel = f"a kernel of {in_features} x {out_features}"
        remedy = "leave it out with exclude, or give it an operator such as 'sharing'"
        what = f"rank {rank} on {kernel} leaves no room for {cls.name}"
        raise ValueError(f"{what}; {remedy}")
    return q


def _fitting(q: int, common: int) -> int | None:
    """The widest M of whole 128s or 64s, above q / 2, that divides `common`, if any."""
    eights = q - q % 8
    for step in (LANES, LANES // 2):
        widths = range(q - q % step, q // 2, -step)
        if fitting := next((w for w in widths if common % w == 0), None):
            return fitting
        if common and eights > LANES // 2 and common % eights == 0:
            return None  # it divides both as it is
    return None


def make_operator(
    spec: OperatorSpec,
    in_features: int,
    out_features: int,
    square_rank: int,
    *,
    seed: int = 0,
) -> Operator:
    """The operator that `spec` names, for one kernel.

    Args:
      spec: A name ("rotation"), or a mapping with further settings
        ({"name": "sharing", "compress_groups": "contiguous"}).
      in_features: The number of the kernel's input features.
      out_features: The number of its output features.
      square_rank: q, the width of M.
      seed: The seed of the operators that are random.

    Raises:
      TypeError, ValueError: A name or setting is unknown, or the size is not possible.

    Example::

      >>> make_operator("rotation", 8, 8, 4)
      Rotation(in_features=8, out_features=8, square_rank=4, truncate=False)
    """
    positive_integer("in_features", in_features)
    positive_integer("out_features", out_features)
    positive_integer("square_rank", square_rank)
    refuse_auto(spec, square_rank)
    name, settings = parse_spec(spec)
    cls = OPERATORS[name]
    if hasattr(cls, "seed"):
        settings["seed"] = seed
    return cls(in_features, out_features, square_rank, **settings)
