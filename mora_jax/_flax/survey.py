"""Survey of a model before it is planned: its layers, and the uses of its arrays.

Linen's and NNX's `plan` fill it in: the product of each layer of a known class, and
what one traced call does with every array (see `mora_jax._trace_check`).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mora_jax._flax.adapted_call import LayerCall
from mora_jax._flax.layer_rules import LayerRule, planning_rules
from mora_jax._jax.traces import split_static
from mora_jax._trace_check import Call, Uses, follow, mark
from mora_jax.products import Product

NOT_USED = "the call that was traced does not use it"


@dataclasses.dataclass
class Survey:
    """Knowledge of the arrays of a model, by their paths.

    Attributes:
      products: {path of a kernel: the product of its layer}.
      non_kernels: The paths of other arrays of known layers, such as biases.
      classes: {path of a module: the name of its class}.
      scales: {path of a parameter that scales a kernel: the kernel's axes that it has}.
      uses: The uses of the arrays in a call of the model; None if none was traced.
    """

    products: dict[str, Product] = dataclasses.field(default_factory=dict)
    non_kernels: set[str] = dataclasses.field(default_factory=set)
    classes: dict[str, str] = dataclasses.field(default_factory=dict)
    scales: dict[str, range] = dataclasses.field(default_factory=dict)
    uses: Uses | None = None

    def record_call(self, name: str, call: LayerCall) -> jax.Array:
        """The output of a layer's method, with marks; `name` is its kernel's path."""
        product, x = call.read()
        rule, module = call.rule, call.module
        planning_rule = planning_rules(module)[rule.name(module)]
        planned = product if rule is planning_rule else planning_rule.product(module)
        # Of several methods with one kernel (an embedding and its tied head) the first
        # registered decides. If it needs a call, that call may come later.
        self.products[name] = planned or self.products.get(name, product)
        method = f"{type(module).__name__}.{rule.method}"
        marked = Call(name, product, method, self._scale(name, rule, module), x.dtype)
        call = call.with_input(mark(x, marked, end=False))
        y = call.method(*call.args, **call.kwargs)
        if not hasattr(y, "shape"):
            raise ValueError(
                f"{name}: {marked.method} must return the product of its input and its "
                f"kernel, as its rule says, got {type(y).__name__}: a class that hands "
                "its kernel to another module cannot be taught; leave it out with "
                "exclude"
            )
        return mark(y, marked, end=True)

    def _scale(self, name: str, rule: LayerRule, module: Any) -> float | str | None:
        """The scale of the kernel at `name`, for its `Call`."""
        with jax.ensure_compile_time_eval():  # a number is one, and no part of a trace
            scale, ndim = rule.scale_of(module), len(self.products[name].axes)
        if isinstance(rule.scale, str):
            path = "/".join([*name.split("/")[:-1], rule.scale])
            self.scales[path] = range(ndim - jnp.ndim(scale), ndim)
            return path
        if scale is None:
            return None
        numbers = () if isinstance(scale, Tracer) else np.unique(scale)
        return float(numbers[0]) if len(numbers) == 1 else ""

    def record_read(
        self, name: str, product: Product, cls: str, kernel: jax.Array
    ) -> jax.Array:
        """The kernel at `name` as any methods of its layer's class read it, marked."""
        self.products[name] = product
        return mark(kernel, Call(name, product, cls), end=True)

    def trace(
        self, function: Callable[..., Any], leaves: Any, tree: Any, *args: Any
    ) -> None:
        """Follow `leaves`, `named_leaves(tree)`, through `function(tree, *args)`."""
        # The function marks its layers. All else than arrays and shapes is static.
        arrays, join = split_static(args)

        def call(tree: Any, arrays: list[Any]) -> list[Any]:
            return jax.tree.leaves(function(tree, *join(arrays)))

        jaxpr = jax.make_jaxpr(call)(tree, arrays).jaxpr
        axes = {n: range(len(product.axes)) for n, product in self.products.items()}
        self.uses = follow(jaxpr, list(leaves), axes | self.scales)

    def no_kernel(self, name: str) -> bool:
        """True if the array at `name` is known to be never multiplied."""
        if name in self.non_kernels or self.uses is None:
            return name in self.non_kernels
        kernels = self.products, self.uses.multiplied, self.uses.unseen
        return name in self.uses.reached and not any(name in them for them in kernels)

    def unproven(self, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """(name, reason) for the kernels in `names` that the trace does not prove."""
        reasons = {name: self._why_unproven(name) for name in names}
        return tuple((name, why) for name, why in reasons.items() if why)

    def _why_unproven(self, name: str) -> str:
        if self.uses is None:
            return "no call was traced; nnx.plan takes the inputs of one"
        if why := self.uses.unseen.get(name):
            return why
        if name not in self.uses.reached:
            return NOT_USED
        known = name in self.products
        return "" if known else f"nothing is known of its class{self._class_of(name)}"

    def why_unknown(self, name: str) -> str:
        """The reason why nothing is known of the use of the array at `name`."""
        if self.uses is not None and name not in self.uses.reached:
            runs = "plan with inputs for which its layer runs, or exclude it"
            return f"{NOT_USED}: {runs}"
        calls = "" if self.uses is not None else ", and plan with inputs of a call"
        return (
            "it is not known how a layer uses it: teach its class"
            f"{self._class_of(name)} with mora_jax.register_layer{calls}"
        )

    def _class_of(self, name: str) -> str:
        # Of the innermost module whose class is known: a kernel may lie deeper, such as
        # in a list.
        while name:
            name = name.rpartition("/")[0]
            if name in self.classes:
                return f" {self.classes[name]}"
        return ""


def refuse_untraced(name: str, product: Product | None) -> None:
    """Raise for an embedding in a plan that no trace has checked."""
    if product is not None and product.needs_trace:
        raise ValueError(
            f"{name}: only a call shows whether the model also reads this embedding "
            "elsewhere (a tied head); plan with mora_jax.linen.plan or "
            "mora_jax.nnx.plan(model, config, *inputs)"
        )
