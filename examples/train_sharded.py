"""Train adapters on a mesh of devices, over days and through preemptions.

You will see which kernels of a Llama are adapted, and a progress bar with a loss that
falls. Interrupt the run with SIGTERM, or kill it, and start it again: it continues
where it was, bit for bit, or on another mesh. To try it on a laptop:

    python -m examples.train_sharded --host-devices 8 --fsdp 2 --model 2 --data 2 \
        --steps 20 --checkpoint build/sharded

On a pod start the same command on each host with `--coordinator auto`, or with
`--coordinator HOST:PORT --processes N --process K` if JAX cannot find out where it
runs. `--base DIR` starts from a Llama of Hugging Face, of the size that `--shape` says;
otherwise the base is random. The language is invented: replace `Batches`.
"""

import argparse
import functools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.linen import spmd
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import mora_jax
from models import llama
from models.options import positive
from mora_jax import MoRAConfig, linen, sharding

ALPHABET, PHRASE = 64, 8
"""The number of tokens of the invented language, and of those in its longest phrase."""
KEPT = 3
"""The number of checkpoints to keep."""
FIXED = ("shape", "base", "dtype", "batch", "tokens", "rank", "operator", "dropout")
FIXED += ("learning_rate", "accumulate", "clip", "seed")
"""The options that must be the same when a run continues."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add, out = parser.add_argument, Path("out/train_sharded")
    add("--data", type=positive, default=1, help="devices that split batches only")
    add(
        "--fsdp",
        type=positive,
        help="devices that split batches and kernels",
    )
    add("--model", type=positive, default=1, help="devices that split features")
    add("--shape", choices=llama.SHAPES, default="tiny")
    add("--base", help="a Llama's safetensors, as a path or a URL; random by default")
    add("--dtype", default="bfloat16", help="dtype of the base")
    add("--steps", type=positive, default=100, help="number of batches")
    add("--batch", type=positive, default=16, help="sequences on all devices together")
    add("--tokens", type=positive, default=64, help="length of a sequence")
    add("--rank", type=positive, default=8, help="budget, as the rank of a LoRA")
    add("--operator", default="auto", help="rotation, sharing, ...")
    add("--dropout", type=float, default=0.0, help="rate on the adapters' inputs")
    add("--learning-rate", type=float, default=1e-3)
    add("--accumulate", type=positive, default=1, help="batches for each update")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0)
    add("--checkpoint", type=Path, default=out, help="a directory that all hosts see")
    add("--save-every", type=positive, default=100, help="batches between checkpoints")
    add("--coordinator", help="HOST:PORT of process 0, or auto")
    add("--processes", type=int, help="number of processes")
    add("--process", type=int, help="number of this process")
    add("--host-devices", type=int, help="use the CPU as so many devices")
    return parser.parse_args(argv)


def make_mesh(args: argparse.Namespace) -> Mesh:
    """All devices of all processes, arranged as the options say.

    Raises:
      SystemExit: The number of devices is another, or they cannot split a batch.
    """
    # JAX must know this before anything asks for devices.
    if args.host_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.host_devices)
    if args.coordinator == "auto":
        jax.distributed.initialize()
    elif args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    devices, data, model = jax.device_count(), args.data, args.model
    fsdp = args.fsdp or max(1, devices // (data * model))
    if data * fsdp * model != devices:
        raise SystemExit(
            f"data x fsdp x model must be {devices}, the number of devices, "
            f"got {data} x {fsdp} x {model}"
        )
    if args.batch % (data * fsdp):
        raise SystemExit(
            f"--batch must be a multiple of data x fsdp = {data * fsdp}, "
            f"got {args.batch}"
        )
    return llama.make_mesh(data, fsdp, model)


def init_base(
    model: nn.Module, tokens: Any, places: Any, args: argparse.Namespace
) -> Any:
    """The frozen variables with the shardings `places`: each device has its own part.

    `tokens` has the shape of the input.
    """

    def init(key: jax.Array) -> Any:
        return nn.unbox(model.init(key, jnp.zeros(tokens.shape, tokens.dtype)))

    key = jax.random.key(args.seed)
    if args.base is None:
        return jax.jit(init, out_shardings=places)(key)
    like, where = jax.eval_shape(init, key)["params"], places["params"]
    params = mora_jax.io.load_base(
        args.base, like, llama.NAMES, dtype="like", sharding=where
    )
    return {"params": params}


class Batches(Iterator[jax.Array]):
    """Batches of a language in which each sequence repeats a phrase of its own.

    A sequence depends only on the seed, its position and its row. So batches are the
    same on any mesh, and each process makes only the rows that its devices hold.

    Args:
      rows: The number of sequences in a batch.
      tokens: The length of a sequence.
      mesh: The devices.
      seed: The seed of the random numbers.
      position: The number of batches that were taken before.
    """

    def __init__(
        self, rows: int, tokens: int, mesh: Mesh, seed: int, position: int = 0
    ) -> None:
        self.shape, self.seed, self.position = (rows, tokens), seed, position
        self.sharding = NamedSharding(mesh, PartitionSpec(llama.BATCH_AXES))
        held = self.sharding.addressable_devices_indices_map((rows,)).values()
        self.rows = np.unique(np.concatenate([np.arange(rows)[i] for i in held]))

    def __next__(self) -> jax.Array:
        """Tokens (rows, tokens), split over the mesh."""
        local = np.stack([self.sequence(int(row)) for row in self.rows])
        self.position += 1
        return jax.make_array_from_process_local_data(self.sharding, local, self.shape)

    def sequence(self, row: int) -> np.ndarray:
        """One row (tokens,) of the next batch."""
        random = np.random.default_rng((self.seed, self.position, row))
        phrase = random.integers(ALPHABET, size=random.integers(2, PHRASE + 1))
        return np.resize(phrase, self.shape[1]).astype(np.int32)


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """AdamW on the clipped mean of several gradients, without those with NaN."""
    adamw = optax.adamw(args.learning_rate)
    tx = optax.chain(optax.clip_by_global_norm(args.clip), adamw)
    tx = optax.MultiSteps(tx, args.accumulate).gradient_transformation()
    # This is outermost, because a NaN would never leave the mean in MultiSteps. It has
    # no limit, because optax would let NaN through beyond it.
    return optax.apply_if_finite(tx, max_consecutive_errors=np.iinfo(np.int32).max)


def first_state(plan: mora_jax.Plan, tx: Any, seed: int) -> Any:
    """Everything that changes in training, before the first batch."""
    adapters = mora_jax.init(plan)
    return {
        "adapters": adapters,
        "optimizer": tx.init(adapters),
        "position": jnp.zeros((), jnp.int32),
        "key": jax.random.key_data(jax.random.key(seed)),
    }


def place_state(state: Any, tx: Any, adapters: Any, whole: NamedSharding) -> Any:
    """The shardings of a state, in which each moment is placed as its adapter.

    Args:
      state: The shapes of the state.
      tx: The optimizer.
      adapters: The shardings of the adapters.
      whole: The sharding of everything else.
    """
    optimizer = optax.tree_utils.tree_map_params(
        tx,
        lambda _, place: place,
        state["optimizer"],
        adapters,
        transform_non_params=lambda _: whole,
    )
    rest = {"position": whole, "key": whole}
    return {"adapters": adapters, "optimizer": optimizer} | rest


def make_step(apply: Callable[..., Any], tx: Any) -> Callable[..., Any]:
    """Training on one batch, as a function to compile.

    Args:
      apply: (adapters, variables, tokens) -> logits.
      tx: The optimizer.

    Returns:
      (state, variables, tokens) -> (state, (loss, number of batches skipped so far)).
    """

    def step(state: Any, variables: Any, tokens: jax.Array) -> tuple[Any, Any]:
        key = jax.random.wrap_key_data(state["key"])
        rngs = {"dropout": jax.random.fold_in(key, state["position"])}

        def loss(adapters: Any) -> jax.Array:
            inputs, targets = tokens[:, :-1], tokens[:, 1:]
            logits = apply(
                adapters, variables, inputs, adapter_deterministic=False, rngs=rngs
            )
            of_token = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return of_token.mean()

        adapters = state["adapters"]
        value, grads = jax.value_and_grad(loss)(adapters)
        updates, optimizer = tx.update(grads, state["optimizer"], adapters)
        changed = {
            "adapters": optax.apply_updates(adapters, updates),
            "optimizer": optimizer,
            "position": state["position"] + 1,
        }
        return state | changed, (value, optimizer.total_notfinite)

    return step


class Checkpoints:
    """The newest states of a run, each with the options that must stay the same."""

    def __init__(self, args: argparse.Namespace) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            cleanup_tmp_directories=True,
            # Adapters are small. A save in the background would also ask about
            # preemption when it ends, on one process alone.
            enable_async_checkpointing=False,
        )
        directory = args.checkpoint.resolve() / "states"
        self.manager = ocp.CheckpointManager(directory, options=options)
        self.settings = {name: getattr(args, name) for name in FIXED}

    def save(self, position: int, state: Any) -> None:
        """Write a state; all processes must call it together."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            settings=ocp.args.JsonSave(self.settings),
        )
        self.manager.save(position, args=items, force=True)

    def newest(self, like: Any) -> Any:
        """The newest complete state with the shardings of `like`, or None.

        Raises:
          SystemExit: The state was made with other options.
        """
        position = self.manager.latest_step()
        if position is None:
            return None
        items = ocp.args.Composite(settings=ocp.args.JsonRestore())
        saved = self.manager.restore(position, args=items)["settings"]
        for name, value in self.settings.items():
            if (before := saved.get(name)) != value:
                raise SystemExit(
                    f"{name} must be {before!r} as in {self.manager.directory}, "
                    f"got {value!r}"
                )
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        return self.manager.restore(position, args=items)["state"]


def watch_for_sigterm() -> Callable[[int], bool]:
    """A function that each process asks after each batch whether to stop.

    Returns:
      position -> whether any process has received SIGTERM. All processes get the same
      answer, so they stop after the same batch.
    """
    came = threading.Event()
    if jax.process_count() == 1:  # for several, jax.distributed handles the signal
        signal.signal(signal.SIGTERM, lambda *_: came.set())
    reached = multihost_utils.reached_preemption_sync_point
    return lambda position: came.is_set() or reached(position)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, and say where the adapters are."""
    args = arguments(argv)
    mesh = make_mesh(args)
    stopped = watch_for_sigterm()
    model = llama.Llama(llama.SHAPES[args.shape], mesh, jnp.dtype(args.dtype))
    tokens = jax.ShapeDtypeStruct((args.batch, args.tokens), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens)
    names = nn.get_partition_spec(boxed)
    places = spmd.logical_to_mesh_sharding(names, mesh, llama.RULES)

    config = MoRAConfig(
        rank=args.rank, operator=args.operator, dropout=args.dropout, seed=args.seed
    )
    plan = linen.plan(model, boxed, config, tokens)
    plan = sharding.on_mesh(plan, places["params"], batch_axes=llama.BATCH_AXES)
    adapter_places = sharding.adapter_shardings(plan, places["params"])
    chief, whole = jax.process_index() == 0, NamedSharding(mesh, PartitionSpec())
    if chief:
        print(plan, dict(mesh.shape), sep="\n", flush=True)

    tx = make_optimizer(args)
    first = functools.partial(first_state, plan, tx, args.seed)
    state_places = place_state(jax.eval_shape(first), tx, adapter_places, whole)
    first = jax.jit(first, out_shardings=state_places)
    checkpoints = Checkpoints(args)
    state = checkpoints.newest(like=jax.eval_shape(first)) or first()
    variables = init_base(model, tokens, places, args)
    step = jax.jit(
        make_step(linen.wrap(model, plan), tx),
        donate_argnums=0,
        out_shardings=(state_places, whole),
    )

    start = int(state["position"])
    batches = Batches(args.batch, args.tokens + 1, mesh, args.seed, start)
    stop, shown = start >= args.steps, None
    with tqdm(total=args.steps, initial=start, unit="batch", disable=not chief) as bar:
        while not stop:
            state, now = step(state, variables, next(batches))
            stop = stopped(batches.position) or batches.position >= args.steps
            if stop or batches.position % args.save_every == 0:
                checkpoints.save(batches.position, state)
            # The bar shows the batch before, so that devices never wait for the next.
            loss, skipped = now if stop else shown or now
            shown = now
            bar.set_postfix(loss=f"{loss:.3f}", skipped=int(skipped), refresh=False)
            bar.update()

    if batches.position >= args.steps:
        directory = args.checkpoint / "adapter"
        # All processes call it, and the first one writes.
        mora_jax.save(directory, state["adapters"], metadata=checkpoints.settings)
        message = f"the adapters are in {directory}"
    else:
        at = batches.position
        message = f"SIGTERM: saved after batch {at}, to continue from there"
    if chief:
        print(message)
    if args.coordinator:
        jax.distributed.shutdown()


if __name__ == "__main__":
    main()
