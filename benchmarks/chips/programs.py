"""Programs that `compare` compiles: a dense layer, and transformers' Llama.

They are functions with the shapes of their arguments. No array of that size exists.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import mora_jax
from benchmarks.common.by_hand import lora_by_hand
from benchmarks.common.cost import WAYS
from benchmarks.common.flax_llama import flax_llama, inputs
from benchmarks.common.harness import method_name
from benchmarks.common.ways import choose
from mora_jax import FrozenDense, MoRAConfig, linen
from mora_jax._layer.tuning import TUNING
from mora_jax.products import Contraction

FROZEN = "frozen"
TARGETS = r".*_proj/kernel"


class Method(NamedTuple):
    """A program, and what it adapts.

    Attributes:
        name: The name of the method.
        run: The program.
        args: The shapes of its arguments.
    """

    name: str
    run: Callable[..., Any]
    args: tuple[Any, ...]


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """The shape of an array."""
    return jax.ShapeDtypeStruct(sizes, dtype)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One dense layer, forward and backward, as part of a model.

    Attributes:
        ins: Its inputs.
        outs: Its outputs.
        rows: The rows of its input.
        rank: The budget of an adapter, as the rank of LoRA.
        dtype: The dtype of kernel and activations.
    """

    ins: int
    outs: int
    rows: int
    rank: int = 8
    dtype: Any = jnp.bfloat16

    def __str__(self) -> str:
        return f"{self.ins}x{self.outs}, {self.rows:,} rows, r = {self.rank}"

    def config(self, operator: str, execution: str = "auto") -> MoRAConfig:
        """The settings of an adapter."""
        return MoRAConfig(rank=self.rank, operator=operator, execution=execution)

    def frozen(self, operator: str, execution: str) -> FrozenDense:
        """The adapted layer without its kernel."""
        config = self.config(operator, execution)
        kernel = shape(self.ins, self.outs, dtype=self.dtype)
        return FrozenDense.from_config(kernel, config=config)

    def methods(self, operators: Sequence[str]) -> Iterator[Method]:
        """The layer alone, LoRA by hand, and each operator both ways."""
        w = shape(self.ins, self.outs, dtype=self.dtype)
        x = shape(self.rows, self.ins, dtype=self.dtype)
        g = shape(self.rows, self.outs, dtype=self.dtype)
        yield Method(FROZEN, both_passes(lambda _, w, x: x @ w), ((), w, x, g))

        def lora(adapter: Any, w: jax.Array, x: jax.Array) -> jax.Array:
            return x @ w + lora_by_hand(adapter, x, self.outs)

        sizes = (self.ins, self.rank), (self.rank, self.outs)
        pair = tuple(shape(*size, dtype=jnp.float32) for size in sizes)
        yield Method("LoRA, by hand", both_passes(lora), (pair, w, x, g))
        for operator in operators:
            for way in WAYS:
                yield self.mora(operator, way, (w, x, g))

    def mora(self, operator: str, execution: str, args: tuple[Any, ...]) -> Method:
        """The layer with an operator."""
        layer = self.frozen(operator, execution)

        def mora(m: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
            adapted = dataclasses.replace(layer, kernel=w)
            return mora_jax.mora_apply({"kernel_mora": m}, adapted, x)

        m = shape(*layer.operator.m_shape, dtype=jnp.float32)
        return Method(f"{operator}, {execution}", both_passes(mora), (m, *args))

    def is_auto(self, method: str, platform: str) -> bool:
        """True if `execution="auto"` takes a method's way on a platform."""
        operator, _, way = method.partition(", ")
        if way not in WAYS:
            return False
        kernel = shape(self.ins, self.outs, dtype=self.dtype)
        spec = mora_jax.plan({"kernel": kernel}, self.config(operator))["kernel"]
        x = shape(self.rows, self.ins, dtype=self.dtype)
        product = Contraction.from_axes("io", 2)
        return choose(spec, product, x, x.dtype, tuning=TUNING[platform]) == way


def both_passes(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(adapter, w, x, g) -> the output, and the gradients of adapter and x."""

    def run(adapter: Any, w: jax.Array, x: jax.Array, g: jax.Array) -> Any:
        y, back = jax.vjp(lambda adapter, x: apply(adapter, w, x), adapter, x)
        return y, back(g)

    return run


@dataclasses.dataclass(frozen=True)
class Llama:
    """Loss and gradient of transformers' Llama, with all seven projections adapted.

    Attributes:
        batch: The number of sequences.
        tokens: The length of each.
        rank: The budget of an adapter, as the rank of LoRA.
        layers: The number of layers; they are not scanned.
        width: The features of the residual stream.
        hidden: Those inside a feed-forward block.
        heads: The heads of queries.
        kv_heads: The heads of keys and values.
        vocabulary: The number of tokens.
        dtype: The dtype of parameters and activations.
    """

    batch: int
    tokens: int
    rank: int = 8
    layers: int = 2
    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32000
    dtype: Any = jnp.bfloat16

    def __str__(self) -> str:
        size = f"{self.layers} layers of width {self.width}"
        tokens = f"{self.batch} x {self.tokens:,} tokens, r = {self.rank}"
        return f"Llama, {size}, {tokens}"

    def module(self) -> Any:
        """The model as a Linen module."""
        return flax_llama(
            self.tokens,
            self.dtype,
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
        )

    def params(self, module: Any) -> Any:
        """The shapes of its parameters."""
        ids = shape(1, 8, dtype=jnp.int32)
        made = jax.eval_shape(
            lambda key, ids: module.init(key, *inputs(ids)), jax.random.key(0), ids
        )
        return jax.tree.map(lambda s: shape(*s.shape, dtype=self.dtype), made["params"])

    def methods(self, operators: Sequence[str]) -> Iterator[Method]:
        """The frozen model, MoRA with each operator, and qwix's LoRA."""
        module = self.module()
        params = self.params(module)
        ids = shape(self.batch, self.tokens + 1, dtype=jnp.int32)
        # All that is trained is a vector that the embeddings have in common: the
        # backward pass goes through all layers, to no kernel.
        vector = shape(self.width, dtype=self.dtype)
        yield Method(FROZEN, gradient(shifted(module)), (vector, params, ids))
        for operator in operators:
            plan, apply = self.mora(module, params, operator)
            adapters = jax.eval_shape(lambda plan=plan: mora_jax.init(plan))
            name = method_name(operator)
            yield Method(name, gradient(apply), (adapters, params, ids))
        lora, apply = self.lora(module, params)
        yield Method("LoRA, qwix", gradient(apply), (lora, params, ids))

    def mora(self, module: Any, params: Any, operator: str) -> Any:
        """The plan of an operator, and the adapted model."""
        config = MoRAConfig(rank=self.rank, operator=operator, targets=TARGETS)
        plan = mora_jax.plan(params, config)
        wrapped = linen.wrap(module, plan)

        def apply(adapters: Any, params: Any, ids: jax.Array) -> jax.Array:
            variables = {"params": params}
            return wrapped(adapters, variables, *inputs(ids), return_dict=False)[0]

        return plan, apply

    def lora(self, module: Any, params: Any) -> Any:
        """The shapes of qwix's adapters on the same kernels, and the adapted model."""
        import qwix

        provider = qwix.LoraProvider(module_path=".*_proj", rank=self.rank, alpha=16.0)
        adapted: Any = qwix.apply_lora_to_model(module, provider)
        adapters = {}
        flat: dict[Any, Any] = dict(flatten_dict(params))
        for path, kernel in flat.items():
            if path[-2].endswith("_proj"):
                (ins, outs), wide = kernel.shape, {"dtype": jnp.float32}
                adapters[*path[:-1], "kernel_lora_a"] = shape(ins, self.rank, **wide)
                adapters[*path[:-1], "kernel_lora_b"] = shape(self.rank, outs, **wide)

        def apply(adapters: Any, params: Any, ids: jax.Array) -> jax.Array:
            both = unflatten_dict(flatten_dict(params) | adapters)
            return adapted.apply({"params": both}, *inputs(ids), return_dict=False)[0]

        return adapters, apply


def shifted(module: Any) -> Callable[..., jax.Array]:
    """(vector, params, ids) -> logits of a model whose embeddings add the vector."""
    table = "model", "embed_tokens", "embedding"

    def apply(vector: jax.Array, params: Any, ids: jax.Array) -> jax.Array:
        flat: dict[Any, Any] = dict(flatten_dict(params))
        flat[table] = flat[table] + vector
        variables = {"params": unflatten_dict(flat)}
        return module.apply(variables, *inputs(ids), return_dict=False)[0]

    return apply


def gradient(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(trained, params, ids) -> the mean loss of the next tokens, and its gradient."""

    def loss(trained: Any, params: Any, ids: jax.Array) -> jax.Array:
        logits = apply(trained, params, ids[:, :-1]).astype(jnp.float32)
        entropy = optax.softmax_cross_entropy_with_integer_labels
        return entropy(logits, ids[:, 1:]).mean()

    return jax.value_and_grad(loss)
