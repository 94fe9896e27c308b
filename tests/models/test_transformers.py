"""Models that nobody here wrote: transformers' Flax BERT and Llama."""

import chex
import jax
import numpy as np
import pytest
from helpers import close, largest, random_like, trained

from mora_jax import MoRAConfig, fold, init, linen, plan

pytestmark = [
    # transformers announces the end of its Flax models, and uses old names of JAX.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
transformers = pytest.importorskip("transformers")
CONFIG = MoRAConfig(rank=2)


def tiny(model, config):
    """A small random model: (module, variables, arguments)."""
    module = model(config, _do_init=False).module
    ids = np.random.default_rng(0).integers(0, 50, (2, 8), np.int32)
    mask, positions = np.ones_like(ids), np.broadcast_to(np.arange(8), ids.shape)
    args = (ids, mask, positions)
    if model is transformers.FlaxBertModel:
        args = (ids, mask, mask - 1, positions, np.ones((2, 2), np.float32))
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return module, {"params": random_like(shapes["params"])}, args


def check_zero_and_merged(model, variables, args, chosen):
    """Zero M's change nothing, bit for bit; trained ones are the merged model."""
    apply = linen.wrap(model, chosen)

    @jax.jit
    def run(adapters, variables):
        merged = {"params": fold(variables["params"], adapters, chosen)}
        return (
            model.apply(variables, *args),
            apply(adapters, variables, *args),
            model.apply(merged, *args),
        )

    base, adapted, _ = run(init(chosen), variables)
    chex.assert_trees_all_equal(adapted, base)
    base, adapted, merged = run(trained(chosen, 0.02), variables)
    close(adapted, merged, 1e-4)
    assert largest(jax.tree.leaves(adapted)[0] - jax.tree.leaves(base)[0]) > 1e-2


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"vocab_size": 50, "max_position_embeddings": 32, "intermediate_size": 40}


@pytest.mark.parametrize(
    ("name", "model", "more", "kernels"),
    [
        ("Bert", "BertModel", {}, 2 * 6 + 1),  # every Dense, the pooler too
        # All projections, and not the head.
        ("Llama", "LlamaForCausalLM", {"num_key_value_heads": 1}, 2 * 7),
    ],
)
def test_models_of_others(name, model, more, kernels):
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    model, variables, args = tiny(getattr(transformers, f"Flax{model}"), config)
    chosen = linen.plan(model, variables, CONFIG, *args)
    assert len(chosen) == kernels
    assert plan(variables["params"], CONFIG) == chosen
    check_zero_and_merged(model, variables, args, chosen)
