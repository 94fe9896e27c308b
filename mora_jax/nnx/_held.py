"""All that `qwix` needs of NNX: adapters in modules whose classes stay as they are."""

from collections.abc import Iterable

from flax import nnx

from mora_jax._plan.spec import SUFFIX, AdapterSpec
from mora_jax._tree.adapters import init_adapter
from mora_jax.nnx._param import MoRAParam as MoRAParam
from mora_jax.nnx._param import dropout_key as dropout_key
from mora_jax.nnx._param import held as held
from mora_jax.nnx._param import hold_adapter
from mora_jax.nnx._state import adapters as adapters
from mora_jax.nnx._state import attributes as attributes
from mora_jax.nnx._state import named_modules as named_modules
from mora_jax.nnx._state import plan_of as plan_of
from mora_jax.nnx._state import traceable as traceable
from mora_jax.nnx._wrap import detached as detached


def hold(
    model: nnx.Module, specs: Iterable[AdapterSpec], rngs: nnx.Rngs | None
) -> None:
    """Put new M's beside their kernels, on the meshes of the kernels."""
    modules = dict(named_modules(model))
    for spec in specs:
        module, name = modules[spec.path[:-1]], spec.path[-1]
        kernel = getattr(module, name)
        if hasattr(module, name + SUFFIX):
            raise ValueError(
                f"{spec.name}: model has an M there already: give qwix a model without "
                "adapters, such as the base or what mora_jax.qwix.merge_adapters makes"
            )
        if tuple(kernel.shape) != spec.kernel_shape:
            raise ValueError(
                f"{spec.name} of shape {kernel.shape} is multiplied as "
                f"{spec.kernel_shape}: qwix knows no kernels inside nnx.scan and "
                "nnx.vmap; leave it out of module_path"
            )
        key = rngs.params() if rngs and spec.init == "gaussian" else None
        hold_adapter(module, spec, init_adapter(spec, key), 0)
