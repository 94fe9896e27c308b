"""Trees of other libraries' LoRAs: of qwix, Tunix and Flax's `nnx.LoRA`."""

import dataclasses
import math
from typing import Any

from jax import Array

from mora_jax._common.axes import to_model
from mora_jax._common.checks import (
    above_zero,
    as_jax_array,
    check_finite,
    check_floating,
)
from mora_jax._common.messages import nearest_paths
from mora_jax._layer.adapter import Adapter
from mora_jax._plan.settings import AdapterSettings
from mora_jax._plan.spec import AdapterSpec
from mora_jax._tree.paths import Found, Tree, named_leaves
from mora_jax._tree.plan import Plan, check_plan
from mora_jax.operators import LowRank


def from_lora(tree: Any, plan: Plan, alpha: float | int) -> Tree:
    """Adapters of the operator "low_rank" from another library's LoRA.

    Factors are found by their names: `<kernel>_lora_a` and `<kernel>_lora_b` (qwix,
    Tunix), `lora_a` and `lora_b` (`nnx.LoRA`, whose kernel is in `base_module`, and
    `nnx.LoRALinear`). So a user moves over in the middle of a project.

    Args:
      tree: The factors, such as `nnx.state(model, nnx.LoRAParam)` or the params of a
        Linen model; all other leaves are left alone.
      plan: A plan of the model with these kernels, of any operators, which knows their
        axes; by `linen.plan` or `nnx.plan` of the model without LoRA.
      alpha: The factor of A B there: `alpha / rank` of qwix and Tunix, 1 of `nnx.LoRA`.

    Returns:
      The adapters of the kernels that have factors.

    Raises:
      TypeError, ValueError: The tree lacks factors, the plan lacks their kernel, a
        factor lacks its twin, or shapes do not fit.

    Example::

      >>> import jax, jax.numpy as jnp, mora_jax
      >>> plan = mora_jax.plan({"fc": {"kernel": jnp.ones((8, 6))}})
      >>> tree = {"fc": {"kernel_lora_a": jnp.ones((8, 2)),
      ...                "kernel_lora_b": jnp.ones((2, 6))}}
      >>> adapters = mora_jax.from_lora(tree, plan, alpha=16 / 2)
      >>> mora_jax.delta_weight(adapters)["fc"]["kernel"][0, 0]
      Array(16., dtype=float32)
    """
    found, adapters = _factors_in(tree, check_plan(plan)), Found()
    alpha = above_zero("alpha", alpha)
    for path, spec in plan.specs.items():
        if not (pair := found.get("/".join(path))):
            continue
        stack, rank = spec.stack_shape, (pair["a"].shape or (0,))[-1]
        shapes = (*stack, spec.in_features, rank), (*stack, rank, spec.out_features)
        factors = []
        for letter, shape, axis in zip("ab", shapes, (-1, len(stack)), strict=True):
            name = f"{'/'.join(path)}_lora_{letter}"
            check_floating(pair[letter], name)
            factor = as_jax_array(name, pair[letter])
            check_finite(factor, name)
            factor = to_model(factor, spec.axes, back=True)
            is_rank = factor.shape[axis : axis + 1 or None] == (rank,)
            if not is_rank or factor.size != math.prod(shape):
                raise ValueError(
                    f"{'/'.join(path)}: lora_{letter} must have the shape {shape}, "
                    f"perhaps with several axes of features, got {factor.shape}"
                )
            if rank < 1:
                raise ValueError(
                    f"{'/'.join(path)}: lora_{letter} must have a rank of at least 1, "
                    f"got the shape {factor.shape}"
                )
            factors.append(factor.reshape(shape))
        adapters[path] = lora_adapter(spec, *factors, alpha=alpha)
    return adapters.tree()


def lora_adapter(spec: AdapterSpec, a: Array, b: Array, alpha: float = 1.0) -> Adapter:
    """The adapter of a kernel with the factors (*stack, in, r) and (*stack, r, out)."""
    op = LowRank(spec.in_features, spec.out_features, a.shape[-1])
    m = op.joined(a, b)
    settings = vars(AdapterSettings(alpha=alpha, param_dtype=m.dtype))
    return Adapter(m, dataclasses.replace(spec, operator=op, rank=None, **settings))


def _factors_in(tree: Any, plan: Plan) -> dict[str, dict[str, Any]]:
    """{kernel: {"a": array, "b": array}} of the factors of a plan's kernels."""
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in named_leaves(tree, "tree").values():
        *parent, last = path
        own, mark, letter = last.rpartition("lora_")
        if not mark or letter not in ("a", "b"):
            continue
        if own:  # "kernel_lora_a"
            kernel = (*parent, own.removesuffix("_"))
        elif parent[-1:] == ["lora"]:
            kernel = (*parent[:-1], "kernel")
        else:
            kernel = (*parent, "base_module", "kernel")
        if (name := "/".join(kernel)) not in plan:
            hint = nearest_paths(name, plan)
            raise ValueError(f"plan must have the kernel {name!r} of a LoRA{hint}")
        found.setdefault(name, {})[letter] = leaf
    for name, pair in found.items():
        if len(pair) < 2:
            raise ValueError(f"{name}: tree must have lora_a and lora_b of it")
    if not found:
        raise ValueError("tree holds no factor of a LoRA, such as kernel_lora_a")
    return found
