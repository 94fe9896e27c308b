"""The strongest of other methods, beside plain LoRA: what they start from, and how.

LoRA-GA and LoRA-One start a LoRA along the first gradient; LoRA-XS and LoRA-SB put a
square between directions of the kernel or of the gradient, here at LoRA's budget; MiSS
multiplies sums of inputs. Each is written from its paper, with alpha = 1.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

import mora_jax
from benchmarks.quality import earlier, learners
from benchmarks.quality.learners import (
    Learner,
    Path,
    Task,
    bare,
    plan_like,
    with_plan,
)
from mora_jax import MoRAConfig, remora
from mora_jax.operators import Operator
from mora_jax.operators._pytree import operator

GAMMA = 16.0
"""LoRA-GA's gamma, as PEFT has it."""


def svd(gradient: Any, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular vectors and values: (in, rank), (rank,), (rank, out)."""
    u, s, v = np.linalg.svd(np.asarray(gradient, np.float32), full_matrices=False)
    return u[:, :rank], s[:rank], v[:rank]


def lora_one(learner: Learner, grads: Mapping[Path, Any], rank: int) -> Learner:
    """LoRA-One (2502.01235): A B starts as a step of gradient descent at rank r.

    The step is shared between A and B evenly, and has the length 1 still.
    """
    start = {}
    for path, gradient in grads.items():
        u, s, v = svd(gradient, rank)
        a, b = u * np.sqrt(s), -np.sqrt(s)[:, None] * v
        start[_adapter(path)] = jnp.asarray(np.concatenate([a, b.T]))
    return learner._replace(start=unflatten_dict(start))


def lora_ga(learner: Learner, grads: Mapping[Path, Any], rank: int) -> Learner:
    """LoRA-GA (2407.05000): A and B start along other directions of the gradient.

    What they multiply to is subtracted from the kernels.
    """
    start, shifts = {}, {}
    for path, gradient in grads.items():
        u, _, v = svd(gradient, 2 * rank)
        size = math.sqrt(math.sqrt(v.shape[-1]) / GAMMA)
        # PyTorch's kernels are (out, in): the paper's A has leading directions of the
        # inputs, and its B the next ones of the outputs.
        a, b = size * u[:, :rank], size * v[rank:]
        start[_adapter(path)] = jnp.asarray(np.concatenate([a, b.T]))
        shifts[path] = jnp.asarray(a @ b)

    def frozen(params: Any) -> Any:
        flat = flatten_dict(params)
        moved = {path: flat[path] - shift for path, shift in shifts.items()}
        return learner.frozen(unflatten_dict(flat | moved))

    def deltas(trained: Any) -> dict[Path, jax.Array]:
        found = learner.deltas(trained)
        return {path: delta - shifts[path] for path, delta in found.items()}

    start = unflatten_dict(start)
    return learner._replace(start=start, frozen=frozen, deltas=deltas)


def _adapter(path: Path) -> Path:
    return (*path[:-1], f"{path[-1]}_mora")


def halves(task: Task, first: mora_jax.Plan, second: mora_jax.Plan) -> Learner:
    """Two adapters on each kernel, whose deltas are added; the second along a step."""
    other = with_plan(task.model, second)

    def apply(trained: Any, params: Any, *inputs: Any) -> jax.Array:
        folded = mora_jax.fold(params, first.adapters(trained["first"]))
        return other.apply(trained["second"], (folded, second), *inputs)

    def deltas(trained: Any) -> dict[Path, jax.Array]:
        adapters = first.adapters(trained["first"])
        found = flatten_dict(mora_jax.delta_weight(adapters))
        return jax.tree.map(jnp.add, found, other.deltas(trained["second"]))

    plans = {"first": first, "second": second}
    start = {name: bare(mora_jax.init(plan)) for name, plan in plans.items()}
    speeds = jax.tree.map(lambda _: 1.0, start)
    return Learner(apply, start, speeds, deltas)


def started(task: Task, learner: Learner, plan: mora_jax.Plan) -> Learner:
    """The adapters start as one step of gradient descent."""

    @jax.jit
    def start(ms: Any, params: Any) -> Any:
        loss, frozen = task.loss_of(learner), learner.frozen(params)
        adapters = plan.adapters(ms)
        return bare(mora_jax.gradient_start(lambda a: loss(bare(a), frozen), adapters))

    moved = start(learner.start, task.params)
    return learner._replace(start=moved)


def renewed(task: Task, learner: Learner, *, along: bool) -> Learner:
    """An adapter that can be merged, and go on between other maps.

    These are the directions of a new gradient if `along`, or else those of another
    seed; a LoRA has new factors.
    """

    def following(ms: Any, frozen: Any) -> Any:
        (params, plan), tx = frozen, optax.identity()
        adapters = plan.adapters(ms)
        if along:
            params = mora_jax.merge(params, adapters)
            plan = with_directions(plan, task.gradient(params))
            return bare(mora_jax.init(plan)), (params, plan)
        after = remora.restart(params, adapters, tx.init(adapters), tx)
        return bare(after.adapters), (after.params, plan_like(plan, after.adapters))

    return learner._replace(renewed=following)


@operator
class MiSS(Operator):
    """MiSS (2409.15371): sums of inputs times a trained (q, out)."""

    name = "miss"

    @classmethod
    def widest(cls, rank: int, ins: int, outs: int, multiple: int | None = None) -> int:
        """The largest q with no more parameters than a LoRA of `rank`."""
        return (ins + outs) * rank // outs

    @property
    def m_shape(self) -> tuple[int, int]:
        """Shape of the trained array: (q, out)."""
        return self.square_rank, self.out_features

    @property
    def gains(self) -> tuple[float, float]:
        """Sizes of C(x), sums of in / q numbers, and of what one number changes."""
        return math.sqrt(self.in_features / self.square_rank), 1.0

    @property
    def signs(self) -> np.ndarray:
        """The sign of each input."""
        return np.ones(self.in_features, np.float32)

    def _compress(self, x: jax.Array) -> jax.Array:
        x = x * self.signs.astype(x.dtype)
        missing = -self.in_features % self.square_rank
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        return x.reshape(*x.shape[:-1], -1, self.square_rank).sum(-2)

    def _decompress(self, h: jax.Array) -> jax.Array:
        return h

    def _compress_units(self, indices: jax.Array, dtype: DTypeLike) -> jax.Array:
        return self._compress(jax.nn.one_hot(indices, self.in_features, dtype=dtype))


@operator
class SignedMiSS(MiSS):
    """The same with a random sign of each input."""

    name = "signed_miss"

    @property
    def signs(self) -> np.ndarray:
        """The sign of each input."""
        return np.random.default_rng(0).choice([-1.0, 1.0], self.in_features)


MISS: dict[str, type[MiSS]] = {cls.name: cls for cls in (MiSS, SignedMiSS)}


def with_miss(plan: mora_jax.Plan, cls: type[MiSS], rank: int) -> mora_jax.Plan:
    """The plan with MiSS on its kernels."""
    specs = {}
    for path, spec in plan.specs.items():
        features = spec.in_features, spec.out_features
        new = cls(*features, cls.widest(rank, *features))
        scale = new.fine_tuning_scale
        specs[path] = dataclasses.replace(spec, operator=new, scale=scale)
    return dataclasses.replace(plan, parts=specs)


LORAS = "lora", "lora+", "lora-one", "lora-ga"


def make(
    method: str,
    task: Task,
    rank: int,
    scale: str = "fine-tuning",
    multiple_of: int | None = None,
) -> Learner:
    """The learner of a method by its name; `teaching.METHODS` says what it means."""
    name, *extras = method.split(", ")
    if name == "full":
        return learners.full(task.model, task.params, task.targets)
    damp = functools.partial(damped, task, extras)
    if name in LORAS:
        learner = make_lora(name, task, rank, damp)
        return renewed(task, learner, along=False) if "renewed" in extras else learner
    settings: Any = {"rank": rank, "scale": scale, "multiple_of": multiple_of}
    if scale == earlier.SCALE:
        settings["scale"] = "fine-tuning"
    if name == "block_diagonal":  # as they are by default
        settings["multiple_of"] = None
    if name == "halves":
        return make_halves(task, **settings)
    along = name in ("subspace", "lora-xs")
    operator = "orthogonal" if along or name in MISS else name
    plan = planned(task, MoRAConfig(operator=operator, **settings))
    if name in MISS:
        plan = with_miss(plan, MISS[name], rank)
    elif name == "lora-xs":  # between the directions of the kernel
        plan = with_directions(plan, dict(learners.matching(*task[1:3])))
    elif along:
        plan = with_directions(plan, task.gradient(task.params))
    if scale == earlier.SCALE:
        plan = earlier.aligned(plan)
    plan = damp(plan)
    learner = with_plan(task.model, plan)
    if "start" in extras:
        learner = started(task, learner, plan)
    if "renewed" in extras:
        learner = renewed(task, learner, along=along)
    return learner


def prepasses(method: str) -> int:
    """The number of gradients that a method takes before its first step."""
    name, *extras = method.split(", ")
    along = name in ("subspace", "halves", "lora-one", "lora-ga")
    return int(along) + int("start" in extras)


def passes(method: str, steps: float, renewals: float) -> float:
    """Steps, and all gradients beside them: before the first, and of renewals."""
    along = "subspace" in method
    return steps + prepasses(method) + (renewals if along else 0)


def make_lora(name: str, task: Task, rank: int, damp: learners.Damp) -> Learner:
    """One of `LORAS`."""
    speed = learners.LORA_PLUS if name == "lora+" else 1.0
    learner = learners.lora(*task[:3], rank, speed=speed, damp=damp)
    if name in ("lora", "lora+"):
        return learner
    begin = lora_one if name == "lora-one" else lora_ga
    return begin(learner, task.gradient(task.params), rank)


def make_halves(task: Task, rank: int, **settings: Any) -> Learner:
    """Half of the budget with rotation, half along the first gradient."""
    plans = []
    for name in ("rotation", "orthogonal"):
        config = MoRAConfig(operator=name, rank=rank, **settings)
        overrides = {}
        for path, spec in planned(task, config).items():
            q = math.isqrt((spec.in_features + spec.out_features) * rank // 2)
            overrides[path] = {"square_rank": q - q % 2}
        plans.append(planned(task, dataclasses.replace(config, overrides=overrides)))
    second = with_directions(plans[1], task.gradient(task.params))
    return halves(task, plans[0], second)


def damped(task: Task, extras: Sequence[str], plan: mora_jax.Plan) -> mora_jax.Plan:
    """The plan with inputs that are damped if an extra says so."""
    found = [extra.split() for extra in extras if extra.startswith("damped")]
    for _, *count in found:
        plan = learners.damped(task, plan, *map(int, count))
    return plan


def planned(task: Task, config: MoRAConfig) -> mora_jax.Plan:
    """The plan of a task's kernels."""
    return learners.plan_of(*task[:3], config, *task.inputs)


def with_directions(plan: mora_jax.Plan, grads: Mapping[Path, Any]) -> mora_jax.Plan:
    """The plan between the leading directions of matrices by their paths."""
    return mora_jax.gradient_bases(unflatten_dict(grads), plan)
