"""What a user asks for."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from mora_jax.operators._checks import positive_integer
from mora_jax.operators._random import check_seed
from mora_jax.operators._registry import OperatorSpec, parse_spec


def default_targets(leaf: str) -> str:
    """Paths that end in `leaf` and name no head, router, embedding or convolution."""
    return (
        r"(?i)"
        r"(?!(.*/)?(([^/]*_)?head|classifier|logits|score|cls|router)(_\d+)?/)"
        r"(?!.*(embed|conv)[^/]*/)(?!(.*/)?embedding$)"
        rf"(.*/)?{leaf}"
    )


DEFAULT_TARGETS = (default_targets("kernel"),)

INITS = ("zeros", "gaussian")
EXECUTIONS = ("auto", "activation", "fold")


@dataclasses.dataclass(frozen=True)
class MoRAConfig:
    r"""The settings of an adaptation; frozen and hashable.

    Attributes:
      rank: the budget r. Each M has as many parameters as fit into those of a LoRA of
        rank r: q = floor(sqrt((in + out) r)).
      operator: the fixed maps around M: "rotation", "sharing", "decoupling",
        "truncation", "orthogonal", "hadamard", "permutation", or "auto"; or a mapping
        with further settings, {"name": "sharing", "compress_groups": "contiguous"}.
      alpha: multiplies the update. (The reference ignores its alpha.)
      square_rank: q itself, in place of `rank`.
      multiple_of: q is rounded down to a multiple of this, where the budget allows one.
        None stands for 8 where q is at least 64: steps are up to 4% faster, and it
        costs at most a tenth of q.
      init: of M. "zeros" starts as an exact identity. "gaussian", of standard deviation
        1/sqrt(q), is AiDotNet's; it changes the model's outputs before the first step.
      dropout: rate on the adapter's input; the frozen path sees all of it.
      param_dtype: of M. None takes the dtype of each kernel. That is for tools which
        want one dtype in all leaves of a model, such as Tunix when it copies a bfloat16
        model to a sampler on another mesh. Otherwise keep float32: updates of M that
        are small beside M are lost in 16 bits.
      execution: how a dense layer computes. "activation" adds D(C(x) M) to its output,
        "fold" multiplies by W + C M D, made anew in each step; "auto" takes the one
        that was faster in measurements, by the layer's shape, its rows and its dtype.
        Both give the same numbers but for rounding. Other layers, stacks of kernels in
        one product, and layers under dropout never fold.
      targets: regular expressions that match the whole path of a kernel, such as
        `.*/(q_proj|v_proj)/kernel`. By default the kernels of dense layers.
      exclude: paths to leave out, in the same way.
      overrides: {pattern: {setting: value}} for some targets; later patterns win. The
        settings are those above and "axes", the meaning of a kernel's axes by
        letters: "i" input, "o" output, "s" stacked.
      seed: of the random operators.

    Raises:
      TypeError, ValueError: a setting that no kernel could have.

    Example::

      >>> from mora_jax import MoRAConfig
      >>> config = MoRAConfig(rank=4, overrides={".*/q_proj/kernel": {"rank": 16}})
      >>> config.settings("layer/q_proj/kernel")[0].rank
      16
    """

    rank: int = 8
    operator: OperatorSpec = "auto"
    alpha: float = 1.0
    square_rank: int | None = None
    multiple_of: int | None = None
    init: str = "zeros"
    dropout: float = 0.0
    param_dtype: DTypeLike | None = jnp.float32
    execution: str = "auto"
    targets: str | Iterable[str] = DEFAULT_TARGETS
    exclude: str | Iterable[str] = ()
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=FrozenDict
    )
    seed: int = 0

    def __post_init__(self) -> None:
        positive_integer("rank", self.rank)
        for field in ("square_rank", "multiple_of"):
            if getattr(self, field) is not None:
                positive_integer(field, getattr(self, field))
        parse_spec(self.operator)
        if isinstance(self.operator, Mapping):
            object.__setattr__(self, "operator", FrozenDict(self.operator))
        check_number("alpha", self.alpha)
        check_rate(self.dropout)
        check_choice("init", self.init, INITS)
        check_choice("execution", self.execution, EXECUTIONS)
        if self.param_dtype is not None:
            object.__setattr__(self, "param_dtype", floating_dtype(self.param_dtype))
        check_seed(self.seed)
        for field in ("targets", "exclude"):
            patterns = getattr(self, field)
            patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
            for pattern in patterns:
                _check_pattern(field, pattern)
            object.__setattr__(self, field, patterns)
        if not self.targets:
            raise ValueError("targets must hold at least one pattern, got none")
        self._check_overrides()

    def _check_overrides(self) -> None:
        if not isinstance(self.overrides, Mapping):
            raise TypeError(
                f"overrides must map patterns to settings, got {self.overrides!r}"
            )
        object.__setattr__(self, "overrides", FrozenDict(self.overrides))
        for pattern, settings in self.overrides.items():
            _check_pattern("overrides", pattern)
            if not isinstance(settings, Mapping):
                raise TypeError(
                    f"overrides[{pattern!r}] must be a mapping, got {settings!r}"
                )
            allowed = {f.name for f in dataclasses.fields(self)}
            allowed = allowed - {"targets", "exclude", "overrides"} | {"axes"}
            if unknown := set(settings) - allowed:
                raise ValueError(
                    f"overrides[{pattern!r}] must use {sorted(allowed)}, "
                    f"got {sorted(unknown)}"
                )
            self._override(settings)

    def settings(self, path: str) -> tuple["MoRAConfig", str | None]:
        """The config for one kernel, and its axes where an override names them."""
        merged: dict[str, Any] = {}
        for pattern, settings in self.overrides.items():
            if re.fullmatch(pattern, path):
                merged |= settings
        return self._override(merged) if merged else self, merged.get("axes")

    def _override(self, settings: Mapping[str, Any]) -> "MoRAConfig":
        settings = {k: v for k, v in settings.items() if k != "axes"}
        if "rank" in settings:  # it must win over a square_rank for all
            settings = {"square_rank": None, **settings}
        return dataclasses.replace(self, **settings, overrides=FrozenDict())


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_number(name: str, value: object) -> None:
    """Raise unless `value` is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not float("-inf") < value < float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")


def check_rate(value: object) -> None:
    """Raise unless `value` is a dropout rate."""
    check_number("dropout", value)
    if not 0 <= value < 1:  # type: ignore[operator]
        raise ValueError(f"dropout must be in [0, 1), got {value}")


def floating_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    """`dtype` as a numpy dtype, if it is a real floating-point one."""
    found = None if dtype is None else jnp.dtype(dtype)  # numpy's None is float64
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"param_dtype must be a floating-point dtype, got {found}")
    return found


def _check_pattern(field: str, pattern: object) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{field} must hold regular expressions, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{field} holds {pattern!r}, which is no regular expression: {error}"
        ) from error
