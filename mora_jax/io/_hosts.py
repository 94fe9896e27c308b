"""Steps that all processes of a program take together, or none of them."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator

import jax

LIMIT = 300
"""The seconds that a process waits for the others."""

_numbers = itertools.count()


@contextlib.contextmanager
def together(call: str, shared: bool = True) -> Iterator[list[object]]:
    """A step of `call`, which raises on all processes if it raises on one.

    It yields a list for what must be alike on all of them before they go on.

    Raises:
      RuntimeError: Another process failed or has other arguments, or one is missing.
    """
    alike: list[object] = []
    if not shared or jax.process_count() == 1:
        yield alike
        return
    step = next(_numbers)
    try:
        yield alike
    except Exception as error:
        _exchange(call, step, f"{type(error).__name__}: {error}")
        raise
    own = hashlib.sha256(repr(alike).encode()).hexdigest()
    for number, said in enumerate(_exchange(call, step, own)):
        if said != own:
            got = said if ":" in said else "other arguments than here"
            raise RuntimeError(f"{call} failed on process {number}, so on all: {got}")


def _exchange(call: str, step: int, said: str) -> list[str]:
    """What all processes said in a step."""
    # Private to JAX, and used by Orbax as well: what is public runs on the devices. It
    # carries numbers instead of errors, and waits for a process that died for ever.
    from jax._src.distributed import global_state

    if (client := global_state.client) is None:
        raise RuntimeError(f"{call} needs jax.distributed.initialize on each process")
    own = jax.process_index()
    client.key_value_set(f"mora_jax/{step}/{own:06}", said)
    try:
        client.wait_at_barrier(f"mora_jax/{step}", LIMIT * 1000)
    except Exception as error:
        rule = f"{call} must be called on all processes together"
        got = f"one ended, or did not call it within {LIMIT} s"
        raise RuntimeError(f"{rule}, {got}: {error}") from None
    # All processes have read what was said in the step before.
    client.key_value_delete(f"mora_jax/{step - 1}/{own:06}")
    return [text for _, text in sorted(client.key_value_dir_get(f"mora_jax/{step}/"))]
