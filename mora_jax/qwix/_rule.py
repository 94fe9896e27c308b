"""What a user asks for, for the modules that match a pattern."""

import dataclasses
import functools

import jax.numpy as jnp
import qwix
from jax.typing import DTypeLike

from mora_jax._config import DEFAULT_RANK, MoRAConfig
from mora_jax.operators._registry import OperatorSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoRARule(qwix.QuantizationRule):
    """`qwix.QuantizationRule` with adapters for the modules that it matches.

    Attributes:
      rank: As all that follow, the setting of `mora_jax.MoRAConfig`.

    Example::

      >>> import mora_jax
      >>> rule = mora_jax.qwix.MoRARule(module_path=".*mlp", rank=4, weight_qtype="nf4")
      >>> rule.config == mora_jax.MoRAConfig(rank=4)
      True
    """

    rank: int = DEFAULT_RANK
    operator: OperatorSpec = "auto"
    alpha: float = 1.0
    scale: str = "fine-tuning"
    square_rank: int | None = None
    multiple_of: int | None = None
    squares: int | str = 1
    init: str = "zeros"
    dropout: float = 0.0
    param_dtype: DTypeLike | None = jnp.float32
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.config

    @functools.cached_property
    def config(self) -> MoRAConfig:
        """The same settings as a config."""
        ours = {f.name for f in dataclasses.fields(MoRARule)}
        ours -= {f.name for f in dataclasses.fields(qwix.QuantizationRule)}
        return MoRAConfig(**{name: getattr(self, name) for name in ours})
