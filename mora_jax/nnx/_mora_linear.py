"""A linear layer with its adapter."""

from typing import Any

from flax import nnx

from mora_jax._layer.adapter import Adapter
from mora_jax._plan.settings import MoRAConfig
from mora_jax._plan.spec import AdapterSpec
from mora_jax.nnx._classes import adapted_class
from mora_jax.nnx._held import hold_adapter


class MoRALinear(nnx.Linear):
    """`nnx.Linear` with an adapter: the same attributes, and `kernel_mora`.

    Args:
      in_features, out_features: The lengths of the input and the output vectors.
      config: As in `MoRADense`; None for the defaults.
      rngs: The source of the keys for the parameters.
      seed: The seed of the dropout masks, as in `wrap`.
      **kwargs: Further arguments of `nnx.Linear`.

    Example::

      >>> import jax.numpy as jnp, mora_jax
      >>> from flax import nnx
      >>> config = mora_jax.MoRAConfig(rank=2)
      >>> layer = mora_jax.nnx.MoRALinear(16, 8, config=config, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((3, 16))).shape, layer.kernel_mora.shape
      ((3, 8), (4, 4, 2))
    """

    plain_class = nnx.Linear
    __call__ = adapted_class(nnx.Linear).__call__

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        config: MoRAConfig | None = None,
        rngs: nnx.Rngs,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        shape = (in_features, out_features)
        spec = AdapterSpec.from_config(config, shape, kernel_dtype=self.kernel.dtype)
        key = rngs.params() if spec.init == "gaussian" else None
        m = spec.start(("kernel",), key)
        hold_adapter(self, "kernel", Adapter(m, spec), seed)
