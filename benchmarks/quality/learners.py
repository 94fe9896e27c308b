"""Ways to train a model further: all of its kernels, a LoRA, or MoRA.

Each has the same kernels to change, those whose paths match a pattern.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import mora_jax
from mora_jax import MoRAConfig, linen

Path = tuple[str, ...]
Damp = Callable[[mora_jax.Plan], mora_jax.Plan]

LORA_PLUS = 16
"""How many times as fast as A the B of a LoRA+ is trained."""


class Task(NamedTuple):
    """A model, the kernels to change, and what it should learn.

    Attributes:
        model: The model.
        params: Its params.
        targets: A pattern of the paths of the kernels.
        inputs: The inputs of a call.
        loss: (logits of that call) -> loss.
        ordinary: The inputs of a call with ordinary text, for damped inputs.
        counted: Ones for the tokens of that text, and zeros for padding; None counts
            all.
    """

    model: nn.Module
    params: Any
    targets: str
    inputs: tuple[Any, ...]
    loss: Callable[[jax.Array], jax.Array]
    ordinary: tuple[Any, ...] = ()
    counted: Any = None

    def loss_of(self, learner: "Learner") -> Callable[..., jax.Array]:
        """(trained, frozen) -> loss."""
        return lambda trained, frozen: self.loss(
            learner.apply(trained, frozen, *self.inputs)
        )

    def gradient(self, params: Any) -> dict[Path, jax.Array]:
        """Gradients of the kernels."""
        way = full(self.model, params, self.targets)
        grads: Any = jax.jit(jax.grad(self.loss_of(way)))(way.start, params)
        return grads


class Learner(NamedTuple):
    """A way to train a model.

    Attributes:
        apply: (trained, frozen, *inputs) -> logits.
        start: The trained values before the first step, as plain arrays.
        speeds: The rate of each leaf relative to the learning rate, a tree as `start`.
        deltas: (trained) -> what was added to each kernel, by its path.
        frozen: (params) -> what `apply` is given beside what is trained.
        renewed: (trained, frozen) -> both, with what was trained merged, and an adapter
            along a new gradient; None for methods that go on to the end.
    """

    apply: Callable[..., jax.Array]
    start: Any
    speeds: Any
    deltas: Callable[[Any], dict[Path, jax.Array]]
    frozen: Callable[[Any], Any] = lambda params: params
    renewed: Callable[[Any, Any], tuple[Any, Any]] | None = None


def full(model: nn.Module, params: Any, targets: str) -> Learner:
    """Full fine-tuning of the kernels."""

    def apply(kernels: Any, params: Any, *inputs: Any) -> jax.Array:
        both = unflatten_dict(flatten_dict(params) | kernels)
        logits: Any = model.apply({"params": both}, *inputs)
        return logits

    def deltas(trained: Any) -> Any:
        return {path: leaf - kernels[path] for path, leaf in trained.items()}

    kernels = dict(matching(params, targets))
    return Learner(apply, kernels, jax.tree.map(lambda _: 1.0, kernels), deltas)


def lora(
    model: nn.Module,
    params: Any,
    targets: str,
    rank: int,
    seed: int = 0,
    speed: float = 1.0,
    *,
    damp: Damp = lambda plan: plan,
) -> Learner:
    """LoRA with alpha = r: A as He has it, B of zeros. LoRA+ if B has another speed.

    It is this library's, and so as fast as MoRA is by the same means.
    """
    config = MoRAConfig(rank=rank, operator="low_rank", targets=targets)
    plan, key = damp(mora_jax.plan(params, config)), jax.random.key(seed)
    start, speeds = {}, {}
    for path, kernel in matching(params, targets):
        key, own = jax.random.split(key)
        ins, outs = kernel.shape
        a = jax.random.normal(own, (ins, rank)) / np.sqrt(ins)
        start[*path[:-1], "kernel_mora"] = jnp.pad(a, ((0, outs), (0, 0)))
        by_row = np.where(np.arange(ins + outs) < ins, 1.0, speed)
        speeds[*path[:-1], "kernel_mora"] = by_row[:, None].astype(np.float32)
    learner = with_plan(model, plan)
    return learner._replace(start=unflatten_dict(start), speeds=unflatten_dict(speeds))


def mora(
    model: nn.Module, params: Any, targets: str, config: MoRAConfig, *inputs: Any
) -> Learner:
    """MoRA as `config` says; `inputs` are the inputs of a call."""
    return with_plan(model, plan_of(model, params, targets, config, *inputs))


def with_plan(model: nn.Module, plan: mora_jax.Plan) -> Learner:
    """MoRA as a plan has it, which is an argument: plans of a kind share programs."""

    def deltas(ms: Any) -> Any:
        return flatten_dict(mora_jax.delta_weight(plan.adapters(ms)))

    start = bare(mora_jax.init(plan))
    speeds = jax.tree.map(lambda _: 1.0, start)
    return Learner(
        _adapted(model), start, speeds, deltas, lambda params: (params, plan)
    )


@functools.lru_cache
def _adapted(model: nn.Module) -> Callable[..., jax.Array]:
    """(ms, (params, plan), *inputs) -> logits."""

    def apply(ms: Any, frozen: Any, *inputs: Any) -> jax.Array:
        params, plan = frozen
        adapted = linen.wrap(model, plan)
        return adapted(plan.adapters(ms), {"params": params}, *inputs)

    return apply


def bare(adapters: Any) -> Any:
    """The arrays of adapters, whose meaning their plan has."""
    return jax.tree.map(lambda a: a.m, adapters, is_leaf=is_adapter)


def damped(task: Task, plan: mora_jax.Plan, directions: int = 16) -> mora_jax.Plan:
    """The plan with inputs that are damped by the ordinary text of a task."""
    run, variables = jax.jit(linen.wrap(task.model, plan)), {"params": task.params}
    adapters = mora_jax.input_damping(
        lambda adapters: run(adapters, variables, *task.ordinary),
        mora_jax.init(plan),
        directions=directions,
        mask=task.counted,
    )
    return plan_like(plan, adapters)


def plan_like(plan: mora_jax.Plan, adapters: Any) -> mora_jax.Plan:
    """The plan with the meanings of adapters of the same kernels."""
    flat: dict[Path, Any] = flatten_dict(adapters)
    specs = {path: flat[*path[:-1], f"{path[-1]}_mora"].spec for path in plan.specs}
    return dataclasses.replace(plan, parts=specs)


def is_adapter(node: Any) -> bool:
    """True for an adapter, a leaf for `jax.tree.map`."""
    return isinstance(node, mora_jax.Adapter)


def plan_of(
    model: nn.Module, params: Any, targets: str, config: MoRAConfig, *inputs: Any
) -> mora_jax.Plan:
    """The plan of the same kernels."""
    config = dataclasses.replace(config, targets=targets)
    return linen.plan(model, {"params": params}, config, *inputs)


def matching(params: Any, targets: str) -> Iterator[tuple[Path, Any]]:
    """Path and kernel of all that match."""
    flat: dict[Path, Any] = flatten_dict(params)
    for path, leaf in flat.items():
        if re.fullmatch(targets, "/".join(path)):
            yield path, leaf
