"""Tunix's trainer, rollouts and sampler with adapted models, unchanged."""

import re
from importlib.util import find_spec

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_qwen2
from flax import nnx
from jax.sharding import NamedSharding

from mora_jax import MoRAConfig
from mora_jax import nnx as mora

if find_spec("tunix") is None:
    pytest.skip("tunix is not installed", allow_module_level=True)

# Tunix and what it imports use old names of JAX, Flax and of others.
pytestmark = pytest.mark.filterwarnings("ignore")


class Words:
    """A tokenizer of 64 words."""

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def bos_id(self):
        return 1

    def eos_id(self):
        return 63

    def pad_id(self):
        return 0


def trainer_of(model, steps):
    from tunix.sft import peft_trainer  # pyright: ignore

    settings = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=steps)
    trainer = peft_trainer.PeftTrainer(model, optax.adam(1e-2), settings)
    return trainer.with_gen_model_input_fn(tiny_qwen2.model_input)


def batches(steps):
    from tunix.sft import peft_trainer  # pyright: ignore

    mask = np.ones(tiny_qwen2.IDS.shape, bool)
    one = peft_trainer.TrainingInput(input_tokens=tiny_qwen2.IDS, input_mask=mask)
    return [one] * steps


def rollout_of(model):
    from tunix.rl.rollout import base_rollout, vanilla_rollout  # pyright: ignore

    c = model.config
    cache = base_rollout.CacheConfig(
        cache_size=32,
        num_layers=c.num_layers,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
    )
    return vanilla_rollout.VanillaRollout(model, Words(), cache_config_or_size=cache)


def sampled(rollout):
    from tunix.rl.rollout import base_rollout  # pyright: ignore

    config = base_rollout.RolloutConfig(
        max_tokens_to_generate=4, max_prompt_length=8, temperature=0.0
    )
    (text,) = rollout.generate(["5 6 7"], config).text
    return text


def trained(model):
    """With M's that are not zero."""
    keys = jax.random.split(jax.random.key(0), 1000)
    leaves, structure = jax.tree.flatten(mora.adapters(model))
    new = [
        (0.3 * jax.random.normal(key, m.shape)).astype(m.dtype)
        for key, m in zip(keys, leaves, strict=False)
    ]
    mora.set_adapters(model, jax.tree.unflatten(structure, new))
    return model


@pytest.mark.parametrize("operator", ["rotation", "sharing"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_trainer_compiles_its_step_once(operator, dropout, caplog):
    """On a mesh that splits kernels both ways; M stays where it is."""
    mesh = tiny_qwen2.mesh(2, 4)
    config = MoRAConfig(rank=4, operator=operator, dropout=dropout)
    model = mora.wrap(tiny_qwen2.load(mesh), config)
    before = jax.tree.map(lambda m: m.sharding, mora.adapters(model))
    assert all(isinstance(one, NamedSharding) for one in jax.tree.leaves(before))
    zeros = jax.tree.map(np.asarray, mora.adapters(model))
    with mesh, jax.log_compiles():
        trainer_of(model, 3).train(batches(3))
    after = mora.adapters(model)
    assert all(
        m.sharding.is_equivalent_to(sharding, m.ndim)
        for m, sharding in zip(
            jax.tree.leaves(after), jax.tree.leaves(before), strict=True
        )
    )
    assert all(
        np.abs(m - zero).max() > 0
        for m, zero in zip(jax.tree.leaves(after), jax.tree.leaves(zeros), strict=True)
    )
    log = (record.getMessage() for record in caplog.records)
    assert sum(bool(re.match(r"Compiling .*_train_step", line)) for line in log) == 1


def test_a_rollout_on_another_mesh_takes_the_adapters():
    """Of a bfloat16 model: where M's have the dtype of their kernels."""
    from tunix.rl import reshard  # pyright: ignore

    devices = jax.devices()
    actor_mesh = tiny_qwen2.mesh(2, 2, devices=devices[:4])
    rollout_mesh = tiny_qwen2.mesh(1, 4, devices=devices[4:])
    half = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
    base = tiny_qwen2.load(actor_mesh, **half)
    for param_dtype in (jnp.float32, None):
        actor = mora.wrap(base, MoRAConfig(rank=4, param_dtype=param_dtype))
        rollout = rollout_of(reshard.reshard_model_to_mesh(actor, rollout_mesh))
        trained(actor)
        filters = (nnx.LoRAParam,)  # as Tunix's cluster does
        if param_dtype is None:
            rollout.update_params(nnx.state(actor, filters), filters)
        else:
            with pytest.raises(ValueError, match="same shape, dtype and sharding"):
                rollout.update_params(nnx.state(actor, filters), filters)
    there = rollout.model()
    chex.assert_trees_all_equal(
        *(jax.tree.map(np.asarray, mora.adapters(model)) for model in (actor, there))
    )
    with rollout_mesh:
        assert sampled(rollout)


def test_models_with_dropout_share_their_backbone_and_sample():
    from tunix.generate import sampler  # pyright: ignore
    from tunix.rl import utils  # pyright: ignore

    mesh = tiny_qwen2.mesh(1, 1, devices=jax.devices()[:1])
    base = tiny_qwen2.load(mesh)
    config = MoRAConfig(rank=4, dropout=0.5)
    actor = trained(mora.wrap(base, config))
    assert utils.is_sharing_backbone(actor, base)
    assert utils.is_sharing_backbone(actor, mora.wrap(base, config, seed=1))
    # All of a state, as Tunix assigns it.
    actor.eval()
    rollout = rollout_of(actor)
    assert (text := sampled(rollout))
    other = trained(mora.wrap(tiny_qwen2.load(mesh), config))
    other.eval()
    sampling: sampler.Sampler = rollout._sampler
    sampling.transformer_state = nnx.variables(other)
    assert sampled(rollout) == text
    filters = (nnx.LoRAParam,)
    zero = mora.wrap(base, config)
    rollout.update_params(nnx.state(zero, filters), filters)
    zero.eval()
    plain = tiny_qwen2.logits(base, tiny_qwen2.IDS)
    np.testing.assert_allclose(
        tiny_qwen2.logits(rollout.model(), tiny_qwen2.IDS), plain, atol=1e-5
    )
    assert sampled(rollout) == sampled(rollout_of(base))


def test_training_drops_and_evaluation_does_not():
    base = tiny_qwen2.load()
    adapted = trained(mora.wrap(base, MoRAConfig(rank=4, dropout=0.5)))
    merged = tiny_qwen2.logits(mora.merge_adapters(adapted), tiny_qwen2.IDS)
    adapted.train()
    assert np.abs(tiny_qwen2.logits(adapted, tiny_qwen2.IDS) - merged).max() > 0.05
    adapted.eval()
    np.testing.assert_allclose(
        tiny_qwen2.logits(adapted, tiny_qwen2.IDS), merged, atol=1e-4
    )
