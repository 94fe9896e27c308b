"""Training steps of a chain of square Dense layers, of any size."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import mora_jax
from benchmarks.common.harness import Contender, check_close, random_like
from benchmarks.layer.exponents import FLOOR
from mora_jax import MoRAConfig, linen


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a chain, its input and its adapters; `kernels` None adapts all."""

    layers: int = 4
    width: int = 256
    rank: int = 8
    tokens: int = 1024
    kernels: int | None = None


class Layer(nn.Module):
    """A Dense layer in the form that `nn.scan` requires."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """`x`: (..., width) -> the same shape, and nothing to stack."""
        return nn.Dense(self.width, use_bias=False)(x), None


def chain(size: Size, scanned: bool) -> nn.Module:
    """The layers, in `nn.scan` or one after another."""
    if scanned:
        settings: Any = {"variable_axes": {"params": 0}, "length": size.layers}
        return nn.scan(Layer, split_rngs={"params": True}, **settings)(size.width)
    dense = functools.partial(nn.Dense, size.width, use_bias=False)
    return nn.Sequential([dense() for _ in range(size.layers)])


class Step(NamedTuple):
    """A function to compile, its arguments, and the plan of its adapters, if any."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    plan: mora_jax.Plan | None = None


def steps(
    size: Size, operators: Sequence[str], scanned: bool = False
) -> dict[str, Step]:
    """Loss and gradients: of the frozen chain, and with each operator."""
    model = chain(size, scanned)
    x = random_like(jax.ShapeDtypeStruct((size.tokens, size.width), jnp.float32), 1.0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = random_like(shapes, size.width**-0.5)

    def loss(apply: Callable[..., Any], *args: Any) -> jax.Array:
        y = apply(*args)
        return jnp.mean((y[0] if scanned else y) ** 2)

    value = functools.partial(loss, model.apply)
    made = {FLOOR: Step(jax.value_and_grad(value, argnums=1), (variables, x))}
    for operator in operators:
        config = MoRAConfig(rank=size.rank, operator=operator)
        if size.kernels:
            some = tuple(f"layers_{k}/kernel" for k in range(size.kernels))
            config = dataclasses.replace(config, targets=some)
        plan = linen.plan(model, variables, config, x)
        value = functools.partial(loss, linen.wrap(model, plan))
        args = random_like(mora_jax.init(plan), 0.01), variables, x
        made[operator] = Step(jax.value_and_grad(value, argnums=(0, 2)), args, plan)
    return made


def contenders(made: Mapping[str, Step]) -> dict[str, Contender]:
    """Compile all steps; each gradient by x must be as with merged kernels."""
    found = {
        k: Contender.compile(step.function, *step.args) for k, step in made.items()
    }
    for method, step in made.items():
        if step.plan:
            adapters, variables, x = step.args
            merged = mora_jax.merge(variables["params"], adapters)
            _, expected = found[FLOOR].run({"params": merged}, x)
            check_close(found[method]()[1][1], expected)
    return found
