"""Rows of text that a Llama continues, each from its own place in a cache.

The cache has a fixed number of rows of a fixed size, so two kinds of programs are
enough: `fill` reads a prompt into one row, and `step` gives every row its next token.
A row that is free goes through the step like the others; what it says is not used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.smollm2 import Config

Cache = dict[str, Any]
Select = Callable[[Any, jax.Array], Any]


class Rows(NamedTuple):
    """Values that each row needs for its next token; all are (rows,).

    Attributes:
        tokens: The token before.
        positions: The place of that token in its text; the size of the cache for a
            row that is free.
        adapters: The index of the row's adapter; -1 for none.
        temperatures: 0 takes the likeliest token.
        seeds: The seed of the row's random numbers.
    """

    tokens: Any
    positions: Any
    adapters: Any
    temperatures: Any
    seeds: Any


def new_cache(config: Config, rows: int, size: int) -> Cache:
    """An empty cache for `rows` texts of up to `size` tokens each."""
    shape = rows, size, config.kv_heads, config.head_width

    def layer() -> Cache:
        return {"self_attn": {name: jnp.zeros(shape) for name in ("keys", "values")}}

    return {f"layers_{i}": layer() for i in range(config.layers)}


def sample(logits: jax.Array, rows: Rows) -> jax.Array:
    """The next token of each row; `logits`: (rows, vocab).

    The random numbers of a row depend on its seed and its position alone, and not on
    the rows beside it.
    """

    def draw(row_logits: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, row_logits)

    def random() -> jax.Array:
        warmth = jnp.where(rows.temperatures > 0, rows.temperatures, 1)[:, None]
        drawn = jax.vmap(draw)(logits / warmth, rows.seeds, rows.positions)
        return jnp.where(rows.temperatures > 0, drawn, logits.argmax(-1))

    warm = jnp.any(rows.temperatures > 0)
    tokens = jax.lax.cond(warm, random, lambda: logits.argmax(-1))
    return tokens.astype(jnp.int32)


class Programs:
    """The compiled programs of a model whose rows have different adapters.

    Args:
        apply: (adapters, variables, ids, at, positions=..., mutable=["cache"]) ->
            (logits, updated): a Llama with adapters, as `linen.wrap` makes it.
        select: (adapters, indices (rows,)) -> the adapters of these rows, with a
            leading axis; None where all rows have the adapters that are given.

    Attributes:
        compiled: The number of programs that have been compiled.
    """

    def __init__(self, apply: Callable[..., Any], select: Select | None) -> None:
        self.compiled = 0

        def run(
            adapters: Any, params: Any, cache: Cache, ids: Any, at: Any, positions: Any
        ) -> tuple[jax.Array, Cache]:
            variables = {"params": params, "cache": cache}
            logits, updated = apply(
                adapters, variables, ids, at, positions=positions, mutable=["cache"]
            )
            return logits[:, 0], updated["cache"]

        def run_rows(
            stacked: Any, params: Any, cache: Cache, rows: Rows, *inputs: Any
        ) -> tuple[jax.Array, Cache]:
            self.compiled += 1  # this line runs when a program is traced
            if select is None:
                return run(stacked, params, cache, *inputs)

            def row(adapters: Any, *arrays: Any) -> Any:  # as a batch of one
                batch = jax.tree.map(lambda x: x[None], arrays)
                cache, *inputs = batch
                return jax.tree.map(
                    lambda y: y[0], run(adapters, params, cache, *inputs)
                )

            return jax.vmap(row)(select(stacked, rows.adapters), cache, *inputs)

        def step(
            stacked: Any, params: Any, cache: Cache, rows: Rows
        ) -> tuple[jax.Array, Cache]:
            ids, at = rows.tokens[:, None], jnp.zeros_like(rows.tokens)[:, None]
            positions = rows.positions[:, None]
            logits, cache = run_rows(stacked, params, cache, rows, ids, at, positions)
            return sample(logits, rows), cache

        def fill(
            stacked: Any, params: Any, cache: Cache, row: Any, ids: Any, one: Rows
        ) -> tuple[jax.Array, Cache]:
            part = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), cache
            )
            where = jnp.arange(ids.shape[1])[None]
            size = jax.tree.leaves(cache)[0].shape[1]
            positions = jnp.where(where <= one.positions[:, None], where, size)
            at = one.positions[:, None]
            logits, part = run_rows(stacked, params, part, one, ids, at, positions)
            cache = jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, 0),
                cache,
                part,
            )
            return sample(logits, one), cache

        self._step = jax.jit(step, donate_argnames="cache")
        self._fill = jax.jit(fill, donate_argnames="cache")

    def step(
        self, stacked: Any, params: Any, cache: Cache, rows: Rows
    ) -> tuple[jax.Array, Cache]:
        """The next token of each row, (rows,), and the new cache; the old is gone."""
        return self._step(stacked, params, cache, rows)

    def fill(
        self, stacked: Any, params: Any, cache: Cache, row: Any, ids: Any, one: Rows
    ) -> tuple[jax.Array, Cache]:
        """Read a prompt into a row of the cache, and give its first new token.

        Args:
            stacked: All adapters.
            params: The base.
            cache: The cache, which is donated.
            row: The number of the row.
            ids: The prompt, (1, length), padded on the right; one program is compiled
                for each length.
            one: The row alone: each (1,), `positions` the place of the prompt's
                last token.

        Returns:
            The token, (1,), and the new cache.
        """
        return self._fill(stacked, params, cache, row, ids, one)
