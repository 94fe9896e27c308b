"""Text of a model itself: drawn as the model says, from what it is given."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_files import slow
from flax import nnx
from helpers import close, made_for, random
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, put

import mora_jax
from mora_jax import MoRAConfig, input_damping, linen, own_text

VOCABULARY, WIDTH = 6, 8
CHANCES = np.random.default_rng(0).dirichlet(np.ones(VOCABULARY), VOCABULARY)
CHANCES[1, 2] = 0
CHANCES[1] /= CHANCES[1].sum()
with np.errstate(divide="ignore"):
    TABLE = jax.device_put(np.log(CHANCES).astype(np.float32))
SMALL = {"rows": 4, "length": 6}


def bigrams(ids):
    """A model that sees one token."""
    return TABLE[ids]


class Model(nn.Module):
    """A language model of one layer of attention."""

    causal: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids, train=False):
        x = nn.Embed(VOCABULARY, WIDTH, dtype=self.dtype, name="words")(ids)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        mask = nn.make_causal_mask(ids) if self.causal else None
        heads = nn.MultiHeadDotProductAttention(2, dtype=self.dtype, name="heads")
        x = x + heads(x, mask=mask)
        return nn.Dense(VOCABULARY, dtype=self.dtype, name="head")(x)


class Twin(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs, dropout=0.0):
        self.words = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.heads = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, ids):
        x = self.dropout(self.words(ids))
        x = x + self.heads(x, mask=nnx.make_causal_mask(ids))
        return self.head(x)


VARIABLES = made_for(Model(), np.zeros((1, 2), np.int32))


def model(ids, **settings):
    return Model(**settings).apply(VARIABLES, ids)


def twin(**settings):
    made = nnx.eval_shape(lambda: Twin(nnx.Rngs(0), **settings))
    nnx.update(made, nnx.state(Twin(nnx.Rngs(0), **settings)))
    nnx.update(made, jax.tree.map(jnp.asarray, VARIABLES["params"]))
    return made


def largest_chosen(logits, ids):
    """True for each token after the first that has the largest logit."""
    before = np.asarray(logits[:, :-1], np.float32)
    said = np.take_along_axis(before, np.asarray(ids)[:, 1:, None], -1)[..., 0]
    return said == before.max(-1)


@pytest.mark.parametrize("temperature", [1.0, slow(0.5)])
def test_tokens_are_as_frequent_as_the_model_says(temperature):
    ids = np.asarray(own_text(bigrams, 0, rows=80, length=40, temperature=temperature))
    assert ids.shape == (80, 40) and ids.dtype == np.int32
    assert (ids[:, 0] == 0).all()
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (ids[:, :-1], ids[:, 1:]), 1)
    chances = CHANCES ** (1 / temperature)
    expected = counts.sum(1)[:, None] * chances / chances.sum(1)[:, None]
    assert counts[1, 2] == expected[1, 2] == 0
    expected[1, 2] = 1
    counts[1, 2] = 1
    # Chi-square of 29 degrees of freedom: more once in ten thousand keys.
    assert ((counts - expected) ** 2 / expected).sum() < 66


@pytest.mark.slow
def test_a_small_temperature_takes_the_likeliest():
    """By all tokens before each, in both APIs; the model is traced once."""
    calls = []

    def counted(ids):
        calls.append(ids.shape)
        return 1e10 * model(ids)

    settings = {"rows": 3, "length": 8, "temperature": 1e-30}
    ids = own_text(counted, [[1], [2, 3, 4], [5]], **settings)
    assert calls == [(3, 8)]
    chosen = largest_chosen(model(ids), ids)
    assert chosen[0].all() and chosen[1, 2:].all() and chosen[2].all()
    np.testing.assert_array_equal(ids[1, :3], [2, 3, 4])
    other = own_text(twin(), [[1], [2, 3, 4], [5]], **settings)  # itself, not a lambda
    np.testing.assert_array_equal(other, ids)


@pytest.mark.slow
def test_bfloat16():
    ids = own_text(lambda ids: model(ids, dtype=jnp.bfloat16), 1, temperature=1e-3)
    assert ids.shape == (16, 44)
    assert largest_chosen(model(ids, dtype=jnp.bfloat16), ids).mean() > 0.99


SEVERAL = [[3], [1, 2, 0], [5, 4]]


def test_rows_begin_with_the_beginnings_in_turn():
    ids = np.asarray(own_text(bigrams, SEVERAL, rows=5, length=6))
    for row in range(5):
        start = SEVERAL[row % 3]
        np.testing.assert_array_equal(ids[row, : len(start)], start)
    assert len(np.unique(ids, axis=0)) == 5
    mixed = [np.array([3]), (1, 2, 0), jnp.array([5, 4], "uint8")]
    np.testing.assert_array_equal(own_text(bigrams, mixed, rows=5, length=6), ids)


@pytest.mark.parametrize(
    "same",
    [[2], slow(np.int64(2)), slow(np.array(2)), jnp.array([2]), slow([(2,)])],
)
def test_beginnings_of_one_token(same):
    ids = own_text(bigrams, 2, **SMALL)
    np.testing.assert_array_equal(own_text(bigrams, same, **SMALL), ids)


def test_the_key_decides():
    ids = own_text(bigrams, 2, **SMALL)
    for same in (jax.random.key(0), jax.random.PRNGKey(0)):
        np.testing.assert_array_equal(own_text(bigrams, 2, **SMALL, key=same), ids)
    other = own_text(bigrams, 2, **SMALL, key=jax.random.key(1))
    assert (np.asarray(other) != ids).any()


WEIGHTS = np.zeros((300, 300), np.float32)


@pytest.fixture
def constants():
    """JAX warns of constants of more than a few numbers; here warnings are errors."""
    name = "jax_captured_constants_warn_bytes"
    before = getattr(jax.config, name)
    jax.config.update(name, 10_000)
    yield
    jax.config.update(name, before)


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize(
    "compiled, weights",
    [
        (lambda apply: apply, WEIGHTS),
        (lambda apply: apply, jnp.asarray(WEIGHTS)),
        (jax.jit, jnp.asarray(WEIGHTS)),
        slow(nnx.jit, jnp.asarray(WEIGHTS)),
    ],
)
def test_weights_are_no_constants_of_the_program(compiled, weights):
    apply = compiled(lambda ids: jax.nn.one_hot(ids, 300) @ weights)
    own_text(apply, 1, rows=1, length=2)


@pytest.mark.parametrize("kind", ["Auto", slow("Explicit")])
def test_on_a_mesh_as_off_it(kind):
    table, head = random(0, VOCABULARY, WIDTH), random(1, WIDTH, 2 * VOCABULARY)
    ids = own_text(lambda ids: jnp.cumsum(table[ids], 1) @ head, SEVERAL, **SMALL)
    mesh = make_mesh(kind, batch=2, model=4)
    table = put(table, mesh, P())
    head = put(head, mesh, P(None, "model"))

    def call(ids):
        spread = P("batch", None, None) if kind == "Explicit" else None
        x = table.at[ids].get(out_sharding=spread)
        x = jax.lax.with_sharding_constraint(x, P("batch")) if spread is None else x
        return jnp.cumsum(x, 1) @ head

    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(own_text(call, SEVERAL, **SMALL), ids)


def test_from_a_model_to_damped_adapters():
    variables = made_for(Model(), np.zeros((1, 2), np.int32))
    ids = own_text(model, 0, rows=4, length=12)
    apply = linen.wrap(Model(), MoRAConfig(rank=1), variables, ids)
    run, new = jax.jit(apply), mora_jax.init(apply.plan)
    adapters = input_damping(lambda a: run(a, variables, ids), new, directions=2)
    names = {
        adapter.operator.name
        for adapter in jax.tree.leaves(
            adapters, is_leaf=lambda leaf: isinstance(leaf, mora_jax.Adapter)
        )
    }
    assert names == {"damped"}
    close(apply(adapters, variables, ids), model(ids))


def leaking(ids):
    """Logits of the next token, which see it."""
    return TABLE[ids] + jnp.roll(TABLE[ids], -1, 1)


@pytest.mark.parametrize(
    "apply",
    [
        leaking,
        slow(lambda ids: model(ids, causal=False)),
        lambda ids: model(ids, causal=False, dtype=jnp.bfloat16),
    ],
)
def test_a_model_that_sees_later_tokens_is_refused(apply):
    with pytest.raises(ValueError, match="^apply must be causal"):
        own_text(apply, SEVERAL, rows=3, length=8)


def test_dropout_is_refused():
    def dropped(ids):
        rngs = {"dropout": jax.random.key(0)}
        return Model(dropout=0.5).apply(VARIABLES, ids, train=True, rngs=rngs)

    with pytest.raises(ValueError, match="^apply must .* at position 0; .*dropout off"):
        own_text(dropped, SEVERAL, rows=6, length=8)
    changed = twin(dropout=0.5)
    with pytest.raises(ValueError, match=r"^apply must .*state.* RngCount .*eval\(\)"):
        own_text(changed, 0, **SMALL)
    with pytest.raises(ValueError, match="^apply must .* at position 0; .*dropout off"):
        own_text(lambda ids: nnx.clone(changed)(ids), 0, **SMALL)
    changed.eval()
    own_text(changed, 0, **SMALL)


def test_a_model_through_nnx_jit_is_refused():
    """Flax would change it within the trace."""
    call, changed = nnx.jit(lambda model, ids: model(ids)), twin()
    with pytest.raises(ValueError, match="^apply must .*state.* not through nnx.jit"):
        own_text(lambda ids: call(changed, ids), 0, **SMALL)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "apply, error, got",
    [
        ({}, TypeError, "got dict"),
        (Model(), TypeError, "got Model"),
        (lambda ids: (bigrams(ids), None), TypeError, r"tuple; .*logits alone.*\[0\]"),
        (lambda ids: None, TypeError, "NoneType"),
        (lambda ids: ids, TypeError, "int32"),
        (lambda ids: bigrams(ids)[:, -1], ValueError, r"\(4, 6\)"),
        (lambda ids: bigrams(ids)[:, 1:], ValueError, r"\(4, 5, 6\)"),
        (lambda ids: bigrams(ids)[..., :0], ValueError, r"\(4, 6, 0\)"),
        (lambda ids: jnp.nan * bigrams(ids), ValueError, "NaN .*position 0"),
        (lambda ids: bigrams(ids) - jnp.inf, ValueError, "infinity .*position 0"),
        (lambda ids: bigrams(ids).at[2, 3, 1].set(jnp.inf), ValueError, "position 3"),
    ],
)
def test_bad_models(apply, error, got):
    with pytest.raises(error, match=f"^apply must .*{got}"):
        own_text(apply, 1, **SMALL)


@pytest.mark.parametrize(
    "beginnings, error, got",
    [
        ([], ValueError, "got an empty one"),
        ([[1], []], ValueError, "got an empty one"),
        (np.zeros((0, 3), int), ValueError, "got an empty one"),
        (-1, ValueError, "got the id -1"),
        ([[0], [1, VOCABULARY]], ValueError, "vocabulary of 6 .*got the id 6"),
        (2**70, ValueError, f"vocabulary of 6 .*got the id {2**70}"),
        (1.0, TypeError, "got 1.0"),
        ([0.5], TypeError, "got 0.5"),
        (np.ones(2), TypeError, r"got .*1\.0"),
        (True, TypeError, "got True"),
        (None, TypeError, "got None"),
        ("once", TypeError, "got 'once'; .*tokenizer"),
        (["once"], TypeError, "got 'once'; .*tokenizer"),
        ({"input_ids": [1]}, TypeError, "got {.*; give its 'input_ids'"),
        ([1, [2]], TypeError, "got 1 beside a sequence"),
        (np.ones((1, 1, 1), int), TypeError, "got array"),
    ],
)
def test_bad_beginnings(beginnings, error, got):
    with pytest.raises(error, match=f"^beginnings must .*{got}"):
        own_text(bigrams, beginnings, **SMALL)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "settings, error, told",
    [
        ({"rows": 0}, ValueError, "rows must .* got 0"),
        ({"rows": 2.0}, TypeError, "rows must .* got 2.0"),
        ({"rows": 2}, ValueError, "rows must .* rows=2 and 3 beginnings"),
        ({"length": -1}, ValueError, "length must .* got -1"),
        ({"length": True}, TypeError, "length must .* got True"),
        ({"length": 3}, ValueError, "length must .* length=3 and a beginning of 3"),
        ({"temperature": 0}, ValueError, "temperature must .* got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must .* got -1"),
        ({"temperature": 1e-50}, ValueError, "temperature must .* got 1e-50"),
        ({"temperature": float("nan")}, ValueError, "temperature must .* got nan"),
        ({"temperature": "1"}, TypeError, "temperature must .* got '1'"),
        ({"key": 3}, TypeError, "key must .* got 3"),
        ({"key": jax.random.split(jax.random.key(0))}, TypeError, "key must .* got"),
    ],
)
def test_bad_settings(settings, error, told):
    with pytest.raises(error, match=f"^{told}"):
        own_text(bigrams, SEVERAL, **SMALL | settings)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "name, call",
    [
        ("apply", lambda x: own_text(lambda ids: x * TABLE[ids], 1, **SMALL)),
        ("apply", lambda x: own_text(bigrams, 1, **SMALL)),
        ("beginnings", lambda x: own_text(bigrams, [x.astype(int)], **SMALL)),
        ("key", lambda x: own_text(bigrams, 1, key=jax.random.key(x), **SMALL)),
    ],
)
def test_inside_of_jit_it_is_refused(name, call):
    with pytest.raises(TypeError, match=f"^{name} must .*Tracer; .*outside of jit"):
        jax.jit(call)(jnp.ones((), int))
