"""Training steps of big Llamas on meshes of devices, as shapes with shardings."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen import spmd
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import mora_jax
from benchmarks.common.by_hand import adapted_by_hand, lora_by_hand
from benchmarks.common.harness import Row, next_token_loss
from models import llama
from mora_jax import MoRAConfig, linen, sharding
from mora_jax._tree import gradients
from mora_jax._tree.paths import Found
from mora_jax.operators import OPERATORS

RANK = 8
MESHES = {1: (1, 1, 1), 8: (1, 4, 2), 64: (1, 8, 8), 256: (1, 32, 8)}
"""The numbers of devices along the axes data, fsdp and model."""
SHAPES = {**llama.SHAPES, "real": llama.Shape(4, 1024, 2816, 8, 4, 8192)}
"""The sizes of models. The last one really runs: it is large enough that its memory can
be told from the process's own."""
METHODS = {
    **{name: f"MoRA, {name}" for name in OPERATORS},
    **{f"{name}-split": f"MoRA, {name}, M split" for name in OPERATORS},
    "auto": "MoRA, auto",
    "lora": "LoRA",
    "directions": "a gradient for directions",
    "wide": "a LoRA of that rank",
    "full": "every parameter",
    "frozen": "frozen",
}
"""The last one trains a vector that all embeddings add, so that its backward pass goes
through all layers and to no kernel."""
OPTIONS: Any = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, mesh and method.

    Attributes:
        model: A name in `SHAPES`.
        devices: A number in `MESHES`.
        method: A name in `METHODS`.
        tokens: The length of a sequence.
        layers: The number of layers; 0 takes the model's own.
        sequences: The size of the batch; 0 takes one for each part of the batch.
    """

    model: str
    devices: int
    method: str
    tokens: int
    layers: int = 0
    sequences: int = 0

    @property
    def shape(self) -> llama.Shape:
        """The model's size."""
        shape = SHAPES[self.model]
        return dataclasses.replace(shape, layers=self.layers or shape.layers)

    def row(self, kind: str, **figures: Any) -> Row:
        """A row of the report with `figures`."""
        named = {"method": METHODS[self.method], "layers": self.shape.layers}
        return {"kind": kind, **dataclasses.asdict(self), **named, **figures}


class Step(NamedTuple):
    """A training step and its arguments, as shapes with shardings."""

    run: Callable[..., Any]
    trained: Any
    state: Any
    frozen: Any
    ids: Any

    def compile(self, options: Mapping[str, Any] = OPTIONS) -> tuple[Any, float]:
        """The program, and the seconds of all cores to trace and compile it.

        Args:
            options: Those of the compiler; by default for CPUs.
        """
        start = time.process_time()
        kept = jax.tree.map(lambda s: s.sharding, (self.trained, self.state))
        step = jax.jit(self.run, donate_argnums=(0, 1), out_shardings=(*kept, None))
        compiled = step.lower(*self[1:]).compile(compiler_options=dict(options))
        return compiled, time.process_time() - start


def make_step(case: Case, devices: Sequence[Any] | None = None) -> Step:
    """The training step of a case; no array is computed.

    Args:
        case: The model, mesh and method.
        devices: The devices of the mesh; by default those that JAX computes on.
    """
    mesh = make_mesh(MESHES[case.devices], devices)
    model = llama.Llama(case.shape, mesh)
    rows = NamedSharding(mesh, PartitionSpec(llama.BATCH_AXES))
    size = case.sequences or math.prod(MESHES[case.devices][:2]), case.tokens
    ids = jax.ShapeDtypeStruct(size, jnp.int32, sharding=rows)
    boxed = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    names, rules = nn.get_partition_spec(boxed), list(llama.RULES)
    places = spmd.logical_to_mesh_sharding(names, mesh, rules)
    params = jax.tree.map(placed, nn.unbox(boxed), places)
    if case.method == "full":
        apply, trained = lambda p, _, ids: model.apply({"params": p}, ids), params
    elif case.method == "frozen":
        apply, trained = shifted(model), vector(params)
    elif case.method == "lora":
        apply, trained = adapted_by_hand(model, lora_by_hand), lora(params)
    elif case.method in ("directions", "wide"):
        with nn.logical_axis_rules(rules):
            apply, trained = sketches(model, boxed, ids)
    else:
        with nn.logical_axis_rules(rules):
            apply, trained = mora(case.method, model, boxed, ids)
    tx = optax.identity() if case.method == "directions" else optax.adamw(1e-3)

    def loss(trained: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        logits: Any = apply(trained, frozen, ids)
        return next_token_loss(logits, ids)

    def run(trained: Any, state: Any, frozen: Any, ids: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(trained, frozen, ids)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    whole = NamedSharding(mesh, PartitionSpec())
    state = optax.tree_map_params(
        tx,
        lambda moment, parameter: placed(moment, parameter.sharding),
        jax.eval_shape(tx.init, trained),
        trained,
        transform_non_params=lambda s: placed(s, whole),
    )
    return Step(run, trained, state, {} if trained is params else params, ids)


def make_mesh(sizes: tuple[int, int, int], devices: Sequence[Any] | None) -> Mesh:
    """A mesh of these sizes along data, fsdp and model."""
    try:
        return llama.make_mesh(*sizes, devices)
    except NotImplementedError:  # `jax.make_mesh` splits axes of a v5e's torus alone
        split = {"allow_split_physical_axes": True}
        arranged = mesh_utils.create_device_mesh(sizes, devices, **split)
        types = (AxisType.Auto,) * 3
        return Mesh(arranged, ("data", "fsdp", "model"), axis_types=types)


def placed(like: Any, where: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of `like` with a sharding."""
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=where)


def mora(
    method: str, model: llama.Llama, boxed: Any, ids: Any
) -> tuple[Callable[..., Any], Any]:
    """The model as `linen.wrap` adapts it, and adapters."""
    operator, _, split = method.partition("-")
    config = MoRAConfig(rank=RANK, operator=operator)
    plan = linen.plan(model, {"params": boxed}, config, ids)
    mesh, square = model.mesh, ("model" if split else None, None)
    plan = sharding.on_mesh(plan, boxed, batch_axes=llama.BATCH_AXES, mesh=mesh)
    places = jax.tree.map(
        lambda at: NamedSharding(at.mesh, PartitionSpec(*at.spec[:-2], *square)),
        sharding.adapter_shardings(plan, boxed, mesh=mesh),
    )
    wrapped = linen.wrap(model, plan)

    def apply(adapters: Any, params: Any, ids: jax.Array) -> Any:
        return wrapped(adapters, {"params": params}, ids)

    adapters = jax.eval_shape(lambda: mora_jax.init(plan))
    return apply, jax.tree.map(placed, adapters, places)


def sketches(
    model: llama.Llama, boxed: Any, ids: Any
) -> tuple[Callable[..., Any], Any]:
    """The model with the LoRAs whose gradients `directions` takes."""
    config = MoRAConfig(rank=RANK, operator="orthogonal")
    plan = linen.plan(model, {"params": boxed}, config, ids)
    plan = sharding.on_mesh(plan, boxed, batch_axes=llama.BATCH_AXES, mesh=model.mesh)
    wrapped = linen.wrap(model, plan)

    def apply(adapters: Any, params: Any, ids: jax.Array) -> Any:
        return wrapped(adapters, {"params": params}, ids)

    adapters = jax.eval_shape(lambda: Found(gradients.sketches(plan.specs)).tree())
    places = sharding.adapter_shardings(adapters, boxed, mesh=model.mesh)
    return apply, jax.tree.map(placed, adapters, places)


def vector(params: Any) -> jax.ShapeDtypeStruct:
    """The shape of a vector that all embeddings may add."""
    table = params["embed_tokens"]
    where = NamedSharding(table.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(table.shape[1:], table.dtype, sharding=where)


def shifted(model: llama.Llama) -> Callable[..., Any]:
    """(vector, params, ids) -> logits of a model whose embeddings add the vector."""

    def apply(vector: jax.Array, params: Any, ids: jax.Array) -> Any:
        return model.apply({"params": params}, ids, vector)

    return apply


def lora(params: Any) -> Any:
    """LoRA on the same kernels; A and B are split as the kernels are."""
    adapters = {}
    base: dict[Any, Any] = dict(flatten_dict(params))
    for path, kernel in base.items():
        if path[0] == "layers" and path[-1] == "kernel":
            (n, ins, outs), place = kernel.shape, kernel.sharding

            def array(size: tuple[int, ...], *axes: Any, mesh: Any = place.mesh) -> Any:
                where = NamedSharding(mesh, PartitionSpec(*axes))
                return jax.ShapeDtypeStruct(size, jnp.float32, sharding=where)

            a = array((n, ins, RANK), *place.spec[:2], None)
            b = array((n, RANK, outs), None, None, place.spec[2])
            adapters[*path[:-1], "adapter"] = a, b
    return unflatten_dict(adapters)
