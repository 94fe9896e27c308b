"""M as a variable of a module."""

import dataclasses
from typing import Any

from flax import nnx

from mora_jax.spec import AdapterSpec


class MoRAParam(nnx.LoRAParam[Any]):
    """The square matrix M of one kernel; its metadata `spec` says how it is adapted.

    A subclass of `nnx.LoRAParam`, so code that filters adapters by that works as it is.

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
