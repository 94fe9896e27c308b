"""A Llama in Flax Linen for any mesh: scanned layers, logical axes, remat, bfloat16.

Nothing in it knows of adapters. `RULES` alone say how a mesh of axes "data", "fsdp" and
"model" shares it: batches are split over the first two, kernels over the last two.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "model"),
    ("mlp", "model"),
    ("vocabulary", "model"),
    ("layers", None),
)
"""Which mesh axes split which axis of the model."""

BATCH_AXES = ("data", "fsdp")
"""Mesh axes that split batches."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a Llama.

    Attributes:
      layers: how many.
      width: of the residual stream.
      hidden: width inside the MLP.
      heads: of the queries.
      kv_heads: of keys and values.
      vocabulary: how many tokens there are.
      head_width: numbers a head.
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
"""Llama 3's sizes, and one for tests."""


def make_mesh(data: int, fsdp: int, model: int) -> Mesh:
    """A mesh of data x fsdp x model devices."""
    automatic = (jax.sharding.AxisType.Auto,) * 3
    sizes, names = (data, fsdp, model), ("data", "fsdp", "model")
    return jax.make_mesh(
        sizes,
        names,
        axis_types=automatic,
        devices=jax.devices()[: data * fsdp * model],
    )


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions. `x`: (batch, tokens, heads, head_width)."""
    half = x.shape[-1] // 2
    rates = 500_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * rates
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Llama(nn.Module):
    """Tokens (batch, tokens) to logits (batch, tokens, vocabulary).

    Attributes:
      shape: its size.
      mesh: where activations are laid out; None leaves them alone.
      dtype: of kernels and activations.
    """

    shape: Shape
    mesh: Mesh | None = None
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits, in float32."""
        size = self.shape
        table: Any = self.param(
            "embed_tokens",
            nn.with_logical_partitioning(
                nn.initializers.normal(0.02), ("vocabulary", None)
            ),
            (size.vocabulary, size.width),
            self.dtype,
        )
        x = self.lay_out(jnp.take(table, tokens, axis=0), "batch")
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
        logits = self.lay_out(head(x), "batch", None, "vocabulary")
        return logits.astype(jnp.float32)

    def lay_out(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`x` with its axes split as `RULES` say."""
        return lay_out(x, self.mesh, *names)


def lay_out(x: jax.Array, mesh: Mesh | None, *names: str | None) -> jax.Array:
    """`x` with its axes split over `mesh` as `RULES` say."""
    if mesh is None:
        return x
    axes = PartitionSpec(*(dict(RULES).get(name or "") for name in names))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, axes))


def dense(features: int, axes: tuple[str, str], dtype: Any, name: str) -> nn.Dense:
    """A layer without bias whose kernel has logical axes."""
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
    """Attention and MLP, as the body of a scan."""

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
        """Causal attention with grouped keys and values."""
        size, dtype = self.shape, self.dtype

        def heads(number: int, name: str) -> jax.Array:
            width = number * size.head_width
            y = dense(width, ("embed", "heads"), dtype, name)(x)
            y = lay_out(y, self.mesh, "batch", None, "heads")
            return y.reshape(*x.shape[:-1], number, size.head_width)

        q, k = heads(size.heads, "q_proj"), heads(size.kv_heads, "k_proj")
        v = heads(size.kv_heads, "v_proj")
        y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
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
