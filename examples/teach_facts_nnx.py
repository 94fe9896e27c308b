"""Teach SmolLM2-135M facts that it does not know, with MoRA, in Flax NNX.

As teach_facts.py, all of which it shares but the model and its adapters; you will see
the same losses. Takes a few minutes on 2 cores:

    python examples/teach_facts_nnx.py --facts 20 --rank 8 --operator rotation
"""

from typing import Any

import smollm2_nnx
import teach_facts
from flax import nnx

import mora_jax.nnx
from mora_jax import MoRAConfig


def load(config: MoRAConfig) -> tuple[teach_facts.Student, smollm2_nnx.Tokenizer]:
    """SmolLM2 in NNX, as pure functions of its state."""
    model, tokenizer = smollm2_nnx.load()
    return student(model, config), tokenizer


def student(model: smollm2_nnx.Llama, config: MoRAConfig) -> teach_facts.Student:
    """`model` with adapters."""
    plan = mora_jax.nnx.plan(model, config)
    graph, state = nnx.split(model)

    def adapted(adapters: Any, state: Any) -> smollm2_nnx.Llama:
        model = mora_jax.nnx.wrap(nnx.merge(graph, state), plan)
        mora_jax.nnx.set_adapters(model, adapters)
        return model

    def base(state: Any, *inputs: Any) -> Any:
        return nnx.merge(graph, state)(*inputs)

    def apply(adapters: Any, state: Any, *inputs: Any) -> Any:
        return adapted(adapters, state)(*inputs)

    def merge(adapters: Any, state: Any) -> Any:
        return nnx.state(mora_jax.nnx.merge_adapters(adapted(adapters, state)))

    return teach_facts.Student(base, apply, merge, state, plan)


if __name__ == "__main__":
    teach_facts.main(load, lora=None, description=str(__doc__).split("\n")[0])
