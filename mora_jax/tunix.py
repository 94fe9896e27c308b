"""Adapters for the models of Tunix; `pip install google-tunix`.

register              check that this version has the layers that `mora_jax` knows
"""

from importlib.util import find_spec

from mora_jax._common.warnings import warn
from mora_jax._flax.layers import lacking


def register() -> None:
    """Check that this version of Tunix has all the layers that `mora_jax` knows.

    `nnx.plan` and `nnx.wrap` know the layers of Qwen2, Qwen3, Llama3 and Gemma 1 to 4,
    with their mixtures of experts, by their names, without this call.

    Raises:
      ImportError: Tunix is not installed.

    Warns:
      MoRAWarning: This version of Tunix lacks a class that the version 0.1.7 has. All
        other classes are known.

    Example: see docs/tunix.md, which also says what is adapted by default.
    """
    if find_spec("tunix") is None:
        raise ImportError("mora_jax.tunix needs Tunix: pip install google-tunix")
    if missing := lacking("tunix"):
        warn(
            f"this version of Tunix has no {' and no '.join(missing)}, which Tunix "
            "0.1.7 has; mora_jax.register_layer teaches what is there instead"
        )
