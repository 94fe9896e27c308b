"""Marks in a program: where calls of known layers begin and end."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mora_jax.products import Product


@dataclasses.dataclass(eq=False, repr=False)
class Call:
    """One call of a method of a known layer; two calls are never equal.

    Attributes:
      name: The path of the kernel.
      product: The product that the method computes, according to the layer's rule.
      scaled: True if the rule says that the layer scales its kernel.
      method: The method, such as "Dense.__call__".
    """

    name: str
    product: Product
    scaled: bool
    method: str

    def __repr__(self) -> str:  # in a printed program
        return f"{self.method} of {self.name}"

    @functools.cached_property
    def transposed(self) -> "Call":
        """The transposed call: a model that takes a gradient goes back through it."""
        call = dataclasses.replace(self, product=self.product.transposed)
        call.__dict__["transposed"] = self
        return call


mark_p = Primitive("mora_mark")


def mark(x: Any, call: Call, *, end: bool) -> jax.Array:
    """`x`, with a mark that it is the input or (`end`) the output of `call`."""
    return mark_p.bind(jnp.asarray(x), call=call, end=end, lead=0)


def _batch_mark(args: Any, axes: Any, *, lead: int, **settings: Any) -> Any:
    (x,), (axis,) = args, axes
    return mark_p.bind(jnp.moveaxis(x, axis, 0), lead=lead + 1, **settings), 0


def _transpose_mark(y: Any, x: Any, *, call: Call, end: bool, lead: int) -> Any:
    if isinstance(y, ad.Zero):
        return [y]
    return [mark_p.bind(y, call=call.transposed, end=not end, lead=lead)]


mark_p.def_impl(lambda x, **_: x)
mark_p.def_abstract_eval(lambda x, **_: x)
ad.deflinear2(mark_p, _transpose_mark)
batching.primitive_batchers[mark_p] = _batch_mark
mlir.register_lowering(mark_p, lambda context, x, **_: [x])
