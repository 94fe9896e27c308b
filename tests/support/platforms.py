"""Computing here what another platform would compute."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from mora_jax._jax.tracing import chosen_platform

_traced_for: Any = jax.make_user_context("")
"""A part of the key of all of JAX's caches."""


@contextlib.contextmanager
def as_if_on(platform: str) -> Iterator[None]:
    """Compute within, on the default platform, as another one would.

    So the tests compute here what a chip would compute. Nothing that was traced before
    is used within, nor afterwards what was traced within.

    Args:
      platform: One of `TUNING`.
    """
    token = chosen_platform.set(platform)
    try:
        with _traced_for(platform):
            yield
    finally:
        chosen_platform.reset(token)
