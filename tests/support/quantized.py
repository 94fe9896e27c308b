"""Adapters in models that qwix quantizes; run by models/test_interception.py.

`python quantized.py plain-first` runs each adapted model as it is and then quantized,
`quantized-first` the other way round. Each case has shapes of its own, so that no
program of one serves another: the order is all that can make a difference.
"""

import sys
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from mora_jax import MoRAConfig, MoRADense, combine, delta_weight, init, linen
from mora_jax import nnx as mora

warnings.simplefilter("error")
warnings.simplefilter("ignore", DeprecationWarning)  # qwix uses old names of Flax

QT = qwix.QtRule(weight_qtype="int8", act_qtype="int8")
PTQ = qwix.QuantizationRule(weight_qtype="int8")


def provider(kind: str) -> Any:
    return qwix.QtProvider([QT]) if kind == "qt" else qwix.PtqProvider([PTQ])


def exact(kernel: Any, x: Any) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)


def close(actual: Any, expected: Any, name: str) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(actual) / scale, expected / scale, atol=2e-6, err_msg=name
    )


def is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


class Case:
    """A model of one adapted layer, and what it must give."""

    def __init__(self, shape: tuple[int, int], rows: int, operator: str, kind: str):
        random = np.random.default_rng(sum(shape))
        self.x, self.kernel, self.m = (
            jnp.asarray(random.normal(size=size), jnp.float32)
            for size in ((rows, shape[0]), shape, (8, 8))
        )
        self.kind, self.out = kind, shape[1]
        self.config = MoRAConfig(square_rank=8, operator=operator, alpha=2.0)
        self.name = f"{type(self).__name__} {kind} {operator} {rows} rows"
        self.make()

    def adapters(self, m: Any) -> Any:
        return jax.tree.map(lambda _: m, init(self.plan))

    def delta(self, m: Any) -> Any:
        (delta,) = jax.tree.leaves(delta_weight(self.adapters(m)))
        return delta

    def plain(self) -> None:
        kernel = self.kernel + self.delta(self.m)
        close(self.adapted(), exact(kernel, self.x), self.name)

    def quantized(self) -> None:
        """qwix's own product, and the exact update; exact gradients of M."""
        (y, grads), (own, kernel) = self.run(), self.own()
        if self.kind == "ptq":
            close(own, exact(qwix.dequantize(kernel), self.x), self.name)
        close(y, own + exact(self.delta(self.m), self.x), self.name)
        expected = jax.grad(lambda m: jnp.sum(self.x @ self.delta(m)))(self.m)
        close(grads, np.asarray(expected), self.name)


class Linen(Case):
    def make(self) -> None:
        self.model = nn.Sequential([nn.Dense(self.out, use_bias=False)])
        self.variables = {"params": {"layers_0": {"kernel": self.kernel}}}
        self.plan = linen.plan(self.model, self.variables, self.config, self.x)

    def adapted(self):
        apply = linen.wrap(self.model, self.plan)
        return apply(self.adapters(self.m), self.variables, self.x)

    def quantize(self, model, variables):
        model = qwix.quantize_model(model, provider(self.kind))
        if self.kind == "ptq":
            shapes = jax.eval_shape(model.init, jax.random.key(0), self.x)
            params = qwix.quantize_params(variables["params"], shapes["params"])
            variables = {"params": params}
        return model, variables

    def function(self):
        """(M to the output of the quantized model)."""
        model, variables = self.quantize(self.model, self.variables)
        apply = linen.wrap(model, self.plan)  # a plan of floating-point kernels
        return lambda m: apply(self.adapters(m), variables, self.x)

    def run(self):
        function = self.function()

        def loss(m):
            y = function(m)
            return jnp.sum(y), y

        grads, y = jax.grad(loss, has_aux=True)(self.m)
        return y, grads

    def own(self):
        model, variables = self.quantize(self.model, self.variables)
        kernel = variables["params"]["layers_0"]["kernel"]
        return np.asarray(model.apply(variables, self.x)), getattr(
            kernel, "array", None
        )


class Module(Linen):
    """MoRADense in a model."""

    def function(self):
        layers = [MoRADense(self.out, use_bias=False, config=self.config)]
        # qwix quantizes dicts of arrays alone, so the adapters are put in afterwards.
        model, variables = self.quantize(nn.Sequential(layers), self.variables)
        base = variables["params"]
        return lambda m: model.apply(
            {"params": combine(base, self.adapters(m))}, self.x
        )


class Nnx(Case):
    def make(self) -> None:
        settings = {"use_bias": False, "kernel_init": lambda *_: self.kernel}
        layer = nnx.Linear(*self.kernel.shape, **settings, rngs=nnx.Rngs(0))
        self.model = nnx.Sequential(layer)
        self.wrapped = mora.wrap(self.model, self.config)
        self.plan = mora.plan_of(self.wrapped)
        mora.set_adapters(self.wrapped, self.adapters(self.m))

    def adapted(self):
        return self.wrapped(self.x)

    def run(self):
        model = qwix.quantize_model(self.wrapped, provider(self.kind), self.x)
        (layer,) = model.layers
        assert isinstance(layer.kernel_mora, mora.MoRAParam)
        assert layer.kernel_mora.dtype == jnp.float32
        grad = mora.value_and_grad(lambda model, x: jnp.sum(model(x)))
        _, grads = grad(model, self.x)
        (dm,) = jax.tree.leaves(grads)
        return self.call(model), dm

    def own(self):
        model = qwix.quantize_model(self.model, provider(self.kind), self.x)
        y, kernel = self.call(model), model.layers[0].kernel

        if self.kind == "qt":
            return np.asarray(y), None
        arrays = [
            one[...] for one in jax.tree.leaves(kernel.array, is_leaf=is_variable)
        ]
        structure = jax.tree.structure(kernel.array, is_leaf=is_variable)
        return np.asarray(y), jax.tree.unflatten(structure, arrays)

    def call(self, model):
        return model(self.x)


class Jitted(Nnx):
    def call(self, model):
        return nnx.jit(lambda model, x: model(x))(model, self.x)


CASES = (  # most have so many rows that the plain model folds
    (Linen, "qt", 512, "rotation"),
    (Nnx, "qt", 16, "orthogonal"),
    (Jitted, "qt", 512, "sharing"),
    (Linen, "ptq", 512, "sharing"),
    (Linen, "ptq", 16, "sharing"),
    (Module, "ptq", 512, "truncation"),
    (Nnx, "ptq", 512, "decoupling"),
)


def main(order: str) -> None:
    runs = [Case.plain, Case.quantized]
    made = [
        cls((16 + 8 * k, 24), rows, operator, kind)
        for k, (cls, kind, rows, operator) in enumerate(CASES)
        # qwix's own PTQ of NNX models asks Flax for this.
        if hasattr(nnx.Variable, "get_raw_value") or (cls, kind) != (Nnx, "ptq")
    ]
    for run in runs if order == "plain-first" else reversed(runs):
        for case in made:
            run(case)


if __name__ == "__main__":
    main(*sys.argv[1:])
