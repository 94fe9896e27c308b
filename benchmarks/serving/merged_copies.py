"""The same service with a merged copy of the base for each adapter.

`benchmarks.serving.service` compares with it. Copies cannot share a step, so each row
takes one of its own, with the kernels of its copy. It takes the options of
`examples.serve_many`; `--slots` copies must fit into memory.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mora_jax
from examples import serve_many
from examples.serving.engine import Engine
from models import decoding, smollm2


def unadapted(model: smollm2.Llama) -> Any:
    """The model alone, in the form that `decoding.Programs` takes."""
    return lambda _, *args, **kwargs: model.apply(*args, **kwargs)


class Copies(decoding.Programs):
    """Programs for which `stacked` is {slot: the params of a copy}."""

    def __init__(self, model: smollm2.Llama) -> None:
        super().__init__(unadapted(model), None)

        def one(params: Any, cache: Any, row: Any, rows: decoding.Rows) -> Any:
            own = decoding.Rows(*(jnp.asarray(x)[row][None] for x in rows))
            part = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), cache
            )
            logits, updated = model.apply(
                {"params": params, "cache": part},
                own.tokens[:, None],
                positions=own.positions[:, None],
                mutable=["cache"],
            )
            cache = jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, 0),
                cache,
                updated["cache"],
            )
            return decoding.sample(logits[:, 0], own), cache

        self._one = jax.jit(one, donate_argnums=1)

    def step(self, stacked: Any, params: Any, cache: Any, rows: Any) -> Any:
        """The next token of each row that is in use."""
        tokens = np.full(len(rows.tokens), smollm2.EOS, np.int32)
        used = rows.positions < jax.tree.leaves(cache)[0].shape[1]
        used[0] |= not used.any()  # so that it is compiled before it is needed
        for row in np.flatnonzero(used):
            own = stacked.get(int(rows.adapters[row]), params)
            found, cache = self._one(own, cache, np.int32(row), rows)
            tokens[row] = found[0]
        return tokens, cache

    def fill(
        self, stacked: Any, params: Any, cache: Any, row: Any, ids: Any, one: Any
    ) -> Any:
        """Read a prompt with the kernels of its copy."""
        own = stacked.get(int(one.adapters[0]), params)
        return super().fill(None, own, cache, row, ids, one)


def make_engine(
    args: argparse.Namespace,
    model: smollm2.Llama,
    params: Any,
    plan: mora_jax.Plan,
) -> Engine:
    """An engine of copies."""

    def put(copies: Any, slot: int, adapters: Any) -> Any:
        return copies | {slot: mora_jax.merge(params, adapters)}

    return Engine(
        programs=Copies(model),
        config=model.config,
        params=params,
        stacked={},
        put=put,
        rows=args.rows,
        size=args.context,
        queue=args.queue,
    )


if __name__ == "__main__":
    serve_many.main(make_engine=make_engine)
