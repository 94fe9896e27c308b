"""The program to copy: a run that is killed goes on bit for bit, and ends well."""

import contextlib
import functools
import json
import re
import shutil
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, random_like, trained
from processes import ROOT, environment
from tokenizers import pre_tokenizers

import mora_jax
from examples import train
from models import lesson, smollm2
from mora_jax import MoRAConfig, linen

pytest.importorskip("airportsdata")

STEPS, EVERY, SECONDS = 12, 3, 240
# With dropout, several micro-batches and the last one of the held-out questions not
# full, so that all parts of a run matter.
SETTINGS = f"--steps {STEPS} --save-every {EVERY} --evaluate-every 4 --facts 5 --rank 2"
SETTINGS += " --batch 16 --dropout 0.1 --learning-rate 1e-2 --gain 1e-4"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama in a folder, so small that a step takes milliseconds."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    sizes = {"layers": 1, "width": 24, "hidden": 32, "heads": 3, "kv_heads": 1}
    model = smollm2.Llama(smollm2.Config(vocab=len(tokens), **sizes))
    ids = jnp.zeros((1, 8), jnp.int32)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), ids))["params"]
    folder = tmp_path_factory.mktemp("base") / "llama"
    smollm2.save(folder, model, params, smollm2.Tokenizer(tokens, special, []))
    return folder


def options(base, out, more=""):
    return [*f"{SETTINGS} {more}".split(), "--model", f"{base}", "--out", f"{out}"]


@contextlib.contextmanager
def running(base, out, devices):
    """The program as a process, which is killed if it still runs then."""
    command = [sys.executable, "-m", "examples.train", *options(base, out)]
    env = environment(
        JAX_COMPILATION_CACHE_DIR=jax.config.jax_compilation_cache_dir,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )
    command += ["--host-devices", f"{devices}"]
    with out.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def printed(out):
    return out.with_suffix(".log").read_text()


def run_to_its_end(base, out, devices):
    with running(base, out, devices) as process:
        assert process.wait(SECONDS) == 0, printed(out)


def saved(out):
    """The steps of all checkpoints that are whole."""
    names = [state.name for state in (out / "states").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def history(out):
    return json.loads((out / "history.json").read_text())


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A function from a number of devices to a run that nothing broke."""

    @functools.cache
    def run(devices):
        out = tmp_path_factory.mktemp(f"whole{devices}") / "run"
        run_to_its_end(base, out, devices)
        return out

    return run


@pytest.mark.slow  # as a whole, so that CI runs both
@pytest.mark.parametrize("devices", [1, 8])
def test_killed_in_the_middle_the_rest_is_the_same_bit_for_bit(
    base, whole, tmp_path, devices
):
    expected, out = whole(devices), tmp_path / "run"
    with running(base, out, devices) as process:
        end = time.monotonic() + SECONDS
        while not saved(out):
            assert process.poll() is None and time.monotonic() < end, printed(out)
            time.sleep(0.005)
        process.kill()  # SIGKILL
    start = saved(out)[-1]
    assert 0 < start < STEPS and not (out / "adapter").exists()
    run_to_its_end(base, out, devices)
    assert f" {start}/{STEPS}" in printed(out)
    assert not re.search(rf" {start - 1}/{STEPS}", printed(out))
    assert history(out) == history(expected)
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (out / file).read_bytes() == (expected / file).read_bytes()


@pytest.mark.slow
def test_a_run_learns_and_its_steps_are_listed(whole):
    rows = history(whole(1))
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    evaluated = [row["step"] for row in rows if "held_out" in row]
    assert evaluated == [0, 4, 8, 12] and saved(whole(1)) == [9, 12]
    losses = [row["held_out"] for row in rows if "held_out" in row]
    assert min(losses) < losses[0] - 0.3 and rows[-1]["loss"] < rows[1]["loss"] - 0.3
    metadata = mora_jax.io.read_metadata(whole(1) / "adapter")
    assert metadata["held_out"] == min(losses) and metadata["rank"] == 2


@pytest.mark.slow
def test_eight_devices_go_on_where_one_was(base, whole, tmp_path):
    """The losses agree as far as bfloat16 lets them."""
    first, out = whole(1), tmp_path / "run"
    shutil.copytree(first / "states/9", out / "states/9")
    train.main(options(base, out))
    got, expected = history(out), history(first)
    assert jax.device_count() == 8 and got[:10] == expected[:10]
    assert len(got) == len(expected)
    for now, before in zip(got[10:], expected[10:], strict=True):
        assert now == pytest.approx(before, rel=0.02)


@pytest.mark.slow
def test_the_merged_checkpoint_says_what_the_adapted_model_says(base, whole):
    model, params, tokenizer = smollm2.load(base)
    adapters = mora_jax.load(whole(8) / "adapter", params)
    again, merged, _ = smollm2.load(whole(8) / "merged")
    assert again.config == model.config
    ids = np.array([tokenizer.chat("Which IATA code does Erzincan Airport have?")])
    variables, config = {"params": params}, MoRAConfig(rank=2, dropout=0.1)
    apply = linen.wrap(model, linen.plan(model, variables, config, ids))
    adapted = apply(adapters, variables, ids, adapter_deterministic=True)
    close(model.apply({"params": merged}, ids), adapted)
    assert np.abs(model.apply(variables, ids) - adapted).max() > 0.1


@pytest.mark.slow
def test_it_stops_when_the_loss_falls_no_more(base, tmp_path, capsys):
    """And keeps the best adapters, here the untrained ones; again it trains no more."""
    out, more = tmp_path / "run", "--gain 99 --evaluate-every 2 --patience 2"
    for _ in range(2):
        train.main(options(base, out, more))
        rows = history(out)
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and saved(out)[-1] == 4
        best = mora_jax.load(out / "adapter")
        assert not any(np.any(m) for m in jax.tree.leaves(best))
        before = f"{rows[0]['held_out']:.3g}"
        told = f"4 steps; loss of held-out questions: {before} before, {before} at best"
        assert told in capsys.readouterr().out
    with pytest.raises(SystemExit, match="rank must be 2 as in .*states, got 4"):
        train.main(options(base, out, f"{more} --rank 4"))


@pytest.fixture(scope="module")
def parts(base):
    """A model with adapters, and the conversations that it learns."""
    model, params, tokenizer = smollm2.load(base)
    args = train.arguments(["--facts", "5"])
    learned, _ = train.conversations(args)
    batch = lesson.encode(tokenizer, *zip(*learned[:8], strict=True))
    plan = linen.plan(model, {"params": params}, MoRAConfig(rank=2), batch.ids)
    tx = optax.sgd(0.1)
    run = train.first_run(plan, tx)._replace(adapters=trained(plan))
    return linen.wrap(model, plan), {"params": params}, batch, run, tx


def split(batch, size):
    """As one device has it."""
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    place = jax.sharding.NamedSharding(mesh, jax.P())
    return train.placed(batch, size, place)


@pytest.mark.slow
def test_micro_batches_add_up_to_their_batch(parts):
    """Also where their answers are of different lengths."""
    apply, variables, batch, run, tx = parts
    batch = batch._replace(
        weights=np.where(np.arange(8)[:, None] < 2, 1, batch.weights)
    )
    update = jax.jit(functools.partial(train.update, apply=apply, tx=tx, seed=0))
    whole, loss = update(run, variables, split(batch, 8))
    for size in (2, 4):
        again, same = update(run, variables, split(batch, size))
        close((again.adapters, same), (whole.adapters, loss))
    chex.assert_trees_all_equal(whole.best, run.best)
    moved = jax.tree.map(
        lambda a, b: jnp.abs(a - b).max(), whole.adapters, run.adapters
    )
    assert max(jax.tree.leaves(moved)) > 1e-3 and whole.step == 1


@pytest.mark.slow
def test_rows_that_fill_a_micro_batch_do_not_count(parts):
    apply, variables, batch, run, _ = parts
    evaluate = jax.jit(functools.partial(train.evaluate, apply=apply, gain=0.0))
    logits = apply(run.adapters, variables, batch.ids, batch.at)
    targets = np.where(np.arange(8)[:, None] < 3, logits.argmax(-1), batch.targets)
    batch = batch._replace(targets=targets)  # three answers are right
    expected = train.loss_of(logits, batch) / batch.weights.sum()
    for size in (8, 5, 3):
        kept, found = evaluate(run, variables, split(batch, size))
        close(found["held_out"], expected)
        assert found["right"] == 3 / 8 and kept.waited == 0
        chex.assert_trees_all_equal(kept.best, run.adapters)
    worse = run._replace(best_loss=expected - 0.1)
    kept, _ = evaluate(worse, variables, split(batch, 8))
    chex.assert_trees_all_equal(kept.best, run.best)
    assert kept.waited == 1 and kept.best_loss == worse.best_loss


def test_each_epoch_has_every_row_in_an_order_of_its_own():
    rows = [train.rows_of(step, 4, 10, seed=0) for step in range(5)]
    first, second = np.split(np.concatenate(rows), 2)
    assert sorted(first) == sorted(second) == list(range(10))
    assert (first != second).any()
    np.testing.assert_array_equal(train.rows_of(3, 4, 10, seed=0), rows[3])
    assert (train.rows_of(3, 4, 10, seed=1) != rows[3]).any()


def test_held_out_questions_are_not_taught():
    args = train.arguments(["--facts", "3"])
    learned, held_out = train.conversations(args)
    questions = [{question for question, _ in pairs} for pairs in (learned, held_out)]
    assert len(learned) == 6 and len(held_out) == 3
    assert not questions[0] & questions[1]
    assert {answer for _, answer in learned} == {answer for _, answer in held_out}
    assert not [q for q in questions[0] | questions[1] if "{" in q or q.endswith("..")]


def test_rate_warms_up_and_decays():
    args = train.arguments(["--steps", "20", "--warmup", "4", "--learning-rate", "1"])
    tx, one = train.make_optimizer(args), jnp.ones(1)
    state, moves = tx.init(one), []
    for _ in range(20):
        move, state = tx.update(one, state)
        moves.append(-np.asarray(move)[0])
    np.testing.assert_allclose(moves[:5], [0.2, 0.4, 0.6, 0.8, 1.0], 1e-4)
    assert moves[4:] == sorted(moves[4:], reverse=True) and 0.1 < moves[-1] < 0.12


def test_bad_options(capsys):
    with pytest.raises(SystemExit):
        train.arguments(["--batch", "12"])
    assert "--batch must be a multiple of 8, --micro-batch" in capsys.readouterr().err
    args = train.arguments(["--batch", "12", "--micro-batch", "6"])
    with pytest.raises(SystemExit, match="multiple of 8, the devices"):
        train.places(args)


def test_the_page_quotes_the_program():
    page = (ROOT / "docs/training-script.md").read_text()
    quoted = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    program = (ROOT / "examples/train.py").read_text()
    assert len(quoted) > 3 and not [part for part in quoted if part not in program]
