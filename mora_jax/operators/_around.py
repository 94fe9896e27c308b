"""Operators that are made of another one."""

import dataclasses

from mora_jax._types import Shape
from mora_jax.operators._base import Operator


@dataclasses.dataclass(frozen=True)
class Around(Operator):
    """An operator whose maps are, for some features, those of another.

    Attributes:
      whole: the other one.
    """

    whole: Operator

    def __post_init__(self) -> None:
        pass  # `whole` has been checked

    @property
    def compressed_shape(self) -> Shape:
        return self.whole.compressed_shape

    @property
    def partition(self) -> bool:
        return self.whole.partition
