"""A dense layer with its adapter."""

import functools

import flax.linen as nn
import jax
from jaxtyping import Float, Shaped

from mora_jax._common.types import ArrayLike
from mora_jax._flax.calls import LayerCall, adapt_call
from mora_jax._flax.layer_rules import rules_of
from mora_jax._plan.settings import MoRAConfig, check_config
from mora_jax._plan.spec import AdapterSpec
from mora_jax.linen._bound import running_adapter


class MoRADense(nn.Dense):
    """`nn.Dense` with an adapter: the same fields and parameters, and `kernel_mora`.

    It loads the parameters of an `nn.Dense`. Train it with `mora_jax.optimizer`, or
    take the M's out of its parameters with `mora_jax.split`.

    Attributes:
      config: The adapter's settings; `targets`, `exclude` and `overrides` mean nothing
        here, and `train` must be empty.
      deterministic: True to turn the adapter's dropout off. It must be given, here or
        in the call, if `config.dropout` is not zero. The stream of keys is "dropout".

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> layer = mora_jax.MoRADense(features=16, config=mora_jax.MoRAConfig(rank=2))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 16)))
      >>> variables["params"]["kernel_mora"]
      Adapter(block_diagonal, float32[4, 4, 4])
    """

    config: MoRAConfig = MoRAConfig()
    deterministic: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.use_bias, MoRAConfig):
            raise TypeError("give it by name: write MoRADense(features, config=config)")
        check_config(self.config, "MoRADense(features, config=config)")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Shaped[ArrayLike, "*batch features"],
        deterministic: bool | None = None,
    ) -> Float[jax.Array, "*batch out"]:
        """The output of `nn.Dense`, with the adapter's delta added.

        Args:
          inputs: (..., in_features).
          deterministic: As the attribute.
        """
        shape, path = (inputs.shape[-1], self.features), (*self.path, "kernel")
        name = "/".join(path)
        spec = AdapterSpec.from_config(
            self.config, shape, name=name, kernel_dtype=self.param_dtype
        )
        key, given = None, (self.deterministic, deterministic)
        if spec.dropout > 0 and not nn.merge_param("deterministic", *given):
            key = self.make_rng("dropout")
        rule, method = rules_of(nn.Dense)["__call__"], super().__call__
        call = LayerCall(rule, self, method, (inputs,), {})
        adapter = functools.partial(running_adapter, self, "kernel", spec)
        return adapt_call(call, name, adapter, key)
