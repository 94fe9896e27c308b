"""Settings of adapters: the record that files hold, and what a user may choose."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from mora_jax._common.checks import (
    check_choice,
    check_number,
    check_rate,
    check_seed,
    floating_dtype,
    positive_integer,
)
from mora_jax._common.frozen import FrozenMapping
from mora_jax.operators._registry import OperatorSpec, parse_spec

DEFAULT_RANK = 8

Check = Callable[[str, Any], Any]
"""Function of a setting's name and value that raises, or returns what is stored."""


def setting(default: Any, check: Check, *, meaning: bool = False) -> Any:
    """Field of a record of settings.

    A setting with a `meaning` decides which delta an M stands for; the others decide
    only how M is trained or computed.
    """
    metadata = {"check": check, "meaning": meaning}
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(record: Any) -> None:
    """Check the fields that `setting` made, and store what their checks return."""
    for field in dataclasses.fields(record):
        if check := field.metadata.get("check"):
            value = check(field.name, getattr(record, field.name))
            object.__setattr__(record, field.name, value)


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def check_dtype(name: str, value: Any) -> jnp.dtype:
    """Return `value` as a NumPy dtype, if it is a real floating-point dtype."""
    return floating_dtype(value, name)


def _above_zero(name: str, value: Any) -> float:
    if (number := check_number(name, value)) <= 0:
        raise ValueError(f"{name} must be above 0, got {number}")
    return number


def _other_than_zero(name: str, value: Any) -> float:
    if (number := check_number(name, value)) == 0:
        raise ValueError(
            f"{name} must not be 0, which would make all deltas and gradients 0"
        )
    return number


def _operator(name: str, value: Any) -> OperatorSpec:
    parse_spec(value)
    return FrozenMapping(value) if isinstance(value, Mapping) else value


_init = functools.partial(check_choice, choices=("zeros", "gaussian"))
_scale = functools.partial(check_choice, choices=("paper", "fine-tuning"))
_execution = functools.partial(check_choice, choices=("auto", "activation", "fold"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Settings of one adapter that are neither its operator nor its place.

    `AdapterSpec` and `FrozenDense` have these fields, and files hold all of them. They
    are as in `MoRAConfig`, which chooses a number for `scale` by the kernel.
    """

    alpha: float = setting(1.0, check_number, meaning=True)
    scale: float = setting(1.0, _above_zero, meaning=True)
    dropout: float = setting(0.0, check_rate)
    init: str = setting("zeros", _init)
    param_dtype: DTypeLike = setting(jnp.float32, check_dtype)
    execution: str = setting("auto", _execution)

    def __post_init__(self) -> None:
        check_settings(self)

    def to_json(self) -> dict[str, Any]:
        """{name: value as JSON holds it} of all settings."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return values | {"param_dtype": jnp.dtype(self.param_dtype).name}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "AdapterSettings":
        """The settings that `to_json` wrote, exactly so; nothing is filled in."""
        if values.keys() != SETTINGS.keys():
            raise ValueError(
                f"settings must be {sorted(SETTINGS)}, got {sorted(values)}"
            )
        settings = AdapterSettings(**values)
        for name, value in settings.to_json().items():
            # True == 1 == 1.0, so types are compared as well.
            if (type(values[name]), values[name]) != (type(value), value):
                raise ValueError(f"{name} must be {value!r}, got {values[name]!r}")
        return settings


SETTINGS = {f.name: f.metadata["meaning"] for f in dataclasses.fields(AdapterSettings)}
"""{name of a setting: True if it decides which delta an M stands for}."""


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Settings that a user chooses for a kernel; `MoRAConfig` explains them.

    `qwix.MoRARule` has these fields as well, and `MoRAConfig(overrides=)` changes them
    for the kernels of a pattern.
    """

    rank: int = setting(DEFAULT_RANK, positive_integer)
    operator: OperatorSpec = setting("auto", _operator)
    alpha: float = setting(1.0, _other_than_zero)
    scale: str = setting("fine-tuning", _scale)
    square_rank: int | None = setting(None, _optional(positive_integer))
    multiple_of: int | None = setting(None, _optional(positive_integer))
    init: str = setting("zeros", _init)
    dropout: float = setting(0.0, check_rate)
    param_dtype: DTypeLike | None = setting(jnp.float32, _optional(check_dtype))
    execution: str = setting("auto", _execution)
    seed: int = setting(0, lambda _, value: check_seed(value))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.square_rank is not None and self.rank != DEFAULT_RANK:
            raise ValueError(
                f"rank and square_rank exclude each other, got rank={self.rank} and "
                f"square_rank={self.square_rank}: a budget for q, and q itself"
            )
