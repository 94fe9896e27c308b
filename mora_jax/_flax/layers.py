"""Products of known layers; importing this registers them.

Flax's own are known by their classes, and layers of transformers, Tunix, gemma and
RecurrentGemma by name, so that these packages need not be installed.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from mora_jax._common.types import ArrayLike
from mora_jax._flax.layer_rules import RULES, LayerRule, register_layer
from mora_jax.products import ATTEND, DENSE, Convolution, Folded, Lookup, Product
from mora_jax.products.contraction import Blocks, dot_general_equation

NORMS = (nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.LayerNorm, nnx.RMSNorm)
"""Classes whose `scale` and `bias` are one number for each feature, and no kernels."""


def _axes(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _general(module: Any, inputs: ArrayLike, *_: Any, **__: Any) -> str:
    linen = isinstance(module, nn.Module)
    names = ("batch_dims", "features") if linen else ("batch_axis", "out_features")
    axis, batch, outs = (_axes(getattr(module, name)) for name in ("axis", *names))
    batch, axis = (sorted(k % inputs.ndim for k in axes) for axes in (batch, axis))
    # The kernel's axes are (*batch, *in, *out).
    summed = range(len(batch), len(batch) + len(axis))
    numbers = (axis, summed), (batch, range(len(batch)))
    return dot_general_equation(inputs.ndim, summed.stop + len(outs), numbers)


def _einsum(module: Any, x: Any, einsum_str: Any = None, *_: Any, **__: Any) -> str:
    return einsum_str or module.einsum_str


def convolution(layer: Any, *_: Any, **__: Any) -> Convolution:
    """The product of `Conv` or `ConvTranspose`; Linen's class computes it."""
    cls: Any = nn.ConvTranspose if hasattr(layer, "transpose_kernel") else nn.Conv
    names = "strides padding kernel_dilation mask precision transpose_kernel "
    names += "input_dilation feature_group_count"
    copied = {n: getattr(layer, n) for n in names.split() if hasattr(layer, n)}
    features = "oi" if copied.get("transpose_kernel") else "io"
    window, masked = _axes(layer.kernel_size), layer.mask is not None
    plain = copied.get("feature_group_count", 1) == 1 and not masked

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        outputs = kernel.shape[len(window) + features.index("o")]
        settings = {**copied, "use_bias": False, "dtype": kernel.dtype}
        # Without a parent; otherwise it would become a part of the running module.
        convolution = cls(outputs, window, parent=None, **settings)
        return convolution.apply({"params": {"kernel": kernel}}, x)

    return Convolution("i" * len(window) + features, convolve, plain, masked)


_APIS = (nn, nn.Dense, nn.DenseGeneral), (nnx, nnx.Linear, nnx.LinearGeneral)
for api, dense, general in _APIS:
    register_layer(dense, equation=DENSE, dot_general=True)
    register_layer(general, equation=_general, dot_general=True)
    register_layer(api.Einsum, equation=_einsum)
    register_layer(api.Conv, equation=convolution)
    register_layer(api.ConvTranspose, equation=convolution)
    register_layer(api.Embed, equation=Lookup(), kernel="embedding")
    register_layer(api.Embed, equation=ATTEND, kernel="embedding", method="attend")

_TABLE = "input_embedding"


def _folded(product: Product, *kernels: str) -> list[LayerRule]:
    return [LayerRule(product, kernel) for kernel in kernels]


def _root(layer: Any) -> jax.Array:
    """The factor of an Embedder's rows, in their dtype."""
    return jnp.sqrt(layer.embed_dim).astype(layer.get_variable("params", _TABLE).dtype)


_GM_EINSUM = LayerRule(
    lambda layer, eqn, x: eqn,
    lambda layer: layer.weight_name,
    argument="x",
    scale=lambda layer: getattr(layer, "w_scale", None),  # Gemma 3n and 4 have it
)
_GM_ENCODE = LayerRule(Lookup(), _TABLE, "encode", scale=_root)
_DECODE = LayerRule(ATTEND, _TABLE, "decode")
_EMBEDDER = [LayerRule(Lookup(), _TABLE, "encode"), _DECODE]
# Experts are bare arrays, whose method sorts tokens and multiplies groups of them.
_EXPERTS, _LEFT_OUT = Folded("sio"), Folded("io", adapted_by_default=False)
# Gemma scales what it looks up, so that each call adds its whole table to its delta.
_SCALED_TABLE = _folded(_LEFT_OUT, _TABLE)
_EINSUM = LayerRule(_einsum, "w")
_QWEN_AND_LLAMA, _GEMMA = ("qwen2", "qwen3", "llama3"), ("gemma", "gemma3")
_TUNIX = {
    **{f"{model}.model.Einsum": [_EINSUM] for model in _QWEN_AND_LLAMA + _GEMMA},
    **{f"{model}.model.Embedder": _EMBEDDER for model in _QWEN_AND_LLAMA},
    **{f"{model}.model.Embedder": _SCALED_TABLE for model in _GEMMA},
    "gemma4.model.Einsum": [LayerRule(_einsum, "w", scale=lambda own: own.w_scale)],
    "gemma4.model.Embedder": _SCALED_TABLE
    + _folded(Folded("ioo", adapted_by_default=False), "per_layer_input_embedding"),
    "qwen3.model.MoELayer": _folded(_EXPERTS, "gate_proj", "up_proj", "down_proj"),
    "gemma4.moe.MoERagged": _folded(Folded("sooi"), "gating_einsum")
    + _folded(_EXPERTS, "linear")
    + _folded(_LEFT_OUT, "router_logits"),
}
RULES.update({f"tunix.models.{name}": rules for name, rules in _TUNIX.items()})
_CONV1D = [LayerRule("...i,oi->...o")]
RULES["transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D"] = _CONV1D
RULES["recurrentgemma.jax.layers.Einsum"] = [LayerRule(lambda own, x: own.eqn, "w")]
RULES["recurrentgemma.jax.layers.BlockDiagonalLinear"] = [LayerRule(Blocks(), "w")]
# Gemma 2 and 3, 3n, and 4 have their own `Einsum`, and `Embedder`, also their head.
for _package in ("gemma.gm.nn", "gemma.gm.nn.gemma3n", "gemma.gm.nn.gemma4"):
    RULES[f"{_package}._layers.Einsum"] = [_GM_EINSUM]
    RULES[f"{_package}._modules.Embedder"] = [_GM_ENCODE, _DECODE]
