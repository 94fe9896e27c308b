"""A Llama in Flax Linen for any mesh: scanned layers, logical axes, remat, bfloat16.

This file does not know about adapters. `RULES` alone says how the model is split over a
mesh with the axes "data", "fsdp" and "model": batches over the first two, kernels over
the last two.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.smollm2 import rotary

RULES = (
    ("batch", ("fsdp", "data")),
    ("embed", "fsdp"),
    ("heads", "model"),
    ("mlp", "model"),
    ("vocabulary", "model"),
    ("layers", None),
)
"""The mesh axes that split each axis of the model."""

_PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
NAMES = {
    "model.embed_tokens": "embed_tokens",
    "model.layers.{n}.input_layernorm": "layers/input_norm/scale[{n}]",
    "model.layers.{n}.post_attention_layernorm": "layers/mlp_norm/scale[{n}]",
} | {
    f"model.layers.{{n}}.{block}.{name}": f"layers/{name}/kernel[{{n}}]"
    for block, names in _PROJECTIONS.items()
    for name in names
}
"""PyTorch's names, for `mora_jax.io.load_base`. Leaves that are not here have them."""

ROPE_BASE = 500_000.0

BATCH_AXES = ("fsdp", "data")
"""The mesh axes that split batches; see docs/meshes.md on their order."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a Llama.

    Attributes:
      layers: The number of layers.
      width: The width of the residual stream.
      hidden: The width inside the MLP.
      heads: The number of query heads.
      kv_heads: The number of key heads, and of value heads.
      vocabulary: The number of different tokens.
      head_width: The number of features in a head.
    """

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_width: int = 128


SHAPES = {
    "tiny": Shape(4, 256, 768, 8, 4, 512, head_width=32),
    "8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "70b": Shape(80, 8192, 28672, 64, 8, 128256),
    "405b": Shape(126, 16384, 53248, 128, 8, 128256),
}
"""The sizes of Llama 3, and a small one for tests."""


def make_mesh(
    data: int, fsdp: int, model: int, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of data x fsdp x model devices: the first of some, or of all."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (data, fsdp, model),
        ("data", "fsdp", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=devices[: data * fsdp * model],
    )


class Llama(nn.Module):
    """A model from tokens (batch, tokens) to logits (batch, tokens, vocabulary).

    Attributes:
      shape: The size of the model.
      mesh: The mesh over which activations are split; None leaves that to XLA.
      dtype: The dtype of kernels and activations.
    """

    shape: Shape
    mesh: Mesh | None = None
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, tokens: jax.Array, offset: jax.Array | None = None) -> jax.Array:
        """The logits, in float32.

        Args:
          tokens: (batch, tokens).
          offset: A vector that all embeddings add, (width,); None for none.
        """
        size = self.shape
        table: Any = self.param(
            "embed_tokens",
            nn.with_logical_partitioning(
                nn.initializers.normal(0.02), ("vocabulary", None)
            ),
            (size.vocabulary, size.width),
            self.dtype,
        )
        x = jnp.take(table, tokens, axis=0)
        x = lay_out(x if offset is None else x + offset, self.mesh, "batch")
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=size.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(size, self.mesh, self.dtype, name="layers")(x, None)
        x = Norm(self.dtype, name="norm")(x)
        head = dense(size.vocabulary, ("embed", "vocabulary"), self.dtype, "lm_head")
        logits = lay_out(head(x), self.mesh, "batch", None, "vocabulary")
        return logits.astype(jnp.float32)


def lay_out(x: jax.Array, mesh: Mesh | None, *names: str | None) -> jax.Array:
    """`x` with its named axes split over `mesh` as `RULES` says."""
    if mesh is None:
        return x
    axes = PartitionSpec(*(dict(RULES).get(name or "") for name in names))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, axes))


def dense(features: int, axes: tuple[str, str], dtype: Any, name: str) -> nn.Dense:
    """A layer without a bias, whose kernel has logical axes."""
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
    return nn.Dense(
        features,
        use_bias=False,
        dtype=dtype,
        param_dtype=dtype,
        kernel_init=init,
        name=name,
    )


class Norm(nn.Module):
    """Division by the root of the mean square, in float32."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x`: (..., width)."""
        init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        scale = self.param("scale", init, (x.shape[-1],), self.dtype)
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide**2, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean + 1e-5)).astype(x.dtype) * scale


class Layer(nn.Module):
    """Attention and the MLP, as the body of a scan."""

    shape: Shape
    mesh: Mesh | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """`x`: (batch, tokens, width)."""
        x = x + self.attend(Norm(self.dtype, name="input_norm")(x))
        x = x + self.think(Norm(self.dtype, name="mlp_norm")(x))
        return lay_out(x, self.mesh, "batch"), None

    def attend(self, x: jax.Array) -> jax.Array:
        """Causal attention, in which key/value heads serve groups of query heads."""
        size, dtype = self.shape, self.dtype

        def heads(number: int, name: str) -> jax.Array:
            width = number * size.head_width
            y = dense(width, ("embed", "heads"), dtype, name)(x)
            y = lay_out(y, self.mesh, "batch", None, "heads")
            return y.reshape(*x.shape[:-1], number, size.head_width)

        q, k = heads(size.heads, "q_proj"), heads(size.kv_heads, "k_proj")
        v = heads(size.kv_heads, "v_proj")
        q, k = rotary(q, ROPE_BASE), rotary(k, ROPE_BASE)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        y = lay_out(y.reshape(*x.shape[:-1], -1), self.mesh, "batch", None, "heads")
        y = dense(size.width, ("heads", "embed"), dtype, "o_proj")(y)
        return lay_out(y, self.mesh, "batch")

    def think(self, x: jax.Array) -> jax.Array:
        """The gated MLP."""
        size, dtype = self.shape, self.dtype
        gate = dense(size.hidden, ("embed", "mlp"), dtype, "gate_proj")(x)
        up = dense(size.hidden, ("embed", "mlp"), dtype, "up_proj")(x)
        y = lay_out(nn.silu(gate) * up, self.mesh, "batch", None, "mlp")
        y = dense(size.width, ("mlp", "embed"), dtype, "down_proj")(y)
        return lay_out(y, self.mesh, "batch")
