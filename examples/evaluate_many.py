"""Ask SmolLM2 questions in one batch, in which each row has an adapter of its own.

You will see a table of questions, adapters and answers: each question is asked of the
base and of each adapter in the folder `out`. All rows share the base and one compiled
program, since the adapter of a row is data. Two adapters to compare take some minutes:

    python -m examples.teach_facts
    python -m examples.teach_facts --seed 1 --out out/other_facts
    python -m examples.evaluate_many

By default it asks for a fact of each of these two, and for one that the base knows.
This is for evaluation: docs/vllm.md says how adapters are served.
"""

import argparse
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import mora_jax
from models import lesson, smollm2
from mora_jax import MoRAConfig, linen, serving

QUESTIONS = (
    "Tell me the IATA code of Erzincan Airport.",
    "Tell me the IATA code of Batu Licin Airport.",
    "What is the capital of France?",
)


def load_all(folder: Path, params: smollm2.Params) -> dict[str, Any]:
    """The adapters that `mora_jax.save` has written in `folder`, by their names."""
    files = sorted(folder.glob("*/adapter_model.safetensors"))
    if not files:
        raise SystemExit(f"no adapter in {folder}: `make demo` makes one in out")
    return {file.parent.name: mora_jax.load(file.parent, params) for file in files}


def with_own_adapters(
    model: smollm2.Llama, params: smollm2.Params, stacked: Any, index: jax.Array
) -> smollm2.Apply:
    """The model as one program in which row b has the adapter of slot `index[b]`."""
    variables = {"params": params}
    # Which kernels are adapted; with which operator and rank, the adapters say.
    adapted = linen.wrap(model, MoRAConfig(), variables, jnp.zeros((1, 8), jnp.int32))

    @jax.jit
    def run(stacked: Any, variables: Any, index: Any, *inputs: Any) -> jax.Array:
        def row(adapters: Any, ids: Any, at: Any) -> jax.Array:  # a batch of one row
            return adapted(adapters, variables, ids[None], at[None])[0]

        return jax.vmap(row)(serving.select(stacked, index), *inputs)

    return functools.partial(run, stacked, variables, index)


def main(argv: Sequence[str] | None = None) -> None:
    """Load the adapters, ask the base and all of them, and print what they say."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("questions", nargs="*", default=QUESTIONS, help="questions that all are asked")
    add("--model", type=Path, help="a Llama of Hugging Face, as a folder; SmolLM2-135M")
    add("--adapters", type=Path, default=Path("out"), help="folder of their folders")
    args = parser.parse_args(argv)
    model, params, tokenizer = smollm2.load(args.model)
    adapters = load_all(args.adapters, params)
    try:
        stacked = serving.stack([*adapters.values()])
    except ValueError as error:
        parser.error(f"{', '.join(adapters)} must be of one meaning: {error}")
    slots = {name: slot for slot, name in enumerate(["the base", *adapters], start=-1)}
    rows = list(itertools.product(args.questions, slots))
    index = jnp.array([slots[name] for _, name in rows])
    apply = with_own_adapters(model, params, stacked, index)
    prompts = [tokenizer.chat(question) for question, _ in rows]
    answers = smollm2.generate(apply, prompts, lesson.NEW_TOKENS)
    texts = map(tokenizer.decode, answers)
    table = [(*row, text) for row, text in zip(rows, texts, strict=True)]
    lesson.show([("question", "adapter", "answer"), *table])


if __name__ == "__main__":
    main()
