"""Flax Linen: a dense layer with its adapter, and adapters for unmodified models."""

import dataclasses
import string
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Float, Shaped

from mora_jax._types import ArrayLike
from mora_jax.config import MoRAConfig
from mora_jax.contraction import Contraction
from mora_jax.layer import (
    SUFFIX,
    AdapterSpec,
    choose_dropout_key,
    init_adapter,
    update,
)
from mora_jax.layers import LayerRule, find_rule
from mora_jax.layers import register_layer as register_layer
from mora_jax.planning import Plan, adapter_path, named_leaves
from mora_jax.planning import plan as plan_params
from mora_jax.tree import adapter_items, combine, nest, split


class MoRADense(nn.Dense):
    """`nn.Dense` with an adapter: the same fields and parameters, and `kernel_mora`.

    It loads the parameters of an `nn.Dense`. Train it with `optimizer`, or keep the M's
    apart with `split`.

    Attributes:
      config: the adapter's settings; `targets`, `exclude` and `overrides` have no
        meaning here.
      deterministic: no adapter dropout; needed, here or in the call, where
        `config.dropout` is above zero. The key comes from the "dropout" stream.

    Example::

      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import MoRAConfig, MoRADense
      >>> layer = MoRADense(features=16, config=MoRAConfig(rank=2))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 16)))
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'bias': (16,), 'kernel': (16, 16), 'kernel_mora': (8, 8)}
    """

    config: MoRAConfig = MoRAConfig()
    deterministic: bool | None = None

    @nn.compact
    def __call__(
        self,
        inputs: Shaped[ArrayLike, "*batch features"],
        deterministic: bool | None = None,
    ) -> Float[jax.Array, "*batch out"]:
        """`nn.Dense`, plus the adapter's update.

        Args:
          inputs: (..., in_features).
          deterministic: no adapter dropout.

        Returns:
          (..., features).
        """
        y = super().__call__(inputs)
        shape = (inputs.shape[-1], self.features)
        spec = AdapterSpec.from_config(self.config, shape, path=(*self.path, "kernel"))
        m = self.param(f"kernel{SUFFIX}", lambda key: init_adapter(spec, key))
        key = None
        if spec.dropout > 0 and not nn.merge_param(
            "deterministic", self.deterministic, deterministic
        ):
            key = self.make_rng("dropout")
        return y + update(
            spec,
            m,
            inputs,
            Contraction.parse(DENSE, inputs.ndim),
            dtype=y.dtype,
            dropout_key=key,
            precision=self.precision,
        )


DENSE = "...i,io->...o"


def _dense_general(module: nn.DenseGeneral, inputs: ArrayLike) -> str:
    def normalise(axes: Any) -> list[int]:
        axes = [axes] if isinstance(axes, int) else axes
        return sorted(axis % inputs.ndim for axis in axes)

    features = module.features
    count = len(features) if not isinstance(features, int) else 1
    labels = string.ascii_letters[: inputs.ndim]
    stack = "".join(labels[axis] for axis in normalise(module.batch_dims))
    ins = "".join(labels[axis] for axis in normalise(module.axis))
    outs = string.ascii_letters[inputs.ndim : inputs.ndim + count]
    batch = "".join(c for c in labels if c not in stack + ins)
    return f"{labels},{stack}{ins}{outs}->{stack}{batch}{outs}"


def _einsum(module: nn.Einsum, inputs: ArrayLike, einsum_str: str | None = None) -> str:
    return nn.merge_param("einsum_str", module.einsum_str, einsum_str)


register_layer(nn.Dense, equation=DENSE)
register_layer(nn.DenseGeneral, equation=_dense_general)
register_layer(nn.Einsum, equation=_einsum)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Bound:
    """An M in the params of a running model, with its spec as static metadata.

    So the spec travels wherever Flax carries the parameters: into scanned and vmapped
    layers, and into the cache keys of `nn.jit`, which would else serve a program that
    was traced for another plan.
    """

    m: Any
    spec: Any

    @classmethod
    def of(cls, spec: AdapterSpec, m: Any) -> "_Bound":
        # Without the path, so that equal layers under nn.jit share one program.
        return cls(m, dataclasses.replace(spec, path=spec.path[-1:]))

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        return (self.m,), self.spec

    @classmethod
    def tree_unflatten(cls, spec: Any, children: tuple[Any]) -> "_Bound":
        return cls(*children, spec)


def wrap(model: nn.Module, plan: Plan) -> Callable[..., Any]:
    """An unmodified model's `apply`, with adapters.

    The model's own code runs; the output of each planned layer gets its update added,
    wherever the layer is: in `nn.scan`, `nn.remat`, `nn.vmap` or `nn.jit`, in
    setup-style or compact modules.

    Args:
      model: any Linen module.
      plan: made from its params, by `linen.plan` or `plan`.

    Returns:
      `apply(adapters, variables, *args, **kwargs)`: like `model.apply`, with the
      adapters first, so that `jax.grad` differentiates by them alone. Where the plan
      has dropout, `adapter_deterministic=` must be given; with False, keys come from
      `rngs={"dropout": key}`.

    Raises:
      TypeError: `model` is no Linen module; in a call: an adapter on a layer class that
        is not known (see `register_layer`).
      ValueError: in a call: adapters that do not fit the plan, or a plan that reads a
        kernel's axes otherwise than the layer.

    Example::

      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import init, linen
      >>> model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32)])
      >>> x = jnp.ones((1, 32))
      >>> variables = model.init(jax.random.key(0), x)
      >>> plan = linen.plan(model, variables, None, x)
      >>> apply, adapters = linen.wrap(model, plan), init(plan)
      >>> bool((apply(adapters, variables, x) == model.apply(variables, x)).all())
      True
    """
    _check_model(model)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, got {type(plan).__name__}")
    needs_flag = any(spec.dropout > 0 for spec in plan)

    def apply(
        adapters: Any,
        variables: Mapping[str, Any],
        *args: Any,
        adapter_deterministic: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if needs_flag and adapter_deterministic is None:
            raise ValueError(
                "the plan has dropout: adapter_deterministic must be True or False, "
                "got None"
            )
        items = adapter_items(adapters, plan)
        bound = nest({adapter_path(spec): _Bound.of(spec, m) for spec, m in items})
        params = combine(_params(variables), bound)
        with nn.intercept_methods(_Interceptor(bool(adapter_deterministic))):
            result = model.apply({**variables, "params": params}, *args, **kwargs)
        if not kwargs.get("mutable"):
            return result
        output, updated = result
        if "params" in updated:
            updated = {**updated, "params": split(updated["params"])[0]}
        return output, updated

    return apply


def plan(
    model: nn.Module,
    variables: Mapping[str, Any],
    config: MoRAConfig | None,
    *args: Any,
    **kwargs: Any,
) -> Plan:
    """`mora_jax.plan` for a Linen model, which it traces to see what each layer does.

    So kernels of any number of axes are understood, scanned ones too, and the default
    targets are the kernels of all layers of a known class, but for those whose names
    say head, classifier, embedding and the like.

    Args:
      model: any Linen module.
      variables: its variables, arrays or shapes.
      config: what to adapt, and how.
      *args: arguments of a call, arrays or shapes, as for `model.apply`.
      **kwargs: the same.

    Raises:
      TypeError, ValueError: as `mora_jax.plan`; and a target whose layer class is not
        known (see `register_layer`).

    Example::

      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from mora_jax import MoRAConfig, linen
      >>> model, x = nn.MultiHeadDotProductAttention(num_heads=4), jnp.ones((1, 3, 64))
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> plan = linen.plan(model, variables, MoRAConfig(rank=2), x)
      >>> {spec.name: spec.axes for spec in plan}  # doctest: +NORMALIZE_WHITESPACE
      {'key/kernel': 'ioo', 'out/kernel': 'iio', 'query/kernel': 'ioo',
       'value/kernel': 'ioo'}
    """
    _check_model(model)
    params = _params(variables)
    recorder = _Recorder()
    leaves, structure = jax.tree.flatten((args, kwargs))
    traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def call(variables: Any, arrays: list[Any]) -> Any:
        rest = iter(arrays)
        merged = [
            next(rest) if is_array else leaf
            for leaf, is_array in zip(leaves, traced, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(structure, merged)
        model.apply(variables, *args, **kwargs)

    arrays = [leaf for leaf, is_array in zip(leaves, traced, strict=True) if is_array]
    # Beside each kernel a mark of its own that no earlier call had, or nn.jit would
    # take a trace that it remembers, and the recorder would see nothing of it.
    kernels = [path for path, leaf in named_leaves(params).values() if leaf.ndim > 1]
    marks = {
        (*path[:-1], path[-1] + SUFFIX): _Bound(None, (recorder, path))
        for path in kernels
    }
    marked = {**variables, "params": combine(params, nest(marks))}
    with nn.intercept_methods(recorder):
        jax.eval_shape(call, marked, arrays)
    return plan_params(params, config, axes=recorder.axes(params))


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a flax.linen.Module, got {type(model).__name__}"
        )


def _params(variables: Any) -> Any:
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables)
        raise ValueError(f"variables must be a mapping with 'params', got {got}")
    return variables["params"]


def _own_params(module: nn.Module) -> Mapping[str, Any]:
    if module.scope is None:
        return {}
    return module.scope.variables().get("params", {})


class _Interceptor:
    """Adds to the output of each layer what the adapter in its params adds."""

    def __init__(self, deterministic: bool) -> None:
        self.deterministic = deterministic
        self.running: list[nn.Module] = []

    def __call__(
        self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module, name = context.module, context.method_name
        if name == "setup":
            return method(*args, **kwargs)
        rule = find_rule(type(module))
        bound = {
            key.removesuffix(SUFFIX): value
            for key, value in _own_params(module).items()
            if isinstance(value, _Bound)
        }
        if not bound or any(module is other for other in self.running):
            return method(*args, **kwargs)
        _check_rule(rule, bound, module, name)
        self.running.append(module)
        try:
            y = method(*args, **kwargs)
        finally:
            self.running.pop()
        assert rule is not None
        equation, x = rule.read(module, args, kwargs)
        return self._add(y, x, module, bound[rule.kernel], equation)

    def _add(
        self, y: jax.Array, x: Any, module: nn.Module, bound: _Bound, equation: str
    ) -> jax.Array:
        contraction = Contraction.parse(equation, x.ndim)
        spec = bound.spec
        if not spec.axes.endswith(contraction.axes) or set(
            spec.axes.removesuffix(contraction.axes)
        ) - {"s"}:
            name = "/".join((*module.path, spec.name))
            raise ValueError(
                f"{name}: the plan reads its axes as {spec.axes!r}, the layer computes "
                f"{contraction.axes!r}; plan with mora_jax.linen.plan, or say "
                f"overrides={{{name!r}: {{'axes': {contraction.axes!r}}}}}"
            )
        key = None
        if spec.dropout > 0 and not self.deterministic:
            key = module.make_rng("dropout")
        key = choose_dropout_key(spec, key, self.deterministic)
        return y + update(
            spec,
            bound.m,
            x,
            contraction,
            dtype=y.dtype,
            dropout_key=key,
            precision=getattr(module, "precision", None),
        )


def _check_rule(
    rule: LayerRule | None, bound: Mapping[str, _Bound], module: nn.Module, method: str
) -> None:
    """Raise if an adapter in `module` would have no effect."""
    for kernel in bound:
        if rule is None or rule.kernel != kernel or rule.method != method:
            known = f"{rule.kernel!r} in {rule.method!r}" if rule else "nothing"
            raise TypeError(
                f"{'/'.join((*module.path, kernel))}: {type(module).__name__}.{method} "
                f"may use this adapted kernel, but of that class {known} is known; "
                "see mora_jax.register_layer"
            )


class _Recorder:
    """Notes the kernel's axes in each layer of a known class."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, ...], tuple[str, tuple[int, ...]]] = {}

    def __call__(
        self, method: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module, rule = context.module, find_rule(type(context.module))
        y = method(*args, **kwargs)
        if rule and context.method_name == rule.method and module.scope is not None:
            equation, x = rule.read(module, args, kwargs)
            contraction = Contraction.parse(equation, x.ndim)
            kernel = module.get_variable("params", rule.kernel)
            mark = module.get_variable("params", rule.kernel + SUFFIX)
            if isinstance(mark, _Bound):
                _, path = mark.spec
                self.seen[path] = contraction.axes, tuple(nn.unbox(kernel).shape)
        return y

    def axes(self, params: Any) -> dict[str, str]:
        """{path: axes} with the stack axes that lifted transforms take off."""
        axes = {}
        for path, (inner, shape) in self.seen.items():
            kernel: Any = params
            for key in path:
                kernel = kernel[key]
            whole = tuple(nn.unbox(kernel).shape)
            lead = len(whole) - len(shape)
            if whole[lead:] != shape:
                raise ValueError(
                    f"{'/'.join(path)} of shape {whole} is used as {shape}: stacked "
                    "axes must come first (variable_axes={'params': 0})"
                )
            axes["/".join(path)] = "s" * lead + inner
        return axes
