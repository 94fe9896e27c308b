"""Models that nobody here wrote: transformers' Flax BERT, GPT-2 and Llama."""

import chex
import jax
import numpy as np
import pytest
from helpers import close, largest, random_like, trained

from mora_jax import MoRAConfig, fold, init, linen, plan, register_layer

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


def test_bert():
    config = transformers.BertConfig(**SIZES)
    model, variables, args = tiny(transformers.FlaxBertModel, config)
    chosen = linen.plan(model, variables, CONFIG, *args)
    assert len(chosen) == 2 * 6 + 1  # every Dense, the pooler too
    assert plan(variables["params"], CONFIG) == chosen
    check_zero_and_merged(model, variables, args, chosen)


def test_llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1)
    model, variables, args = tiny(transformers.FlaxLlamaForCausalLM, config)
    chosen = linen.plan(model, variables, CONFIG, *args)
    assert len(chosen) == 2 * 7  # all projections, and not the head
    check_zero_and_merged(model, variables, args, chosen)


@pytest.mark.slow
def test_gpt2():
    """Its Conv1D is no nn.Dense, and its kernel is (out, in)."""
    from transformers.models.gpt2.modeling_flax_gpt2 import FlaxConv1D

    sizes = {"n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(vocab_size=50, **sizes)
    model, variables, args = tiny(transformers.FlaxGPT2LMHeadModel, config)
    chosen = plan(variables["params"], CONFIG)
    with pytest.raises(TypeError, match=r"FlaxConv1D.* see mora_jax.register_layer"):
        linen.wrap(model, chosen)(init(chosen), variables, *args)

    register_layer(FlaxConv1D, equation="...i,oi->...o")
    # A plan of names and shapes takes the kernels for (in, out): exact all the same.
    check_zero_and_merged(model, variables, args, chosen)

    chosen = linen.plan(model, variables, CONFIG, *args)
    assert len(chosen) == 2 * 4 and {spec.axes for spec in chosen.specs} == {"oi"}
    spec = chosen["transformer/h/0/attn/c_attn/kernel"]
    assert (spec.in_features, spec.out_features) == (24, 72)
    check_zero_and_merged(model, variables, args, chosen)
