"""What is known of a model before it is planned: its layers, and what a call does.

Both Flax shells fill in a `Survey`: of each layer of a known class which product it
computes with which kernel, and of one traced call what it does with every array.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax

from mora_jax._flax.layer_rules import LayerRule, planning_rules
from mora_jax._proof import Call, Uses, follow
from mora_jax.products import Lookup, Product


@dataclasses.dataclass
class Survey:
    """What is known of the arrays of a model, by their paths.

    Attributes:
      products: {path of a kernel: what its layer computes with it}.
      others: paths of what known layers have beside their kernels, as biases.
      classes: {path of a module: the name of its class}.
      faults: {path of a kernel: what other modules are known to do with it}.
      uses: what a call of the model does with its arrays; None if none was traced.
    """

    products: dict[str, Product] = dataclasses.field(default_factory=dict)
    others: set[str] = dataclasses.field(default_factory=set)
    classes: dict[str, str] = dataclasses.field(default_factory=dict)
    faults: dict[str, str] = dataclasses.field(default_factory=dict)
    uses: Uses | None = None

    def note(
        self, name: str, rule: LayerRule, module: Any, args: Any, kwargs: Any
    ) -> tuple[Call, Any]:
        """Keep what a call tells about the kernel at `name`: the call, its input."""
        product, x = rule.read(module, args, kwargs)
        first = planning_rules(module)[rule.name(module)]
        planned = product if rule is first else first.product(module)
        if planned is None:
            self.products.setdefault(name, product)
        else:
            self.products[name] = planned
        method = f"{type(module).__name__}.{rule.method}"
        return Call(name, product, rule.scale_of(module) is not None, method), x

    def trace(
        self, function: Callable[..., Any], leaves: Any, tree: Any, *args: Any
    ) -> None:
        """Follow the leaves of `tree` through `function(tree, *args)`.

        Only the arrays and shapes in `args` are traced; whatever else is there is
        static.

        Args:
          function: the call, which marks its layers.
          leaves: {path: leaf} of `tree`, in its order.
          tree: the arrays to follow.
          *args: further arguments.
        """
        inputs, structure = jax.tree.flatten(args)
        traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in inputs]

        def call(tree: Any, arrays: list[Any]) -> list[Any]:
            left = iter(arrays)
            merged = [
                next(left) if is_array else leaf
                for leaf, is_array in zip(inputs, traced, strict=True)
            ]
            result = function(tree, *jax.tree.unflatten(structure, merged))
            return jax.tree.leaves(result)

        arrays = [x for x, is_array in zip(inputs, traced, strict=True) if is_array]
        jaxpr = jax.make_jaxpr(call)(tree, arrays).jaxpr
        stacked = {
            name: leaf.ndim - len(self.products[name].axes)
            for name, leaf in leaves.items()
            if name in self.products
        }
        self.uses = follow(jaxpr, list(leaves), stacked)

    def no_kernels(self, names: Iterable[str]) -> set[str]:
        """Those of `names` that are known to be added or read, not multiplied."""
        found = set(self.others)
        if self.uses is not None:
            kernels = (
                self.uses.multiplied | self.products.keys() | self.uses.unseen.keys()
            )
            found |= self.uses.run - kernels
        return found & set(names)

    def unproven(self, names: Iterable[str]) -> tuple[tuple[str, str], ...]:
        """Those of `names` of which the trace of a call proves nothing, and why."""
        if self.uses is None:
            return ()
        found = {}
        for name in names:
            if name in self.uses.unseen:
                primitive = self.uses.unseen[name]
                found[name] = f"a trace cannot look into `{primitive}`"
            elif name not in self.uses.run:
                found[name] = "the call that was traced does not use it"
            elif name not in self.products:
                found[name] = f"nothing is known of its class{self.class_of(name)}"
        return tuple(found.items())

    def why_unknown(self, name: str) -> str:
        """Why it is not known what a layer computes with the array at `name`."""
        if self.uses is not None and name not in self.uses.run:
            return (
                "the call that was traced does not use it: plan with inputs for which "
                "its layer runs, or exclude it"
            )
        calls = "" if self.uses is not None else ", and plan with inputs of a call"
        return (
            "it is not known how a layer uses it: teach its class"
            f"{self.class_of(name)} with mora_jax.register_layer{calls}"
        )

    def class_of(self, name: str) -> str:
        """The class of the module that has the array at `name`, as " Dense"; or ""."""
        path = name
        while path:
            path = path.rpartition("/")[0]
            if path in self.classes:
                return f" {self.classes[path]}"
        return ""


def refuse_untraced(name: str, product: Product | None) -> None:
    """Raise for an embedding in a plan that no trace has checked."""
    if isinstance(product, Lookup):
        raise ValueError(
            f"{name}: only a call shows whether the model also reads this embedding "
            "elsewhere (a tied head); plan with mora_jax.linen.plan or "
            "mora_jax.nnx.plan(model, config, *inputs)"
        )
