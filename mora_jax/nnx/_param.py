"""M as a variable of a module."""

import dataclasses
from typing import Any

from flax import nnx

from mora_jax._spec import AdapterSpec, check_same


class MoRAParam(nnx.LoRAParam[Any]):
    """The square matrix M of one kernel; its metadata `spec` says how it is adapted.

    A subclass of `nnx.LoRAParam`, so code that filters adapters by that works as it is.
    Where Flax copies a whole variable (`nnx.update` with another model's state,
    `nnx.merge`, `copy_from`), the spec comes with the numbers, which so remain the
    update that they were. To assign one variable to another of another update is an
    error.

    Example::

      >>> from flax import nnx
      >>> from mora_jax import MoRAConfig
      >>> from mora_jax.nnx import MoRALinear, MoRAParam
      >>> layer = MoRALinear(16, 16, config=MoRAConfig(rank=2), rngs=nnx.Rngs(0))
      >>> isinstance(layer.kernel_mora, nnx.LoRAParam)
      True
      >>> layer.kernel_mora.spec.parameters
      64
    """

    spec: AdapterSpec

    @classmethod
    def of(cls, spec: AdapterSpec, m: Any) -> "MoRAParam":
        """M with its spec, but for the path, so that equal layers can be stacked."""
        return cls(m, spec=dataclasses.replace(spec, path=spec.path[-1:]))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._check(value)
        super().__setitem__(key, value)

    def set_value(self, value: Any, **kwargs: Any) -> None:
        self._check(value)
        super().set_value(value, **kwargs)

    def _check(self, value: Any) -> None:
        if isinstance(value, MoRAParam):
            check_same(value.spec, self.spec)
