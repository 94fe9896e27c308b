"""Fine-tune SmolLM2-135M: a program to copy, with all that a long run needs.

You will see which kernels are adapted, a progress bar with the loss of each step and of
held-out questions, and how well the merged model does. Kill it and start it again with
the same options: it goes on from its newest checkpoint, bit for bit.

    python -m examples.train                     # on all devices that JAX finds
    python -m examples.train --host-devices 8    # on eight, all of them this CPU

Replace `conversations` by your own data; docs/training-script.md says what else to
change. Here the model learns the codes of airports, and is asked in another wording.
"""

import argparse
import functools
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

import mora_jax
from models import smollm2
from models.airports import all_facts
from models.lesson import Batch, encode
from models.options import positive
from mora_jax import MoRAConfig, linen, sharding

ASKED = "Tell me the IATA code of {}."
TAUGHT, HELD_OUT = "Which IATA code does {} have?", "What is the IATA code of {}?"
FREE = "out", "save_every", "host_devices"
"""The options that may change when a run goes on."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--model", help="a Llama of Hugging Face, as a folder; SmolLM2-135M")
    add("--dtype", default="bfloat16", help="dtype of the frozen base")
    add("--facts", type=positive, default=16, help="airports to learn")
    add("--rank", type=positive, default=8, help="budget, as the rank of a LoRA")
    add("--operator", default="auto", help="rotation, sharing, ...; low_rank: a LoRA")
    add("--dropout", type=float, default=0.0, help="rate on the adapters' inputs")
    add("--steps", type=positive, default=60, help="largest number of updates")
    add("--batch", type=positive, default=16, help="conversations for an update")
    add("--micro-batch", type=positive, default=8, help="conversations at once")
    add("--learning-rate", type=float, default=2e-4, help="after the warm-up")
    add("--warmup", type=positive, default=5, help="steps of the warm-up")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--evaluate-every", type=positive, default=5, help="steps")
    add("--patience", type=positive, default=3, help="evaluations without a gain")
    add("--gain", type=float, default=1e-3, help="fall of the loss that is a gain")
    add("--save-every", type=positive, default=10, help="steps between checkpoints")
    add("--seed", type=int, default=0, help="of the facts, their order and dropout")
    add("--out", type=Path, default=Path("out/train"), help="folder for all results")
    add("--host-devices", type=positive, help="use the CPU as so many devices")
    args = parser.parse_args(argv)
    if args.batch % args.micro_batch:
        parser.error(f"--batch must be a multiple of {args.micro_batch}, --micro-batch")
    return args


def places(args: argparse.Namespace) -> tuple[NamedSharding, NamedSharding]:
    """All devices, for what each holds; and for micro-batches, which they split."""
    if args.host_devices:  # before anything asks for devices
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.host_devices)
    if args.micro_batch % (count := jax.device_count()):
        raise SystemExit(f"--micro-batch must be a multiple of {count}, the devices")
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec(None, "data")
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, rows)


def conversations(args: argparse.Namespace) -> tuple[Any, Any]:
    """Pairs of question and answer: some to learn, and some to evaluate on."""
    facts = list(itertools.islice(all_facts(args.seed), args.facts))
    before, after = ASKED.split("{}")

    def asked(wording: str) -> list[tuple[str, str]]:
        names = (f.question.removeprefix(before).removesuffix(after) for f in facts)
        return [
            (wording.format(n), f.answer) for n, f in zip(names, facts, strict=True)
        ]

    return asked(ASKED) + asked(TAUGHT), asked(HELD_OUT)


def rows_of(step: int, size: int, count: int, seed: int) -> np.ndarray:
    """The rows of a step's batch: the next ones of endless shuffled epochs.

    They follow from the seed and the step, so a run that goes on sees the same ones.
    """
    numbers = range(step * size, (step + 1) * size)
    epochs = {n // count for n in numbers}
    orders = {e: np.random.default_rng((seed, e)).permutation(count) for e in epochs}
    return np.array([orders[n // count][n % count] for n in numbers])


def placed(batch: Batch, size: int, place: NamedSharding) -> Batch:
    """A batch as micro-batches (count, size, ...); rows of weight 0 fill the last."""

    def split(rows: np.ndarray) -> Any:
        rows = np.pad(rows, [(0, -len(rows) % size), (0, 0)])
        return jax.device_put(rows.reshape(-1, size, rows.shape[1]), place)

    return Batch(*map(split, batch))


class Run(NamedTuple):
    """All that changes in training, and so all that a checkpoint must hold."""

    adapters: Any
    optimizer: Any
    step: jax.Array  # updates so far
    best: Any  # the adapters with the least loss of held-out questions
    best_loss: jax.Array
    waited: jax.Array  # evaluations since then


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """Adam on clipped gradients, with a warm-up and a decay to a tenth."""
    rate = optax.warmup_cosine_decay_schedule(
        init_value=args.learning_rate / (args.warmup + 1),
        peak_value=args.learning_rate,
        warmup_steps=args.warmup,
        decay_steps=max(args.steps, args.warmup + 1),
        end_value=args.learning_rate / 10,
    )
    return optax.chain(optax.clip_by_global_norm(args.clip), optax.adam(rate))


def first_run(plan: mora_jax.Plan, tx: optax.GradientTransformation) -> Run:
    """A run before its first step."""
    adapters, zero = mora_jax.init(plan), jnp.zeros((), jnp.int32)
    return Run(adapters, tx.init(adapters), zero, adapters, jnp.float32(jnp.inf), zero)


def loss_of(logits: jax.Array, batch: Batch) -> jax.Array:
    """The sum of the cross-entropies of all tokens of the answers, in float32."""
    logits = logits.astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    return jnp.sum(each * batch.weights)


within_loop = jax.lax.optimization_barrier
"""Where XLA multiplies in float32, as on CPUs, it would convert the whole base before a
loop over micro-batches, and hold the copy throughout."""


def update(
    run: Run, variables: Any, batch: Batch, *, apply: Any, tx: Any, seed: int
) -> tuple[Run, jax.Array]:
    """One step, with the sum of the gradients of all micro-batches."""
    key = jax.random.fold_in(jax.random.key(seed), run.step)

    def loss(adapters: Any, micro: Batch, number: jax.Array) -> jax.Array:
        rngs = {"dropout": jax.random.fold_in(key, number)}
        call = functools.partial(apply, adapter_deterministic=False, rngs=rngs)
        frozen, micro = within_loop((variables, micro))
        logits = call(adapters, frozen, micro.ids, micro.at)
        # By the tokens of the whole batch, so that each of them weighs the same.
        return loss_of(logits, micro) / batch.weights.sum()

    def add(total: Any, item: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        found = jax.value_and_grad(loss)(run.adapters, *item)
        return jax.tree.map(jnp.add, total, found), None

    zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, run.adapters)
    items = batch, jnp.arange(len(batch.ids))
    (value, grads), _ = jax.lax.scan(add, zero, items)
    updates, optimizer = tx.update(grads, run.optimizer, run.adapters)
    adapters = optax.apply_updates(run.adapters, updates)
    step = run.step + 1
    return run._replace(adapters=adapters, optimizer=optimizer, step=step), value


def evaluate(
    run: Run, variables: Any, batch: Batch, *, apply: Any, gain: float
) -> tuple[Run, dict[str, jax.Array]]:
    """The mean loss of a token and the share of right answers; the best are kept."""

    def measure(micro: Batch) -> tuple[jax.Array, jax.Array]:
        call = functools.partial(apply, adapter_deterministic=True)  # without dropout
        frozen, micro = within_loop((variables, micro))
        logits = call(run.adapters, frozen, micro.ids, micro.at)
        right = (logits.argmax(-1) == micro.targets) | (micro.weights == 0)
        return loss_of(logits, micro), jnp.sum(right.all(-1) & micro.weights.any(-1))

    losses, right = jax.lax.map(measure, batch)
    loss = losses.sum() / batch.weights.sum()
    better = loss < run.best_loss - gain
    now, before = (run.adapters, loss), (run.best, run.best_loss)
    best, best_loss = jax.tree.map(functools.partial(jnp.where, better), now, before)
    waited = jnp.where(better, 0, run.waited + 1)
    run = run._replace(best=best, best_loss=best_loss, waited=waited)
    return run, {"held_out": loss, "right": right.sum() / batch.weights.any(-1).sum()}


class Checkpoints:
    """The newest states of a run, each with its history and what its numbers mean."""

    def __init__(self, args: argparse.Namespace, plan: mora_jax.Plan) -> None:
        settings = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,  # adapters are small
        )
        directory = args.out.resolve() / "states"
        self.manager = ocp.CheckpointManager(directory, options=settings)
        self.options = {k: v for k, v in vars(args).items() if k not in FREE}
        self.plan = plan

    def save(self, run: Run, history: list[Any]) -> None:
        """Write a state under another name, and rename it when it is whole."""
        notes = {"plan": mora_jax.io.plan_to_json(self.plan), "options": self.options}
        notes["history"] = history
        items = {"run": ocp.args.StandardSave(run), "notes": ocp.args.JsonSave(notes)}
        self.manager.save(int(run.step), args=ocp.args.Composite(**items), force=True)

    def newest(self, like: Run) -> tuple[Run, list[Any]] | None:
        """The newest state, placed as `like`, and its history; or None.

        It must have been made with the same options, and adapters of the same meaning.
        """
        if (step := self.manager.latest_step()) is None:
            return None
        items = ocp.args.Composite(notes=ocp.args.JsonRestore())
        notes = self.manager.restore(step, args=items)["notes"]
        for name, value in self.options.items():
            if (before := notes["options"].get(name)) != value:
                at = f"{before!r} as in {self.manager.directory}"
                raise SystemExit(f"{name} must be {at}, got {value!r}")
        mora_jax.io.plan_from_json(notes["plan"], like=self.plan)
        items = ocp.args.Composite(run=ocp.args.StandardRestore(like))
        return self.manager.restore(step, args=items)["run"], notes["history"]


def fit(
    args: Any, run: Run, history: list[Any], step: Any, evaluation: Any, save: Any
) -> Run:
    """Train to the last step, or until `args.patience` evaluations brought no gain."""
    if not history:
        run, found = evaluation(run)
        history.append({"step": 0, **jax.tree.map(float, found)})
    start, last = int(run.step), args.steps
    bar = tqdm(range(start + 1, last + 1), initial=start, total=last, unit="step")
    for number in bar:
        if run.waited >= args.patience:
            break
        run, loss = step(run, number - 1)
        row = {"loss": float(loss)}
        if number % args.evaluate_every == 0 or number == last:
            run, found = evaluation(run)
            row |= jax.tree.map(float, found)
        bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()})
        history.append({"step": number, **row})
        ends = number == last or run.waited >= args.patience
        if ends or number % args.save_every == 0:
            save(run, history)
    return run


def write_merged(out: Path, model: Any, params: Any, tokenizer: Any) -> Any:
    """The base merged with the adapters in `out`, also as a Llama of Hugging Face."""
    merged = mora_jax.merge(params, mora_jax.load(out / "adapter", params))
    for folder in ("unfinished", "merged"):
        shutil.rmtree(out / folder, ignore_errors=True)
    smollm2.save(out / "unfinished", model, merged, tokenizer)
    (out / "unfinished").rename(out / "merged")
    return merged


def main(argv: Sequence[str] | None = None) -> None:
    """Train, write the best adapters, and merge them."""
    args = arguments(argv)
    everywhere, split = places(args)
    model, params, tokenizer = smollm2.load(args.model and Path(args.model))
    params = jax.device_get(params)  # stay in float32, for the merge

    def in_dtype(params: Any) -> Any:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(args.dtype)), params)
        return {"params": jax.device_put(params, everywhere)}

    variables = in_dtype(params)
    learned, held_out = (
        encode(tokenizer, *zip(*pairs, strict=True)) for pairs in conversations(args)
    )
    held_out = placed(held_out, args.micro_batch, split)

    config = MoRAConfig(rank=args.rank, operator=args.operator, dropout=args.dropout)
    plan = linen.plan(model, variables, config, jnp.zeros((1, 8), jnp.int32))
    plan = sharding.on_mesh(plan, variables["params"], batch_axes="data")
    print(plan, f"devices: {jax.device_count()}", sep="\n", flush=True)

    apply, tx = linen.wrap(model, plan), make_optimizer(args)
    first = jax.jit(lambda: first_run(plan, tx), out_shardings=everywhere)
    compiled = functools.partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    updated = compiled(functools.partial(update, apply=apply, tx=tx, seed=args.seed))
    evaluated = compiled(functools.partial(evaluate, apply=apply, gain=args.gain))

    def step(run: Run, number: int) -> tuple[Run, jax.Array]:
        rows = rows_of(number, args.batch, len(learned.ids), args.seed)
        batch = placed(Batch(*(a[rows] for a in learned)), args.micro_batch, split)
        return updated(run, variables, batch)

    checkpoints = Checkpoints(args, plan)
    run, history = checkpoints.newest(jax.eval_shape(first)) or (first(), [])
    test = functools.partial(evaluated, variables=variables, batch=held_out)
    run = fit(args, run, history, step, test, checkpoints.save)

    metadata = checkpoints.options | {"held_out": float(run.best_loss)}
    mora_jax.save(args.out / "adapter", run.best, metadata=metadata, params=params)
    (args.out / "history.json").write_text(json.dumps(history))
    merged = in_dtype(write_merged(args.out, model, params, tokenizer))
    _, after = test(first(), variables=merged)  # new adapters add nothing to it
    print(
        f"{len(history) - 1} steps; loss of held-out questions: "
        f"{history[0]['held_out']:.3g} before, {run.best_loss:.3g} at best, "
        f"{after['held_out']:.3g} merged, with {after['right']:.0%} of answers right\n"
        f"{args.out}/adapter has the best adapters, {args.out}/merged the whole model"
    )


if __name__ == "__main__":
    main()
