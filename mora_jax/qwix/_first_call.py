"""The first call of a model, which shows what it multiplies: repeated, and checked."""

import functools
import itertools
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from typing import Any

import flax.linen as nn
import jax
import qwix
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata

from mora_jax._common.warnings import LeftOutWarning, warn
from mora_jax.qwix._kernels import Run
from mora_jax.qwix._rule import MoRARule

tracing_anew: ContextVar[bool] = ContextVar("tracing_anew", default=False)
"""Whether `shapes_of` runs."""

_NUMBERS = itertools.count()


def shapes_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The shapes of `function(*args, **kwargs)`.

    Only arrays and shapes among the arguments are traced. Everything else is static,
    as it is for `mora_jax.linen.plan`.

    JAX keeps traces of inner functions that it compiles, such as `x @ y`, and qwix
    would not see their products. It keeps them by context, of which the metadata of
    operations is a part; so a new value of it makes new traces.
    """
    inputs, structure = jax.tree.flatten((args, kwargs))
    traced = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in inputs]

    def call(arrays: list[Any]) -> Any:
        remaining = iter(arrays)
        values = [
            next(remaining) if is_array else leaf
            for leaf, is_array in zip(inputs, traced, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(structure, values)
        return function(*args, **kwargs)

    arrays = [leaf for leaf, is_array in zip(inputs, traced, strict=True) if is_array]
    token = tracing_anew.set(True)
    try:
        with set_xla_metadata(mora_jax_trace=str(next(_NUMBERS))):
            return jax.eval_shape(call, arrays)
    finally:
        tracing_anew.reset(token)


def repeat(run: Run, model: Any, method_name: str) -> bool:
    """Trace a first call once more; whether that was done, and so has checked it.

    Only a trace tells what is made of a kernel, and only a new one has all products.

    Raises:
      ValueError: As the call; or a trace is needed and there can be none.
    """
    if run.given is None:
        return False
    parts, args, kwargs = run.given
    if isinstance(model, nn.Module):
        assert model.scope is not None
        if model.scope.path:  # rules are for paths in the whole model
            _refuse_doubtful(run, "initialise the whole model")
            return False
        rngs = {name: jax.random.key(0) for name in ("params", *model.scope.rngs)}
        alone = model.clone(parent=None)
        call = functools.partial(alone.init, rngs, method=method_name)
    else:
        graph, state = parts

        def call(state: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(nnx.merge(graph, state), method_name)(*args, **kwargs)

        args = state, *args
    try:
        shapes_of(call, *args, **kwargs)
    except ValueError:
        raise
    except Exception as error:  # the model wants numbers
        _refuse_doubtful(run, "the model cannot be traced", error)
        return False
    return True


def _refuse_doubtful(run: Run, why: str, cause: Exception | None = None) -> None:
    """Raise if an operand may be made of a kernel."""
    if run.doubtful:
        names = ", ".join(sorted(run.doubtful))
        raise ValueError(
            f"{names}: an operand has the shape of this kernel, and only a trace "
            f"tells whether it is made of it: {why}; or leave it out of module_path"
        ) from cause


def check_used(run: Run, rules: Iterable[qwix.QuantizationRule]) -> None:
    """Look whether each rule adapted a kernel, and each kernel has an adapter.

    Raises:
      ValueError: No rule adapts anything.
    """
    unused = [
        rule.module_path
        for rule in rules
        if isinstance(rule, MoRARule) and id(rule) not in run.used
    ]
    if not run.used:
        raise ValueError(
            f"no kernel is multiplied in a module that module_path={unused} matches"
        )
    if unused:
        warn(f"these rules adapt no kernel: module_path={unused}")
    left = sorted(run.seen - {place for place, _ in run.specs})
    if left:
        warn(
            f"{', '.join(left)}: no product that qwix sees multiplies by it, so "
            "that it has no adapter; leave its module out of module_path",
            LeftOutWarning,
        )
