"""What a user asks for."""

import copy
import dataclasses
import functools
import numbers
import re
from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.typing import DTypeLike

from mora_jax._checks import check_seed, positive_integer
from mora_jax._settings import NAMES_ELSEWHERE, check_pattern, meant, patterns_of
from mora_jax._warnings import warn
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

DEFAULT_RANK = 8
LARGEST_USUAL_ALPHA = 4.0


@dataclasses.dataclass(frozen=True)
class MoRAConfig:
    r"""The settings of an adaptation; frozen and hashable.

    Attributes:
      rank: the budget r. Each M has as many parameters as fit into those of a LoRA of
        rank r: q = floor(sqrt((in + out) r)).
      operator: the fixed maps around M: "rotation", "sharing", "decoupling",
        "truncation", "orthogonal", "hadamard", "permutation", or "auto"; or a mapping
        with further settings, {"name": "sharing", "compress_groups": "contiguous"}.
      alpha: multiplies the update itself, so 1 is usual; above 4 a `MoRAWarning` says
        so. LoRA divides its alpha by the rank first. (The reference ignores its alpha.)
      square_rank: q itself, in place of `rank`.
      multiple_of: q is rounded down to a multiple of this, where the budget allows one.
        None stands for 8 where q is at least 64: steps are up to 4% faster, and it
        costs at most a tenth of q.
      init: of M. "zeros" starts as an exact identity. "gaussian", of standard deviation
        1/sqrt(q), is AiDotNet's; it changes the model's outputs before the first step.
      dropout: rate on the adapter's input; the frozen path sees all of it.
      param_dtype: M's dtype. None takes each kernel's dtype. That is for tools which
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
      TypeError, ValueError: a setting that no kernel could have; `rank` and
        `square_rank` together; alpha=0, which would train nothing.

    Example::

      >>> from mora_jax import MoRAConfig
      >>> config = MoRAConfig(rank=4, overrides={".*/q_proj/kernel": {"rank": 16}})
      >>> config.settings("layer/q_proj/kernel")[0].rank
      16
    """

    rank: int = DEFAULT_RANK
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

    def __new__(cls, *args: Any, **settings: Any) -> "MoRAConfig":
        """Before `__init__` sees them: names that this class does not have."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise TypeError(
                    f"MoRAConfig has no setting {name!r}{meant(name, known)}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check()
        for alpha in (self.alpha, *_values(self.overrides, "alpha")):
            if abs(alpha) > LARGEST_USUAL_ALPHA:
                warn(
                    f"alpha={alpha:g} multiplies the update itself, and 1 is usual: "
                    "what LoRA calls lora_alpha is alpha=lora_alpha / r here"
                )

    def _check(self) -> None:
        """Check all settings, and store them in types that hash and compare."""
        self._set("rank", _positive_integer("rank", self.rank))
        for field in ("square_rank", "multiple_of"):
            if getattr(self, field) is not None:
                self._set(field, _positive_integer(field, getattr(self, field)))
        if self.square_rank is not None and self.rank != DEFAULT_RANK:
            raise ValueError(
                f"rank and square_rank exclude each other, got rank={self.rank} and "
                f"square_rank={self.square_rank}: the first is a budget that q is "
                "chosen by, the second is q itself"
            )
        parse_spec(self.operator)
        if isinstance(self.operator, Mapping):
            self._set("operator", FrozenDict(self.operator))
        self._set("alpha", check_number("alpha", self.alpha))
        if self.alpha == 0:
            raise ValueError(
                "alpha must not be 0, which would make the update, and all gradients "
                "of the adapters, 0"
            )
        self._set("dropout", check_rate(self.dropout))
        check_choice("init", self.init, INITS)
        check_choice("execution", self.execution, EXECUTIONS)
        if self.param_dtype is not None:
            self._set("param_dtype", floating_dtype(self.param_dtype))
        check_seed(self.seed)
        self._set("seed", index(self.seed))
        for field in ("targets", "exclude"):
            self._set(field, patterns_of(field, getattr(self, field)))
        if not self.targets:
            raise ValueError("targets must hold at least one pattern, got none")
        self._check_overrides()

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    def _check_overrides(self) -> None:
        if not isinstance(self.overrides, Mapping):
            raise TypeError(
                f"overrides must map patterns to settings, got {self.overrides!r}"
            )
        self._set("overrides", FrozenDict(self.overrides))
        for pattern, settings in self.overrides.items():
            check_pattern("overrides", pattern)
            if not isinstance(settings, Mapping):
                raise TypeError(
                    f"overrides[{pattern!r}] must be a mapping, got {settings!r}"
                )
            allowed = {f.name for f in dataclasses.fields(self)}
            allowed = allowed - {"targets", "exclude", "overrides"} | {"axes"}
            if unknown := sorted(set(settings) - allowed, key=str):
                raise ValueError(
                    f"overrides[{pattern!r}] must use {sorted(allowed)}, "
                    f"got {unknown}{meant(str(unknown[0]), sorted(allowed))}"
                )
            if "rank" in settings and settings.get("square_rank") is not None:
                raise ValueError(
                    f"overrides[{pattern!r}] must hold rank or square_rank, got both"
                )
            self._override(settings)

    def settings(self, path: str) -> tuple["MoRAConfig", str | None]:
        """The config for one kernel, and its axes where an override names them."""
        merged: dict[str, Any] = {}
        for pattern, settings in self.overrides.items():
            if re.fullmatch(pattern, path):
                # Of the two that exclude each other the later one wins.
                if "rank" in settings:
                    merged.pop("square_rank", None)
                if "square_rank" in settings:
                    merged.pop("rank", None)
                merged |= settings
        return self._override(merged) if merged else self, merged.get("axes")

    def _override(self, settings: Mapping[str, Any]) -> "MoRAConfig":
        if settings.get("square_rank") is not None:
            settings = {"rank": DEFAULT_RANK, **settings}
        elif "rank" in settings:
            settings = {"square_rank": None, **settings}
        changed = copy.copy(self)  # not a new one, which would warn again
        for field, value in {**settings, "overrides": FrozenDict()}.items():
            if field != "axes":
                changed._set(field, value)
        changed._check()
        return changed


# Since `__new__` takes anything, what help() shows is said here.
functools.update_wrapper(
    MoRAConfig.__new__, MoRAConfig.__init__, assigned=(), updated=()
)


def check_config(config: Any, call: str = "MoRAConfig(rank=8)") -> MoRAConfig:
    """`config`, or the default one for None.

    Args:
      config: what a user gave as a config.
      call: how the function is called, for the message.

    Raises:
      TypeError: something else.
    """
    if config is None:
        return MoRAConfig()
    if isinstance(config, MoRAConfig):
        return config
    got = type(config).__name__
    if hasattr(config, "shape"):
        got = f"an array of shape {tuple(config.shape)}"
    fields = {field.name for field in dataclasses.fields(MoRAConfig)}
    if isinstance(config, int):
        hint = f"write MoRAConfig(rank={config})"
    elif isinstance(config, Mapping) and set(config) <= fields | set(NAMES_ELSEWHERE):
        settings = ", ".join(f"{name}={value!r}" for name, value in config.items())
        hint = f"write MoRAConfig({settings})"
    else:
        hint = f"the call is {call}, where config may be None"
    raise TypeError(f"config must be a MoRAConfig, got {got}: {hint}")


def _values(overrides: Mapping[str, Mapping[str, Any]], name: str) -> list[Any]:
    return [settings[name] for settings in overrides.values() if name in settings]


def _positive_integer(name: str, value: Any) -> int:
    positive_integer(name, value)
    return index(value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_number(name: str, value: Any) -> float:
    """`value` as a Python float, if it is a finite real number."""
    if isinstance(value, jax.Array):  # it would make a config unhashable
        raise TypeError(
            f"{name} must be a number, got a JAX array; write float({name})"
        )
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not float("-inf") < number < float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def check_rate(value: Any) -> float:
    """`value` as a Python float, if it is a dropout rate."""
    rate = check_number("dropout", value)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout must be in [0, 1), got {value}")
    return rate


def floating_dtype(dtype: DTypeLike | None, name: str = "param_dtype") -> jnp.dtype:
    """`dtype` as a numpy dtype, if it is a real floating-point one."""
    found = None if dtype is None else jnp.dtype(dtype)  # numpy's None is float64
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"{name} must be a floating-point dtype, got {found}")
    return found
