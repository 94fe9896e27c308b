"""Settings of an adapter: what a user may choose, and the record of what was chosen."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mora_jax._common.checks import (
    check_number,
    check_rate,
    check_seed,
    floating_dtype,
    one_of,
    positive_integer,
)
from mora_jax._common.frozen import FrozenMapping
from mora_jax.operators._registry import OperatorSpec, parse_spec

DEFAULT_RANK = 8


def setting(
    default: Any, check: Callable[[str, Any], Any], *, meaning: bool = False
) -> Any:
    """Field of a record of settings.

    Args:
      default: The value of a setting that is not given.
      check: A function of the setting's name and value, which raises an error for a
        wrong value and returns a right one in the type that is stored.
      meaning: True if the setting decides which delta an M stands for, and False if it
        decides only how M is trained or computed.
    """
    return dataclasses.field(
        default=default, metadata={"check": check, "meaning": meaning}
    )


def check_settings(record: Any) -> None:
    """Check the fields that `setting` made, and store what their checks return."""
    for field in dataclasses.fields(record):
        if check := field.metadata.get("check"):
            value = check(field.name, getattr(record, field.name))
            object.__setattr__(record, field.name, value)


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Check that also takes None."""
    return lambda name, value: None if value is None else check(name, value)


def _scale(name: str, value: Any) -> float:
    scale = check_number(name, value)
    if scale <= 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    return scale


def _nonzero(name: str, value: Any) -> float:
    alpha = check_number(name, value)
    if alpha == 0:
        raise ValueError(
            "alpha must not be 0, which would make every delta and every gradient of "
            "the adapters 0"
        )
    return alpha


def _operator(name: str, value: Any) -> OperatorSpec:
    parse_spec(value)
    return FrozenMapping(value) if isinstance(value, Mapping) else value


def _dtype(name: str, value: Any) -> jnp.dtype:
    return floating_dtype(value, name)


_init = one_of("zeros", "gaussian")
check_execution = one_of("auto", "activation", "fold")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Settings of one adapter that are neither its operator nor its place.

    `AdapterSpec` and `FrozenDense` have these fields, and files hold all of them.

    Attributes:
      alpha: The factor of the delta.
      scale: A second factor, which `MoRAConfig(scale=)` chooses for the kernel.
      dropout: The rate of dropout on the adapter's input.
      init: How M starts, "zeros" or "gaussian".
      param_dtype: The dtype of M.
      execution: How a dense layer computes, as in `MoRAConfig`.
    """

    alpha: float = setting(1.0, check_number, meaning=True)
    scale: float = setting(1.0, _scale, meaning=True)
    dropout: float = setting(0.0, check_rate)
    init: str = setting("zeros", _init)
    param_dtype: DTypeLike = setting(jnp.float32, _dtype)
    execution: str = setting("auto", check_execution)

    def __post_init__(self) -> None:
        check_settings(self)

    def to_json(self) -> dict[str, Any]:
        """{name: value as JSON holds it} of all settings."""
        return {
            **{name: getattr(self, name) for name in SETTINGS},
            "param_dtype": np.dtype(self.param_dtype).name,
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "AdapterSettings":
        """The settings that `to_json` wrote; nothing is filled in.

        Raises:
          TypeError, ValueError: A setting is missing, unknown or wrong, or its value is
            not written as `to_json` writes it.
        """
        if values.keys() != set(SETTINGS):
            raise ValueError(
                f"settings must be {sorted(SETTINGS)}, got {sorted(values)}"
            )
        settings = AdapterSettings(**values)
        for name, value in settings.to_json().items():
            # True == 1 == 1.0, so types are compared as well.
            if type(values[name]) is not type(value) or values[name] != value:
                raise ValueError(f"{name} must be {value!r}, got {values[name]!r}")
        return settings


SETTINGS = {
    field.name: field.metadata["meaning"]
    for field in dataclasses.fields(AdapterSettings)
}
"""{name of a setting: True if it decides which delta an M stands for}."""


@dataclasses.dataclass(frozen=True)
class AdapterChoice:
    """Settings that a user may choose for each kernel; `MoRAConfig` explains them.

    `MoRAConfig` and `qwix.MoRARule` have these fields.
    """

    rank: int = setting(DEFAULT_RANK, positive_integer)
    operator: OperatorSpec = setting("auto", _operator)
    alpha: float = setting(1.0, _nonzero)
    scale: str = setting("fine-tuning", one_of("paper", "fine-tuning"))
    square_rank: int | None = setting(None, optional(positive_integer))
    multiple_of: int | None = setting(None, optional(positive_integer))
    init: str = setting("zeros", _init)
    dropout: float = setting(0.0, check_rate)
    param_dtype: DTypeLike | None = setting(jnp.float32, optional(_dtype))
    seed: int = setting(0, lambda _, value: check_seed(value))
