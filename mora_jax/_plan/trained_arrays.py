"""Arrays of the base that are trained themselves, beside the M's."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from mora_jax._common.checks import check_floating
from mora_jax._common.types import Path, Shape
from mora_jax._plan.settings import check_dtype, check_settings, setting


@dataclasses.dataclass(frozen=True)
class TrainedArray:
    """An array of the base that is trained itself: a norm's scale, a bias, a head.

    The adapters hold a copy of it, under its own path, which training changes. The
    model computes with the copy, rounded to the dtype of the base's array, and `merge`
    puts that into the base.

    Attributes:
      path, shape: The array's place in the params tree, and its shape.
      dtype, base_dtype: The dtypes of the copy and of the base's array.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> params = {"fc": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}
      >>> plan = mora_jax.plan(params, mora_jax.MoRAConfig(train="fc/bias"))
      >>> plan.trained[0].name, plan.trained[0].shape
      ('fc/bias', (8,))
    """

    path: Path
    shape: Shape
    dtype: DTypeLike = setting(jnp.float32, check_dtype)
    base_dtype: DTypeLike = setting(jnp.float32, check_dtype)

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def of(cls, path: Path, leaf: Any, param_dtype: DTypeLike | None) -> "TrainedArray":
        """The base's array or shape `leaf`; the copy has `param_dtype`, or is wider."""
        check_floating(leaf, "/".join(path), "take it out of train")
        # A step of training is smaller than what 16 bits can tell beside the array.
        dtype = jnp.promote_types(leaf.dtype, param_dtype or leaf.dtype)
        return cls(path, tuple(leaf.shape), dtype, leaf.dtype)

    @property
    def name(self) -> str:
        """The array's path, slash-joined."""
        return "/".join(self.path)

    @property
    def parameters(self) -> int:
        """The number of its entries."""
        return math.prod(self.shape)


Items = list[tuple[TrainedArray, Any]]
"""Each trained array of a plan with its copy."""


def refuse_trained(trained: Iterable[TrainedArray], why: str) -> None:
    """Raise if there are trained arrays; `why` says what cannot be done with them."""
    for array in trained:
        raise ValueError(f"{array.name}: the plan trains this array itself, {why}")
